"""Ways back through a solve: what is kept on the way forward, and how a gradient is carried against the steps.

Each has `forward(x)`, which solves without a graph, and `backward(cotangents)`, which returns the gradient with respect to
the first state and adds those of the unknowns to their sums. Cotangents are those of states at nodes of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pantarhei.solve.adams import Adams
from pantarhei.solve.ode import Hook
from pantarhei.solve.reversible import Reversible
from pantarhei.solve.state import CountedField, State, add_terms, leaves, map_state, tensors_of, with_tensors
from pantarhei.solve.steps import RungeKutta, Step, Tableau
from pantarhei.solve.unknowns import Unknowns

Cotangents = Mapping[int, State]


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

    def advance(self, i: int, x: State, memory: Any, fresh: bool) -> tuple[State, Any, bool]:
        """State, memory, and whether the memory has to begin anew, after step i."""
        t, end = self.grid[i], self.grid[i + 1]
        if self.before is not None:
            changed = self.before(x, t, i)
            fresh, x = (fresh, x) if changed is None else (True, changed)
        if fresh:
            memory, fresh = self.step.start(self.field, x, t, end - t), False
        result = self.step(self.field, x, t, end - t, memory)
        x, memory = result.x, result.memory
        if self.after is not None:
            changed = self.after(x, end, i)
            fresh, x = (fresh, x) if changed is None else (True, changed)
        return x, memory, fresh

    def solve(self, x: State, nodes: Sequence[int]) -> list[State]:
        """The states at some nodes."""
        found, memory, fresh = [x] if 0 in nodes else [], None, True
        for i in range(self.count):
            x, memory, fresh = self.advance(i, x, memory, fresh)
            if i + 1 in nodes:
                found.append(x)
        return found

    def only_watched(self, i: int, x: State, hook: Hook | None, end: bool = False) -> None:
        """Call a hook that must not change the state.

        Raises:
            ValueError: it does.
        """
        if hook is not None and hook(x, self.grid[i + end], i) is not None:
            raise ValueError("through: a hook that changes the state needs 'checkpoint' or 'backprop'")


class Way(Protocol):
    """A way back through a solve."""

    def forward(self, x: State) -> list[State]:
        """The states at all nodes that are asked for, the last among them."""

    def backward(self, cotangents: Cotangents) -> State:
        """The gradient with respect to the first state."""
        ...

    def kept_bytes(self) -> int:
        """What is kept between the two."""


@dataclass
class _Kept:
    """The state before a step, and what else it needs to be taken again."""

    x: State
    memory: Any
    fresh: bool
    random: list[Tensor] | None


@dataclass
class Checkpoint:
    """Every step is taken again, with a graph: the exact gradient of the steps, with the activations of one.

    Attributes:
        problem: the solve.
        asked: nodes whose states are wanted.
        every: how many steps lie between stored states; those between are found again, by one more solve.
        offload: keep the states in the host's memory.
        first: the step that the way back ends at.
        random: whether the field may draw random numbers, which are then drawn again.
    """

    problem: Problem
    asked: tuple[int, ...]
    every: int = 1
    offload: bool = False
    first: int = 0
    random: bool = True
    _kept: dict[int, _Kept] = field(default_factory=dict)

    @torch.no_grad()
    def forward(self, x: State) -> list[State]:
        """Keep the states before some steps."""
        problem, found = self.problem, [x] if 0 in self.asked else []
        memory, fresh = None, True
        device = leaves(x)[0].device
        first = _random_state(device) if self.random else None
        for i in range(problem.count):
            if i >= self.first and (i - self.first) % self.every == 0:
                self._kept[i] = self._keep(x, memory, fresh, device)
            x, memory, fresh = problem.advance(i, x, memory, fresh)
            if i + 1 in self.asked:
                found.append(x)
        if first is not None and _same(first, _random_state(device)):  # nothing was drawn
            self.random = False
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
                if i in cotangents and i > 0:
                    a = map_state(torch.add, a, cotangents[i])
            del self._kept[start]
        return map_state(torch.add, a, cotangents[0]) if 0 in cotangents else a

    def kept_bytes(self) -> int:
        """States and memories."""
        return sum(t.nbytes for kept in self._kept.values() for t in tensors_of((kept.x, kept.memory)))

    def _keep(self, x: State, memory: Any, fresh: bool, device: torch.device) -> _Kept:
        remembered = None if fresh or isinstance(self.problem.step, RungeKutta) else memory
        kept = _Kept(x, remembered, fresh, _random_state(device) if self.random else None)
        if self.offload:
            kept.x, kept.memory = (with_tensors(tree, [t.cpu() for t in tensors_of(tree)]) for tree in (x, remembered))
        return kept

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
        with _drawn_again(first.random, device):
            for i in range(start, end - 1):
                before = steps[-1]
                x, memory, fresh = self.problem.advance(i, before.x, before.memory, before.fresh)
                remembered = None if fresh or isinstance(self.problem.step, RungeKutta) else memory
                steps.append(_Kept(x, remembered, fresh, _random_state(device) if self.random else None))
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
        with torch.enable_grad(), _drawn_again(kept.random, problem.device):
            new, after, _ = problem.advance(i, x, memory, fresh)
        outputs, cotangents = list(leaves(new)), list(leaves(a))
        if of_memory:
            outputs += tensors_of(after)
            cotangents += of_memory  # type: ignore[arg-type]
        inputs = [*leaves(x), *tensors_of(memory)]
        grads = problem.unknowns.pull(outputs, cotangents, inputs)
        split = len(leaves(x))
        return with_tensors(x, grads[:split]), list(grads[split:])


@dataclass
class Symplectic:
    """The partitioned Runge-Kutta adjoint (2102.09750): exact as `Checkpoint`, with the activations of one stage.

    Attributes:
        problem: the solve, by a Runge-Kutta method.
        asked: nodes whose states are wanted.
    """

    problem: Problem
    asked: tuple[int, ...]
    _states: list[State] = field(default_factory=list)

    def forward(self, x: State) -> list[State]:
        """Keep the state before each step."""
        self._states = _nodes(self.problem, x)
        return [self._states[i] for i in self.asked]

    def backward(self, cotangents: Cotangents) -> State:
        """Stage by stage, the last one first."""
        problem = self.problem
        a: State = cotangents[problem.count]
        self._states.pop()
        for i in range(problem.count - 1, -1, -1):
            a = self._back(i, self._states.pop(), a)
            if i in cotangents:
                a = map_state(torch.add, a, cotangents[i])
        return a

    def kept_bytes(self) -> int:
        """States."""
        return sum(t.nbytes for x in self._states for t in leaves(x))

    def _back(self, i: int, x: State, a: State) -> State:
        problem, t = self.problem, self.problem.grid[i]
        problem.only_watched(i, x, problem.before)
        tableau, dt = tableau_of(problem.step), self.problem.grid[i + 1] - t
        stages, slopes = [x], []
        with torch.no_grad():
            for terms, c in zip(tableau.stages, (0.0, *tableau.c[1:]), strict=False):
                slopes.append(problem.field(stages[-1], t + c * dt))
                stages.append(add_terms(x, terms[0], slopes, dt))
        pulled: list[State | None] = [None] * len(stages)  # dt J_j^T g_j
        for j in range(len(stages) - 1, -1, -1):
            g = map_state(lambda leaf, b=tableau.b[j]: b * leaf, a) if tableau.b[j] else None
            for k in range(j + 1, len(stages)):
                if tableau.a[k][j] and pulled[k] is not None:
                    term = map_state(lambda leaf, c=tableau.a[k][j]: c * leaf, pulled[k])
                    g = term if g is None else map_state(torch.add, g, term)
            if g is not None:
                cotangent = map_state(lambda leaf: dt * leaf, g)
                _, pulled[j] = _evaluated(problem, stages[j], t + tableau.c[j] * dt, cotangent)
        for part in pulled:
            a = a if part is None else map_state(torch.add, a, part)
        return a


@dataclass
class Adjoint:
    """The continuous adjoint: da/dt = -J^T a solved backwards by the solve's own method (2307.10711, 1806.07366).

    Not the gradient of the steps: it differs from it by their error. Gradients of the unknowns are sums on the way, no part
    of what is integrated.

    Attributes:
        problem: the solve, by a Runge-Kutta method (or Adams, whose starting method goes back).
        asked: nodes whose states are wanted.
        stored: begin each step at the state that the solve had there; else (`backsolve`) only the last one is kept, and the
            solve is run backwards beside it, which drifts where the flow contracts.
    """

    problem: Problem
    asked: tuple[int, ...]
    stored: bool = True
    _states: list[State] = field(default_factory=list)

    def forward(self, x: State) -> list[State]:
        """Keep the state after each step, or the last."""
        if self.stored:
            self._states = _nodes(self.problem, x)
            return [self._states[i] for i in self.asked]
        found = _nodes(self.problem, x, self.asked)
        self._states = found[-1:]
        return found

    def backward(self, cotangents: Cotangents) -> State:
        """Step by step, the last one first."""
        problem = self.problem
        a: State = cotangents[problem.count]
        x = self._states[-1]
        for i in range(problem.count - 1, -1, -1):
            if self.stored:
                x = self._states.pop()
            x, a = self._back(i, x, a)
            if i in cotangents:
                a = map_state(torch.add, a, cotangents[i])
        self._states.clear()
        return a

    def kept_bytes(self) -> int:
        """States."""
        return sum(t.nbytes for x in self._states for t in leaves(x))

    def _back(self, i: int, x: State, a: State) -> tuple[State, State]:
        problem, t = self.problem, self.problem.grid[i + 1]
        problem.only_watched(i, x, problem.before)
        tableau, dt = tableau_of(problem.step), self.problem.grid[i] - t
        slopes: list[State] = []
        pulled: list[
            State
        ] = []  # w_j J_j^T A_j, where w = -dt b makes it the stage's part of the gradients, and 1 where b = 0
        weights = [-dt * b or 1.0 for b in tableau.b]
        new = a
        for j in range(len(weights)):
            terms = tableau.stages[j - 1][0] if j else ()
            if not tableau.b[j] and not any(row[j] for row in tableau.a[j + 1 :]):
                continue  # a slope at the new point, for the next step
            stage = add_terms(x, terms, slopes, dt)
            cotangent = add_terms(a, tuple((k, c / -weights[k]) for k, c in terms), pulled, dt)
            cotangent = map_state(lambda leaf, w=weights[j]: w * leaf, cotangent)
            at, of_unknowns = t + tableau.c[j] * dt, bool(tableau.b[j])
            slope, part = _evaluated(problem, stage, at, cotangent, of_unknowns=of_unknowns)
            slopes.append(slope)
            pulled.append(part)
            new = map_state(torch.add, new, part) if of_unknowns else new
        return x if self.stored else add_terms(x, tableau.weights, slopes, dt), new


@dataclass
class Backwards:
    """The exact gradient of a reversible solve, whose states are found again on the way back: nothing is kept but the last.

    Attributes:
        problem: the solve, by a `Reversible` step.
        asked: nodes whose states are wanted.
    """

    problem: Problem
    asked: tuple[int, ...]
    _last: tuple[State, State] | None = None

    @torch.no_grad()
    def forward(self, x: State) -> list[State]:
        """Keep the last pair."""
        problem, found = self.problem, [x] if 0 in self.asked else []
        memory, fresh = None, True
        device = leaves(x)[0].device
        first = _random_state(device)
        for i in range(problem.count):
            problem.only_watched(i, x, problem.before)
            if fresh:
                memory, fresh = problem.step.start(problem.field, x, problem.grid[i], 0.0), False
            result = problem.step(problem.field, x, problem.grid[i], problem.grid[i + 1] - problem.grid[i], memory)
            x, memory = result.x, result.memory
            problem.only_watched(i, x, problem.after, end=True)
            if i + 1 in self.asked:
                found.append(x)
        _check_random(first, device)
        self._last = (x, memory)
        return found

    def backward(self, cotangents: Cotangents) -> State:
        """Both states and both gradients, step by step."""
        problem, step = self.problem, self.problem.step
        assert self._last is not None
        assert isinstance(step, Reversible)
        (y, z), share = self._last, step.coupling
        self._last = None
        a: State = cotangents[problem.count]
        b: State = map_state(torch.zeros_like, a)
        for i in range(problem.count - 1, -1, -1):
            t, end = problem.grid[i], problem.grid[i + 1]
            problem.only_watched(i, y, problem.before)
            up, of_y = self._increment(y, end, t - end, map_state(torch.neg, b))
            z = map_state(torch.add, z, up)
            a = map_state(torch.add, a, of_y)
            down, of_z = self._increment(z, t, end - t, a)
            y = map_state(lambda y, z, p: (y - (1 - share) * z - p) / share, y, z, down)
            b = map_state(lambda b, a, g: b + (1 - share) * a + g, b, a, of_z)
            a = map_state(lambda a: share * a, a)
            if i in cotangents and i > 0:
                a = map_state(torch.add, a, cotangents[i])
        a = map_state(torch.add, a, b)  # both begin at x
        return map_state(torch.add, a, cotangents[0]) if 0 in cotangents else a

    def kept_bytes(self) -> int:
        """Two states."""
        return sum(t.nbytes for t in tensors_of(self._last))

    def _increment(self, x: State, t: float, dt: float, a: State) -> tuple[State, State]:
        """P_dt(x, t), and its vector-Jacobian product."""
        step: Any = self.problem.step
        leaf = map_state(_leaf, x)
        with torch.enable_grad():
            p = step.increment(self.problem.field, leaf, t, dt)
        grads = self.problem.unknowns.pull(leaves(p), leaves(a), leaves(leaf))
        return map_state(torch.Tensor.detach, p), with_tensors(x, grads)


def tableau_of(step: Step) -> Tableau:
    """The tableau of a step, or of the one that starts an Adams method.

    Raises:
        ValueError: it has none.
    """
    if isinstance(step, Adams):
        return step.starting.tableau
    if isinstance(step, RungeKutta):
        return step.tableau
    raise ValueError(f"through: {step.name} is no Runge-Kutta method; take 'checkpoint', 'backprop' or 'reversible'")


def square_root(count: int) -> int:
    """Steps between stored states that keep about as many states as steps of one segment."""
    return max(1, math.isqrt(count - 1) + 1 if count > 1 else 1)


@torch.no_grad()
def _nodes(problem: Problem, x: State, wanted: Sequence[int] | None = None) -> list[State]:
    """The states at all nodes, or at some.

    Raises:
        ValueError: the field draws random numbers, or a hook changes the state.
    """
    device = leaves(x)[0].device
    first = _random_state(device)
    states, memory, fresh = [x] if wanted is None or 0 in wanted else [], None, True
    for i in range(problem.count):
        t, end = problem.grid[i], problem.grid[i + 1]
        problem.only_watched(i, x, problem.before)
        if fresh:
            memory, fresh = problem.step.start(problem.field, x, t, end - t), False
        result = problem.step(problem.field, x, t, end - t, memory)
        x, memory = result.x, result.memory
        problem.only_watched(i, x, problem.after, end=True)
        if wanted is None or i + 1 in wanted:
            states.append(x)
    _check_random(first, device)
    return states


def _check_random(first: list[Tensor], device: torch.device) -> None:
    if not _same(first, _random_state(device)):
        raise ValueError(
            "through: the field draws random numbers (is its network in training mode?), which only 'checkpoint' and "
            "'backprop' can repeat"
        )


def _evaluated(
    problem: Problem, x: State, t: float, cotangent: State, *, of_unknowns: bool = True
) -> tuple[State, State]:
    """The field at (x, t), and its vector-Jacobian product."""
    leaf = map_state(_leaf, x)
    with torch.enable_grad():
        slope = problem.field(leaf, t)
    grads = problem.unknowns.pull(leaves(slope), leaves(cotangent), leaves(leaf), of_unknowns=of_unknowns)
    return map_state(torch.Tensor.detach, slope), grads[0] if isinstance(x, Tensor) else tuple(grads)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(True)


def _random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators that dropout draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _drawn_again(state: list[Tensor] | None, device: torch.device) -> AbstractContextManager[None]:
    """Draw again what was drawn after a state of the generators."""
    return nullcontext() if state is None else _Replayed(state, device)


class _Replayed(AbstractContextManager[None]):
    def __init__(self, state: list[Tensor], device: torch.device):
        self._state, self._device, self._now = state, device, _random_state(device)

    def __enter__(self) -> None:
        self._set(self._state)

    def __exit__(self, *failure: object) -> None:
        self._set(self._now)

    def _set(self, state: list[Tensor]) -> None:
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state(state[1], self._device)
