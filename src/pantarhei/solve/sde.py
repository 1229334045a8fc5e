"""`sde`: integrate dX = drift(X, t) dt + g dW on a given grid, forwards or backwards in time."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.naming import unknown
from pantarhei.solve.ode import Hook, Solution, check_grid, check_times
from pantarhei.solve.state import (
    CountedField,
    Field,
    State,
    add_scaled,
    check_state,
    half_types,
    in_types,
    leaves,
    map_state,
    wide,
)
from pantarhei.solve.steps import StepResult

Diffusion = float | Callable[..., Any]
SDEMethodName = Literal["euler_maruyama", "heun", "noised_heun"]
# (drift, amplitude, x, t, t_end, unit normal draw) -> new state
SDEStep = Callable[[CountedField, Callable[[State, float], State], State, float, float, State], State]


def sde(
    drift: Field,
    diffusion: Diffusion,
    x: State,
    times: Sequence[float] | Tensor = (0.0, 1.0),
    *,
    steps: int | Sequence[float] | Tensor | None = None,
    method: SDEMethodName | SDEStep = "euler_maruyama",
    noise: Sequence[State] | Tensor | Callable[[int, State], State] | None = None,
    generator: torch.Generator | None = None,
    condition: Any = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
    observe: Callable[[State, float, int], None] | None = None,
) -> Solution:
    """Solve a stochastic differential equation with diagonal noise.

    Args:
        drift: `drift(x, t[, condition])`, like a field of `ode`.
        diffusion: a number g, or `g(t) -> float` of the float time, or `g(x, t) -> tensor` for state-dependent noise
            (told apart by the number of its required arguments). Where time falls, the equation is the backward one:
            dX = drift dt + g dW with dt < 0 and W run from the last time.
        x: state at `times[0]`.
        times: strictly monotone; states at these times are reported and must be nodes of the grid.
        steps: number of equal steps, or the whole grid; without it the grid is `times`.
        method: "euler_maruyama" (Ito; strong order 1/2, 1 for additive noise), "heun" (both stages share the increment;
            drift of weak order 2 for additive noise; for state-dependent noise it solves the Stratonovich equation),
            "noised_heun" (the noise first, then a deterministic Heun step from there; Karras et al. 2206.00364, SiT), or a
            function `(drift, amplitude, x, t, t_end, draw) -> x` of one step.
        noise: standard normal draws to use, one a step: a tensor (steps, *x.shape), a sequence of states, or a function of
            the step's number and the state.
        generator: draws the noise where `noise` is None.
        condition, before_step, after_step, observe: as in `ode`.

    Returns:
        A `Solution` (`rejected` is 0).

    Raises:
        ValueError: for bad grids, an unknown method, or noise that does not match the number of steps.
    """
    check_state(x)
    advance = _step_of(method)
    asked = check_times(times)
    grid = check_grid(steps, asked)
    if not set(asked) <= set(grid):
        raise ValueError(
            "times: an SDE is reported at nodes of its grid only; give steps= as a grid that contains them"
        )
    if noise is not None and not callable(noise) and len(noise) != len(grid) - 1:
        raise ValueError(f"noise: one draw a step is needed, {len(grid) - 1}, got {len(noise)}")
    types = half_types(x)
    field, x = CountedField(drift, condition, types), wide(x) if types else x
    amplitude = _amplitude(diffusion)
    reported = [x]
    if observe is not None:
        observe(x, grid[0], 0)
    for i, (t, end) in enumerate(pairwise(grid)):
        x = _hooked(before_step, x, t, i)
        if noise is None:
            draw = map_state(lambda leaf: _normal_like(leaf, generator), x)
        else:
            draw = noise(i, x) if callable(noise) else noise[i]
        x = _hooked(after_step, advance(field, amplitude, x, t, end, draw), end, i)
        if observe is not None:
            observe(x, end, i + 1)
        if len(reported) < len(asked) and asked[len(reported)] == end:
            reported.append(x)
    reported = [in_types(part, types) for part in reported] if types else reported
    xs = map_state(lambda *parts: torch.stack(parts), *reported)
    return Solution(in_types(x, types) if types else x, asked, xs, field.calls, field.rows, len(grid) - 1, 0)


def _euler_maruyama(
    drift: CountedField, amplitude: Callable[[State, float], State], x: State, t: float, end: float, draw: State
) -> State:
    kick = map_state(lambda g, w: g * math.sqrt(abs(end - t)) * w, amplitude(x, t), draw)
    return map_state(torch.add, add_scaled(x, (1.0,), (drift(x, t),), end - t), kick)


def _heun(
    drift: CountedField, amplitude: Callable[[State, float], State], x: State, t: float, end: float, draw: State
) -> State:
    root = math.sqrt(abs(end - t))
    slope, early = drift(x, t), amplitude(x, t)
    predicted = add_scaled(x, (1.0,), (slope,), end - t)
    predicted = map_state(lambda y, g, w: y + g * root * w, predicted, early, draw)
    late_slope, late = drift(predicted, end), amplitude(predicted, end)
    mean = add_scaled(x, (0.5, 0.5), (slope, late_slope), end - t)
    return map_state(lambda y, a, b, w: y + (a + b) / 2 * root * w, mean, early, late, draw)


def _noised_heun(
    drift: CountedField, amplitude: Callable[[State, float], State], x: State, t: float, end: float, draw: State
) -> State:
    root = math.sqrt(abs(end - t))
    x = map_state(lambda y, g, w: y + g * root * w, x, amplitude(x, t), draw)
    slope = drift(x, t)
    late = drift(add_scaled(x, (1.0,), (slope,), end - t), end)
    return add_scaled(x, (0.5, 0.5), (slope, late), end - t)


SDE_METHODS: dict[str, SDEStep] = {"euler_maruyama": _euler_maruyama, "heun": _heun, "noised_heun": _noised_heun}


@dataclass(frozen=True)
class Stochastic:
    """A step of an SDE among those of `ode` and `differentiable`: the field is its drift.

    A gradient through it is that of the path with its noise fixed, which is drawn again on the way back: exact, with
    'checkpoint' and 'backprop'.

    Attributes:
        diffusion, method: as of `sde`.
        noise: a number that the noise of each step follows from, with the step's time; or a function of time and state;
            None draws from torch's own generator.
    """

    diffusion: Diffusion
    method: SDEMethodName | SDEStep = "euler_maruyama"
    noise: int | Callable[[float, State], State] | None = None

    name = "stochastic"
    order = 1
    adaptive = False
    one_way = True

    def __post_init__(self) -> None:
        if self.noise is not None and not callable(self.noise) and type(self.noise) is not int:
            raise ValueError(
                f"noise: a whole number, a function of time and state, or None is needed, got {self.noise!r}"
            )

    def start(self, field: CountedField, x: State, t: Any, dt: Any, slope: State | None = None) -> None:
        """Nothing is remembered."""

    def __call__(self, field: CountedField, x: State, t: Any, dt: Any, memory: None) -> StepResult:
        """One step with its noise."""
        if callable(self.noise):
            draw = self.noise(t, x)
        else:
            draw = draw_at(self.noise, t, x)
        new = _step_of(self.method)(field, _amplitude(self.diffusion), x, t, t + dt, draw)
        return StepResult(new, None, None, ())

    def interpolate(self, theta: Any, x: State, result: StepResult, dt: Any, field: CountedField, t: Any) -> State:
        """There is no path between two nodes.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "times: an SDE is reported at nodes of its grid only; give steps= as a grid that contains them"
        )


