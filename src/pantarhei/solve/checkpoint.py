"""The way back that takes every step again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pantarhei.solve.problem import Cotangents, Problem, with_cotangent
from pantarhei.solve.randomness import RandomState, drawn_again, random_state, same_state
from pantarhei.solve.state import State, leaves, tensors_of, with_tensors
from pantarhei.solve.steps import RungeKutta


@dataclass
class _Kept:
    """The state before a step, and what else it needs to be taken again."""

    x: State
    memory: Any
    fresh: bool
    random: RandomState | None


@dataclass
class Checkpoint:
    """Every step is taken again, with a graph: the exact gradient of the steps, with the activations of one.

    Attributes:
        problem: the solve.
        asked: nodes whose states are wanted.
        every: how many steps lie between stored states; those between are found again, by one more solve.
        offload: keep the states in the host's memory.
        first: the step that the way back ends at.
        random: whether the field has drawn random numbers, which are then drawn again.
    """

    problem: Problem
    asked: tuple[int, ...]
    every: int = 1
    offload: bool = False
    first: int = 0
    random: bool = field(default=False, init=False)
    _kept: dict[int, _Kept] = field(default_factory=dict)

    @torch.no_grad()
    def forward(self, x: State) -> list[State]:
        """Keep the states before some steps."""
        device = leaves(x)[0].device
        first = random_state(device)
        self.random = False

        def keep(i: int, x: State, memory: Any, fresh: bool) -> None:
            now = random_state(device)
            self.random = self.random or not same_state(first, now)
            if i >= self.first and (i - self.first) % self.every == 0:
                state = now if self.random else first  # one for all, as long as nothing was drawn
                kept = _Kept(x, self._remembered(memory, fresh), fresh, state)
                if self.offload:
                    kept.x, kept.memory = (
                        with_tensors(tree, [t.cpu() for t in tensors_of(tree)]) for tree in (kept.x, kept.memory)
                    )
                self._kept[i] = kept

        found, _ = self.problem.solve(x, self.asked, keep=keep)
        self.random = self.random or not same_state(first, random_state(device))
        if not self.random:
            for kept in self._kept.values():
                kept.random = None
        return found

    def backward(self, cotangents: Cotangents) -> State:
        """From the last segment to the first."""
        count = self.problem.count
        a: State = cotangents[count]
        of_memory: list[Tensor | None] | None = None
        for start in sorted(self._kept, reverse=True):
            steps = self._segment(start, min(start + self.every, count))
            for i in range(start + len(steps) - 1, start - 1, -1):
                a, of_memory = self._back(i, steps.pop(), a, of_memory)
                a = with_cotangent(a, cotangents, i)
            del self._kept[start]
        return a

    def kept_bytes(self) -> int:
        """States and memories."""
        return sum(t.nbytes for kept in self._kept.values() for t in tensors_of((kept.x, kept.memory)))

    def _remembered(self, memory: Any, fresh: bool) -> Any:
        """What a step needs of the past: a slope of a Runge-Kutta method is the field's there, unless it was drawn."""
        again = isinstance(self.problem.step, RungeKutta) and not self.random
        return None if fresh or again else memory

    @torch.no_grad()
    def _segment(self, start: int, end: int) -> list[_Kept]:
        """What each step of a segment starts from."""
        first = self._kept[start]
        device = self.problem.device
        if self.offload:
            x, memory = (
                with_tensors(tree, [t.to(device) for t in tensors_of(tree)]) for tree in (first.x, first.memory)
            )
            first = _Kept(x, memory, first.fresh, first.random)
        steps = [first]
        with drawn_again(first.random, device):
            for i in range(start, end - 1):
                before = steps[-1]
                x, memory, fresh = self.problem.advance(i, before.x, before.memory, before.fresh)
                state = random_state(device) if self.random else None
                steps.append(_Kept(x, self._remembered(memory, fresh), fresh, state))
        return steps

    def _back(
        self, i: int, kept: _Kept, a: State, of_memory: list[Tensor | None] | None
    ) -> tuple[State, list[Tensor | None]]:
        """Through step i."""
        problem = self.problem
        x, memory = (
            with_tensors(tree, [t.detach().requires_grad_(t.is_floating_point()) for t in tensors_of(tree)])
            for tree in (kept.x, kept.memory)
        )
        # A Runge-Kutta method remembers a slope at most, which is the field's here: it needs no memory.
        fresh = kept.fresh and not isinstance(problem.step, RungeKutta)
        with torch.enable_grad(), drawn_again(kept.random, problem.device):
            new, after, _ = problem.advance(i, x, memory, fresh)
        outputs, cotangents = list(leaves(new)), list(leaves(a))
        if of_memory:
            outputs += tensors_of(after)
            cotangents += of_memory  # type: ignore[arg-type]
        inputs = [*leaves(x), *tensors_of(memory)]
        grads = problem.unknowns.pull(outputs, cotangents, inputs)
        split = len(leaves(x))
        return with_tensors(x, grads[:split]), list(grads[split:])


def square_root(count: int) -> int:
    """Steps between stored states that keep about as many states as steps of one segment."""
    return max(1, math.isqrt(count - 1) + 1 if count > 1 else 1)
