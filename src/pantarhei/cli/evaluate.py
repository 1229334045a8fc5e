"""`pantarhei evaluate RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from pantarhei.data import Source
from pantarhei.files import write_json
from pantarhei.interop import load
from pantarhei.recipes.evaluation import evaluate_flow, make_reference
from pantarhei.recipes.rectified_flow import config_of
from pantarhei.training import Run


def evaluate(
    run: tyro.conf.Positional[Path],
    steps: tuple[int, ...] = (1, 2, 4, 8, 50),
    count: int = 2000,
    seed: int = 0,
    method: Literal["euler", "midpoint", "heun", "rk4"] = "euler",
    guidance: float = 1.0,
    inception: Path | None = None,
    batch: int = 256,
    out: Path | None = None,
) -> int:
    """Print a table of quality against steps and write `evaluation.json`.

    Args:
        run: a run folder.
        steps: numbers of sampling steps, such as 1 2 4 8 50.
        count: samples for each.
        seed: of noise and labels.
        method: of the sampler.
        guidance: classifier-free guidance scale.
        inception: file of Inception weights; without it features come from a small classifier trained on the data.
        batch: samples at a time.
        out: where to write; RUN/evaluation.json by default.
    """
    if count < 10:
        raise ValueError(f"--count: at least 10 samples are needed, got {count}")
    if not steps or min(steps) < 1:
        raise ValueError(f"--steps: every number must be at least 1, got {list(steps)}")
    flow = load(run)
    train_set, held_out = data_of(run)
    reference = make_reference(train_set, held_out, inception=inception, cache=run / "classifier.safetensors")
    result = evaluate_flow(
        flow,
        reference,
        steps=steps,
        count=count,
        seed=seed,
        method=method,
        guidance=guidance,
        conditions=held_out if flow.conditions and flow.conditions != ("label",) else None,
        batch=batch,
        progress=True,
    )
    path = write_json(out or run / "evaluation.json", {"run": str(run), **result.data()})
    print(result.table().text())
    print(path)
    return 0


def data_of(run: Path) -> tuple[Source, Source]:
    """Training and held-out data of a run (of its teacher's recipe, for a straightened one).

    Raises:
        ValueError: the run does not say what it was trained on.
    """
    config = Run.open(run).config
    if not config.get("recipe"):
        raise ValueError(f"{run} does not name data that can be opened again; evaluate it from Python")
    return config_of(config).data.open()
