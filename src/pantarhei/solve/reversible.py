"""Algebraically reversible steps: the state before a step follows exactly from the one after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pantarhei.solve.state import CountedField, Scalar, State, map_state
from pantarhei.solve.steps import RungeKutta, Step, StepResult, hermite


@dataclass(frozen=True)
class Reversible:
    """Two states y and z, coupled through any one-step method's increment P (McCallum & Foster, 2410.11648).

    y' = l y + (1 - l) z + P_dt(z, t) and z' = z - P_-dt(y', t + dt), from y = z; both follow backwards, too, so that a
    gradient needs no stored states. A step costs twice the method's evaluations, and its solution differs a little from it.

    Attributes:
        step: the method; one without memory.
        coupling: l, in (0, 1].
    """

    step: Step
    coupling: float = 0.99

    adaptive = False

    def __post_init__(self) -> None:
        if getattr(self.step, "one_way", False):
            raise ValueError(f"reversible: steps of {self.step.name} go one way only; take 'checkpoint' or 'backprop'")
        if not 0 < self.coupling <= 1:
            raise ValueError(f"reversible: the coupling must lie in (0, 1], got {self.coupling}")

    @property
    def name(self) -> str:
        """The method's."""
        return f"reversible-{self.step.name}"

    @property
    def order(self) -> int:
        """The method's."""
        return self.step.order

    def start(self, field: CountedField, x: State, t: Scalar, dt: Scalar, slope: State | None = None) -> State:
        """z = y."""
        return x

    def __call__(self, field: CountedField, x: State, t: Scalar, dt: Scalar, memory: State) -> StepResult:
        """One step of both."""
        z = memory
        y = map_state(
            lambda y, z, p: self.coupling * y + (1 - self.coupling) * z + p, x, z, self.increment(field, z, t, dt)
        )
        z = map_state(lambda z, p: z - p, z, self.increment(field, y, t + dt, -dt))
        return StepResult(y, z, None, ())

    def increment(self, field: CountedField, x: State, t: Scalar, dt: Scalar) -> State:
        """P_dt(x, t): what the method adds to x."""
        if not isinstance(self.step, RungeKutta) and self.step.start(field, x, t, dt) is not None:
            raise ValueError(f"reversible: {self.step.name} remembers its past; take a one-step method")
        result = self.step(field, x, t, dt, None)
        return map_state(lambda new, old: new - old, result.x, x)

    def interpolate(self, theta: Any, x: State, result: StepResult, dt: Any, field: CountedField, t: Any) -> State:
        """Cubic Hermite; costs two evaluations."""
        return hermite(theta, x, result.x, field(x, t), field(result.x, t + dt), dt)
