"""Is a foreign model what we take it for? Checked on data before anything is trained on it.

A wrong time direction, scale, prediction or schedule gives no error, only bad samples, or a student that learns them. Two
checks find it: the error of denoised data must fall with the noise level as no worse predictor's would, and where a model
brings its own sampler, ours must give the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, evaluation_mode
from pantarhei.flow.change_of_path import on_path
from pantarhei.flow.denoising import denoising_steps
from pantarhei.flow.numbered import numbered_noise
from pantarhei.flow.paths import VP, AffinePath, Numbered
from pantarhei.flow.predictions import EDMPreconditioned, Prediction, build_prediction

LEVELS = (0.9, 0.75, 0.5, 0.25, 0.1)  # of the noise on the linear path, where all schedules can be compared
CLEARLY = 0.97  # by how much another schedule must be better to be taken for the right one
SLACK = 1.1  # what an untrained predictor, a rough estimate or few items may add


class WrongConvention(ValueError):
    """A model does not do what its description says; the message says what it may be."""


@dataclass(frozen=True)
class ConventionCheck:
    """What the checks found.

    Attributes:
        levels: noise levels sigma / (alpha + sigma).
        errors: E|x1hat - x1|^2 / E|x1 - mean|^2 at each level.
        linear: the same of the best linear estimate by one variance alone, which a trained model must not exceed.
        sampler: largest relative difference to the model's own sampler; None where it brings none.
    """

    levels: tuple[float, ...]
    errors: tuple[float, ...]
    linear: tuple[float, ...]
    sampler: float | None

    @property
    def denoises(self) -> bool:
        """Whether errors fall with the noise level and none exceeds the linear estimate's."""
        return _falls(self.errors, self.linear)


@torch.no_grad()
def check_convention(
    flow: Flow,
    data: Mapping[str, Tensor] | Tensor | None,
    *,
    seed: int = 0,
    tolerance: float = 1e-3,
    steps: int = 50,
) -> ConventionCheck:
    """Check a model on data.

    Args:
        flow: the model.
        data: a batch with `x1` (in data space, as users have them) and the flow's conditions, or `x1` alone; 64 items do.
            None leaves the first check out.
        seed: of the noise.
        tolerance: allowed relative difference to the model's own sampler.
        steps: of that comparison, on 4 noises.

    Raises:
        WrongConvention: it fails; the message names the likely cause, found by trying the usual confusions.
    """
    if data is None:
        difference = _compared(flow, _nulls(flow, 4), seed, steps, tolerance)
        return ConventionCheck((), (), (), difference)
    batch = {"x1": data} if isinstance(data, Tensor) else dict(data)
    x1 = flow.encode(batch["x1"].to(flow.device, flow.dtype))
    condition = {name: batch[name].to(flow.device) for name in flow.conditions if name in batch} or None
    missing = [name for name in flow.conditions if name not in batch and name not in flow.null]
    if missing:
        raise ValueError(f"data: this flow is conditioned on {', '.join(missing)}, which the batch lacks")
    if flow.conditions and (condition is None or set(condition) != set(flow.conditions)):
        condition = _nulls(flow, len(x1))
    with evaluation_mode(flow.network):
        found = _measure(flow, x1, condition, seed)
        if not found.denoises:
            raise WrongConvention(_explain(flow, x1, condition, seed, found))
        for schedule in _other_paths(flow.path):
            other = _measure(flow.like(flow.network, path=schedule), x1, condition, seed)
            if other.denoises and sum(other.errors) < CLEARLY * sum(found.errors):
                raise WrongConvention(
                    f"this denoises, but with {_schedule_named(schedule)} the errors at all noise levels sum to "
                    f"{sum(other.errors):.3g} instead of {sum(found.errors):.3g}: most likely that is its schedule"
                )
    return replace(found, sampler=_compared(flow, condition, seed, steps, tolerance))


