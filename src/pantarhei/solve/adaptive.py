"""Steps whose size follows an error estimate: one size for the whole state, or one a row.

The rule is that of Hairer, Norsett & Wanner, "Solving ODEs I", II.4, with the constants SciPy uses (safety 0.9,
factors in [0.2, 10], no growth right after a rejection), so that joint control takes SciPy's steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pantarhei.solve.state import CountedField, State, leaves, map_state, per_row, select_rows
from pantarhei.solve.steps import Step, StepResult

SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0


@dataclass(frozen=True)
class Tolerance:
    """Tolerances and limits of an adaptive solve."""

    rtol: float
    atol: float
    first_step: float | None = None
    max_steps: int = 100_000

    def __post_init__(self) -> None:
        if self.rtol < 0 or self.atol < 0 or self.rtol + self.atol == 0:
            raise ValueError(f"rtol, atol: must be non-negative and not both zero, got {self.rtol}, {self.atol}")
        if self.first_step is not None and self.first_step <= 0:
            raise ValueError(f"first_step: must be positive, got {self.first_step}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps: must be at least 1, got {self.max_steps}")


def solve_joint(
    field: CountedField,
    step: Step,
    x: State,
    asked: tuple[float, ...],
    tolerance: Tolerance,
    observe: Callable[[State, float, int], None] | None,
) -> tuple[list[State], tuple[int, int]]:
    """Integrate with one step size for the whole state; returns the states at `asked` and (accepted, rejected)."""
    start, end = asked[0], asked[-1]
    sign = 1.0 if end > start else -1.0
    t, accepted, rejected, after_rejection = start, 0, 0, False
    slope = field(x, t)
    dt = sign * _first_step(field, step, x, t, slope, sign, abs(end - start), tolerance)
    memory = step.start(field, x, t, dt, slope)
    reported = [x]
    if observe is not None:
        observe(x, t, 0)
    while True:
        if accepted + rejected >= tolerance.max_steps:
            raise FloatingPointError(f"error control: no end after max_steps={tolerance.max_steps} steps, at t={t:.6g}")
        # The smallest step that still moves t, ten spacings of floating-point numbers.
        smallest = 10 * abs(math.nextafter(t, sign * math.inf) - t)
        if abs(dt) < smallest:
            dt = sign * smallest
        last = (t + dt - end) * sign >= 0
        h = end - t if last else dt
        result = step(field, x, t, h, memory)
        norm = _root_mean_square(_scaled_error(result, x, tolerance))
        if not math.isfinite(norm) and abs(h) <= smallest:
            raise FloatingPointError(f"error control: the field is not finite near t={t:.6g}")
        if norm < 1:
            factor = GROW if norm == 0 else min(GROW, SAFETY * norm ** (-1 / step.order))
            factor = min(1.0, factor) if after_rejection else factor
            new_t = end if last else t + h
            while len(reported) < len(asked) - 1 and (new_t - asked[len(reported)]) * sign >= 0:
                theta = (asked[len(reported)] - t) / h
                reported.append(step.interpolate(theta, x, result, h, field, t))
            x, memory, t = result.x, result.memory, new_t
            accepted, after_rejection = accepted + 1, False
            if observe is not None:
                observe(x, t, accepted)
            if last:
                return [*reported, x], (accepted, rejected)
        else:
            if abs(h) <= smallest:
                raise FloatingPointError(f"error control: step size underflow at t={t:.6g}")
            factor = SHRINK if not math.isfinite(norm) else max(SHRINK, SAFETY * norm ** (-1 / step.order))
            rejected, after_rejection = rejected + 1, True
        dt = h * factor


def solve_per_sample(
    field: CountedField, step: Step, x: State, asked: tuple[float, ...], tolerance: Tolerance
) -> tuple[list[State], tuple[int, int]]:
    """Integrate every row with steps of its own; rows that have arrived are no longer evaluated."""
    start, end = asked[0], asked[-1]
    _check_rows(x)
    sign = 1.0 if end > start else -1.0
    count, device = leaves(x)[0].shape[0], leaves(x)[0].device
    rows = torch.arange(count, device=device)
    t = torch.full((count,), start, dtype=torch.float64, device=device)
    slope = field(x, t)
    _check_independent_rows(field, x, start, slope)
    dt = sign * _first_steps(field, step, x, start, slope, sign, abs(end - start), tolerance)
    memory = step.start(field, x, t, dt, slope)
    after_rejection = torch.zeros(count, dtype=torch.bool, device=device)
    end_state = map_state(torch.zeros_like, x)
    inner = torch.tensor(asked[1:-1], dtype=torch.float64, device=device)
    inside = _Inside(inner, map_state(lambda leaf: leaf.new_zeros(len(inner), *leaf.shape), x))
    initial, active, accepted, rejected = x, field, 0, 0
    for _ in range(tolerance.max_steps):
        smallest = 10 * torch.finfo(torch.float64).eps * t.abs().clamp_min(1e-300)
        dt = sign * torch.maximum(dt.abs(), smallest)
        last = (t + dt - end) * sign >= 0
        h = torch.where(last, end - t, dt)
        calls, row_count = active.calls, active.rows
        result = step(active, x, t, h, memory)
        error = _scaled_error(result, x, tolerance)
        norm = _root_mean_square_rows(error)
        ok = norm < 1
        stuck = ~ok & (h.abs() <= smallest)
        if bool(stuck.any()):
            raise FloatingPointError(
                f"error control: step size underflow or a field that is not finite at t={float(t[stuck][0]):.6g}"
            )
        new_t = torch.where(last, torch.full_like(t, end), t + h)
        if len(asked) > 2:
            inside = _report_inside(inside, step, active, (t, new_t, h), sign, ok, rows, x, result)
        if active is not field:  # the counts of this step belong to the whole solve
            field.calls, field.rows = field.calls + active.calls - calls, field.rows + active.rows - row_count
        factor = (SAFETY * norm ** (-1 / step.order)).nan_to_num(SHRINK, posinf=GROW, neginf=SHRINK)
        factor = factor.clamp(SHRINK, GROW)
        factor = torch.where(ok & ~after_rejection, factor, factor.clamp(max=1.0))
        x = _where_rows(ok, result.x, x)
        memory = _where_rows(ok, result.memory, memory) if memory is not None else None
        t, dt, after_rejection = torch.where(ok, new_t, t), h * factor, ~ok
        accepted, rejected = accepted + int(ok.sum()), rejected + int((~ok).sum())
        arrived = ok & last
        if bool(arrived.any()):
            done, left = arrived.nonzero()[:, 0], (~arrived).nonzero()[:, 0]
            end_state = _put_rows(end_state, rows[done], select_rows(x, done))
            if left.numel() == 0:
                middle = [map_state(lambda leaf, k=k: leaf[k], inside.states) for k in range(len(inner))]
                return [initial, *middle, end_state], (accepted, rejected)
            x, memory, rows = select_rows(x, left), select_rows(memory, left), rows[left]
            t, dt, after_rejection = t[left], dt[left], after_rejection[left]
            active = field.for_rows(rows)
    raise FloatingPointError(f"error control: {rows.numel()} rows did not arrive within {tolerance.max_steps} steps")


class _Inside(NamedTuple):
    """The reported times between start and end, and the states at them, (times, B, ...) a leaf."""

    times: Tensor
    states: State


def _report_inside(
    inside: _Inside,
    step: Step,
    field: CountedField,
    span: tuple[Tensor, Tensor, Tensor],
    sign: float,
    ok: Tensor,
    rows: Tensor,
    x: State,
    result: StepResult,
) -> _Inside:
    """Fill in the states at reported times that accepted rows have just passed, all of them at once."""
    t, new_t, h = span
    ahead, reached = (inside.times - t[:, None]) * sign > 0, (new_t[:, None] - inside.times) * sign >= 0
    row, which = (ok[:, None] & ahead & reached).nonzero(as_tuple=True)
    if row.numel() == 0:
        return inside
    theta = (inside.times[which] - t[row]) / h[row]
    picked = StepResult(select_rows(result.x, row), None, None, tuple(select_rows(k, row) for k in result.slopes))
    values = step.interpolate(theta, select_rows(x, row), picked, h[row], field.for_rows(row), t[row])
    place = (which, rows[row])
    return _Inside(inside.times, map_state(lambda a, b: a.index_put(place, b), inside.states, values))


def _scaled_error(result: StepResult, x: State, tolerance: Tolerance) -> State:
    def leaf(error: Tensor, before: Tensor, after: Tensor) -> Tensor:
        scale = tolerance.atol + tolerance.rtol * torch.maximum(before.detach().abs(), after.detach().abs())
        return error.detach() / scale

    return map_state(leaf, result.error, x, result.x)


def _root_mean_square(x: State) -> float:
    total = sum(float(leaf.double().square().sum()) for leaf in leaves(x))
    return math.sqrt(total / sum(leaf.numel() for leaf in leaves(x)))


def _root_mean_square_rows(x: State) -> Tensor:
    squares = [
        leaf.double().square().flatten(1) if leaf.ndim > 1 else leaf.double().square()[:, None] for leaf in leaves(x)
    ]
    return torch.cat(squares, dim=1).mean(dim=1).sqrt()


def _first_step(
    field: CountedField, step: Step, x: State, t: float, slope: State, sign: float, span: float, tolerance: Tolerance
) -> float:
    """Hairer, Norsett & Wanner, II.4: a step in which explicit Euler changes the state by about one per cent."""
    if tolerance.first_step is not None:
        return min(tolerance.first_step, span)
    scale = map_state(lambda leaf: tolerance.atol + tolerance.rtol * leaf.detach().abs(), x)
    d0 = _root_mean_square(map_state(lambda v, s: v.detach() / s, x, scale))
    d1 = _root_mean_square(map_state(lambda v, s: v.detach() / s, slope, scale))
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, span)
    probe = field(map_state(lambda v, k: v + sign * h0 * k, x, slope), t + sign * h0)
    d2 = _root_mean_square(map_state(lambda a, b, s: (a - b).detach() / s, probe, slope, scale)) / h0
    if not math.isfinite(d1) or not math.isfinite(d2):
        raise FloatingPointError(f"error control: the field is not finite at t={t:.6g}")
    largest = max(d1, d2)
    h1 = max(1e-6, h0 * 1e-3) if largest <= 1e-15 else (0.01 / largest) ** (1 / step.order)
    return min(100 * h0, h1, span)


def _first_steps(
    field: CountedField, step: Step, x: State, t: float, slope: State, sign: float, span: float, tolerance: Tolerance
) -> Tensor:
    """The same estimate, row by row."""
    first = leaves(x)[0]
    if tolerance.first_step is not None:
        return torch.full((first.shape[0],), min(tolerance.first_step, span), dtype=torch.float64, device=first.device)
    scale = map_state(lambda leaf: tolerance.atol + tolerance.rtol * leaf.detach().abs(), x)
    d0 = _root_mean_square_rows(map_state(lambda v, s: v.detach() / s, x, scale))
    d1 = _root_mean_square_rows(map_state(lambda v, s: v.detach() / s, slope, scale))
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1).clamp(max=span)
    shifted = map_state(lambda v, k: v + per_row(sign * h0, v).to(v.dtype) * k, x, slope)
    probe = field(shifted, t + sign * h0)
    d2 = _root_mean_square_rows(map_state(lambda a, b, s: (a - b).detach() / s, probe, slope, scale)) / h0
    largest = torch.maximum(d1, d2)
    if not bool(largest.isfinite().all()):
        raise FloatingPointError(f"error control: the field is not finite at t={t:.6g}")
    h1 = torch.where(largest <= 1e-15, (h0 * 1e-3).clamp_min(1e-6), (0.01 / largest) ** (1 / step.order))
    return torch.minimum(100 * h0, h1).clamp(max=span)


def _where_rows(mask: Tensor, new: State, old: State) -> State:
    return map_state(lambda a, b: torch.where(per_row(mask, a), a, b), new, old)


def _put_rows(target: State, rows: Tensor, values: State) -> State:
    return map_state(lambda a, b: a.index_copy(0, rows, b), target, values)


def _check_rows(x: State) -> None:
    first = leaves(x)[0]
    if any(leaf.ndim == 0 or leaf.shape[0] != first.shape[0] for leaf in leaves(x)):
        raise ValueError("control='per_sample': every part of the state needs the batch as its first dimension")


def _check_independent_rows(field: CountedField, x: State, t: float, together: State) -> None:
    """Refuse fields that mix rows (batch statistics, a condition captured at full batch size): one row asked alone."""
    reason = "control='per_sample': rows must be independent and the condition sliceable by rows, but "
    row = torch.zeros(1, dtype=torch.long, device=leaves(x)[0].device)
    with torch.no_grad():
        try:
            alone = field.for_rows(row)(select_rows(x, row), t)
        except (RuntimeError, IndexError, AttributeError, TypeError) as error:
            raise ValueError(f"{reason}the field fails on a single row: {error}") from error
    for a, b in zip(leaves(alone), leaves(together), strict=True):
        if a.shape[1:] != b.shape[1:] or not torch.allclose(
            a, b[:1], rtol=1e-3, atol=1e-4 * float(b.detach().abs().max())
        ):
            raise ValueError(
                f"{reason}the field gives the first row another value when asked alone; use control='joint'"
            )