def draw_at(seed: int | None, t: float, x: State) -> State:
    """Standard normal noise like x that follows from a number and a time; from torch's own generator without a number.

    Of the time, not of a step's number: a step that is taken again knows its time only.
    """
    generator = None
    if seed is not None:
        digest = hashlib.blake2b(struct.pack("<qd", seed, t), digest_size=8).digest()
        generator = torch.Generator(leaves(x)[0].device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return map_state(lambda leaf: _normal_like(leaf, generator), x)


def _step_of(method: SDEMethodName | SDEStep) -> SDEStep:
    if not isinstance(method, str):
        return method
    if method not in SDE_METHODS:
        raise ValueError(unknown("method", method, SDE_METHODS))
    return SDE_METHODS[method]


def _hooked(hook: Hook | None, x: State, t: float, step: int) -> State:
    changed = None if hook is None else hook(x, t, step)
    return x if changed is None else changed


def _amplitude(diffusion: Diffusion) -> Callable[[State, float], State]:
    """The diffusion as a state-shaped amplitude at (x, t)."""
    if not callable(diffusion):
        return lambda x, t: map_state(lambda leaf: _number_like(diffusion, leaf), x)
    required = _required_arguments(diffusion)
    if required == 1:
        return lambda x, t: map_state(lambda leaf: _number_like(diffusion(t), leaf), x)
    if required == 2:
        return lambda x, t: diffusion(x, leaves(x)[0].new_full((), t))
    raise TypeError(f"diffusion: must be a number, g(t) or g(x, t), got a callable of {required} required arguments")


def _required_arguments(function: Callable[..., Any]) -> int:
    import inspect

    parameters = inspect.signature(function).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters)


def _number_like(value: Any, like: Tensor) -> Tensor:
    """A number in the type of a tensor; a tensor keeps its gradient."""
    return value.to(like) if isinstance(value, Tensor) else like.new_full((), float(value))


def _normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
