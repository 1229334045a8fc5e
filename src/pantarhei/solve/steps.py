"""One step of an ordinary differential equation: the protocol, and the explicit Runge-Kutta methods.

A step takes the state from `t` to `t + dt` and may carry a *memory* from step to step: the last slope
(first-same-as-last methods), past outputs (multistep methods), the second state of an algebraically reversible method.
The drivers treat the memory as opaque, ask for a new one where the state was changed from outside, and, where rows are
dropped, slice it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pantarhei.solve.state import CountedField, Scalar, State, Terms, add_scaled, add_terms, map_state, nonzero, per_row


class StepResult(NamedTuple):
    """What a step returns: the new state, the memory for the next step, an error estimate and the stage slopes."""

    x: State
    memory: Any
    error: State | None
    slopes: tuple[State, ...]


class Step(Protocol):
    """A one-step (or, with memory, multistep) method. `dt` may be negative, and a (B,) tensor in per-sample control."""

    @property
    def name(self) -> str:
        """What the method is called in tables and saved configurations."""

    @property
    def order(self) -> int:
        """Order of accuracy."""

    @property
    def adaptive(self) -> bool:
        """Whether `StepResult.error` is an error estimate."""

    def start(self, field: CountedField, x: State, t: Scalar, dt: Scalar, slope: State | None = None) -> Any:
        """The memory before the first step, or after the state was changed between steps.

        `slope` is the field at (x, t) where the driver has it already.
        """

    def __call__(self, field: CountedField, x: State, t: Scalar, dt: Scalar, memory: Any) -> StepResult:
        """Advance from `t` to `t + dt`."""

    def interpolate(
        self, theta: Scalar, x: State, result: StepResult, dt: Scalar, field: CountedField, t: Scalar
    ) -> State:
        """The solution at `t + theta dt`, theta in [0, 1], from the step that led from `x` to `result.x`."""


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method.

    `error` holds b - b_hat, the weights of the embedded error estimate; `dense`, where given, the columns theta,
    theta^2, ... of the weights b_i(theta) of the continuous extension. Of these follow `stages` (each later stage's
    non-zero (slope number, coefficient) pairs and its node), `weights` (the non-zero b) and `first_same_as_last` (the last
    stage is the slope at the new point).
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    error: tuple[float, ...] | None = None
    dense: tuple[tuple[float, ...], ...] | None = None

    # Found once, on construction: a compiled sampler can neither enter the lock of a cached property nor wait for it.
    stages: tuple[tuple[Terms, float], ...] = field(init=False, repr=False, compare=False)
    weights: Terms = field(init=False, repr=False, compare=False)
    first_same_as_last: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        later = zip(self.a[1:], self.c[1:], strict=True)
        object.__setattr__(self, "stages", tuple((nonzero(row), c) for row, c in later))
        object.__setattr__(self, "weights", nonzero(self.b))
        ends = len(self.b) > 1 and self.c[-1] == 1.0 and self.a[-1] == self.b[:-1] and self.b[-1] == 0.0
        object.__setattr__(self, "first_same_as_last", ends)


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta step; all of its behaviour is in its tableau."""

    name: str
    tableau: Tableau = field(repr=False)

    @property
    def order(self) -> int:
        """Order of accuracy of the advanced solution."""
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        """Whether the tableau has an embedded error estimate."""
        return self.tableau.error is not None

    def start(self, field: CountedField, x: State, t: Scalar, dt: Scalar, slope: State | None = None) -> State | None:
        """First-same-as-last methods remember the slope at the current point; the others remember nothing."""
        if not self.tableau.first_same_as_last:
            return None
        return field(x, t) if slope is None else slope

    def __call__(self, field: CountedField, x: State, t: Scalar, dt: Scalar, memory: State | None) -> StepResult:
        """Advance from `t` to `t + dt`."""
        tableau = self.tableau
        slopes = [field(x, t) if memory is None else memory]
        stage = x
        for terms, c in tableau.stages:
            stage = add_terms(x, terms, slopes, dt)
            slopes.append(field(stage, t + c * dt))
        # In a first-same-as-last method the last stage *is* the new point.
        new = stage if tableau.first_same_as_last else add_terms(x, tableau.weights, slopes, dt)
        error = None
        if tableau.error is not None:
            zero = map_state(lambda leaf: leaf.new_zeros(()).expand_as(leaf), x)
            error = add_scaled(zero, tableau.error, slopes, dt)
        return StepResult(new, slopes[-1] if tableau.first_same_as_last else None, error, tuple(slopes))

    def interpolate(
        self, theta: Scalar, x: State, result: StepResult, dt: Scalar, field: CountedField, t: Scalar
    ) -> State:
        """The method's own continuous extension, or the cubic Hermite polynomial (which may cost one evaluation)."""
        if self.tableau.dense is None:
            end_slope = result.slopes[-1] if self.tableau.first_same_as_last else field(result.x, t + dt)
            return hermite(theta, x, result.x, result.slopes[0], end_slope, dt)
        if not isinstance(theta, Tensor):
            weights = [_polynomial(row, theta) for row in self.tableau.dense]
            return add_scaled(x, weights, result.slopes, dt)
        total = None
        for row, slope in zip(self.tableau.dense, result.slopes, strict=True):
            weight = _polynomial(row, theta)
            term = map_state(lambda k, w=weight: per_row(w * dt, k).to(k.dtype) * k, slope)
            total = term if total is None else map_state(lambda p, q: p + q, total, term)
        return map_state(lambda p, q: p + q, x, total)


def hermite(theta: Scalar, x0: State, x1: State, slope0: State, slope1: State, dt: Scalar) -> State:
    """Cubic Hermite interpolation between two states with their slopes, third-order accurate in dt."""

    def leaf(a: Tensor, b: Tensor, da: Tensor, db: Tensor) -> Tensor:
        s = per_row(theta, a).to(a.dtype) if isinstance(theta, Tensor) else theta
        h = per_row(dt, a).to(a.dtype) if isinstance(dt, Tensor) else dt
        return (
            (1 + 2 * s) * (1 - s) ** 2 * a
            + s**2 * (3 - 2 * s) * b
            + s * (1 - s) ** 2 * h * da
            + s**2 * (s - 1) * h * db
        )

    return map_state(leaf, x0, x1, slope0, slope1)


def _polynomial(coefficients: tuple[float, ...], theta: Scalar) -> Any:
    value: Any = 0.0
    for c in reversed(coefficients):
        value = (value + c) * theta
    return value
