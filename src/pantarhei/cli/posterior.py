"""`pantarhei optimize posterior RUN`: data from a noisy measurement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from pantarhei.cli.opening import data_of, data_shape, read_input, save_rows, with_null_labels
from pantarhei.cli.optimize import Drawing, Sampling, Searching, with_bar, write_made
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Blurred, Flow, Masked, Measurement, Sensors, TrajectoryModel, posterior_sample
from pantarhei.recipes.optimization import OfRows, optimize_noise
from pantarhei.recipes.sample_metrics import function_of
from pantarhei.report.progress import Progress


def optimize_posterior(
    run: tyro.conf.Positional[Path],
    out: Path,
    operator: str,
    input: Path | None = None,
    noise: float = 0.05,
    spread: float | None = None,
    way: Literal["guidance", "noise"] = "guidance",
    searching: Searching = Searching(iterations=60),
    sampling: Sampling = Sampling(),
    drawing: Drawing = Drawing(count=8),
    label: int | None = None,
    scale: float = 1.0,
) -> int:
    """Data from a noisy measurement: in-painting, deblurring, sparse sensors, or any function of yours.

    Measures items, adds noise, and draws samples that agree with what was measured: by guiding the ODE, or by searching for
    noise. Writes `posterior.safetensors` (`truth`, `measured`, `x`) and a picture.

    Args:
        run: a run, a saved flow, or a pipeline of diffusers.
        out: folder to write into.
        operator: mask:SHARE (that share of the pixels is known), box:SIDE (all but a square in the middle), blur:WIDTH,
            sensors:NUMBER, or FILE.py:function.
        input: what is measured: images (a folder, zip or file), .safetensors with x, or .npy; held-out data by default.
        noise: standard deviation of the noise.
        spread: of guidance, the standard deviation of data that are Gaussian noise; measured from the network by default.
        way: guidance (diffusion posterior sampling) or noise (D-Flow).
        searching: of noise.
        sampling: the sampler; 40 steps by default, 20 of a search.
        drawing: how many items, and everything that is drawn.
        label: of all items; nothing is said of their labels by default.
        scale: of guidance by the measurement.
    """
    if not scale > 0:
        raise ValueError(f"--scale: must be positive, got {scale:g}")
    if way == "guidance" and searching != Searching(iterations=60):
        raise ValueError("--iterations, --lr, --weight-decay, --through, --truncate: go with --way noise")
    if way == "noise" and (scale != 1.0 or spread is not None):
        raise ValueError("--scale, --spread: go with --way guidance")
    if way == "guidance" and (sampling.variables is not None or sampling.gamma is not None):
        raise ValueError("--variables, --gamma: go with --way noise")
    flow = drawing.open_flow(run)
    if input is not None:
        truth = read_input(input, flow, drawing.count, ("x", "x1"), data_shape(flow))[0]
    else:
        held_out = data_of(run)[1]
        truth = held_out.fetch(torch.arange(min(drawing.count, len(held_out))))["x1"].to(flow.device, flow.dtype)
    if label is None and flow.conditions == ("label",) and not drawing.prompt:
        condition: dict[str, Tensor] | None = with_null_labels(flow, {}, len(truth))
    else:
        condition = drawing.conditions(run, flow, len(truth), label) if flow.conditions or label is not None else None
    measure = _operator(operator, tuple(truth.shape[1:]), seeded(drawing.seed, 74))
    clean, generator = measure(truth), seeded(drawing.seed, 73, device=flow.device)
    value = clean + noise * torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=clean.device)
    measurement = Measurement(measure, value, noise, spread)
    x0 = drawing.noise(flow, len(truth), condition)
    if way == "guidance":
        x = _guided(flow, measurement, x0, condition, sampling, scale)
    else:
        mismatch = OfRows(lambda x, rows: measurement.index(rows).mismatch(x))
        search = searching.search(flow, sampling, drawing.seed)
        x = with_bar("searching noise", search, optimize_noise, flow, mismatch, x0, condition=condition).after
    misses = float(measurement.residual(x).square().mean().sqrt())
    error = float((x - truth).square().mean().sqrt())
    tensors = {"truth": truth, "measured": value, "x": x, "x0": x0, **(condition or {})}
    made = {"operator": operator, "noise": noise, "way": way, "scale": scale, "spread": spread}
    write_made(out / "posterior.safetensors", tensors, run, made, searching, sampling, drawing)
    rows = {"truth": truth, "measured": value, "sample": x}
    places = measure.places if isinstance(measure, Sensors) else None
    save_rows({k: v for k, v in rows.items() if v.shape == truth.shape}, out / "posterior.png", places)
    print(
        f"{len(x)} samples: they miss the measurement by {misses:.4g} (its noise is {noise:g}), the truth by {error:.4g} "
        f"(the data's deviation is {float(truth.std()):.3g}) in {out}"
    )
    return 0


def _guided(
    flow: Flow,
    measurement: Measurement,
    x0: Tensor,
    condition: dict[str, Tensor] | None,
    sampling: Sampling,
    scale: float,
) -> Tensor:
    """Posterior samples, some at a time, behind a progress bar."""
    if isinstance(flow, TrajectoryModel) and sampling.method == "auto":
        sampling = replace(sampling, method="heun")  # jumps pass over what guides
    options = sampling.options(flow, 40)
    del options["variables"]
    parts = torch.arange(len(x0), device=flow.device).split(sampling.batch)
    found = []
    with Progress(len(parts) * options["steps"], "guiding samples", "steps") as bar:
        for number, rows in enumerate(parts):
            done = number * options["steps"]
            given = {name: value[rows] for name, value in (condition or {}).items()} or None
            how: dict[str, Any] = {"condition": given, "scale": scale, **options}
            how["observe"] = lambda x, t, step, done=done: bar.update(done + step)
            found.append(posterior_sample(flow, measurement.index(rows), x0=x0[rows], **how))
    return torch.cat(found)


def _operator(text: str, shape: tuple[int, ...], generator: torch.Generator) -> Any:
    kind, _, rest = text.partition(":")
    if kind not in ("mask", "box", "blur", "sensors"):
        return function_of(text)
    try:
        number = float(rest)
    except ValueError:
        raise ValueError(f"--operator: {kind} needs a number, such as {kind}:2, got {text!r}") from None
    if len(shape) != 3:
        raise ValueError(f"--operator: {kind} is for images and fields on a grid; give FILE.py:function")
    height, width = shape[1:]
    if kind == "mask" and 0 < number < 1:
        return Masked((torch.rand(1, height, width, generator=generator) < number).float())
    if kind == "box" and 1 <= number < min(height, width):
        side = int(number)
        mask = torch.ones(1, height, width)
        mask[:, (height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2] = 0
        return Masked(mask)
    if kind == "blur" and number > 0:
        return Blurred(number)
    if kind == "sensors" and 1 <= number <= height * width:
        at = torch.randperm(height * width, generator=generator)[: int(number)]
        return Sensors(torch.stack([at // width, at % width], dim=1))
    raise ValueError(f"--operator: {rest} is out of range for {kind} on items of shape {shape}")
