"""Flow maps: where points go, and the gradient of that map, of a fluid or of a generative model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.solve.methods import MethodName
from pantarhei.solve.ode import ode
from pantarhei.solve.state import Field
from pantarhei.solve.steps import Step


@dataclass(frozen=True)
class FlowMap:
    """The map F of points from time t0 to t1.

    Attributes:
        x0, x1: start and end positions, (*grid, D).
        gradient: dF_i/dx_j at the start positions, (*grid, D, D), or None.
        spacing: distance of neighbouring start points along each grid axis, or None where there is no grid.
        interval: (t0, t1).
        evaluations: calls of the field.
    """

    x0: Tensor
    x1: Tensor
    gradient: Tensor | None
    spacing: tuple[float, ...] | None
    interval: tuple[float, float]
    evaluations: int


def flow_map(
    field: Field,
    points: Tensor,
    t0: float,
    t1: float,
    *,
    gradient: Literal["grid", "jvp"] | None = "jvp",
    spacing: Sequence[float] | None = None,
    method: MethodName | Step = "tsit5",
    steps: int | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    condition: Any = None,
) -> FlowMap:
    """Carry points from t0 to t1 (t1 < t0 runs backwards) and differentiate the map.

    Args:
        field: `field(x, t[, condition])` on positions of shape (N, D).
        points: start positions (*grid, D); for `gradient="grid"` a regular grid whose i-th axis varies the i-th
            coordinate (D grid axes). float64 is advised: separations are small differences of positions.
        gradient: "jvp" integrates the variational equation dG/dt = grad v(F, t) G with forward-mode derivatives of the
            field: the exact gradient of the solved map. "grid" takes central differences between neighbouring end
            points (one-sided at the borders): cheaper, smooths, and gives the separation that the grid resolves.
        spacing: grid spacing along each axis; found from `points` where not given.
        method, steps, rtol, atol, condition: as in `ode`; error control is joint over all points and tangents.

    Raises:
        ValueError: if `points` is not a regular grid where one is needed.
    """
    if points.ndim < 2:
        raise ValueError(f"points: shape (*grid, D) is needed, got {tuple(points.shape)}")
    dimension = points.shape[-1]
    flat = points.reshape(-1, dimension)
    options: dict[str, Any] = {"method": method, "steps": steps, "rtol": rtol, "atol": atol}
    if gradient == "grid" or spacing is not None:
        spacing = _check_spacing(points, spacing)
    if gradient == "jvp":
        identity = torch.eye(dimension, dtype=points.dtype, device=points.device).expand(flat.shape[0], -1, -1)
        solution = ode(_variational(field, condition), (flat, identity.contiguous()), (t0, t1), **options)
        x1, jacobian = solution.x
        result = jacobian.reshape(*points.shape, dimension)
    elif gradient in ("grid", None):
        solution = ode(field, flat, (t0, t1), condition=condition, **options)
        x1 = solution.x
        result = None
        if gradient == "grid" and spacing is not None:
            ends = x1.reshape(points.shape)
            columns = torch.gradient(ends, spacing=[float(s) for s in spacing], dim=tuple(range(dimension)))
            result = torch.stack(columns, dim=-1)
    else:
        raise ValueError(f"gradient: must be 'grid', 'jvp' or None, got {gradient!r}")
    kept = None if spacing is None else tuple(float(s) for s in spacing)
    return FlowMap(points, x1.reshape(points.shape), result, kept, (t0, t1), solution.evaluations)


def _variational(field: Field, condition: Any) -> Field:
    def both(state: tuple[Tensor, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        x, jacobian = state

        def velocity(position: Tensor) -> Tensor:
            return field(position, t) if condition is None else field(position, t, condition)

        # One forward-mode product a column of G; all rows at once, since points do not interact.
        columns, value = [], None
        for j in range(jacobian.shape[-1]):
            pair: Any = torch.func.jvp(velocity, (x,), (jacobian[..., j].contiguous(),))
            value, column = pair
            columns.append(column)
        assert value is not None
        return value, torch.stack(columns, dim=-1)

    return both


def _check_spacing(points: Tensor, spacing: Sequence[float] | None) -> tuple[float, ...]:
    dimension = points.shape[-1]
    if points.ndim != dimension + 1 or min(points.shape[:-1]) < 2:
        raise ValueError(
            f"points: gradient='grid' needs a grid of {dimension} axes with at least two points each, shape (n1, ..., "
            f"n{dimension}, {dimension}), got {tuple(points.shape)}"
        )
    found = []
    for axis in range(dimension):
        step = points.diff(dim=axis)[..., axis]
        if not torch.allclose(step, step.flatten()[0].expand_as(step), rtol=1e-3, atol=0.0):
            raise ValueError(f"points: axis {axis} is not evenly spaced in coordinate {axis}")
        found.append(float(step.double().mean()))
    if spacing is not None and any(abs(a - b) > 1e-3 * abs(b) for a, b in zip(spacing, found, strict=True)):
        raise ValueError(f"spacing: got {tuple(spacing)}, but the points are spaced by {tuple(found)}")
    return tuple(found)
