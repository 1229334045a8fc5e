"""A velocity field with the right amount of noise: the SDEs that share the marginals of a flow's ODE.

dX = (v + epsilon s) dt + sqrt(2 epsilon) dW, with s the score, has the marginals of dX = v dt for every epsilon(t) >= 0
(Albergo et al. 2303.08797, theorem 2.8; Song et al. 2011.13456). On the linear path s = -(x - t v) / (1 - t), a formula that
holds for independent noise and data only; after reflow there is no such SDE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.grids import make_grid
from pantarhei.flow.predictions import Velocity
from pantarhei.solve import Solution, ode, sde

if TYPE_CHECKING:
    from pantarhei.flow.flow import ConditionLike, Flow
    from pantarhei.flow.transforms import FieldTransform, Guidance

Epsilon = float | Callable[[float], float]


def fading(scale: float) -> Callable[[float], float]:
    """epsilon(t) = scale (1 - t)^2 / 2: noise that dies out towards the data, where the score is largest."""
    return lambda t: 0.5 * scale * (1 - t) ** 2


def transport_sde(
    flow: Flow,
    x: Tensor,
    times: Sequence[float],
    epsilon: Epsilon,
    *,
    steps: int | Sequence[float] = 100,
    method: Any = "euler_maruyama",
    grid: Any = "uniform",
    shift: float = 1.0,
    condition: ConditionLike = None,
    guidance: float | Guidance = 1.0,
    transforms: Sequence[FieldTransform] = (),
    generator: torch.Generator | None = None,
    **hooks: Any,
) -> Solution:
    """Carry states from `times[0]` to `times[1]` with noise, either way; both directions keep the flow's marginals.

    The score is unbounded where sigma vanishes. A step that touches such an end is one of the plain ODE (Heun, or Euler
    where the field must not be evaluated at the end).

    Args:
        flow: with independent Gaussian noise.
        x: states at `times[0]`, (B, *shape).
        times: first and last time, inside the flow's interval.
        epsilon: a number, or a function of the time; 0 is the ODE.
        steps: number of steps, or a whole grid.
        method: of `solve.sde`.
        grid, shift: spacing of the steps, see `make_grid`.
        condition, guidance, transforms: what changes the field; the score belongs to the changed field.
        generator: draws the noise.
        hooks: `before_step`, `after_step`, `observe`.

    Raises:
        ValueError: the flow's score is not known (its reason is given), or epsilon is negative.
    """
    flow.require_score()
    first, last = float(times[0]), float(times[-1])
    named = as_condition(condition, flow.null, x.shape[0])
    named = None if named is None else named.to(x.device)
    field = flow.field(guidance, transforms)
    forward = last > first
    if isinstance(steps, int):
        nodes = list(make_grid(steps, (min(first, last), max(first, last)), kind=grid, shift=shift, path=flow.path))
        nodes = nodes if forward else nodes[::-1]
    else:
        nodes = [float(t) for t in steps]
    sign = 1.0 if forward else -1.0

    def amount(t: float) -> float:
        value = float(epsilon(t)) if callable(epsilon) else float(epsilon)
        if not value >= 0:
            raise ValueError(f"epsilon: must not be negative, got {value} at t = {t:g}")
        return value

    def drift(x: Tensor, t: Tensor, named: Any = None) -> Tensor:
        velocity = field(x, t, named)
        noise = Velocity().ends(flow.path, x, t, velocity).noise
        return velocity - sign * amount(float(t)) / flow.path.at(t, x).sigma * noise

    ends = torch.tensor([nodes[0], nodes[-1]], dtype=torch.float64)
    clean = (flow.path.sigma(ends) < 1e-6).tolist()
    inner = nodes[1 if clean[0] else 0 : len(nodes) - 1 if clean[1] else len(nodes)]
    evaluations, options = 0, {"condition": named, **hooks}
    if clean[0]:
        opening = ode(field, x, nodes[:2], method="euler", steps=1, **options)
        x, evaluations = opening.x, opening.evaluations
    if len(inner) > 1:
        solution = sde(
            drift,
            lambda t: math.sqrt(2 * amount(t)),
            x,
            (inner[0], inner[-1]),
            steps=inner,
            method=method,
            generator=generator,
            **options,
        )
        x, evaluations = solution.x, evaluations + solution.evaluations
    if clean[1]:
        closing = ode(
            field, x, nodes[-2:], method="heun" if flow.interval[1] >= nodes[-1] else "euler", steps=1, **options
        )
        x, evaluations = closing.x, evaluations + closing.evaluations
    xs = torch.stack([x])
    return Solution(x, (first, last), xs, evaluations, evaluations * x.shape[0], len(nodes) - 1, 0)
