"""Steps that know the path: the velocity is taken apart into data and noise, which are put together at the next time.

On an affine path they are exact where the estimates do not change, whatever the path's curve; so few of them go further than
few steps of a Runge-Kutta method. All are steps of `solve.ode` and work with guidance, hooks and any grid.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.paths import Custom, Linear
from pantarhei.flow.predictions import Ends, Velocity
from pantarhei.naming import unknown
from pantarhei.solve.methods import METHODS, as_step
from pantarhei.solve.state import CountedField, per_row
from pantarhei.solve.steps import Step, StepResult, hermite

_VELOCITY = Velocity()


@dataclass(frozen=True)
class _PathStep:
    """What the steps below share: ends of the velocity at a float time, and coefficients there.

    Attributes:
        path: the affine path.
        end: the last time of the solve, where a step is of first order.
    """

    path: AffinePath
    end: float = 1.0

    adaptive = False

    def _at(self, t: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        return self.path.alpha(t).to(x.dtype), self.path.sigma(t).to(x.dtype)

    def _ends(self, x: Tensor, t: Any, velocity: Tensor) -> Ends:
        t = torch.as_tensor(t, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return _VELOCITY.ends(self.path, x, t, velocity)

    def _last(self, t: Any, dt: Any) -> bool:
        return math.isclose(t + dt, self.end, abs_tol=1e-9)

    def start(self, field: CountedField, x: Tensor, t: Any, dt: Any, slope: Tensor | None = None) -> Any:
        """No memory."""
        return None

    def interpolate(self, theta: Any, x: Tensor, result: StepResult, dt: Any, field: CountedField, t: Any) -> Tensor:
        """Cubic Hermite; costs one evaluation."""
        return hermite(theta, x, result.x, result.slopes[0], field(result.x, t + dt), dt)


@dataclass(frozen=True)
class DDIM(_PathStep):
    """x' = alpha' E[x1 | x_t] + sigma' E[x0 | x_t] (Song et al. 2010.02502), exact on first-order paths.

    On the linear path this is Euler's step.
    """

    name = "ddim"
    order = 1

    def __call__(self, field: CountedField, x: Tensor, t: Any, dt: Any, memory: Any) -> StepResult:
        """One evaluation."""
        slope = field(x, t)
        data, noise = self._ends(x, t, slope)
        alpha, sigma = self._at(t + dt, x)
        return StepResult(alpha * data + sigma * noise, None, None, (slope,))


@dataclass(frozen=True)
class EDMHeun(_PathStep):
    """Heun's method for x / alpha against sigma / alpha, whose slope is the noise estimate (Karras et al. 2206.00364).

    On the EDM path with `Flow.sample`'s closing denoising step it is that paper's sampler: N steps of its grid cost 2 N - 1
    evaluations (18: 35). Heun's method in our t ("heun") would not be: states are no straight lines there. A step from pure
    noise averages on the linear path instead, and a step to clean data is DDIM's.
    """

    name = "edm"
    order = 2

    def __call__(self, field: CountedField, x: Tensor, t: Any, dt: Any, memory: Any) -> StepResult:
        """Two evaluations; one at clean data."""
        slope = field(x, t)
        here = self._ends(x, t, slope)
        (a, s), (alpha, sigma) = self._at(t, x), self._at(t + dt, x)
        new = alpha * here.data + sigma * here.noise
        if self._clean(t + dt):
            return StepResult(new, None, None, (slope,))
        other = field(new, t + dt)
        there = self._ends(new, t + dt, other)
        noisy = self._clean(t, noise=True) or self._clean(t + dt, noise=True)
        rule = _average_differences if noisy else _average_noises
        return StepResult(rule(x, here, there, (a, s), (alpha, sigma)), None, None, (slope, other))

    def _clean(self, t: Any, noise: bool = False) -> bool:
        """Whether there is next to no noise (or no data) at a time."""
        at = torch.tensor(float(t), dtype=torch.float64)
        alpha, sigma = float(self.path.alpha(at)), float(self.path.sigma(at))
        return alpha < 1e-3 * sigma if noise else sigma < 1e-4 * alpha


Pair = tuple[Tensor, Tensor]


def _average_noises(x: Tensor, here: Ends, there: Ends, at: Pair, to: Pair) -> Tensor:
    """Heun's step for x / alpha against sigma / alpha; `at` and `to` are alpha and sigma before and after."""
    (a, s), (alpha, sigma) = at, to
    return alpha * (x / a + (sigma / alpha - s / a) * (here.noise + there.noise) / 2)


