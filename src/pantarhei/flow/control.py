"""How far a flow's samples can be from the data: what errors of the drift allow the Kullback-Leibler divergence to be.

For an SDE with noise epsilon(t) > 0, KL(rho_1 || model) <= int E|b^ - b|^2 / (4 epsilon) dt, with b = v + epsilon s and the
mean over the true x_t; hence <= int (E|v^ - v|^2 / (2 epsilon) + epsilon E|s^ - s|^2 / 2) dt (Albergo et al. 2303.08797,
whose printed constant in front of the losses is a factor 2 smaller than this safe one). The ODE has no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.noise_amounts import Epsilon

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow
    from pantarhei.flow.interpolation import Interpolation


class Control(NamedTuple):
    """Bounds on the divergence in nats, and the errors behind them.

    Attributes:
        bound: int E|b^ - b|^2 / (4 epsilon) dt.
        split: the looser bound from the two errors.
        velocity, score: int E|v^ - v|^2 dt and int E|s^ - s|^2 dt.
        best_epsilon: sqrt(velocity / score), the constant epsilon with the least split bound (inf for an exact score).
    """

    bound: float
    split: float
    velocity: float
    score: float
    best_epsilon: float


@torch.no_grad()
def kl_control(
    flow: Flow,
    reference: Flow,
    x1: Tensor,
    epsilon: Epsilon,
    *,
    times: int = 100,
    interval: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> Control:
    """The bound for a flow against one whose fields are right (a closed form, or a better trained flow).

    Args:
        flow: what is asked about.
        reference: on the same path, with the true fields.
        x1: data (N, *shape); x0 is drawn from the reference's source.
        epsilon: the noise of the SDE, a positive number or function of t.
        times: midpoints of so many equal parts of the interval; the data are used once for each.
        interval: where the errors are integrated; by default the flow's, less 1 % at ends where the score is unbounded.
        generator: draws x0 and the latent.

    Raises:
        ValueError: a score is not known, or epsilon is not positive.
    """
    with evaluation_mode(flow.network), evaluation_mode(reference.network):
        return _control(flow, reference, x1, epsilon, times, interval, generator)


def _control(
    flow: Flow,
    reference: Flow,
    x1: Tensor,
    epsilon: Epsilon,
    times: int,
    interval: tuple[float, float] | None,
    generator: torch.Generator | None,
) -> Control:
    flow.require_score()
    reference.require_score()
    low, high = interval or (max(flow.interval[0], 0.01), min(flow.interval[1], 0.99))
    part = (high - low) / times
    totals = torch.zeros(4, dtype=torch.float64)
    for i in range(times):
        moment = low + (i + 0.5) * part
        amount = float(epsilon(moment)) if callable(epsilon) else float(epsilon)
        if not amount > 0:
            raise ValueError(f"epsilon: the bound needs a positive value, got {amount} at t = {moment:g}")
        t = torch.tensor(moment, dtype=torch.promote_types(x1.dtype, torch.float32), device=x1.device)
        x0 = reference.source.draw(x1.shape, x1, None, generator)
        z = torch.randn(x1.shape, generator=generator, dtype=x1.dtype, device=x1.device)
        x_t, _ = reference.path.sample(x0, x1, z, t)
        velocity = flow.velocity(x_t, t) - reference.velocity(x_t, t)
        score = flow.score(x_t, t) - reference.score(x_t, t)
        errors = [_mean_square(part) for part in (velocity + amount * score, velocity, score)]
        split = errors[1] / (2 * amount) + amount * errors[2] / 2
        totals += part * torch.tensor([errors[0] / (4 * amount), split, errors[1], errors[2]], dtype=torch.float64)
    bound, split, of_velocity, of_score = totals.tolist()
    best = math.sqrt(of_velocity / of_score) if of_score > 0 else math.inf
    return Control(bound, split, of_velocity, of_score, best)


class LossGap(NamedTuple):
    """By how much a flow's loss exceeds another's, a field: the mean and its standard error."""

    mean: float
    error: float


@torch.no_grad()
def loss_gap(
    flow: Flow,
    other: Flow,
    batch: Mapping[str, Tensor],
    objective: Interpolation,
    *,
    draws: int = 16,
    seed: int = 0,
) -> dict[str, LossGap]:
    """Differences of two flows' quadratic losses on the same draws of noise and time, field by field.

    A loss alone says nothing about the divergence, for its minimum is not known; the difference of two is half the
    difference of their mean squared errors, so that gap / epsilon (velocity) and epsilon gap (score) are what the better
    flow takes off the split bound. Losses are means over dimensions: multiply by their number.

    Args:
        flow, other: on the same path, predicting the same fields.
        batch: held-out data.
        objective: the training objective.
        draws: how often the batch is used.
        seed: of the draws.

    Raises:
        ValueError: the flows differ in path or fields.
    """
    if flow.prediction != other.prediction or flow.path != other.path:
        raise ValueError("other: losses can be compared of flows on one path that predict the same fields")
    found: dict[str, list[Tensor]] = {}
    for i in range(draws):
        sides = []
        for each in (flow, other):
            generator = torch.Generator(device=batch["x1"].device).manual_seed(seed * 1_000_003 + i)
            sides.append(objective.rows(each, batch, generator))
        for (name, first), (_, second) in zip(*sides, strict=True):
            found.setdefault(name, []).append(first - second)
    gaps = {}
    for name, parts in found.items():
        rows = torch.stack(parts).mean(dim=0).double()
        gaps[name] = LossGap(float(rows.mean()), float(rows.std() / math.sqrt(len(rows))))
    return gaps


def _mean_square(error: Tensor) -> float:
    return float(error.flatten(1).double().square().sum(dim=1).mean())
