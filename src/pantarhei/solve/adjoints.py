"""Ways back through a solve by equations of their own: symplectic, continuous, and along reversible steps."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch

from pantarhei.solve.adams import Adams
from pantarhei.solve.problem import Cotangents, Problem, with_cotangent
from pantarhei.solve.reversible import Reversible
from pantarhei.solve.state import State, add_terms, leaves, map_state, tensors_of
from pantarhei.solve.steps import RungeKutta, Step, Tableau

TOLERABLE = 1e-3  # of what is found again of a state


@dataclass
class _Stored:
    """What ways back share that keep the state at each node and go from step to step.

    Attributes:
        problem: the solve.
        asked: nodes whose states are wanted.
    """

    problem: Problem
    asked: tuple[int, ...]
    _states: list[State] = field(default_factory=list, init=False)

    def forward(self, x: State) -> list[State]:
        """Keep the state at each node."""
        self._states, _ = self.problem.solve_plainly(x, range(self.problem.count + 1))
        return [self._states[i] for i in self.asked]

    def backward(self, cotangents: Cotangents) -> State:
        """Step by step, the last one first."""
        a: State = cotangents[self.problem.count]
        end = self._states.pop()
        for i in range(self.problem.count - 1, -1, -1):
            start = self._states.pop() if self._states else None
            end, a = self._back(i, start, end, a)
            a = with_cotangent(a, cotangents, i)
        return a

    def kept_bytes(self) -> int:
        """States."""
        return sum(t.nbytes for x in self._states for t in leaves(x))

    def _back(self, i: int, start: State | None, end: State, a: State) -> tuple[State, State]:
        """State and gradient before step i, from the states at its ends (the first is None where it was not kept)."""
        raise TypeError(f"{type(self).__name__} does not go back")


class Symplectic(_Stored):
    """The partitioned Runge-Kutta adjoint (2102.09750): exact as `Checkpoint`, with the activations of one stage."""

    def _back(self, i: int, start: State | None, end: State, a: State) -> tuple[State, State]:
        problem, t = self.problem, self.problem.grid[i]
        problem.begin(i, start)
        tableau, dt = tableau_of(problem.step), self.problem.grid[i + 1] - t
        stages, slopes = [start], []
        with torch.no_grad():
            for terms, c in zip(tableau.stages, (0.0, *tableau.c[1:]), strict=False):
                slopes.append(problem.field(stages[-1], t + c * dt))
                stages.append(add_terms(start, terms[0], slopes, dt))
        pulled: list[State | None] = [None] * len(stages)  # dt J_j^T g_j
        for j in range(len(stages) - 1, -1, -1):
            g = map_state(lambda leaf, b=tableau.b[j]: b * leaf, a) if tableau.b[j] else None
            for k in range(j + 1, len(stages)):
                if tableau.a[k][j] and pulled[k] is not None:
                    term = map_state(lambda leaf, c=tableau.a[k][j]: c * leaf, pulled[k])
                    g = term if g is None else map_state(torch.add, g, term)
            if g is not None:
                cotangent = map_state(lambda leaf: dt * leaf, g)
                _, pulled[j] = problem.evaluated(stages[j], t + tableau.c[j] * dt, cotangent)
        for part in pulled:
            a = a if part is None else map_state(torch.add, a, part)
        return start, a


class Adjoint(_Stored):
    """The continuous adjoint: da/dt = -J^T a solved backwards by the solve's own method (2307.10711, 1806.07366).

    Not the gradient of the steps: it differs from it by their error. Gradients of the unknowns are sums on the way, no part
    of what is integrated. Of an Adams method its starting method goes back.
    """

    def _back(self, i: int, start: State | None, end: State, a: State) -> tuple[State, State]:
        problem, t = self.problem, self.problem.grid[i + 1]
        problem.begin(i, end)
        tableau, dt = tableau_of(problem.step), self.problem.grid[i] - t
        slopes: list[State] = []
        # w J^T A of each stage, where w = -dt b makes it the stage's part of the gradients; 1 where b = 0.
        pulled: list[State] = []
        weights = [-dt * b or 1.0 for b in tableau.b]
        new = a
        for j in range(len(weights)):
            terms = tableau.stages[j - 1][0] if j else ()
            if not tableau.b[j] and not any(row[j] for row in tableau.a[j + 1 :]):
                continue  # a slope at the new point, for the next step
            stage = add_terms(end, terms, slopes, dt)
            cotangent = add_terms(a, tuple((k, c / -weights[k]) for k, c in terms), pulled, dt)
            cotangent = map_state(lambda leaf, w=weights[j]: w * leaf, cotangent)
            at, of_unknowns = t + tableau.c[j] * dt, bool(tableau.b[j])
            slope, part = problem.evaluated(stage, at, cotangent, of_unknowns=of_unknowns)
            slopes.append(slope)
            pulled.append(part)
            new = map_state(torch.add, new, part) if of_unknowns else new
        return add_terms(end, tableau.weights, slopes, dt) if start is None else start, new


class Backsolve(Adjoint):
    """The same with the last state only: the solve is run backwards beside it, which drifts where the flow contracts."""

    def forward(self, x: State) -> list[State]:
        """Keep the last state."""
        found, _ = self.problem.solve_plainly(x, self.asked)
        self._states = found[-1:]
        return found


@dataclass
class Backwards:
    """The exact gradient of a reversible solve, whose states are found again on the way back: nothing is kept but the last.

    Rounding grows by 1 / coupling a step on the way back, which says when single precision ends.

    Attributes:
        problem: the solve, by a `Reversible` step.
        asked: nodes whose states are wanted.
    """

    problem: Problem
    asked: tuple[int, ...]
    _last: tuple[State, State] | None = None

    def forward(self, x: State) -> list[State]:
        """Keep the last pair."""
        step = self.problem.step
        assert isinstance(step, Reversible)
        growth = step.coupling**-self.problem.count * torch.finfo(leaves(x)[0].dtype).eps
        if growth > TOLERABLE:
            warnings.warn(
                f"reversible: on the way back rounding grows to about {growth:.1g} of the states, by 1 / {step.coupling:g} "
                "a step; take fewer steps, double precision, or through='checkpoint'",
                stacklevel=2,
            )
        found, memory = self.problem.solve_plainly(x, self.asked)
        self._last = (found[-1], memory)
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
            problem.begin(i, y)
            up, of_y = self._increment(y, end, t - end, map_state(torch.neg, b))
            z = map_state(torch.add, z, up)
            a = map_state(torch.add, a, of_y)
            down, of_z = self._increment(z, t, end - t, a)
            y = map_state(lambda y, z, p: (y - (1 - share) * z - p) / share, y, z, down)
            b = map_state(lambda b, a, g: b + (1 - share) * a + g, b, a, of_z)
            a = map_state(lambda a: share * a, a)
            a = with_cotangent(a, cotangents, i)
        return map_state(torch.add, a, b)  # both begin at x

    def kept_bytes(self) -> int:
        """Two states."""
        return sum(t.nbytes for t in tensors_of(self._last))

    def _increment(self, x: State, t: float, dt: float, a: State) -> tuple[State, State]:
        """P_dt(x, t), and its vector-Jacobian product."""
        problem, step = self.problem, self.problem.step
        assert isinstance(step, Reversible)
        return problem.pulled(lambda leaf: step.increment(problem.field, leaf, t, dt), x, a)


def tableau_of(step: Step) -> Tableau:
    """The tableau of a step, or of the one that starts an Adams method.

    Raises:
        ValueError: it has none.
    """
    if isinstance(step, Adams):
        return step.starting.tableau
    if isinstance(step, RungeKutta):
        return step.tableau
    raise ValueError(f"through: {step.name} is no Runge-Kutta method; take 'checkpoint' or 'backprop'")
