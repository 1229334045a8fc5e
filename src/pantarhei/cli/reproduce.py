"""`pantarhei reproduce SYSTEM`."""

from __future__ import annotations

from pathlib import Path

import torch
import tyro

from pantarhei.naming import unknown
from pantarhei.reproduce import EXPERIMENTS
from pantarhei.reproduce import reproduce as run_experiments


def reproduce(
    system: tyro.conf.Positional[str],
    out: Path | None = None,
    only: tuple[str, ...] = (),
    seeds: int | None = None,
    quick: bool = False,
    threads: int = 1,
) -> int:
    """Run the experiments behind a system's claims; writes `README.md`, `results.json` and `report.html`.

    Each seed of each experiment is kept as it finishes, so an interrupted command goes on where it stopped.

    Args:
        system: such as rectified-flow.
        out: folder; runs/reproduce-SYSTEM by default.
        only: names of experiments, instead of all.
        seeds: how many seeds, instead of each experiment's own number (3 or more).
        quick: tiny sizes, to see that everything runs; the figures mean nothing.
        threads: CPU threads; figures of a seed are the same for the same number.
    """
    if system not in EXPERIMENTS:
        raise ValueError(unknown("system", system, EXPERIMENTS))
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds: must be at least 1, got {seeds}")
    if threads < 1:
        raise ValueError(f"--threads: must be at least 1, got {threads}")
    torch.set_num_threads(threads)
    out = out or Path("runs") / f"reproduce-{system}"
    title = f"{system}: claims and what was measured"
    run_experiments(EXPERIMENTS[system], out, title=title, only=only, seeds=seeds, quick=quick)
    print(out / "report.html")
    return 0
