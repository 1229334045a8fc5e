"""`pantarhei edit interpolate RUN`, `pantarhei edit translate RUN`, and the quick inversion behind them."""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from torch import Tensor

from pantarhei.cli.opening import Device, data_of, open_flow, read_input, save_picture, with_null_labels
from pantarhei.data.seeds import generator as seeded
from pantarhei.files import write_tensors
from pantarhei.flow import Flow, on_path
from pantarhei.interop import load
from pantarhei.report import save_image_grid
from pantarhei.straighten import interpolate, reconstruct, translate
from pantarhei.straighten.editing import Inverter


def edit_interpolate(
    run: tyro.conf.Positional[Path],
    out: Path,
    pairs: int = 4,
    count: int = 8,
    evaluations: tuple[int, int] = (8, 8),
    method: Inverter = "auto",
    input: Path | None = None,
    seed: int = 0,
    checkpoint: str = "newest",
    device: Device = "auto",
) -> int:
    """Invert two items to noise, walk from one noise to the other on the sphere, and decode on the way.

    Writes `edited.safetensors` (`x` (pairs, count, ...)) and `edited.png` (a row each), and prints how well items come back
    from their noise.

    Args:
        run: a run folder or a saved flow; best a straightened one.
        out: folder to write into.
        pairs: how many pairs: items 1 and 2, 3 and 4, ...
        count: items in a row, both ends included.
        evaluations: of the network, to the noise and back.
        method: of the way to the noise and back.
        input: images (a folder, zip or file) or a .safetensors file with x; held-out data of the run by default.
        seed: which held-out items, and the admixed noise.
        checkpoint: newest, best or an iteration.
        device: where to run.
    """
    flow = _opened(run, checkpoint, device, evaluations)
    if pairs < 1:
        raise ValueError(f"--pairs: must be at least 1, got {pairs}")
    items = items_of(run, flow, 2 * pairs, input, seed)
    x, rows = _states(flow, items), len(items["x1"]) // 2
    if rows < 1:
        raise ValueError("--input: at least two items are needed")
    both = tuple(_condition(flow, items, range(first, 2 * rows, 2)) for first in (0, 1))
    found = interpolate(
        flow,
        x[0 : 2 * rows : 2],
        x[1 : 2 * rows : 2],
        count,
        evaluations=evaluations,
        condition=(both[0], both[1]),
        method=method,
        generator=seeded(seed, 52, device=flow.device),
    )
    write_tensors(
        out / "edited.safetensors", {"x": found.float().cpu()}, {"run": str(run), "evaluations": str(evaluations)}
    )
    if found.ndim == 5:
        save_image_grid(found.flatten(0, 1).float().cpu(), out / "edited.png", columns=count)
    _say_reconstruction(flow, items, evaluations, method, seed)
    print(out)
    return 0


def edit_translate(
    run: tyro.conf.Positional[Path],
    out: Path,
    target: int,
    source: int | None = None,
    count: int = 16,
    evaluations: tuple[int, int] = (4, 2),
    method: Inverter = "auto",
    guidance: float = 1.0,
    keep_noise: bool = True,
    input: Path | None = None,
    seed: int = 0,
    checkpoint: str = "newest",
    device: Device = "auto",
) -> int:
    """Invert items to noise under their own label and decode the noise under another one.

    Writes `edited.safetensors` (`x` and what they were, `before`) and `edited.png` (before above after), and prints how well
    items come back from their noise.

    Args:
        run: a run folder or a saved flow, trained with labels; best a straightened one.
        out: folder to write into.
        target: label to turn them into.
        source: their label, where the input does not say it; of held-out data only those with it are taken.
        count: how many items.
        evaluations: of the network, to the noise and back.
        method: of the way to the noise.
        guidance: on the way back.
        keep_noise: re-interpolate with the noise on the way back.
        input: images (a folder, zip or file) or a .safetensors file with x (and label); held-out data by default.
        seed: which held-out items, and the admixed noise.
        checkpoint: newest, best or an iteration.
        device: where to run.
    """
    flow = _opened(run, checkpoint, device, evaluations)
    classes = flow.null.get("label")
    if flow.conditions != ("label",) or not isinstance(classes, int):
        raise ValueError("run: translation changes the label, and this flow was trained without labels")
    for name, label in (("--target", target), ("--source", source)):
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"{name}: must lie in 0 to {classes - 1}, got {label}")
    items = items_of(run, flow, count, input, seed, source)
    if source is not None:
        items["label"] = torch.full((len(items["x1"]),), source)
    x = _states(flow, items)
    aim = {"label": torch.full((len(x),), target, device=flow.device)}
    found = translate(
        flow,
        x,
        _condition(flow, items, range(len(x))),
        aim,
        evaluations=evaluations,
        method=method,
        keep_noise=keep_noise,
        guidance=guidance,
        generator=seeded(seed, 52, device=flow.device),
    )
    parts = {"x": flow.decode(found).float().cpu(), "before": items["x1"].float().cpu()}
    write_tensors(out / "edited.safetensors", parts, {"run": str(run), "target": str(target)})
    if found.ndim == 4:
        both = torch.cat([parts["before"], parts["x"]])
        save_image_grid(both, out / "edited.png", columns=len(x))
    _say_reconstruction(flow, items, evaluations, method, seed)
    print(out)
    return 0


