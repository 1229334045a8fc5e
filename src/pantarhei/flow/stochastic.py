"""The SDEs that share the marginals of a flow's ODE, with any amount of noise.

dX = (v + epsilon s) dt + sqrt(2 epsilon) dW, with s the score, has the marginals of dX = v dt for every epsilon(t) >= 0;
from the data end down, dX = (v - epsilon s) dt + sqrt(2 epsilon) dW does (Albergo et al. 2303.08797, theorem 2.8; Song et
al. 2011.13456). The score comes from the noise x0 where that is Gaussian and independent of the data, or from a latent.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from pantarhei.flow.conditions import as_condition
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.grids import solver_grid
from pantarhei.flow.noise_amounts import Epsilon
from pantarhei.naming import unknown
from pantarhei.solve import Solution, ode, sde
from pantarhei.solve.sde import SDEMethodName

if TYPE_CHECKING:
    from pantarhei.flow.flow import ConditionLike, Flow
    from pantarhei.flow.transforms import FieldTransform, Guidance

LastStep = Literal["mean", "euler", "heun", "denoise"]
# Below this noise level an end counts as clean: the score is unbounded there.
CLEAN = 1e-6


class StiffNoise(UserWarning):
    """The steps are too long for the noise."""


def transport_sde(
    flow: Flow,
    x: Tensor,
    times: Sequence[float],
    epsilon: Epsilon | Literal["trained"],
    *,
    steps: int | Sequence[float] = 100,
    method: SDEMethodName = "euler_maruyama",
    cap: float | None = 0.5,
    last: LastStep | None = None,
    last_step: float | None = None,
    noise: Sequence[Tensor] | Tensor | Callable[[int, Tensor], Tensor] | None = None,
    grid: Any = "uniform",
    shift: float = 1.0,
    condition: ConditionLike = None,
    guidance: float | Guidance = 1.0,
    transforms: Sequence[FieldTransform] = (),
    generator: torch.Generator | None = None,
    solver: Callable[..., Solution] = sde,
    **hooks: Any,
) -> Solution:
    """Carry states from `times[0]` to `times[1]` with noise, either way; both directions keep the flow's marginals.

    The score is unbounded where the noise level (sigma, or gamma on a path with a latent) vanishes: a step that starts at
    such an end is an Euler step of the plain ODE (of a predicted drift's own equation), and one that ends there is `last`.

    Args:
        flow: with a known score (`Flow.require_score`).
        x: states at `times[0]`, (B, *shape).
        times: first and last time, inside the flow's interval.
        epsilon: a number, or a function of the time (`noise_amount`); 0 is the ODE. "trained": what a flow that predicts a
            drift was trained with (it then needs no score).
        steps: number of steps, or a whole grid.
        method: of `solve.sde`: "euler_maruyama", "heun", or "noised_heun", which is SiT's.
        cap: epsilon is lowered where epsilon dt / gamma^2 would exceed this: the score may be as steep as 1 / gamma^2, and
            explicit steps overshoot above 1 (any epsilon keeps the marginals, so that only the noise near clean ends
            changes); `StiffNoise` warns where that takes more than half of the noise. None leaves it, and warns where 1 is
            exceeded.
        last: the step that ends at a clean end: "mean" (drift without noise), "euler" or "heun" of the ODE, or "denoise",
            E[x1 | x_t] (E[x0 | x_t] backwards), which is also Tweedie's formula. Where it is given, the last step is of this
            kind at any noise level; otherwise it is "mean" at a clean end.
        last_step: its length; the others then share the rest evenly.
        noise: unit normal draws to use, one each noisy step (see `solve.sde`).
        grid, shift: spacing of the steps, see `make_grid`.
        condition, guidance, transforms: what changes the field (on a path with a latent, all stacked fields of the network's
            output); the score belongs to the changed field.
        generator: draws the noise.
        solver: takes the noisy steps, as `solve.sde` does.
        hooks: `before_step`, `after_step`, `observe`.

    Raises:
        ValueError: the flow's score is not known (its reason is given), epsilon is negative, or options do not fit.
    """
    if last is not None and last not in get_args(LastStep):
        raise ValueError(unknown("last", last, get_args(LastStep)))
    if cap is not None and not cap > 0:
        raise ValueError(f"cap: must be positive, or None for no cap, got {cap}")
    equation = Equation(flow, epsilon, x, condition, guidance, transforms)
    nodes = _nodes(flow, times, steps, last_step, grid, shift)
    if equation.direct and nodes[-1] < nodes[0]:
        # The predicted drift is that of the forward equation; the backward one needs the score.
        flow.require_score()
        equation.direct = False
    closing = equation.level(nodes[-1]) < CLEAN or last is not None or last_step is not None
    # A single step between two clean ends is the last one.
    opening = equation.level(nodes[0]) < CLEAN and not equation.direct and (len(nodes) > 2 or not closing)
    inner = nodes[1 if opening else 0 : -1 if closing else len(nodes)]
    equation.place(inner, nodes[-1] > nodes[0], cap)
    _check_noise(equation, inner, method, cap)
    options = {"condition": equation.condition, **hooks}
    evaluations, before = 0, x
    if opening:
        first = equation.open(x, nodes[:2], generator, noise, options)
        x, evaluations = first.x, first.evaluations
    if len(inner) > 1:
        noisy: Any = solver(
            equation.drift,
            lambda t: math.sqrt(2 * equation.amount(t)),
            x,
            (inner[0], inner[-1]),
            steps=inner,
            method=method,
            noise=noise,
            generator=generator,
            **{**options, "before_step": equation.number_steps(hooks.get("before_step"))},
        )
        x, evaluations = noisy.x, evaluations + noisy.evaluations
    if closing:
        x, calls = _close(equation, x, nodes[-2:], last, options)
        evaluations += calls
    states = torch.stack([before, x])
    return Solution(x, (nodes[0], nodes[-1]), states, evaluations, evaluations * x.shape[0], len(nodes) - 1, 0)


class Equation:
    """The drift of a flow's SDE and its noise, step by step."""

    def __init__(
        self, flow: Flow, epsilon: Any, x: Tensor, condition: Any, guidance: Any, transforms: Sequence[FieldTransform]
    ):
        self.flow, self.forward, self.path = flow, True, flow.path
        names = getattr(flow.prediction, "names", ())
        trained = flow.prediction.trained_epsilon(flow.path) if "drift" in names else None
        if epsilon == "trained" and trained is None:
            raise ValueError("epsilon: 'trained' is for flows that predict a drift; give a number or a function of t")
        # A drift with its own noise is used as it is, and exists also where the score does not.
        self.direct = epsilon == "trained"
        self._epsilon: Any = trained if self.direct else epsilon
        self._trained = trained
        if not self.direct:
            flow.require_score()
        self.condition = as_condition(condition, flow.null, x.shape[0], x.device)
        self.estimates = Estimates(flow, guidance, transforms)

    def place(self, nodes: Sequence[float], forward: bool, cap: float | None) -> None:
        """Tell it its noisy steps, its direction, and where epsilon is capped."""
        self.forward, self._step, self._cap = forward, 0, None if self.direct else cap
        self._lengths = [abs(end - t) for t, end in pairwise(nodes)] or [1.0]

    def number_steps(self, hook: Any) -> Callable[[Any, float, int], Any]:
        """A `before_step` hook that keeps the number of the step, all of which has one cap, and then calls `hook`."""

        def before(x: Any, t: float, step: int) -> Any:
            self._step = self.estimates.field.step = step
            return None if hook is None else hook(x, t, step)

        return before

    def asked(self, t: float) -> float:
        """epsilon(t) as it was given."""
        value = float(self._epsilon(t)) if callable(self._epsilon) else float(self._epsilon)
        if not 0 <= value < math.inf:
            raise ValueError(f"epsilon: must be finite and not negative, got {value} at t = {t:g}")
        return value

    def amount(self, t: float, step: int | None = None) -> float:
        """epsilon(t), capped for the length of the step."""
        value = self.asked(t)
        if self._cap is None:
            return value
        length = self._lengths[min(self._step if step is None else step, len(self._lengths) - 1)]
        return min(value, self._cap * self.level(t) ** 2 / length)

    def level(self, t: float) -> float:
        """The noise level: sigma, or gamma."""
        return float(self.path.level(torch.tensor(t, dtype=torch.float64)))

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """v + epsilon s where time rises, v - epsilon s where it falls."""
        if self.direct:
            return self.estimates.drift(x, t, condition)
        velocity, noise = self.estimates.velocity_and_noise(x, t, condition)
        moment = float(t)
        amount = self.amount(moment)
        factor = amount / self.level(moment) if amount else 0.0
        return torch.add(velocity, noise, alpha=-factor if self.forward else factor)

    def open(self, x: Tensor, times: Sequence[float], generator: Any, noise: Any, options: dict[str, Any]) -> Solution:
        """The step that starts at a clean end: an Euler step of the ODE, or of the drift where there is none."""
        if self._trained is None:
            return ode(self.estimates.velocity, x, times, method="euler", steps=1, **options)
        trained = self._trained
        amplitude = math.sqrt(2 * trained(times[0]))
        drawn = noise if callable(noise) else None  # a list of draws is for the steps after this one
        return sde(self.estimates.drift, amplitude, x, times, noise=drawn, generator=generator, **options)


def _nodes(
    flow: Flow, times: Sequence[float], steps: Any, last_step: float | None, grid: Any, shift: float
) -> list[float]:
    low, high = flow.interval
    if len(times) != 2 or times[0] == times[1] or min(times) < low - 1e-6 or max(times) > high + 1e-6:
        raise ValueError(f"times: first and last time in [{low:g}, {high:g}] are needed, got {tuple(times)}")
    first, end = (float(t) for t in times)
    if steps is None:
        raise ValueError("steps: an SDE has no error control; give a number of steps")
    if not isinstance(steps, int):
        if last_step is not None:
            raise ValueError("last_step: goes with a number of steps; a whole grid contains its last step")
        nodes = [float(t) for t in steps]
        onward = all(b != a and (b > a) == (end > first) for a, b in pairwise(nodes))
        if not onward or abs(nodes[0] - first) > 1e-6 or abs(nodes[-1] - end) > 1e-6:
            raise ValueError(f"steps: a grid must run from {first:g} to {end:g} without turning back, got {nodes}")
        return nodes
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if last_step is not None and not (steps > 1 and 0 < last_step < abs(end - first)):
        raise ValueError(f"last_step: must be shorter than the interval, with two steps or more, got {last_step}")
    away = 0.0 if last_step is None else last_step
    stop = end - away if end > first else end + away
    count = steps if last_step is None else steps - 1
    nodes = list(solver_grid(flow.path, count, (first, stop), grid, shift))
    return nodes if last_step is None else [*nodes, end]


def _check_noise(equation: Equation, nodes: Sequence[float], method: str, cap: float | None) -> None:
    """Warn where explicit steps overshoot (the score may be as steep as 1 / gamma^2), or where the cap takes most noise."""
    if equation.direct or len(nodes) < 2:
        return
    if cap is not None:
        count = len(nodes) - 1
        asked = sum(equation.asked(t) for t in nodes[:-1]) / count
        kept = sum(equation.amount(t, step) for step, t in enumerate(nodes[:-1])) / count
        if kept < 0.5 * asked:
            warnings.warn(
                f"epsilon was lowered from {asked:.3g} to {kept:.3g} on average (cap {cap:g} on epsilon dt / gamma^2); take "
                "more steps for more noise",
                StiffNoise,
                stacklevel=3,
            )
        return
    worst, where = 0.0, 0.0
    for t, end in pairwise(nodes):
        for moment in (t, end) if method != "euler_maruyama" else (t,):
            ratio = equation.asked(moment) * abs(end - t) / max(equation.level(moment), 1e-12) ** 2
            if ratio > worst:
                worst, where = ratio, moment
    if worst > 1:
        warnings.warn(
            f"epsilon dt / gamma^2 reaches {worst:.3g} at t = {where:.3g}: {method} steps overshoot above 1; take more "
            "steps, less noise there, a longer last_step, or cap=0.5",
            StiffNoise,
            stacklevel=3,
        )


def _close(
    equation: Equation, x: Tensor, times: Sequence[float], last: LastStep | None, options: dict[str, Any]
) -> tuple[Tensor, int]:
    kind = last or "mean"
    field: Any = equation.drift if kind == "mean" else equation.estimates.velocity
    if kind == "denoise":
        t = x.new_full((), times[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
        data, source = equation.estimates.ends(x, t, equation.condition)
        return (data if equation.forward else source), 1
    solution = ode(field, x, tuple(times), method="heun" if kind == "heun" else "euler", steps=1, **options)
    return solution.x, solution.evaluations
