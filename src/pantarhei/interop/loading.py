"""`load`: a flow from a run folder, a folder written by `save_pretrained`, or somebody else's checkpoint file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from pantarhei.data import pickles
from pantarhei.files import read_json
from pantarhei.flow import Flow
from pantarhei.flow.pretrained import SPEC, build_network, from_pretrained, load_weights
from pantarhei.interop import consistency, diffusers, edm, score_sde, sit
from pantarhei.training import checkpoints
from pantarhei.training.runs import CONFIG, Run

# Whose files are known: name, `recognise(content)`, `read(path, content, averaged=, **overrides)`.
READERS: dict[str, Any] = {
    "score_sde (rectified flow)": score_sde,
    "SiT": sit,
    "CTM and consistency models": consistency,  # before EDM, whose names some of them have
    "EDM": edm,
    "diffusers": diffusers,
}


def load(
    where: str | Path,
    *,
    network: nn.Module | None = None,
    checkpoint: Literal["newest", "best"] | int = "newest",
    averaged: bool = True,
    base: str | Path | None = None,
    **overrides: Any,
) -> Flow:
    """Open a flow.

    Args:
        where: a run folder, a folder written by `Flow.save_pretrained`, or a checkpoint file of the rectified flow
            authors (`.pth`), of SiT (`.pt`), of EDM and rectified flow++ (`.pkl`, `.pth`), or of consistency (trajectory)
            models (`.pt`); weights may also be safetensors. Also a folder of diffusers, or the weights of one of its
            models (see `interop.diffusers.read`).
        network: needed where the network is not one of ours; the weights are loaded into it.
        checkpoint: of a run: the newest, the best by validation, or an iteration.
        averaged: take the moving average where there is one.
        base: of a model of diffusers, the folder of the pipeline that it belongs to. Bare weights need it; a run or a saved
            flow does where its pipeline is no longer where it was.
        overrides: what a saved flow cannot hold (source, path, codec); of a file, what it does not say (`rectified`,
            `size`, `heads`, `kind`: see `read` of `interop.score_sde`, `interop.sit`, `interop.edm` and
            `interop.consistency`).

    Raises:
        FileNotFoundError: there is nothing to load, or no such checkpoint.
        ValueError: a file is damaged, the weights do not fit, or `base` is given to what has no pipeline.
    """
    folder = Path(where)
    based: dict[str, Any] = {} if base is None else {"base": base}
    if folder.is_file():
        return _read_file(folder, averaged=averaged, **based, **overrides)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder or file {folder}")
    if (folder / SPEC).is_file():
        return diffusers.attach(from_pretrained(folder, network, **overrides), base, codec="codec" not in overrides)
    if not (folder / CONFIG).is_file() and diffusers.recognise(folder):
        return diffusers.read(folder, averaged=averaged, **based, **overrides)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is neither a run folder (no {CONFIG}) nor a saved flow (no {SPEC})")
    run = Run.open(folder)
    task = run.config.get("task", {})
    if "flow" not in task:
        raise ValueError(f"{folder} is not the run of a flow")
    chosen = find_checkpoint(run, checkpoint)
    tensors = checkpoints.network_tensors(chosen)
    prefix = (
        "average.network." if averaged and any(k.startswith("average.network.") for k in tensors) else "flow.network."
    )
    built = build_network(task["network"], network, str(folder))
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    load_weights(built, own, str(chosen / checkpoints.MODEL), types=network is None)
    flow = Flow.from_spec(task["flow"], built.eval(), **overrides)
    return diffusers.attach(flow, base, codec="codec" not in overrides)


def content_of(path: Path) -> dict[str, Any]:
    """What a checkpoint file holds, by name; nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no file of weights.
    """
    return edm.load_snapshot(path) if path.suffix == ".pkl" else pickles.load_weights(path)


def _read_file(path: Path, **options: Any) -> Flow:
    content = content_of(path)
    if "kind" in options:  # told by the user, since EDM's names may be those of a consistency model
        return consistency.read(path, content, **options)
    for reader in READERS.values():
        if reader.recognise(content):
            return reader.read(path, content, **options)
    names = ", ".join(list(content)[:4])
    raise ValueError(f"{path} is no checkpoint that is known here ({', '.join(READERS)}); its first names are {names}")


def find_checkpoint(run: Run, which: Literal["newest", "best"] | int) -> Path:
    """Folder of a run's checkpoint.

    Raises:
        FileNotFoundError: the run has no checkpoint yet, or not this one.
    """
    newest = checkpoints.newest(run.checkpoints)
    if newest is None:
        raise FileNotFoundError(f"{run.folder} has no checkpoint yet")
    if which == "newest":
        return newest
    if which == "best":
        best = read_json(newest / checkpoints.STATE)["best"]
        return newest if best is None else run.checkpoints / f"{best[0]:08d}"
    path = run.checkpoints / f"{which:08d}"
    if not path.is_dir():
        there = ", ".join(str(int(p.name)) for p in sorted(run.checkpoints.glob("[0-9]*")))
        raise FileNotFoundError(f"{run.folder} has no checkpoint {which}; there are {there}")
    return path