def _compared(flow: Flow, condition: Any, seed: int, steps: int, tolerance: float) -> float | None:
    """The difference to the model's own sampler, checked."""
    with evaluation_mode(flow.network):
        difference = _own_sampler(flow, condition, seed, steps)
    if difference is not None and not difference <= tolerance:
        raise WrongConvention(
            f"the model's own sampler and ours differ by {difference:.2g} (relative, {steps} steps; expected below "
            f"{tolerance:g}): most likely another scheduler (betas, spacing of steps, last step) than its file names"
        )
    return difference


def _measure(flow: Flow, x1: Tensor, condition: Any, seed: int) -> ConventionCheck:
    moved = on_path(flow)
    low, high = moved.interval
    variance = float((x1 - x1.mean(dim=0)).double().square().mean())
    x0 = torch.randn(x1.shape, generator=seeded(seed, 61), dtype=torch.float32).to(x1)
    levels, errors, linear = [], [], []
    for level in LEVELS:
        t = min(max(1 - level, low), high)
        at = torch.tensor(t, dtype=torch.promote_types(x1.dtype, torch.float32), device=x1.device)
        x = moved.path.sample(x0, x1, None, at)[0]
        error = float((moved.denoise(x, at, condition) - x1).double().square().mean())
        errors.append(error / variance if variance > 0 else float("inf"))
        levels.append(1 - t)
        linear.append((1 - t) ** 2 / ((1 - t) ** 2 + t**2 * variance))
    return ConventionCheck(tuple(levels), tuple(errors), tuple(linear), None)


def _falls(errors: tuple[float, ...], linear: tuple[float, ...]) -> bool:
    falling = all(b <= SLACK * a for a, b in pairwise(errors))
    return falling and all(e <= SLACK * bound for e, bound in zip(errors, linear, strict=True))


def _explain(flow: Flow, x1: Tensor, condition: Any, seed: int, found: ConventionCheck) -> str:
    """What was seen, and which of the usual confusions would make it right."""
    seen = ", ".join(f"{e:.2g} at noise {level:.2g}" for level, e in zip(found.levels, found.errors, strict=True))
    text = (
        f"this does not denoise as described ({flow.path.spec()['name']}, {flow.prediction.spec()['name']}): relative "
        f"error {seen}; expected a falling one, at most {found.linear[0]:.2g} to {found.linear[-1]:.2g}"
    )
    best: tuple[float, str] | None = None
    for cause, other, scaled in _suspects(flow):
        try:
            measured = _measure(other(), scaled(x1), condition, seed)
        except (ValueError, RuntimeError):  # this suspect cannot be asked at these times
            continue
        if measured.denoises:
            # Against what the linear estimate makes of data of this scale: smaller data have smaller errors by themselves.
            score = sum(e / bound for e, bound in zip(measured.errors, measured.linear, strict=True))
            best = (score, cause) if best is None or score < best[0] else best
    if best is not None:
        return f"{text}. Most likely {best[1]}"
    return f"{text}. No usual confusion explains it; are these the data it was trained on, scaled to [-1, 1]?"


Suspect = tuple[str, Callable[[], Flow], Callable[[Tensor], Tensor]]


