"""Explicit Adams-Bashforth steps: one evaluation each, the past slopes remembered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pantarhei.solve.methods import METHODS
from pantarhei.solve.state import CountedField, Scalar, State, add_scaled
from pantarhei.solve.steps import RungeKutta, StepResult, hermite


class Past(NamedTuple):
    """Times and slopes before the present one, the newest first."""

    times: tuple[float, ...] = ()
    slopes: tuple[State, ...] = ()


@dataclass(frozen=True)
class Adams:
    """Adams-Bashforth: the polynomial through the last slopes, integrated (Hairer, Norsett & Wanner, III.1 and III.5).

    Attributes:
        most: the largest number of slopes, which is the order; high ones are only good for short steps.
        starting: who takes the first steps.
        least: slopes that are needed to begin, those at the present point included.
        equal_steps: weigh the slopes as if all steps were equally long, whatever the grid: what torchdiffeq's
            `explicit_adams` does, of no order on other grids.
    """

    most: int = 4
    starting: RungeKutta = METHODS["rk38"]
    least: int = 3
    equal_steps: bool = False

    name = "adams"
    adaptive = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= 12:
            raise ValueError(f"adams: 1 <= least <= most <= 12 is needed, got {self.least} and {self.most}")

    @property
    def order(self) -> int:
        """Order of accuracy after enough steps."""
        return self.most

    def start(self, field: CountedField, x: State, t: Scalar, dt: Scalar, slope: State | None = None) -> Past:
        """Nothing is known yet."""
        return Past()

    def __call__(self, field: CountedField, x: State, t: Scalar, dt: Scalar, memory: Past) -> StepResult:
        """One evaluation; those of `starting` at first.

        Raises:
            ValueError: rows with steps of their own.
        """
        if isinstance(t, Tensor) or isinstance(dt, Tensor):
            raise ValueError("adams: all rows advance together; take a Runge-Kutta method for control='per_sample'")
        slope = field(x, t)
        times, slopes = (t, *memory.times)[: self.most], (slope, *memory.slopes)[: self.most]
        if len(slopes) < self.least:
            new = self.starting(field, x, t, dt, slope).x
        else:
            nodes = range(0, -len(times), -1) if self.equal_steps else [(s - t) / dt for s in times]
            new = add_scaled(x, adams_weights(tuple(float(node) for node in nodes)), slopes, dt)
        kept = self.most - 1
        return StepResult(new, Past(times[:kept], slopes[:kept]), None, (slope,))

    def interpolate(self, theta: Any, x: State, result: StepResult, dt: Any, field: CountedField, t: Any) -> State:
        """Cubic Hermite; costs one evaluation."""
        return hermite(theta, x, result.x, result.slopes[0], field(result.x, t + dt), dt)


@lru_cache(maxsize=1024)
def adams_weights(nodes: tuple[float, ...]) -> tuple[float, ...]:
    """The weights w with sum w_j p(node_j) = integral of p over [0, 1], for polynomials of a degree below their number."""
    powers = np.arange(len(nodes))
    matrix = np.asarray(nodes, dtype=np.float64)[None, :] ** powers[:, None]
    return tuple(np.linalg.solve(matrix, 1.0 / (powers + 1.0)).tolist())
