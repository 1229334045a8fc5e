"""First-order paths: trajectories along which the estimates of data and noise do not change (Wang et al. 2410.07303).

Such a path is x_t = alpha_t x1 + sigma_t x0 with its own ends, whatever the schedule: straight for the linear path, a curve
for VP. One step of `DDIM` then goes anywhere on it exactly. (It has nothing to do with the order of an ODE.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.flow import Flow, TrajectoryModel, evaluation_mode, on_path
from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import as_condition
from pantarhei.flow.predictions import Ends
from pantarhei.straighten.straightness import straightness


def segment_ends(path: AffinePath, x_s: Tensor, s: Tensor, x_e: Tensor, e: Tensor) -> Ends:
    """The data and noise of the first-order path through two states.

    x0 = (x_e / alpha_e - x_s / alpha_s) / (sigma_e / alpha_e - sigma_s / alpha_s) and x1 = (x_e - sigma_e x0) / alpha_e,
    written without divisions by alpha or sigma, so that s may be pure noise and e clean.

    Args:
        path: an affine path.
        x_s, x_e: states (B, ...).
        s, e: their times, 0-d or (B,), s != e.
    """
    at, to = path.at(s, x_s), path.at(e, x_e)
    determinant = at.sigma * to.alpha - at.alpha * to.sigma
    return Ends(
        (at.sigma * x_e - to.sigma * x_s) / determinant,
        (to.alpha * x_s - at.alpha * x_e) / determinant,
    )


@dataclass(frozen=True)
class FirstOrder:
    """How far a flow's trajectories are from first-order ones.

    Attributes:
        data: FO = int E |x1hat(x_t, t) - its mean over t|^2 dt, summed over elements; 0 for first-order paths.
        noise: the same of the noise estimate.
        data_relative: `data` divided by the variance of the samples, summed over elements.
        straightness: S / E|Z1 - Z0|^2 on the linear path, after the exact change of path where the flow has another.
        raw_straightness: S / E|x_1 - x_0|^2 of the states as they are, which no VP path can make small.
        gaps: number of steps -> mean squared distance per element to the finely solved sample of the same noise.
    """

    data: float
    noise: float
    data_relative: float
    straightness: float
    raw_straightness: float
    gaps: dict[int, float]


@torch.no_grad()
def first_order(
    flow: Flow,
    x0: Tensor,
    *,
    condition: Any = None,
    steps: int = 64,
    gaps: tuple[int, ...] = (1, 2, 4, 8),
    teacher: Tensor | None = None,
) -> FirstOrder:
    """Measure first-orderness along finely solved trajectories.

    Args:
        flow: on an affine path.
        x0: unit source draws (B, *shape).
        condition: as in `Flow.sample`.
        steps: Heun steps of the trajectories, even in the time of the linear path and at least 50.
        gaps: numbers of DDIM steps to compare with them.
        teacher: what the samples are compared with; the finely solved samples themselves by default.

    Raises:
        ValueError: too few steps, or a path that is not affine.
    """
    if steps < 50:
        raise ValueError(f"steps: at least 50 are needed for a meaningful measure, got {steps}")
    moved = on_path(flow)
    moved.require_field()
    condition = as_condition(condition, flow.null, x0.shape[0], flow.device)
    low, high = moved.interval
    times = [low + (high - low) * i / steps for i in range(steps + 1)]
    weights = torch.full((steps + 1,), (high - low) / steps, dtype=torch.float64)
    weights[[0, -1]] /= 2
    with evaluation_mode(flow.network):
        start = (1 - low) * x0
        states = moved.transport(start, times, steps=tuple(times), method="heun", condition=condition).xs
        sums = {name: [torch.zeros_like(x0, dtype=torch.float64) for _ in range(2)] for name in ("data", "noise")}
        for t, x, weight in zip(times, states, weights.tolist(), strict=True):
            at = torch.tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
            found = moved.ends(x, at, condition)
            for name, value in zip(("data", "noise"), found, strict=True):
                sums[name][0] += weight * value.double()
                sums[name][1] += weight * value.double().square()
        total = float(weights.sum())
        spread = {
            name: float((second / total - (first / total).square()).clamp_min(0).flatten(1).sum(1).mean())
            for name, (first, second) in sums.items()
        }
        raw, chord = _raw_straightness(flow, x0, condition, steps)
        fine = flow.sample(x0=x0, steps=2 * steps, method="edm", condition=condition, decode=False)
        reference = fine if teacher is None else teacher
        found_gaps = {n: float((_few(flow, x0, n, condition) - reference).double().square().mean()) for n in gaps}
    variance = float(fine.double().var(dim=0).sum())
    mapped = straightness(moved, x0, condition=condition, steps=steps)
    return FirstOrder(
        spread["data"], spread["noise"], spread["data"] / variance, mapped.normalised, raw / chord, found_gaps
    )


def _few(flow: Flow, x0: Tensor, steps: int, condition: Any) -> Tensor:
    """Samples of so many evaluations, with a clean end."""
    return flow.sample(x0=x0, steps=steps, method="ddim", final=clean_end(flow), condition=condition, decode=False)


def clean_end(flow: Flow) -> Any:
    """The `final` of `Flow.sample` with which N steps are N evaluations and leave no noise."""
    if isinstance(flow, TrajectoryModel):
        return "state"
    left = float(flow.path.sigma(torch.tensor(flow.interval[1], dtype=torch.float64)))
    return "clean" if left > 1e-6 else "state"


def _raw_straightness(flow: Flow, x0: Tensor, condition: Any, steps: int) -> tuple[float, float]:
    """S and E|x_1 - x_0|^2 of the flow's own states."""
    low, high = flow.interval
    times = [low + (high - low) * i / steps for i in range(steps + 1)]
    first = float(flow.path.sigma(torch.tensor(low, dtype=torch.float64)))
    states = flow.transport(first * x0, times, steps=tuple(times), method="edm", condition=condition).xs
    shift = (states[-1] - states[0]).double()
    speeds = (states[1:] - states[:-1]).double() / (times[1] - times[0])
    gap = (shift / (high - low) - speeds).square().flatten(2).sum(2).mean()
    return float(gap) * (high - low), float(shift.square().flatten(1).sum(1).mean())