def invert_quickly_to(
    run: Path,
    flow: Flow,
    out: Path,
    items: dict[str, Tensor],
    evaluations: tuple[int, int],
    method: Inverter,
    seed: int,
) -> int:
    """The quick inversion of `pantarhei invert`: writes what it found and says how well it reconstructs."""
    if min(evaluations) < 1:
        raise ValueError(f"--evaluations: must be at least 1, got {evaluations}")
    x = _states(flow, items)
    condition = _condition(flow, items, range(len(x)))
    draws = seeded(seed, 53, device=flow.device)
    found = reconstruct(flow, x, evaluations, condition=condition, method=method, generator=draws)
    parts = {"x": flow.decode(found.x), "x0": found.x0, "reconstruction": flow.decode(found.again)}
    kept = {name: value.float().cpu() for name, value in parts.items()}
    labels = {name: items[name] for name in flow.conditions if name in items}
    write_tensors(out / "inverted.safetensors", {**kept, **labels}, {"run": str(run), "evaluations": str(evaluations)})
    for name, value in kept.items():
        save_picture(value, out / f"{name}.png", name)
    print(
        f"{len(x)} items: x0 has mean {float(found.x0.mean()):.3g}, deviation {float(found.x0.std()):.3g}; distance of "
        f"|x0|^2 to its law {found.shell_distance:.3g}"
    )
    _say_reconstruction(flow, items, evaluations, method, seed)
    print(out)
    return 0


def items_of(
    run: Path, flow: Flow, count: int, input: Path | None, seed: int, label: int | None = None
) -> dict[str, Tensor]:
    """Items to start from, `x1` and conditions: given ones, or held-out data (of one label)."""
    if input is not None:
        x1, given = read_input(input, flow, count, ("x", "x1"))
        return {"x1": x1, **with_null_labels(flow, given, len(x1))}
    held_out = data_of(run)[1]
    rows = torch.randperm(len(held_out), generator=seeded(seed, 51))
    if label is not None:
        labels = held_out.fetch(rows).get("label")
        rows = rows if labels is None else rows[labels == label]
        if not len(rows):
            raise ValueError(f"--source: there are no held-out items with the label {label}")
    return held_out.fetch(rows[:count])


def _opened(run: Path, checkpoint: str, device: Device, evaluations: tuple[int, int]) -> Flow:
    if min(evaluations) < 1:
        raise ValueError(f"--evaluations: must be at least 1, got {evaluations}")
    flow = open_flow(run, checkpoint, device)
    flow.require_field()
    flow.require_ode()
    return flow


def _states(flow: Flow, items: dict[str, Tensor]) -> Tensor:
    """The items in the flow's space: themselves, or their latents."""
    return flow.encode(items["x1"].to(flow.device, flow.dtype))


def _condition(flow: Flow, items: dict[str, Tensor], rows: range) -> dict[str, Tensor] | None:
    return {name: items[name][list(rows)].to(flow.device) for name in flow.conditions} or None


def _say_reconstruction(
    flow: Flow, items: dict[str, Tensor], evaluations: tuple[int, int], method: Inverter, seed: int
) -> None:
    """How well items come back from their noise, beside the teacher with Euler's method, where it is there."""
    x = _states(flow, {name: value[:64] for name, value in items.items()})
    condition = _condition(flow, items, range(len(x)))
    named = flow.provenance.teacher
    teacher = None
    try:
        if named:
            teacher = on_path(load(named)).to(flow.device).eval()
    except (FileNotFoundError, ValueError, ImportError):  # it has moved, or needs more than its name
        teacher = None
    for there, back in dict.fromkeys([evaluations, (4, 4), (8, 8)]):
        if method == "heun-euler" and (there % 2 == 0 or back % 2 == 0):
            continue  # it takes odd numbers

        def error(of: Flow, how: Inverter, there: int = there, back: int = back) -> float:
            draws = seeded(seed, 54, device=flow.device)
            return reconstruct(of, x, (there, back), condition=condition, method=how, generator=draws).error

        own = error(flow, method)
        text = f"reconstruction error with {there} + {back} evaluations: {own:.4g} mean squared"
        if teacher is not None:
            theirs = error(teacher, "euler")
            text += f"; teacher with Euler's method {theirs:.4g}, {theirs / own:.2g} times as much"
        print(text)