def _suspects(flow: Flow) -> Iterator[Suspect]:
    """The flow under one other convention each, or the data under another scale."""
    network, path, prediction = flow.network, flow.path, flow.prediction

    def same(x: Tensor) -> Tensor:
        return x

    def changed(cause: str, **how: Any) -> Suspect:
        return cause, lambda: flow.like(_Changed(network, **how)), same

    yield changed("the time runs the other way (t = 1 is noise there)", time=lambda t: 1 - t)
    yield changed("the output has the other sign (noise - data)", sign=-1.0)
    yield changed(
        "time and sign are both reversed (velocity noise - data, t = 1 is noise)", time=lambda t: 1 - t, sign=-1.0
    )
    for factor in (1000.0, 999.0, 1e-3):
        cause = f"the scale of the time (the network wants {factor:g} t)"
        yield changed(cause, time=_times(factor))
    for name in ("velocity", "noise", "data", "v", "edm"):
        other: Prediction = build_prediction(name)
        if type(other) is not type(prediction):
            yield f"it predicts {name}", partial(flow.like, network, predicts=other), same
    for schedule in _other_paths(path):
        yield _schedule_named(schedule), partial(flow.like, network, path=schedule), same
    if isinstance(prediction, EDMPreconditioned):
        for scale in (0.25, 0.66, 1.0):
            other = replace(prediction, sigma_data=scale)
            yield f"sigma_data = {scale:g}", partial(flow.like, network, predicts=other), same
    for factor in (0.5, 2.0, 0.18215, 1 / 0.18215, 0.13025, 1 / 0.13025):
        yield (
            f"the scale of the data (it was trained on {factor:.4g} times these)",
            lambda: flow,
            _times(factor),
        )
    yield "the range of the data (it was trained on [-1, 1], these lie in [0, 1])", lambda: flow, lambda x: 2 * x - 1
    yield "the range of the data (it was trained on [0, 1], these lie in [-1, 1])", lambda: flow, lambda x: (x + 1) / 2


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda t: factor * t


def _schedule_named(path: AffinePath) -> str:
    described = ", ".join(f"{k} {v}" for k, v in path.spec().items() if k in ("name", "schedule"))
    return f"another schedule ({described})"


def _other_paths(path: AffinePath) -> Iterator[AffinePath]:
    usual = ((0.00085, 0.012), (1e-4, 0.02))
    if isinstance(path, Numbered):
        for schedule in ("linear", "scaled-linear", "cosine"):
            if schedule != path.schedule:
                yield replace(path, schedule=schedule, betas=None)
        for low, high in usual:
            if (path.beta_min, path.beta_max) != (low, high):
                yield replace(path, schedule="linear", beta_min=low, beta_max=high, betas=None)
    elif isinstance(path, VP):
        for low, high in usual:
            yield Numbered("linear", low, high)
        yield Numbered()


class _Changed(nn.Module):
    """A network with another time, sign or scale."""

    def __init__(self, network: nn.Module, time: Any = None, sign: float = 1.0, scale: float = 1.0):
        super().__init__()
        self.network, self.time, self.sign, self.scale = network, time, sign, scale

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        """The other convention's output."""
        t = t if self.time is None else self.time(t)
        return self.sign * self.network(self.scale * x, t, **conditions) / self.scale


def _nulls(flow: Flow, rows: int) -> dict[str, Tensor] | None:
    """Null conditions, where the batch names none."""
    if not flow.conditions or not all(name in flow.null for name in flow.conditions):
        return None
    rows_of = {name: torch.as_tensor(value, device=flow.device) for name, value in flow.null.items()}
    return {name: value.expand(rows, *value.shape) for name, value in rows_of.items()}


def _own_sampler(flow: Flow, condition: Any, seed: int, steps: int) -> float | None:
    """Largest relative difference to what the model's own sampler makes of 4 noises."""
    own: Any = getattr(flow.network, "own_sample", None)
    times: Any = getattr(flow.network, "own_times", None)
    if own is None or flow.shape is None:
        return None
    # DDIM's own grid is even only where the steps divide the schedule's length.
    count = getattr(getattr(flow.path, "origin", flow.path), "count", steps)
    steps = max(n for n in range(1, steps + 1) if count % n == 0)
    x0 = numbered_noise(seed, range(4), flow.shape, salt=62).to(flow.device, flow.dtype)
    some = (
        None
        if condition is None
        else {name: value[:1].expand(4, *value.shape[1:]) for name, value in condition.items()}
    )
    theirs = own(x0, steps, some)
    ours = denoising_steps(flow, x0, times(steps), some)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
