"""EDM's stochastic sampler (Karras et al. 2206.00364, algorithm 2): a little noise before each of Heun's steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.grids import Grid, solver_grid
from pantarhei.flow.jumps import Move, renoised
from pantarhei.flow.modes import evaluation_mode

if TYPE_CHECKING:
    from pantarhei.flow.flow import ConditionLike, Flow


@dataclass(frozen=True)
class Churn:
    """How much noise: the level rises by the factor 1 + min(amount / steps, sqrt(2) - 1) before a step.

    Attributes:
        amount: S_churn, over all steps.
        least, largest: S_tmin and S_tmax, levels sigma / alpha between which there is any.
        inflation: S_noise, deviation of the noise.
    """

    amount: float = 40.0
    least: float = 0.05
    largest: float = 50.0
    inflation: float = 1.003

    def __post_init__(self) -> None:
        if self.amount < 0 or self.inflation <= 0 or not 0 <= self.least <= self.largest:
            raise ValueError(f"churn: amount >= 0, inflation > 0 and 0 <= least <= largest are needed, got {self}")


@torch.no_grad()
def churned_sample(
    flow: Flow,
    x0: Tensor,
    *,
    churn: Churn | None = None,
    steps: int | Grid = 17,
    condition: ConditionLike = None,
    generator: torch.Generator | None = None,
    noise: Callable[[int, Tensor], Tensor] | None = None,
    decode: bool = True,
    **options: Any,
) -> Tensor:
    """Samples of a diffusion model by Heun's steps with a little noise before each, and one closing denoising step.

    Args:
        flow: with a data and a noise estimate, on an affine path; best on EDM's.
        x0: unit source draws (B, *shape).
        churn: how much noise.
        steps: steps between the first and the last level (18 levels: 17 steps, and the closing one), or a grid.
        condition, decode: as in `Flow.sample`.
        generator: draws the noise, once a step even where none is added.
        noise: gives it instead: `noise(number, x)`, standard normal and like x, for the step of a number.
        options: `guidance`, `transforms`, `grid` of `Flow.transport`.

    Raises:
        ValueError: noise and data are not independent, so that noise cannot be added; or a grid that begins elsewhere.
    """
    flow.require_score()
    churn, path = churn or Churn(), flow.path
    grid = options.pop("grid", "edm")
    nodes = solver_grid(flow.path, steps, flow.interval, grid)
    if abs(nodes[0] - flow.interval[0]) > 1e-6:
        raise ValueError(f"steps: the grid must begin at the first time, {flow.interval[0]:g}, got {nodes[0]:g}")
    levels = _levels(flow, nodes)
    gain = min(churn.amount / len(nodes), math.sqrt(2) - 1)  # the closing step counts
    x = flow.first_sigma * x0
    with evaluation_mode(flow.network):
        for number, (t, following) in enumerate(pairwise(nodes)):
            drawn = (
                noise(number, x)
                if noise is not None
                else torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            )
            if churn.least <= levels[number] <= churn.largest and gain > 0:
                raised = min(levels[number] * (1 + gain), levels[0])
                earlier = float(path.time_at(torch.tensor(1 / raised, dtype=torch.float64)))
                x = renoised(path, x, Move(t, earlier), churn.inflation * drawn)
                t = earlier
            x = flow.transport(x, (t, following), steps=1, method="edm", condition=condition, **options).x
        x = _denoised(flow, x, nodes[-1], condition, options)
    return flow.decode(x) if decode else x


def _levels(flow: Flow, nodes: Grid) -> list[float]:
    times = torch.tensor(nodes, dtype=torch.float64)
    return (flow.path.sigma(times) / flow.path.alpha(times).clamp_min(1e-30)).tolist()


def _denoised(flow: Flow, x: Tensor, t: float, condition: ConditionLike, options: dict[str, Any]) -> Tensor:
    from pantarhei.flow.estimates import Estimates

    time = x.new_full((), t, dtype=torch.promote_types(x.dtype, torch.float32))
    guided = Estimates(flow, options.get("guidance", 1.0), options.get("transforms", ()))
    return guided.ends(x, time, as_condition(condition, flow.null, x.shape[0], x.device)).data
