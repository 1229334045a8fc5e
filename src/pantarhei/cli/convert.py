"""`pantarhei convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tyro

from pantarhei.cli.opening import read_checkpoint
from pantarhei.interop import edm, load, score_sde, sit
from pantarhei.interop.loading import find_checkpoint
from pantarhei.training import Run
from pantarhei.training.runs import CONFIG


def convert(
    source: tyro.conf.Positional[Path],
    out: Path,
    to: Literal["pantarhei", "score-sde", "sit", "sit-train", "edm", "edm-train"] = "pantarhei",
    weights: Literal["average", "raw"] = "average",
    size: int | None = None,
    heads: int | None = None,
    rectified: int | None = None,
    distilled: int | None = None,
    checkpoint: str = "newest",
) -> int:
    """Turn a published checkpoint into a folder of ours, or a run or folder of ours into a published layout.

    Args:
        source: a checkpoint file (`checkpoint_8.pth`, `SiT-XL-2-256.pt`, `edm-cifar10-32x32-uncond-ve.pkl`), a run, or a
            folder with `flow.json`.
        out: folder to write (pantarhei), or file (the others).
        to: layout to write: ours, that of score_sde (rectified flow), SiT's, or that of rectified flow++
            for EDM's networks (the last two: bare weights, or as their training saves).
        weights: of a checkpoint or run: the moving average, or the raw weights.
        size: side of the images of a score_sde checkpoint whose attention does not sit at side 16.
        heads: attention heads of a SiT checkpoint that is of no published size.
        rectified: how many reflow rounds a checkpoint went through, which its file does not say; 0 for 1-rectified flow and
            for EDM's own. Score, SDE and likelihood of a score_sde checkpoint are refused where this is left out.
        distilled: steps that a checkpoint was distilled to, where it was.
        checkpoint: of a run: newest, best or an iteration.
    """
    told = {"size": size, "heads": heads, "rectified": rectified, "distilled": distilled}
    told = {name: value for name, value in told.items() if value is not None}
    overrides: dict[str, Any] = told if source.is_file() else {"checkpoint": read_checkpoint(checkpoint)}
    if not source.is_file() and told:
        raise ValueError("--size, --heads, --rectified, --distilled: only a checkpoint file needs them")
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
    if out.suffix not in (".pth", ".pt", *((".safetensors",) if to == "edm" else ())):
        raise ValueError(f"--out: the {to} layout is a .pth or .pt file, got {out.name}")
    of_run = (source / CONFIG).is_file()
    raw = (
        load(source, averaged=False, **overrides).network.state_dict()
        if of_run and averaged and to not in ("sit", "edm")
        else None
    )
    about: dict[str, Any] = {}
    if of_run and to in ("score-sde", "edm-train"):
        about["iterations"] = int(find_checkpoint(Run.open(source), read_checkpoint(checkpoint)).name)
    if to == "score-sde":
        if of_run:
            about["decay"] = float(Run.open(source).config.get("recipe", {}).get("average", 0.999999))
        score_sde.write(flow, out, raw=raw, **about)
    elif to in ("edm", "edm-train"):
        edm.write(flow, out, raw=raw, layout="train" if to == "edm-train" else "weights", **about)
    else:
        sit.write(flow, out, raw=raw, layout="train" if to == "sit-train" else "weights")
    print(f"{source} -> {out}")
    return 0
