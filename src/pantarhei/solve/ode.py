"""`ode`: integrate a field between any two real times, on a given grid or with error control."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.solve.adaptive import Tolerance, solve_joint, solve_per_sample
from pantarhei.solve.methods import MethodName, as_step
from pantarhei.solve.state import CountedField, Field, State, check_state, half_types, in_types, map_state, wide
from pantarhei.solve.steps import Step, hermite

# Changes the state around a step; None means that it did not.
Hook = Callable[[State, float, int], State | None]


@dataclass(frozen=True)
class Solution:
    """A solved trajectory.

    Attributes:
        x: the state at the last time.
        times: the reported times, as asked.
        xs: the states at `times`, stacked along a new first dimension (per leaf for tuple states).
        evaluations: calls of the field.
        rows: batch rows evaluated, summed over calls (the cost where rows finish at different times).
        accepted, rejected: steps; in per-sample control summed over rows.
    """

    x: State
    times: tuple[float, ...]
    xs: State
    evaluations: int
    rows: int
    accepted: int
    rejected: int


def ode(
    field: Field,
    x: State,
    times: Sequence[float] | Tensor = (0.0, 1.0),
    *,
    method: MethodName | Step = "dopri5",
    steps: int | Sequence[float] | Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    control: Literal["joint", "per_sample"] = "joint",
    first_step: float | None = None,
    max_steps: int = 100_000,
    condition: Any = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
    observe: Callable[[State, float, int], None] | None = None,
) -> Solution:
    """Solve dx/dt = field(x, t[, condition]) through `times`.

    Args:
        field: a callable whose output is like `x`; `t` reaches it as a 0-d tensor, or (B,) in per-sample control.
        x: state at `times[0]`: a tensor, or a tuple of tensors, of any floating-point dtype. Half precision is what the
            field sees; steps are summed, and hooks called, in single precision.
        times: two or more strictly monotone real numbers, rising or falling; the states at all of them are reported.
        method: a name (euler, midpoint, heun, rk4, bosh3, dopri5, tsit5) or any object with the `Step` protocol.
        steps: number of equal steps from the first to the last time, or the whole grid. Without it, methods with an
            error estimate (bosh3, dopri5, tsit5) choose their steps and the others step from time to time.
            Reported times inside a step come from the method's continuous extension.
        rtol, atol: tolerances of the error control, in the units of the state.
        control: "joint" controls the root mean square over the whole state, as SciPy does; "per_sample" gives each row
            steps of its own and stops evaluating a row that has arrived. Rows must then be independent.
        first_step: size of the first adaptive step; by default it is estimated with one more evaluation.
        max_steps: adaptive steps after which the solve is given up.
        condition: passed on to the field as third argument; sliced by rows in per-sample control.
        before_step, after_step: `(x, t, step) -> x or None`, change the state around each step of a fixed grid
            (known regions, projections, re-noising). Returning None means no change.
        observe: `(x, t, step)`, called with the initial state and after each (accepted) step; stores nothing.

    Returns:
        A `Solution`. The last step ends exactly at the last time. Gradients flow through everything but step sizes.

    Raises:
        ValueError, TypeError: for times that are not monotone, unknown methods, bad tolerances, rows that are not
            independent.
        FloatingPointError: where error control fails (the step size underflows, or the field returns NaN).
    """
    check_state(x)
    step = as_step(method)
    asked = check_times(times)
    types = half_types(x)
    counted, x = CountedField(field, condition, types), wide(x) if types else x
    if steps is None and step.adaptive:
        if before_step is not None or after_step is not None:
            raise ValueError("before_step, after_step: hooks need a fixed grid; give steps= as well")
        tolerance = Tolerance(rtol, atol, first_step, max_steps)
        if control == "per_sample":
            if observe is not None:
                raise ValueError("observe: rows advance at different times in per-sample control; use control='joint'")
            reported, counts = solve_per_sample(counted, step, x, asked, tolerance)
        elif control == "joint":
            reported, counts = solve_joint(counted, step, x, asked, tolerance, observe)
        else:
            raise ValueError(f"control: must be 'joint' or 'per_sample', got {control!r}")
    else:
        grid = check_grid(steps, asked)
        reported = _solve_fixed(counted, step, x, grid, asked, before_step, after_step, observe)
        counts = (len(grid) - 1, 0)
    reported = [in_types(part, types) for part in reported] if types else reported
    xs = map_state(lambda *parts: torch.stack(parts), *reported)
    return Solution(reported[-1], asked, xs, counted.calls, counted.rows, *counts)


def _solve_fixed(
    field: CountedField,
    step: Step,
    x: State,
    grid: Sequence[float],
    asked: Sequence[float],
    before_step: Hook | None,
    after_step: Hook | None,
    observe: Callable[[State, float, int], None] | None,
) -> list[State]:
    reported = [x]
    forward = grid[-1] > grid[0]
    memory: Any = None
    fresh = True
    if observe is not None:
        observe(x, grid[0], 0)
    for i in range(len(grid) - 1):
        t, end = grid[i], grid[i + 1]
        dt = end - t
        if before_step is not None:
            changed = before_step(x, t, i)
            fresh, x = (fresh, x) if changed is None else (True, changed)
        if fresh:
            memory, fresh = step.start(field, x, t, dt), False
        result = step(field, x, t, dt, memory)
        # An asked time inside the step comes from the continuous extension; its own end is the state itself.
        while len(reported) < len(asked) and (asked[len(reported)] < end if forward else asked[len(reported)] > end):
            theta = (asked[len(reported)] - t) / dt
            reported.append(step.interpolate(theta, x, result, dt, field, t))
        x, memory = result.x, result.memory
        if after_step is not None:
            changed = after_step(x, end, i)
            fresh, x = (fresh, x) if changed is None else (True, changed)
        if observe is not None:
            observe(x, end, i + 1)
        if len(reported) < len(asked) and asked[len(reported)] == end:
            reported.append(x)
    return reported


def check_times(times: Sequence[float] | Tensor) -> tuple[float, ...]:
    """Two or more strictly monotone times, as floats.

    Raises:
        ValueError: they are not.
    """
    asked = tuple(float(t) for t in (times.tolist() if isinstance(times, Tensor) else times))
    if len(asked) < 2:
        raise ValueError(f"times: at least two times are needed (start and end), got {len(asked)}")
    if not all(math.isfinite(t) for t in asked):
        raise ValueError("times: must be finite")
    rises = [b - a for a, b in pairwise(asked)]
    if not (all(r > 0 for r in rises) or all(r < 0 for r in rises)):
        raise ValueError("times: must be strictly rising or strictly falling")
    return asked


def check_grid(steps: int | Sequence[float] | Tensor | None, asked: tuple[float, ...]) -> tuple[float, ...]:
    """The grid from a number of steps or its nodes; the asked times themselves where there is none.

    Raises:
        ValueError: it does not lead from the first asked time to the last.
    """
    if steps is None:
        return asked
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps: must be at least 1, got {steps}")
        first, last = asked[0], asked[-1]
        return (*(first + (last - first) * i / steps for i in range(steps)), last)
    grid = check_times(steps)
    if grid[0] != asked[0] or grid[-1] != asked[-1]:
        raise ValueError(
            f"steps: the grid must run from {asked[0]} to {asked[-1]} like times, got {grid[0]} to {grid[-1]}"
        )
    return grid


__all__ = ["Solution", "hermite", "ode"]
