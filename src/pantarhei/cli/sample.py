"""`pantarhei sample RUN`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from pantarhei.cli.evaluate import data_of
from pantarhei.data import Source
from pantarhei.files import write_tensors
from pantarhei.flow import Flow
from pantarhei.flow.numbered import Conditions, join, numbered_samples
from pantarhei.interop import load
from pantarhei.report import save_image_grid
from pantarhei.report.figures import scatter_2d

Method = Literal["euler", "midpoint", "heun", "rk4", "bosh3", "dopri5", "tsit5"]


def sample(
    run: tyro.conf.Positional[Path],
    out: Path,
    count: int = 64,
    steps: int = 50,
    method: Method = "euler",
    label: int | None = None,
    guidance: float = 1.0,
    shift: float = 1.0,
    seed: int = 0,
    batch: int = 256,
    checkpoint: str = "newest",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Write `samples.png` (a grid) and `samples.safetensors` (`x` float32, and `label` where there is one).

    Args:
        run: a run folder or a saved flow.
        out: folder to write into.
        count: number of samples.
        steps: sampling steps.
        method: of the sampler; each step of heun and midpoint costs two evaluations, of rk4 four.
        label: class of all samples; drawn evenly where it is left out.
        guidance: classifier-free guidance scale; 1 is none.
        shift: resolution shift of the time grid; above 1 spends more steps near the noise.
        seed: sample i depends on (seed, i) only.
        batch: samples at a time.
        checkpoint: newest, best or an iteration.
        device: where to run.
    """
    if count < 1 or batch < 1:
        raise ValueError(f"--count, --batch: must be at least 1, got {count} and {batch}")
    if steps < 1:
        raise ValueError(f"--steps: must be at least 1, got {steps}")
    flow = load(run, checkpoint=_checkpoint(checkpoint))
    flow.to(_device(device))
    conditions: Conditions | Source | None = None if label is None else _fixed_label(flow, label)
    if conditions is None and flow.conditions and flow.conditions != ("label",):
        conditions = data_of(run)[1]
    began = time.monotonic()
    options = {"steps": steps, "method": method, "guidance": guidance, "shift": shift}
    found = join(numbered_samples(flow, range(count), seed=seed, conditions=conditions, batch=batch, **options))
    seconds = time.monotonic() - began
    x = found["x1"]
    tensors = {"x": x, **{k: v for k, v in found.items() if k not in ("x0", "x1")}}
    metadata = {"run": str(run), "seed": str(seed), "steps": str(steps), "method": method, "guidance": str(guidance)}
    write_tensors(out / "samples.safetensors", tensors, metadata)
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        save_image_grid(x[:256], out / "samples.png")
    elif x.ndim == 2 and x.shape[1] == 2:
        scatter_2d({f"{count} samples, {steps} steps": x}).savefig(out / "samples.png", dpi=120)
    print(f"{count} samples in {seconds:.2f} s ({count / seconds:.0f} a second) in {out}")
    return 0


def _fixed_label(flow: Flow, label: int) -> Conditions:
    classes = flow.null.get("label")
    if "label" not in flow.conditions or not isinstance(classes, int):
        raise ValueError("--label: this flow was trained without labels")
    if not 0 <= label < classes:
        raise ValueError(f"--label: must lie in 0 to {classes - 1}, got {label}")

    def fixed(numbers: Sequence[int]) -> dict[str, Tensor]:
        return {"label": torch.full((len(numbers),), label)}

    return fixed


def _checkpoint(name: str) -> Literal["newest", "best"] | int:
    if name == "newest":
        return "newest"
    if name == "best":
        return "best"
    if not name.isdigit():
        raise ValueError(f"--checkpoint: newest, best or an iteration is needed, got {name!r}")
    return int(name)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this machine has no CUDA device; use cpu or auto")
    return torch.device(name)
