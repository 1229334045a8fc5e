"""How straight a flow's trajectories are, and what its coupling costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.flow import Flow, evaluation_mode

# Convex functions c of the displacement; one rectification of a coupling raises none of their means.
COSTS: dict[str, Callable[[Tensor], Tensor]] = {
    "|d|": lambda d: d.norm(dim=1),
    "|d|^2": lambda d: d.square().sum(dim=1),
    "|d|^4": lambda d: d.square().sum(dim=1).square(),
    "max |d_i|": lambda d: d.abs().amax(dim=1),
}


def transport_costs(displacement: Tensor) -> dict[str, float]:
    """Mean of each cost of `COSTS` over displacements (B, ...)."""
    flat = displacement.flatten(1).double()
    return {name: float(cost(flat).mean()) for name, cost in COSTS.items()}


@dataclass(frozen=True)
class Straightness:
    """Liu et al. 2209.03003, section 2.2.

    Attributes:
        value: S = int_0^1 E |(Z1 - Z0) - dZ_t/dt|^2 dt, summed over elements; 0 for straight paths at constant speed.
        normalised: S / E |Z1 - Z0|^2.
        over_time: the integrand at `times`.
        times: where it was evaluated.
        costs: mean of each convex cost of Z1 - Z0.
    """

    value: float
    normalised: float
    over_time: tuple[float, ...]
    times: tuple[float, ...]
    costs: dict[str, float]


@torch.no_grad()
def straightness(flow: Flow, x0: Tensor, *, condition: Any = None, steps: int = 64) -> Straightness:
    """Measure S from velocities along finely solved trajectories.

    A coarse solve would look straight by construction (one Euler step always is), hence at least 50 Heun steps.

    Args:
        flow: a flow on the linear path (elsewhere straight is not first-order; map it to the linear path first).
        x0: unit source draws, (B, *shape).
        condition: as in `Flow.sample`.
        steps: Heun steps.

    Raises:
        ValueError: for fewer than 50 steps, or a path that is not linear.
    """
    if steps < 50:
        raise ValueError(f"steps: at least 50 are needed for a meaningful straightness, got {steps}")
    if flow.path.spec()["name"] != "linear":
        raise ValueError(f"flow: straightness is defined on the linear path, this flow's is {flow.path.spec()['name']}")
    flow.require_field()
    low, high = flow.interval
    times = [low + (high - low) * i / steps for i in range(steps + 1)]
    with evaluation_mode(flow.network):
        states = flow.transport(x0, times, steps=tuple(times), method="heun", condition=condition).xs
        shift = states[-1] - states[0]
        gaps = []
        for t, x in zip(times, states, strict=True):
            velocity = flow.velocity(x, torch.tensor(t, dtype=x.dtype, device=x.device), condition)
            gaps.append(float((shift / (high - low) - velocity).square().flatten(1).sum(dim=1).mean()))
    integral = float(torch.trapezoid(torch.tensor(gaps, dtype=torch.float64), torch.tensor(times, dtype=torch.float64)))
    costs = transport_costs(shift)
    return Straightness(integral, integral / costs["|d|^2"], tuple(gaps), tuple(times), costs)
