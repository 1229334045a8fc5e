"""What one rectification did to a coupling: the balance of its costs, and whether the marginals stayed.

Source: Liu et al. 2209.03003, section 3 and appendix; Liu 2209.14577.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.flow import Flow, evaluation_mode
from pantarhei.straighten.straightness import transport_costs


@dataclass(frozen=True)
class Balance:
    """E|X1 - X0|^2 = E|Z1 - Z0|^2 + S + V, with Z the flow's own coupling.

    Exact for the minimiser of the training loss on the linear path; for a trained network the remainder measures how far
    it is from that.

    Attributes:
        given: E|X1 - X0|^2 of the coupling that was rectified.
        rectified: E|Z1 - Z0|^2.
        straightness: S = int E|(Z1 - Z0) - dZ_t/dt|^2 dt.
        crossing: V = int E|X1 - X0 - v(X_t, t)|^2 dt, the training loss (summed over elements); 0 where no lines cross.
        costs_given, costs_rectified: means of convex costs of the displacement, by name.
    """

    given: float
    rectified: float
    straightness: float
    crossing: float
    costs_given: dict[str, float]
    costs_rectified: dict[str, float]

    @property
    def remainder(self) -> float:
        """(given - rectified - S - V) / given."""
        return (self.given - self.rectified - self.straightness - self.crossing) / self.given


@torch.no_grad()
def balance(flow: Flow, x0: Tensor, x1: Tensor, *, condition: Any = None, steps: int = 100) -> Balance:
    """Measure every part of the balance on pairs of the coupling that a flow was trained on.

    Args:
        flow: on the linear path.
        x0, x1: pairs, (N, *shape): independent draws for a first flow, stored pairs for a reflowed one.
        condition: theirs.
        steps: Heun steps and midpoints in time, at least 50.

    Raises:
        ValueError: for fewer than 50 steps, pairs that differ in shape, or a path that is not linear.
    """
    if steps < 50:
        raise ValueError(f"steps: at least 50 are needed, got {steps}")
    if x0.shape != x1.shape:
        raise ValueError(f"x0, x1: pairs are needed, got shapes {tuple(x0.shape)} and {tuple(x1.shape)}")
    if flow.path.spec()["name"] != "linear":
        raise ValueError(f"flow: the balance holds on the linear path, this flow's is {flow.path.spec()['name']}")
    flow.require_field()
    low, high = flow.interval
    nodes = [low + (high - low) * i / steps for i in range(steps + 1)]
    shift = x1 - x0
    crossing = curvature = 0.0
    with evaluation_mode(flow.network):
        states = flow.transport(x0, nodes, steps=tuple(nodes), method="heun", condition=condition).xs
        own = states[-1] - states[0]
        for i in range(steps):
            middle = torch.tensor((nodes[i] + nodes[i + 1]) / 2, dtype=x0.dtype, device=x0.device)
            x_t, slope = flow.path.sample(x0, x1, None, middle)
            crossing += _mean_square(slope - flow.velocity(x_t, middle, condition)) / steps
            # Velocities at both ends of a step and its chord, by Simpson's rule, give the square's mean over the step.
            ends = [flow.velocity(states[j], torch.tensor(nodes[j]).to(x0), condition) for j in (i, i + 1)]
            chord = (states[i + 1] - states[i]) / (nodes[i + 1] - nodes[i])
            parts = [_mean_square(own / (high - low) - v) for v in (ends[0], chord, ends[1])]
            curvature += (parts[0] + 4 * parts[1] + parts[2]) / 6 / steps
    return Balance(
        _mean_square(shift), _mean_square(own), curvature, crossing, transport_costs(shift), transport_costs(own)
    )


@dataclass(frozen=True)
class MarginalCheck:
    """Z_t against X_t at one time: their energy distance, and the chance of a larger one if they had the same law."""

    time: float
    distance: float
    p_value: float


@torch.no_grad()
def check_marginals(
    flow: Flow,
    x0: Tensor,
    x1: Tensor,
    fresh: Tensor,
    *,
    condition: Any = None,
    times: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    steps: int = 100,
    permutations: int = 199,
    generator: torch.Generator | None = None,
) -> tuple[MarginalCheck, ...]:
    """Whether law(Z_t) = law(X_t), by energy distance and a permutation test.

    Args:
        flow: the flow.
        x0, x1: pairs of the coupling it was trained on, (N, *shape).
        fresh: other source draws, which start Z (the test needs independent samples), (M, *shape).
        condition: of the fresh draws.
        times: when to look.
        steps: Heun steps of the flow over the whole interval.
        permutations: of the test; the least p-value is 1 / (permutations + 1).
        generator: of the test.
    """
    low, high = flow.interval
    times = [min(max(float(t), low), high) for t in times]
    nodes = sorted({low, high, *(low + (high - low) * i / steps for i in range(1, steps)), *times})
    with evaluation_mode(flow.network):
        states = flow.transport(fresh, nodes, steps=tuple(nodes), method="heun", condition=condition).xs
    found = []
    for time in times:
        z = states[nodes.index(float(time))].flatten(1)
        t = torch.full((len(x0),), float(time), dtype=x0.dtype, device=x0.device)
        x = flow.path.sample(x0, x1, None, t)[0].flatten(1)
        p = metrics.permutation_test(metrics.energy_distance, z, x, permutations=permutations, generator=generator)
        found.append(MarginalCheck(float(time), metrics.energy_distance(z, x), p))
    return tuple(found)


def _mean_square(x: Tensor) -> float:
    return float(x.double().square().flatten(1).sum(dim=1).mean())