def _average_differences(x: Tensor, here: Ends, there: Ends, at: Pair, to: Pair) -> Tensor:
    """Heun's step on the linear path, which also knows alpha = 0."""
    (a, s), (alpha, sigma) = at, to
    mean = (here.data - here.noise + there.data - there.noise) / 2
    return (alpha + sigma) * (x / (a + s) + (alpha / (alpha + sigma) - a / (a + s)) * mean)


def carry_rows(
    ends: Callable[[Tensor, Tensor], Ends],
    path: AffinePath,
    x: Tensor,
    times: Sequence[Tensor],
    *,
    corrected: bool = True,
) -> Tensor:
    """Carry every row along times of its own, by the steps of `EDMHeun` or (not corrected) of `DDIM`.

    Args:
        ends: data and noise estimates at (x, t), t (B,).
        path: an affine path.
        x: states (B, ...) at `times[0]`.
        times: two or more times (B,), going either way; a row whose time stays the same stays as it is.
        corrected: two evaluations a step, else one.
    """
    for t, following in pairwise(times):
        here, at, to = ends(x, t), path.at(t, x), path.at(following, x)
        new = to.alpha * here.data + to.sigma * here.noise
        if corrected:
            there = ends(new, following)
            pairs = (at.alpha, at.sigma), (to.alpha, to.sigma)
            noisy = (at.alpha < 1e-3 * at.sigma) | (to.alpha < 1e-3 * to.sigma)
            better = torch.where(
                noisy, _average_differences(x, here, there, *pairs), _average_noises(x, here, there, *pairs)
            )
            new = torch.where(to.sigma < 1e-4 * to.alpha, new, better)  # clean data: nothing to average with
        x = torch.where(per_row(t == following, x), x, new)
    return x


@dataclass(frozen=True)
class Reinterpolation(_PathStep):
    """x' = alpha' E[x1 | x_t] + sigma' x0 with the noise that the solve started from (2405.20320, section on sampling).

    Equal to DDIM (on the linear path, to Euler) for a perfectly straight flow, where the implied noise never changes; better
    in two to five steps of a nearly straight one. It does not converge to the flow of a curved one, however many steps.

    Attributes:
        corrected: average the velocities at both ends of a step, as Heun's method does, but for the last step.
        noise: keep this noise instead.
    """

    corrected: bool = False
    noise: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)
    order = 1

    @property
    def name(self) -> str:
        """By the correction."""
        return "reinterpolate-heun" if self.corrected else "reinterpolate"

    def start(self, field: CountedField, x: Tensor, t: Any, dt: Any, slope: Tensor | None = None) -> Tensor:
        """The noise to keep: x_t / sigma at the source end; what the velocity implies after a change from outside.

        Raises:
            ValueError: from the data end, where there is no noise to keep.
        """
        if dt < 0:
            raise ValueError("method: reinterpolation runs from noise to data; invert with euler, ddim or heun")
        if self.noise is not None:
            return self.noise
        alpha, sigma = self._at(t, x)
        if float(alpha) <= 0.1 * float(sigma):
            return x / sigma
        return self._ends(x, t, field(x, t) if slope is None else slope).noise

    def __call__(self, field: CountedField, x: Tensor, t: Any, dt: Any, memory: Tensor) -> StepResult:
        """One evaluation, or two with the correction."""
        slope = field(x, t)
        here = self._ends(x, t, slope)
        alpha, sigma = self._at(t + dt, x)
        new = alpha * here.data + sigma * memory
        if not self.corrected or self._last(t, dt):
            return StepResult(new, memory, None, (slope,))
        other = field(new, t + dt)
        there = self._ends(new, t + dt, other)
        # Velocities at two times are averaged on the linear path, where they are data - noise and do not turn.
        mean = (here.data - here.noise + there.data - there.noise) / 2
        a, s = self._at(t, x)
        data = (x + s * mean) / (a + s)
        return StepResult(alpha * data + sigma * memory, memory, None, (slope, other))


class _Past(NamedTuple):
    """Data prediction and log(alpha / sigma) of the step before."""

    data: Tensor
    level: float


