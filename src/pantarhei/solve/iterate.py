"""`iterate`: roll a discrete map forward (learned time-steppers, coarse solvers)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pantarhei.solve.state import State, check_state, leaves, map_state


@dataclass(frozen=True)
class Rollout:
    """A discrete trajectory: the last state, the kept states (stacked) and the step numbers they belong to."""

    x: State
    xs: State
    kept: tuple[int, ...]


def iterate(
    step: Callable[..., State],
    x: State,
    steps: int,
    *,
    condition: Any = None,
    every: int = 1,
    observe: Callable[[State, int], None] | None = None,
    until: Callable[[State, int], bool] | None = None,
    check_finite: bool = True,
) -> Rollout:
    """Apply `x <- step(x[, condition])` `steps` times.

    Args:
        step: the map; its output is like its input.
        x: initial state, kept as number 0.
        steps: number of applications.
        condition: passed on as second argument where given.
        every: keep each `every`-th state (the initial and the last one are always kept); 0 keeps only these two.
        observe: `(x, number)`, called for the initial state and after each application; stores nothing.
        until: `(x, number) -> bool`; true ends the rollout there (time to failure, say) with what was kept so far.
        check_finite: stop with an error as soon as a state is not finite (one host synchronisation a step).

    Raises:
        ValueError: for a negative number of steps or `every`.
        FloatingPointError: where a state is not finite; the message names the step.
    """
    check_state(x)
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if every < 0:
        raise ValueError(f"every: must not be negative, got {every}")
    states, kept = [x], [0]
    if observe is not None:
        observe(x, 0)
    for number in range(1, steps + 1):
        x = step(x) if condition is None else step(x, condition)
        if check_finite and not all(bool(leaf.isfinite().all()) for leaf in leaves(x)):
            raise FloatingPointError(f"iterate: the state is not finite after step {number}")
        if observe is not None:
            observe(x, number)
        ended = number == steps or (until is not None and until(x, number))
        if ended or (every and number % every == 0):
            states.append(x)
            kept.append(number)
        if ended:
            break
    return Rollout(x, map_state(lambda *parts: torch.stack(parts), *states), tuple(kept))
