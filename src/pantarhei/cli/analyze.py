"""`pantarhei analyze RUN`."""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from pantarhei.cli.opening import Device, data_of, find_device, recipe_of
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow
from pantarhei.flow.numbered import numbered_source
from pantarhei.flow.sources import Samples
from pantarhei.interop import load
from pantarhei.recipes.analysis import Coupled, analyse, write_analysis
from pantarhei.straighten import open_pairs
from pantarhei.training import Run
from pantarhei.training.runs import CONFIG


def analyze(
    run: tyro.conf.Positional[Path],
    out: Path | None = None,
    count: int = 512,
    steps: int = 100,
    seed: int = 0,
    device: Device = "auto",
) -> int:
    """Write `analysis.html`, `analysis.json` and `trajectories.png`.

    Measured are straightness, four convex transport costs, the balance E|X1-X0|^2 = E|Z1-Z0|^2 + S + V of this flow and of
    the teachers before it (as far as their folders are there), and whether its marginals are those of its coupling.

    Args:
        run: a run folder of a flow on the linear path.
        out: folder; RUN/analysis by default.
        count: pairs to look at.
        steps: Heun steps of every solve.
        seed: of the draws.
        device: where to run.
    """
    if count < 32:
        raise ValueError(f"--count: at least 32 pairs are needed, got {count}")
    if steps < 50:
        raise ValueError(f"--steps: at least 50 are needed, got {steps}")
    chain = [run]
    while (teacher := _teacher(chain[0])) is not None:
        if not (teacher / CONFIG).is_file():
            print(f"the teacher of {chain[0]}, {teacher}, is not there: earlier rounds are left out")
            break
        chain.insert(0, teacher)
    rounds = [_coupled(folder, count, seed, device) for folder in chain]
    result = analyse(rounds, steps=steps, seed=seed)
    page = write_analysis(result, rounds[-1], out or run / "analysis")
    for table in (result.rounds_table(), result.costs_table(), result.marginals_table()):
        print(table.text())
        print()
    print(page)
    return 0


def _teacher(run: Path) -> Path | None:
    """The run that made the pairs of this one; None for a first flow."""
    config = Run.open(run).config if (run / CONFIG).is_file() else {}
    if config.get("kind") != "reflow" or not config.get("teacher"):
        return None
    told = Path(config["teacher"])
    # As it was told, or beside the run where this was moved or is looked at from elsewhere.
    places = (told, run.parent / told.name, run.parent.parent / told.name)
    return next((p for p in places if (p / CONFIG).is_file() and p.resolve() != run.resolve()), told)


def _coupled(run: Path, count: int, seed: int, device: Device) -> Coupled:
    """The flow with draws of the coupling that it was trained on: its stored pairs, or independent ones."""
    flow = load(run).to(find_device(device)).eval()
    flow.require_field()
    folder = _pairs(run)
    if folder is not None:
        pairs = open_pairs(folder, gaussian=bool(getattr(flow.source, "gaussian", False))).tensors(count)
        x0, x1 = pairs["x0"], pairs["x1"]
        conditions = {name: pairs[name] for name in flow.conditions}
    else:
        if flow.provenance.rectified:
            raise ValueError(
                f"{run}: the pairs it was trained on are not there (made online, or moved from {run / 'pairs'})"
            )
        data = data_of(run)[0]
        batch = data.fetch(torch.randperm(len(data), generator=seeded(seed, 52))[:count])
        conditions = {name: batch[name] for name in flow.conditions}
        x1, x0 = batch["x1"], _source(run, flow, seed, len(batch["x1"]))
    return Coupled(run.name, flow, x0.to(flow.device, flow.dtype), x1.to(flow.device, flow.dtype), conditions)


def _pairs(run: Path) -> Path | None:
    """Where the pairs of a run are."""
    told = Run.open(run).config.get("pairs") if (run / CONFIG).is_file() else None
    return next((p for p in (run / "pairs", *([Path(told)] if told else [])) if p.is_dir()), None)


def _source(run: Path, flow: Flow, seed: int, count: int) -> torch.Tensor:
    recipe = recipe_of(run)
    start = recipe.open_source() if recipe is not None else None
    if start is not None:
        flow.source = Samples(start[0])
    return numbered_source(flow, seed, range(count))
