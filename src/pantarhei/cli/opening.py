"""What several commands open: a run's flow and data, images to start from, a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data import Source, read_points
from pantarhei.files import read_tensors
from pantarhei.flow import Flow, TrajectoryModel
from pantarhei.flow.sources import Samples
from pantarhei.images import open_images
from pantarhei.interop import load
from pantarhei.recipes.data import Recipe
from pantarhei.recipes.registry import recipe_in
from pantarhei.report import save_image_grid, scatter_2d, vector_fields
from pantarhei.training import Run
from pantarhei.training.runs import CONFIG

Device = Literal["auto", "cpu", "cuda"]


def open_flow(run: Path, checkpoint: str = "newest", device: Device = "auto") -> Flow:
    """The flow of a run or saved folder; a transfer starts from the held-out part of its source.

    Raises:
        FileNotFoundError, ValueError: there is nothing to open, or it is damaged.
    """
    flow = load(run, checkpoint=read_checkpoint(checkpoint))
    recipe = recipe_of(run)
    start = recipe.open_source() if recipe is not None else None
    if start is not None:
        flow.source = Samples(start[1])
    return flow.to(find_device(device)).eval()


def recipe_of(run: Path) -> Recipe | None:
    """The recipe that a run names (its own, or its teacher's); None where there is none."""
    if not (run / CONFIG).is_file():
        return None
    return recipe_in(Run.open(run).config)


def data_of(run: Path) -> tuple[Source, Source]:
    """Training and held-out data of a run (of its teacher's recipe, for a straightened one).

    Raises:
        ValueError: the run does not say what it was trained on.
    """
    recipe = recipe_of(run)
    if recipe is None:
        raise ValueError(f"{run} does not name data that can be opened again; do this from Python")
    return recipe.open()


def default_steps(flow: Flow, method: str = "auto", otherwise: int = 50) -> int:
    """Steps that a distilled flow was made for, the phases of a phased one, one jump; a number for others."""
    if isinstance(flow, TrajectoryModel) and flow.jumps_with(method):
        return 1
    notes = flow.provenance.notes
    return int(notes.get("steps", notes.get("sampling_steps", otherwise)))


def fine_method(flow: Flow) -> Literal["heun", "edm"]:
    """Heun's method, in the noise level where the path is curved: there velocities turn."""
    return "heun" if flow.path.spec()["name"] in ("linear", "interpolant", "custom") else "edm"


def own_guidance(flow: Flow) -> float:
    """Guidance that a flow's notes name for sampling; none for others."""
    return float(flow.provenance.notes.get("guidance", 1.0))


def read_input(
    path: Path,
    flow: Flow,
    count: int,
    keys: Sequence[str],
    shape: Sequence[int] | None = None,
    option: str = "--input",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Items to start from, and their conditions where the file has them; as many as asked for.

    Args:
        path: images in a folder, zip or file, a `.safetensors` file, or an array in a `.npy` file.
        flow: what they are for.
        count: at most so many.
        keys: names of the tensor in a `.safetensors` file, the first one there is taken.
        shape: of an item, that of the flow's states by default.
        option: which asks for it, for messages.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: they have another shape, there are none, or they are not finite.
    """
    if not path.exists():
        raise FileNotFoundError(f"{option}: there is no {path}")
    shape = tuple(shape or flow.shape or ())
    found: dict[str, Tensor]
    if path.suffix == ".safetensors":
        found = read_tensors(path)
        key = next((key for key in keys if key in found), None)
        if key is None:
            raise ValueError(f"{option}: {path} holds {', '.join(found)}; expected {' or '.join(keys)}")
        x = found[key]
    elif path.suffix == ".npy":
        items = read_points(path)
        found = items.fetch(torch.arange(min(count, len(items))))
        x = found["x1"]
    else:
        if keys[0] == "x0" and getattr(flow.source, "gaussian", False):
            raise ValueError(
                f"{option}: this flow starts from noise, not from images; give a .safetensors file with x0"
            )
        options: dict[str, Any] = {"size": shape[-1], "channels": shape[0]} if len(shape) == 3 else {}
        source = open_images(path, **options)
        found = source.fetch(torch.arange(min(count, len(source))))
        x = found["x1"]
    if tuple(x.shape[1:]) != shape or not len(x):
        raise ValueError(f"{option}: expected items of shape {shape}, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{option}: {path} holds NaN or infinity")
    conditions = {name: found[name][:count] for name in flow.conditions if name in found}
    return x[:count].to(flow.device, flow.dtype), conditions


@torch.no_grad()
def data_shape(flow: Flow) -> tuple[int, ...]:
    """The shape of one decoded sample."""
    if flow.codec is None or flow.shape is None:
        return tuple(flow.shape or ())
    return tuple(flow.decode(torch.zeros(1, *flow.shape, dtype=flow.dtype, device=flow.device)).shape[1:])


@contextmanager
def counted_calls(flow: Flow) -> Iterator[list[int]]:
    """Counts the rows that the network sees (with guidance two a sample): the first entry of what it gives."""
    calls = [0]

    def count(_: Any, seen: tuple[Any, ...], __: Any) -> None:
        calls[0] += len(seen[0])

    handle = flow.network.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


def find_device(name: Device) -> torch.device:
    """A device by name; "auto" takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: this machine has no CUDA device; use cpu or auto")
    return torch.device(name)


def read_checkpoint(name: str) -> Literal["newest", "best"] | int:
    """newest, best, or an iteration."""
    if name == "newest":
        return "newest"
    if name == "best":
        return "best"
    if not name.isdigit():
        raise ValueError(f"--checkpoint: newest, best or an iteration is needed, got {name!r}")
    return int(name)


def with_null_labels(flow: Flow, given: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The given conditions; the null class where no labels are given."""
    if set(given) == set(flow.conditions):
        return given
    null = flow.null.get("label")
    if flow.conditions != ("label",) or not isinstance(null, int):
        raise ValueError(f"--input: this flow is conditioned on {', '.join(flow.conditions)}, which the input lacks")
    return {"label": torch.full((count,), null)}


def save_rows(rows: Mapping[str, Tensor], path: Path, places: Tensor | None = None) -> None:
    """A picture of items, a row a name, all on one scale; of a single name a grid. Nothing where nothing can be shown.

    Args:
        rows: name -> images (N, 1, 3 or 4, H, W), plane vector fields (N, 2, H, W) or plane points (N, 2).
        path: where to.
        places: of sensors in the fields.
    """
    plain = {name: value.detach().float().cpu() for name, value in rows.items()}
    shape = next(iter(plain.values())).shape[1:]
    if len(shape) == 3 and shape[0] in (1, 3, 4):
        most = 256 if len(plain) == 1 else 16
        shown = [value[:most] for value in plain.values()]
        save_image_grid(torch.cat(shown), path, columns=None if len(plain) == 1 else len(shown[0]))
    elif len(shape) == 3 and shape[0] == 2:
        vector_fields(plain, places=places).savefig(path, dpi=110)
    elif tuple(shape) == (2,):
        scatter_2d(plain).savefig(path, dpi=120)


def save_picture(x: Tensor, path: Path, title: str) -> None:
    """A picture of items, see `save_rows`."""
    save_rows({title: x}, path)
