"""`pantarhei convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tyro

from pantarhei.interop import load, score_sde
from pantarhei.interop.loading import find_checkpoint
from pantarhei.training import Run
from pantarhei.training.runs import CONFIG


def convert(
    source: tyro.conf.Positional[Path],
    out: Path,
    to: Literal["pantarhei", "score-sde"] = "pantarhei",
    weights: Literal["average", "raw"] = "average",
    size: int | None = None,
    rectified: int | None = None,
) -> int:
    """Turn a published checkpoint into a folder of ours, or a run or folder of ours into the published layout.

    Args:
        source: a checkpoint file (`checkpoint_8.pth`), a run, or a folder with `flow.json`.
        out: folder to write (pantarhei), or file (score-sde).
        to: layout to write.
        weights: of a checkpoint or run: the moving average, or the raw weights.
        size: side of the images of a checkpoint whose attention does not sit at side 16.
        rectified: how many reflow rounds a checkpoint went through, which its file does not say; 0 for 1-rectified flow.
            Score, SDE and likelihood are refused where this is left out.
    """
    overrides: dict[str, Any] = {"size": size, "rectified": rectified} if source.is_file() else {}
    if not source.is_file() and (size is not None or rectified is not None):
        raise ValueError("--size, --rectified: only a checkpoint file needs them")
    averaged = weights == "average"
    flow = load(source, averaged=averaged, **overrides)
    if to == "pantarhei":
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: {out} is a file; give a folder")
        if (out / CONFIG).is_file():
            raise ValueError(f"--out: {out} is a run; choose another folder")
        flow.save_pretrained(out)
        print(f"{source} -> {out}: {sum(p.numel() for p in flow.network.parameters()):,} parameters")
        print(f"next: pantarhei sample {out} --count 16 --out samples")
        return 0
    if out.suffix not in (".pth", ".pt"):
        raise ValueError(f"--out: the score-sde layout is a .pth file, got {out.name}")
    raw, iterations = None, 0
    if (source / CONFIG).is_file():
        raw = load(source, averaged=False).network.state_dict() if averaged else None
        iterations = int(find_checkpoint(Run.open(source), "newest").name)
    score_sde.write(flow, out, raw=raw, iterations=iterations)
    print(f"{source} -> {out}")
    return 0
