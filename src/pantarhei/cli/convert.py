"""`pantarhei convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tyro

from pantarhei.cli.opening import read_checkpoint
from pantarhei.flow import Flow
from pantarhei.interop import consistency, diffusers_write, edm, load, score_sde, sit
from pantarhei.interop.loading import find_checkpoint
from pantarhei.training import Run
from pantarhei.training.runs import CONFIG


def convert(
    source: tyro.conf.Positional[Path],
    out: Path,
    to: Literal["pantarhei", "score-sde", "sit", "sit-train", "edm", "edm-train", "ctm", "diffusers"] = "pantarhei",
    weights: Literal["average", "raw"] = "average",
    size: int | None = None,
    heads: int | None = None,
    rectified: int | None = None,
    distilled: int | None = None,
    kind: Literal["ctm", "cm", "edm"] | None = None,
    base: Path | None = None,
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    complete: bool = False,
    checkpoint: str = "newest",
) -> int:
    """Turn a published checkpoint into a folder of ours, or a run or folder of ours into a published layout.

    Args:
        source: a checkpoint file (`checkpoint_8.pth`, `SiT-XL-2-256.pt`, `edm-cifar10-32x32-uncond-ve.pkl`, `rd.ckpt`), a
            run, a folder with `flow.json`, or a folder of diffusers.
        out: folder to write (pantarhei, diffusers), or file (the others).
        to: layout to write: ours, that of score_sde (rectified flow), SiT's, that of rectified flow++ for EDM's networks
            (the last two: bare weights, or as their training saves), that of CTM and of OpenAI's consistency models, or a
            folder of diffusers.
        weights: of a checkpoint or run: the moving average, or the raw weights.
        size: side of the images of a score_sde checkpoint whose attention does not sit at side 16, or of a network of guided
            diffusion that is of no published size.
        heads: attention heads of a SiT checkpoint that is of no published size; channels of each in guided diffusion's.
        kind: of weights that do not say it: a consistency trajectory model, a consistency model, or a denoiser of EDM.
        rectified: how many reflow rounds a checkpoint went through, which its file does not say; 0 for 1-rectified flow and
            for EDM's own. Score, SDE and likelihood of a score_sde checkpoint are refused where this is left out.
        distilled: steps that a checkpoint was distilled to, where it was.
        base: folder of the pipeline that the bare weights of a diffusers model (`rd.ckpt`, `phased.ckpt`) belong to, or
            that a folder's model now lives beside.
        schedule: of beta, where it is not the one that the scheduler of diffusers is set to.
        guidance, steps: to diffusers: what its model card recommends; by default what the flow's notes say.
        complete: to diffusers: copy tokenizers, text encoders and autoencoder of the teacher's pipeline too.
        checkpoint: of a run: newest, best or an iteration.
    """
    if to != "diffusers" and (complete or guidance is not None or steps is not None):
        raise ValueError(f"--guidance, --steps, --complete: go with --to diffusers, got --to {to}")
    if guidance is not None and not guidance >= 0:
        raise ValueError(f"--guidance: must not be negative, got {guidance:g}")
    if steps is not None and steps < 1:
        raise ValueError(f"--steps: must be at least 1, got {steps}")
    told: dict[str, Any] = {"size": size, "heads": heads, "kind": kind, "rectified": rectified, "distilled": distilled}
    told = {name: value for name, value in told.items() if value is not None}
    overrides: dict[str, Any] = told if source.is_file() else {"checkpoint": read_checkpoint(checkpoint)}
    if not source.is_file() and told:
        raise ValueError("--size, --heads, --kind, --rectified, --distilled: only a checkpoint file needs them")
    overrides |= {k: v for k, v in {"base": base, "schedule": schedule}.items() if v is not None}
    averaged = weights == "average"
    if to in ("pantarhei", "diffusers"):
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: {out} is a file; give a folder")
        if (out / CONFIG).is_file():
            raise ValueError(f"--out: {out} is a run; choose another folder")
    flow = _opened(source, averaged, overrides)
    if to == "diffusers":
        return _to_diffusers(flow, source, out, guidance, steps, complete)
    if to == "pantarhei":
        flow.save_pretrained(out)
        print(f"{source} -> {out}: {sum(p.numel() for p in flow.network.parameters()):,} parameters")
        print(f"next: pantarhei sample {out} --count 16 --out samples")
        return 0
    if out.suffix not in (".pth", ".pt", *((".safetensors",) if to in ("edm", "ctm") else ())):
        raise ValueError(f"--out: the {to} layout is a .pth or .pt file, got {out.name}")
    of_run = (source / CONFIG).is_file()
    raw = (
        load(source, averaged=False, **overrides).network.state_dict()
        if of_run and averaged and to not in ("sit", "edm", "ctm")
        else None
    )
    about: dict[str, Any] = {}
    if of_run and to in ("score-sde", "edm-train"):
        about["iterations"] = int(find_checkpoint(Run.open(source), read_checkpoint(checkpoint)).name)
    if to == "score-sde":
        if of_run:
            about["decay"] = float(Run.open(source).config.get("recipe", {}).get("average", 0.999999))
        score_sde.write(flow, out, raw=raw, **about)
    elif to == "ctm":
        consistency.write(flow, out)
    elif to in ("edm", "edm-train"):
        edm.write(flow, out, raw=raw, layout="train" if to == "edm-train" else "weights", **about)
    else:
        sit.write(flow, out, raw=raw, layout="train" if to == "sit-train" else "weights")
    print(f"{source} -> {out}")
    return 0


def _to_diffusers(
    flow: Flow, source: Path, out: Path, guidance: float | None, steps: int | None, complete: bool
) -> int:
    """Write a folder of diffusers, and say how its samples are drawn."""
    notes = flow.provenance.notes
    steps = steps or notes.get("steps") or notes.get("sampling_steps")
    diffusers_write.write(flow, out, guidance=guidance, steps=steps, complete=complete)
    print(f"{source} -> {out}; its README.md says with which scheduler, guidance and steps it samples")
    print(f"next: pantarhei sample {out} --count 4 --out samples" + (" --prompt TEXT" if flow.conditions else ""))
    return 0


def _opened(source: Path, averaged: bool, told: dict[str, Any]) -> Flow:
    """The flow; what its kind of file has no use for is refused."""
    try:
        return load(source, averaged=averaged, **told)
    except TypeError as error:
        name = str(error).rpartition("unexpected keyword argument ")[2].strip("'")
        if name not in told:
            raise
        raise ValueError(f"--{name}: this kind of file does not take it") from None
