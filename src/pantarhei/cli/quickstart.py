"""`pantarhei quickstart`."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from pantarhei.data.seeds import mix
from pantarhei.recipes.quickstart import quickstart as run_quickstart


def quickstart(out: Path = Path("runs/quickstart"), seed: int = 0) -> int:
    """Train a flow on handwritten digits, straighten it, and write a page that compares both.

    Args:
        out: folder to write into; what an interrupted call finished is not done again.
        seed: of everything.
    """
    if out.is_file():
        raise ValueError(f"--out: {out} is a file, not a folder")
    began = time.monotonic()
    torch.manual_seed(mix(seed, 50))
    result = run_quickstart(out, seed=seed)
    print()
    print(result.table().text())
    gain = result.before.rows[0].frechet.value / result.after.rows[0].frechet.value
    print(
        f"\none step: {gain:.1f} times closer to the data than before straightening; {time.monotonic() - began:.0f} s in all"
    )
    print(f"open {result.report}")
    return 0