@dataclass(frozen=True)
class DPMSolver(_PathStep):
    """DPM-Solver++(2M) (Lu et al. 2211.01095): exponential integration of the data prediction, two steps back.

    With lambda = log(alpha / sigma), h its change and r = h_before / h,
    x' = (sigma' / sigma) x + (alpha' - sigma' alpha / sigma) (D + (D - D_before) / (2 r)).
    The first step and the last are of first order; grids even in lambda suit it best.

    Attributes:
        clock: "snr" is lambda; "noise" takes -log sigma in its place, as the published sampler of SD3 does: then a step from
            pure noise is known to the next one.
    """

    clock: Literal["snr", "noise"] = "snr"

    name = "dpm-solver"
    order = 2

    def start(self, field: CountedField, x: Tensor, t: Any, dt: Any, slope: Tensor | None = None) -> _Past | None:
        """Nothing is known yet.

        Raises:
            ValueError: from the data end, where the data prediction says nothing.
        """
        if dt < 0:
            raise ValueError("method: dpm-solver runs from noise to data; invert with ddim, edm or heun")
        return None

    def __call__(self, field: CountedField, x: Tensor, t: Any, dt: Any, memory: _Past | None) -> StepResult:
        """One evaluation."""
        slope = field(x, t)
        data = self._ends(x, t, slope).data
        level, after = self._level(t), self._level(t + dt)
        estimate = data
        if memory is not None and math.isfinite(after) and not self._last(t, dt):
            # An infinite step before this one (from pure noise) gives no slope.
            weight = (after - level) / (2 * (level - memory.level))
            estimate = data + weight * (data - memory.data)
        alpha, sigma = self._at(t, x)
        alpha_next, sigma_next = self._at(t + dt, x)
        ratio = sigma_next / sigma
        new = ratio * x + (alpha_next - ratio * alpha) * estimate
        return StepResult(new, _Past(data, level), None, (slope,))

    def _level(self, t: Any) -> float:
        t = torch.tensor(float(t), dtype=torch.float64)
        alpha, sigma = float(self.path.alpha(t)), float(self.path.sigma(t))
        if self.clock == "noise":
            alpha = 1.0
        return -math.inf if alpha <= 0 else math.inf if sigma <= 0 else math.log(alpha / sigma)


@dataclass(frozen=True)
class LastEuler:
    """Another method, but Euler's in the step that reaches `end`: the velocity at the very end is never asked for.

    With Heun's method N steps then cost 2 N - 1 evaluations, as in rectified flow++.
    """

    method: Step
    end: float = 1.0

    adaptive = False

    @property
    def name(self) -> str:
        """The method's, with the last step's."""
        return f"{self.method.name}-euler"

    @property
    def order(self) -> int:
        """The method's (the last step's error is one of a short step)."""
        return self.method.order

    def start(self, field: CountedField, x: Tensor, t: Any, dt: Any, slope: Tensor | None = None) -> Any:
        """The method's memory."""
        return self.method.start(field, x, t, dt, slope)

    def __call__(self, field: CountedField, x: Tensor, t: Any, dt: Any, memory: Any) -> StepResult:
        """As the method, or as Euler."""
        if not math.isclose(t + dt, self.end, abs_tol=1e-9):
            return self.method(field, x, t, dt, memory)
        return as_step("euler")(field, x, t, dt, None)

    def interpolate(self, theta: Any, x: Tensor, result: StepResult, dt: Any, field: CountedField, t: Any) -> Tensor:
        """Cubic Hermite; costs one evaluation."""
        return hermite(theta, x, result.x, result.slopes[0], field(result.x, t + dt), dt)


PathMethod = Literal[
    "auto", "ddim", "edm", "reinterpolate", "reinterpolate-heun", "dpm-solver", "dpm-solver-sd3", "heun-euler"
]
PATH_METHODS = get_args(PathMethod)


def path_step(method: str | Step, path: Any, end: float) -> Step:
    """The step of a name, of those that know the path and of `solve`; or the step itself.

    "auto" is DDIM's on curved paths, where Euler's leaves the path at once, and Euler's where they are the same.

    Args:
        method: a name or a step.
        path: the flow's path.
        end: the last time of the solve.

    Raises:
        ValueError: an unknown name, or a path without the algebra that the method needs.
    """
    if method == "auto":
        method = "ddim" if isinstance(path, AffinePath) and not isinstance(path, (Linear, Custom)) else "euler"
    if not isinstance(method, str) or method in METHODS:
        return as_step(method)
    if method not in PATH_METHODS:
        raise ValueError(unknown("method", method, [*METHODS, *PATH_METHODS]))
    if method == "heun-euler":
        return LastEuler(as_step("heun"), end)
    if not isinstance(path, AffinePath):
        raise ValueError(f"method: {method} needs an affine path")
    if method in ("ddim", "edm"):
        return DDIM(path, end) if method == "ddim" else EDMHeun(path, end)
    if method.startswith("dpm-solver"):
        return DPMSolver(path, end, "noise" if method == "dpm-solver-sd3" else "snr")
    return Reinterpolation(path, end, method.endswith("heun"))
