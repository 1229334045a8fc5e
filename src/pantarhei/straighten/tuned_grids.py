"""The best grid of few steps for a given flow, from one fine solution and no training.

Of all grids of N steps over given nodes the one with the least sum of one-step errors is found by dynamic programming, as
Watson et al. 2106.03802 do for diffusion models (there with the likelihood's terms, here with the steps' own errors).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pantarhei.flow import Flow, evaluation_mode, make_grid
from pantarhei.flow.conditions import as_condition
from pantarhei.flow.grids import Grid
from pantarhei.flow.predictions import Velocity


@torch.no_grad()
def tuned_grid(
    flow: Flow,
    steps: int,
    x0: Tensor,
    *,
    condition: Any = None,
    guidance: float = 1.0,
    nodes: int = 64,
) -> Grid:
    """The grid of `steps` DDIM (on the linear path: Euler) steps with the least summed squared one-step error.

    Costs 2 x `nodes` evaluations for the fine solution; the errors of all steps between two nodes follow from it. The sum of
    one-step errors is not the error at the end: of the grid found, the even one and the one even in log(alpha / sigma), that
    whose samples end nearest to the fine ones is taken.

    Args:
        flow: on an affine path.
        steps: how many.
        x0: some tens of unit source draws, (B, *shape).
        condition, guidance: as the samples will have.
        nodes: of the fine solution, more than `steps`.

    Raises:
        ValueError: for steps < 1 or not fewer than nodes.
    """
    if not 1 <= steps < nodes:
        raise ValueError(f"steps: must lie in 1 to {nodes - 1}, got {steps}")
    low, high = flow.interval
    half = nodes // 2
    # Even in time and even in log(alpha / sigma): neither alone resolves both ends.
    by_level = make_grid(nodes - half, (low, high), kind="logsnr", path=flow.path)
    times = sorted({*make_grid(half, (low, high)), *by_level})
    times = [times[0], *(b for a, b in pairwise(times) if b - a > 1e-6)]
    times[-1] = high
    with evaluation_mode(flow.network):
        start = flow.first_sigma * x0
        states = flow.transport(
            start, times, steps=tuple(times), method="heun", condition=condition, guidance=guidance
        ).xs
        field = flow.field(guidance)
        count = len(times)
        cost = torch.full((count, count), float("inf"), dtype=torch.float64)
        at = [torch.tensor(t, dtype=torch.promote_types(x0.dtype, torch.float32), device=x0.device) for t in times]
        coefficients = [(float(flow.path.alpha(t.double())), float(flow.path.sigma(t.double()))) for t in at]
        named = as_condition(condition, flow.null, len(x0), flow.device)
        for i in range(count - 1):
            data, noise = Velocity().ends(flow.path, states[i], at[i], field(states[i], at[i], named))
            for j in range(i + 1, count):
                alpha, sigma = coefficients[j]
                error = alpha * data + sigma * noise - states[j]
                # Errors are compared in units of the data: later steps shrink a state's error by sigma, not its data's.
                cost[i, j] = float(error.double().square().mean()) / (alpha + sigma) ** 2
        even = make_grid(steps, (low, high), path=flow.path)
        level = make_grid(steps, (low, high), kind="logsnr", path=flow.path)
        candidates = [shortest(times, cost, steps), shortest(times, cost.sqrt(), steps), even, level]
        options = {"method": "ddim", "condition": condition, "guidance": guidance}
        ends = [flow.transport(start, (low, high), steps=grid, **options).x for grid in candidates]
        errors = [float((end - states[-1]).double().square().mean()) for end in ends]
    return candidates[errors.index(min(errors))]


def shortest(times: list[float], cost: Tensor, steps: int) -> Grid:
    """The cheapest way from the first to the last node in exactly `steps` steps.

    Args:
        times: the nodes, rising.
        cost: of a step from node i to node j > i, (N, N), infinite elsewhere.
        steps: how many.
    """
    count = len(times)
    best = torch.full((steps + 1, count), float("inf"), dtype=torch.float64)
    best[0, 0] = 0.0
    came = torch.zeros(steps + 1, count, dtype=torch.long)
    for k in range(1, steps + 1):
        total = best[k - 1][:, None] + cost
        best[k], came[k] = total.min(dim=0)
    node, chosen = count - 1, [count - 1]
    for k in range(steps, 0, -1):
        node = int(came[k, node])
        chosen.append(node)
    return tuple(times[i] for i in reversed(chosen))
