"""A solve that a gradient is taken through: its steps, and what its field makes of a gradient."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pantarhei.solve.ode import Hook
from pantarhei.solve.randomness import random_state, same_state
from pantarhei.solve.state import CountedField, State, leaves, map_state
from pantarhei.solve.steps import Step
from pantarhei.solve.unknowns import Unknowns

Cotangents = Mapping[int, State]  # of states at nodes of the grid, the last among them
Keep = Callable[[int, State, Any, bool], None]


@dataclass
class Problem:
    """A solve on a grid.

    Attributes:
        field: what is integrated.
        step: the method.
        grid: its times.
        unknowns: what the gradient is wanted of, besides the state.
        device: of the state.
        before, after: hooks around a step.
    """

    field: CountedField
    step: Step
    grid: tuple[float, ...]
    unknowns: Unknowns
    device: torch.device
    before: Hook | None = None
    after: Hook | None = None

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.grid) - 1

    def advance(self, i: int, x: State, memory: Any, fresh: bool, *, fixed: bool = False) -> tuple[State, Any, bool]:
        """State, memory, and whether the memory has to begin anew, after step i.

        Raises:
            ValueError: a hook changes the state although it is `fixed`.
        """
        t, end = self.grid[i], self.grid[i + 1]
        x, fresh = self._hooked(self.before, x, t, i, fresh, fixed)
        if fresh:
            memory, fresh = self.step.start(self.field, x, t, end - t), False
        result = self.step(self.field, x, t, end - t, memory)
        x, fresh = self._hooked(self.after, result.x, end, i, fresh, fixed)
        return x, result.memory, fresh

    def solve(
        self, x: State, nodes: Container[int], *, keep: Keep | None = None, fixed: bool = False
    ) -> tuple[list[State], Any]:
        """The states at some nodes, and the memory at the end.

        Args:
            x: the first state.
            nodes: which.
            keep: is told number, state, memory and whether it has to begin anew, before each step.
            fixed: hooks may not change the state.
        """
        found, memory, fresh = [x] if 0 in nodes else [], None, True
        for i in range(self.count):
            if keep is not None:
                keep(i, x, memory, fresh)
            x, memory, fresh = self.advance(i, x, memory, fresh, fixed=fixed)
            if i + 1 in nodes:
                found.append(x)
        return found, memory

    @torch.no_grad()
    def solve_plainly(self, x: State, nodes: Container[int]) -> tuple[list[State], Any]:
        """The same without a graph, for ways back that do not take the steps again.

        Raises:
            ValueError: the field draws random numbers, or a hook changes the state.
        """
        before = random_state(self.device)
        found, memory = self.solve(x, nodes, fixed=True)
        if not same_state(before, random_state(self.device)):
            raise ValueError(
                "through: the field draws random numbers (is its network in training mode?), which only 'checkpoint' and "
                "'backprop' can repeat"
            )
        return found, memory

    def begin(self, i: int, x: State) -> None:
        """Tell who watches that step i is come to again."""
        self._hooked(self.before, x, self.grid[i], i, False, True)

    def _hooked(self, hook: Hook | None, x: State, t: float, i: int, fresh: bool, fixed: bool) -> tuple[State, bool]:
        changed = None if hook is None else hook(x, t, i)
        if changed is None:
            return x, fresh
        if fixed:
            raise ValueError("through: a hook that changes the state needs 'checkpoint' or 'backprop'")
        return changed, True

    def evaluated(self, x: State, t: float, cotangent: State, *, of_unknowns: bool = True) -> tuple[State, State]:
        """The field at (x, t), and its vector-Jacobian product."""
        return self.pulled(lambda leaf: self.field(leaf, t), x, cotangent, of_unknowns=of_unknowns)

    def pulled(
        self, function: Callable[[State], State], x: State, cotangent: State, *, of_unknowns: bool = True
    ) -> tuple[State, State]:
        """A function's value at x, and its vector-Jacobian product."""
        leaf = map_state(lambda part: part.detach().requires_grad_(True), x)
        with torch.enable_grad():
            value = function(leaf)
        grads = self.unknowns.pull(leaves(value), leaves(cotangent), leaves(leaf), of_unknowns=of_unknowns)
        return map_state(Tensor.detach, value), grads[0] if isinstance(x, Tensor) else tuple(grads)


class Way(Protocol):
    """A way back through a solve: what is kept on the way forward, and how a gradient is carried against the steps."""

    def forward(self, x: State) -> list[State]:
        """Solve without a graph; the states at all nodes that are asked for, the last among them."""

    def backward(self, cotangents: Cotangents) -> State:
        """The gradient with respect to the first state; those of the unknowns are added to their sums."""
        ...

    def kept_bytes(self) -> int:
        """What is kept between the two."""


def with_cotangent(a: State, cotangents: Cotangents, node: int) -> State:
    """A gradient at a node, and what reaches it there."""
    return map_state(torch.add, a, cotangents[node]) if node in cotangents else a
