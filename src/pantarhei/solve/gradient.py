"""Gradients through a solve: with respect to its first state, its condition, and whatever the field closes over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pantarhei.naming import unknown
from pantarhei.solve.adams import Adams
from pantarhei.solve.adaptive import Tolerance, solve_joint
from pantarhei.solve.adjoints import Adjoint, Backsolve, Backwards, Symplectic, tableau_of
from pantarhei.solve.checkpoint import Checkpoint, square_root
from pantarhei.solve.memory import PeakMemory
from pantarhei.solve.methods import MethodName, as_step
from pantarhei.solve.ode import Hook, check_grid, check_times
from pantarhei.solve.problem import Problem, Way
from pantarhei.solve.randomness import drawn_again, random_state
from pantarhei.solve.reversible import Reversible
from pantarhei.solve.state import (
    CountedField,
    Field,
    State,
    check_state,
    half_types,
    in_types,
    leaves,
    map_state,
    tensors_of,
    wide,
    with_tensors,
)
from pantarhei.solve.steps import Step
from pantarhei.solve.unknowns import Unknowns, check_leaves, constant, own_module, parameters_of

Through = Literal["checkpoint", "backprop", "symplectic", "adjoint", "backsolve", "reversible"]
THROUGH: dict[str, str] = {
    "checkpoint": "take every step again, with a graph: exact, the activations of one step",
    "backprop": "keep the graph of the whole solve: exact, activations grow with the steps",
    "symplectic": "the same gradient stage by stage: exact, the activations of one stage; Runge-Kutta methods",
    "adjoint": "solve the adjoint equation backwards from stored states: right up to the solve's error",
    "backsolve": "the same without stored states: worse where the flow contracts",
    "reversible": "reversible steps: exact for their own, slightly different, solution; no state is stored",
}
RUNGE_KUTTA_WAYS = ("symplectic", "adjoint", "backsolve")  # equations of their own, for methods with a tableau
EXACT = ("checkpoint", "backprop", "symplectic", "reversible")
Wrt = Literal["state", "condition", "parameters"]
Given = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | None


@dataclass
class Report:
    """What a gradient took.

    Attributes:
        through: how it was found.
        steps: of the solve.
        forward, backward: evaluations of the field.
        kept_bytes: states (and memories of steps) that were kept for the way back.
        peak_bytes: the most memory that was held at once, beyond what was there before; None where it was not measured.
        error: relative error of a directional derivative against a difference; None where it was not verified.
        times: nodes of the grid; with error control those of the accepted steps.
    """

    through: str = ""
    steps: int = 0
    forward: int = 0
    backward: int = 0
    kept_bytes: int = 0
    peak_bytes: int | None = None
    error: float | None = None
    times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Gradient:
    """A loss of the end of a solve, and its gradient.

    Attributes:
        value: the loss, 0-d.
        x: the end of the solve.
        state: gradient with respect to the first state, like it; None where it was not asked for.
        condition: those with respect to the condition's floating-point tensors, in their order.
        parameters: those with respect to the parameters, by name.
        report: what it took.
    """

    value: Tensor
    x: State
    state: State | None
    condition: tuple[Tensor, ...]
    parameters: dict[str, Tensor]
    report: Report


def gradient(
    loss: Callable[[State], Tensor],
    field: Field,
    x: State,
    times: Sequence[float] | Tensor = (0.0, 1.0),
    *,
    wrt: Sequence[Wrt] = ("state",),
    parameters: Given = None,
    condition: Any = None,
    verify: bool = False,
    measure: bool = False,
    **options: Any,
) -> Gradient:
    """The gradient of a loss on the end of a solve.

    Args:
        loss: a 0-d tensor from the last state (or the states at all asked times, see `differentiable`).
        field, x, times: as of `ode`.
        wrt: with respect to what: "state" (the first one), "condition", "parameters".
        parameters: of the field; by default those of the module that it is, or whose method it is.
        condition: as of `ode`.
        verify: compare a directional derivative with a difference, at the cost of two solves.
        measure: find the peak of allocated memory; on a CPU this takes time.
        options: of `differentiable`: through, method, steps, rtol, atol, constants, every, offload, truncate, hooks.

    Raises:
        ValueError: settings that do not go together, nothing to differentiate with respect to, a loss that is no number,
            or a field that depends on something else that needs gradients.
        FloatingPointError: an exact gradient that is not verified.
    """
    unknown_names = sorted(set(wrt) - {"state", "condition", "parameters"})
    if unknown_names or not wrt:
        raise ValueError(f"wrt: some of state, condition and parameters are needed, got {', '.join(wrt) or 'nothing'}")
    named = {}
    if "parameters" in wrt:
        named = parameters_of(own_module(field) if parameters is None else parameters)
        if not named:
            raise ValueError("parameters: there are none to train; give a module or tensors that the field depends on")
    conditions = [t for t in tensors_of(plain(condition)) if t.is_floating_point()] if "condition" in wrt else []
    if "condition" in wrt and not conditions:
        raise ValueError("condition: there is none with floating-point tensors")
    start = map_state(lambda leaf: leaf.detach().requires_grad_("state" in wrt), x)
    report, device = Report(), leaves(x)[0].device
    random = random_state(device)
    with needing([*conditions, *named.values()]), _measured(measure, device, report):
        end = differentiable(
            field, start, times, parameters=named or None, condition=condition, report=report, **options
        )
        value = loss(end)
        if value.ndim or not value.requires_grad:
            raise ValueError("loss: a number that depends on the state is needed")
        of_state = leaves(start) if "state" in wrt else ()
        inputs = [*of_state, *conditions, *named.values()]
        found = torch.autograd.grad(value, inputs, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]
    split = len(of_state)
    result = Gradient(
        value.detach(),
        map_state(Tensor.detach, end),
        with_tensors(x, grads[:split]) if split else None,
        tuple(grads[split : split + len(conditions)]),
        dict(zip(named, grads[split + len(conditions) :], strict=True)),
        report,
    )
    if verify:

        def at() -> float:
            way: Through = "reversible" if report.through == "reversible" else "checkpoint"
            again = {**options, "report": None, "steps": report.times, "through": way}
            with torch.no_grad(), drawn_again(random, device):
                return float(loss(differentiable(field, start, times, condition=condition, **again)))

        report.error = _directional_error(at, inputs, grads)
        limit = {torch.float64: 1e-4, torch.float32: 0.05}.get(leaves(x)[0].dtype, float("inf"))
        if report.through in EXACT and options.get("truncate") is None and not report.error <= limit:
            raise FloatingPointError(
                f"verify: along a random direction the gradient is off by {report.error:.2g} of itself; is the loss or the "
                "field not smooth there, or does either change from call to call?"
            )
    return result


def differentiable(
    field: Field,
    x: State,
    times: Sequence[float] | Tensor = (0.0, 1.0),
    *,
    through: Through = "checkpoint",
    parameters: Given = None,
    constants: Given = None,
    condition: Any = None,
    method: MethodName | Step = "dopri5",
    steps: int | Sequence[float] | Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
    every: int | Literal["sqrt"] = 1,
    offload: bool = False,
    truncate: int | None = None,
    report: Report | None = None,
) -> State:
    """The end of a solve as a differentiable function of x, condition and parameters; `backward()` what is made of it.

    Memory does not grow with the number of steps, but for the states (see `THROUGH`). With error control the gradient is
    that of the accepted steps at their sizes. There is no second derivative.

    Args:
        field, x, times, method, steps, rtol, atol, before_step, after_step: as of `ode`; times between the first and the
            last must be nodes of the grid. Hooks are called again on the way back. States in half precision are summed, and
            their gradients carried, in single precision, as `ode` sums them.
        through: how the gradient is found.
        parameters: what the field closes over and a gradient is wanted of: a module, or tensors, by name or not.
        constants: what it closes over that needs gradients elsewhere, but none here. The parameters of the module that a
            field is, or whose method it is, are constants where they are not named.
        condition: as of `ode`; its tensors that need gradients get them.
        every: of "checkpoint", store each so many-th state and find the others again; "sqrt" keeps memory at its least, for
            one more solve.
        offload: of "checkpoint", keep states in the host's memory.
        truncate: of "checkpoint", gradients of the last so many steps only (2309.17400), cheap and biased; of parameters and
            condition, for there is none of x then.
        report: is filled in.

    Returns:
        The last state; the states at all times, stacked, where more than two are asked for.

    Raises:
        ValueError: settings that do not go together; on the way back a field that depends on something else that needs
            gradients, or on none of the parameters; or that draws random numbers where they cannot be drawn again.
        RuntimeError: a second way back.
    """
    check_state(x)
    types = half_types(x)
    x = wide(x) if types else x
    if through not in THROUGH:
        raise ValueError(unknown("through", through, THROUGH))
    asked, step = check_times(times), as_step(method)
    if through == "reversible" and not isinstance(step, Reversible):
        step = Reversible(step)
    unknowns = Unknowns(
        [
            *(t for t in tensors_of(plain(condition)) if t.requires_grad),
            *(p for p in parameters_of(parameters).values() if p.requires_grad),
        ],
        scaled=torch.float16 in types or _casts_to(torch.float16, leaves(x)[0].device.type),
    )
    if parameters is not None and not any(p.requires_grad for p in parameters_of(parameters).values()):
        raise ValueError("parameters: none of them needs a gradient; are they frozen?")
    owner = own_module(field)
    fixed = [*parameters_of(constants).values(), *(owner.parameters() if owner is not None else ())]
    counted, report = CountedField(field, condition, types), report if report is not None else Report()
    with constant(fixed, unknowns.tensors):
        if (before_step or after_step) and steps is None and step.adaptive:
            raise ValueError("before_step, after_step: hooks need a fixed grid; give steps= as well")
        grid = _grid(counted, step, x, asked, steps, Tolerance(rtol, atol))
        report.times = grid
        problem = Problem(counted, step, grid, unknowns, leaves(x)[0].device, before_step, after_step)
        nodes = _nodes(grid, asked)
        report.through, report.steps = through, problem.count
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (*leaves(x), *unknowns.tensors))):
            with torch.no_grad():  # nobody goes back, nothing is kept
                found, _ = problem.solve(x, nodes)
            report.forward = counted.calls
            return _reported(found, len(asked), types)
        if through == "backprop":
            if truncate is not None:
                raise ValueError("truncate: goes with through='checkpoint', which gives the same gradient")
            # A field that takes a gradient of its own, such as a guided one, takes it with respect to this.
            x = map_state(lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(True), x)
            states, _ = problem.solve(x, nodes)
            check_leaves([t for s in states for t in leaves(s)], [*leaves(x), *unknowns.tensors])
            report.forward = counted.calls
            return _reported(states, len(asked), types)
    way = _way(through, problem, nodes, every, offload, truncate, x)
    run = _Run(way, problem, nodes, x, fixed, report, _autocast(leaves(x)[0].device.type))
    flat = _Solve.apply(run, *leaves(x), *unknowns.tensors)
    width = len(leaves(x))
    found = [with_tensors(x, flat[i : i + width]) for i in range(0, len(flat), width)]
    return _reported(found, len(asked), types)


def _reported(states: list[State], asked: int, types: tuple[torch.dtype, ...]) -> State:
    """The last of two, or all of more, in the types that they came in."""
    states = [in_types(x, types) for x in states] if types else states
    return states[-1] if asked == 2 else map_state(lambda *parts: torch.stack(parts), *states)


def _autocast(kind: str) -> dict[str, Any]:
    """The present precision, to be taken up again on the way back."""
    return {
        "device_type": kind,
        "enabled": torch.is_autocast_enabled(kind),
        "dtype": torch.get_autocast_dtype(kind),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def _casts_to(kind: torch.dtype, device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == kind


def plain(condition: Any) -> Any:
    """A condition as nested tuples and dicts."""
    return dict(condition) if isinstance(condition, Mapping) else condition


@dataclass
class _Run:
    """One solve and its way back, for autograd."""

    way: Way
    problem: Problem
    nodes: tuple[int, ...]
    x: State
    fixed: list[Tensor]
    report: Report
    autocast: dict[str, Any]
    used: bool = False


class _Solve(torch.autograd.Function):
    """States and unknowns to the states at the asked nodes."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Solve without a graph."""
        ctx.run = run
        x = with_tensors(run.x, [t.detach().clone() for t in tensors])  # whatever becomes of it outside
        with constant(run.fixed, run.problem.unknowns.tensors):
            found = run.way.forward(x)
        run.report.forward, run.report.kept_bytes = run.problem.field.calls, run.way.kept_bytes()
        return tuple(leaf.clone() for state in found for leaf in leaves(state))  # the way back keeps its own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Carry the gradient back."""
        run = ctx.run
        if run.used:
            raise RuntimeError(
                "a solve is gone through backwards once only: what was kept for it is freed; solve again"
            )
        run.used = True
        width = len(leaves(run.x))
        cotangents = {node: with_tensors(run.x, grads[i * width : (i + 1) * width]) for i, node in enumerate(run.nodes)}
        with constant(run.fixed, run.problem.unknowns.tensors), torch.autocast(**run.autocast):
            a = run.way.backward(cotangents)
        run.report.backward = run.problem.field.calls - run.report.forward
        return (None, *leaves(a), *run.problem.unknowns.gradients())


def _grid(
    field: CountedField,
    step: Step,
    x: State,
    asked: tuple[float, ...],
    steps: int | Sequence[float] | Tensor | None,
    tolerance: Tolerance,
) -> tuple[float, ...]:
    """The given grid, or the times of the steps that error control accepts."""
    if steps is not None or not step.adaptive:
        return check_grid(steps, asked)
    if len(asked) > 2:
        raise ValueError("times: with error control only the last state has a gradient; give two times, or a grid")
    grid: list[float] = []
    with torch.no_grad():
        solve_joint(field, step, map_state(Tensor.detach, x), asked, tolerance, lambda x, t, i: grid.append(t))
    return tuple(grid)


def _nodes(grid: tuple[float, ...], asked: tuple[float, ...]) -> tuple[int, ...]:
    """Where the asked times are in the grid; the first only where more than two are asked for."""
    wanted = asked if len(asked) > 2 else asked[1:]
    missing = [t for t in wanted if t not in grid]
    if missing:
        raise ValueError(f"times: {missing[0]:g} is no node of the grid; put it in `steps`")
    return tuple(grid.index(t) for t in wanted)


def _way(
    through: Through,
    problem: Problem,
    nodes: tuple[int, ...],
    every: int | Literal["sqrt"],
    offload: bool,
    truncate: int | None,
    x: State,
) -> Way:
    if through != "checkpoint" and (every != 1 or offload or truncate is not None):
        raise ValueError("every, offload, truncate: go with through='checkpoint'")
    if through == "checkpoint":
        spacing = square_root(problem.count) if every == "sqrt" else every
        if spacing < 1:
            raise ValueError(f"every: must be at least 1, got {every}")
        first = 0
        if truncate is not None:
            if truncate < 1 or any(leaf.requires_grad for leaf in leaves(x)):
                raise ValueError("truncate: at least one step is needed, and the first state has no gradient then")
            first = max(0, problem.count - truncate)
        return Checkpoint(problem, nodes, spacing, offload, first)
    if through == "reversible":
        return Backwards(problem, nodes)
    if through == "symplectic" and isinstance(problem.step, Adams):
        raise ValueError("through: adams is no Runge-Kutta method; take 'checkpoint', which gives the same gradient")
    tableau_of(problem.step)  # says so where there is none
    ways = {"symplectic": Symplectic, "adjoint": Adjoint, "backsolve": Backsolve}
    return ways[through](problem, nodes)


@contextmanager
def needing(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Leaves that need a gradient for a while."""
    changed = [t for t in tensors if not t.requires_grad]
    for tensor in changed:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in changed:
            tensor.requires_grad_(False)


@contextmanager
def _measured(wanted: bool, device: torch.device, report: Report) -> Iterator[None]:
    if not wanted:
        yield
        return
    with PeakMemory(device) as memory:
        yield
    report.peak_bytes = memory.peak


@torch.no_grad()
def _directional_error(at: Callable[[], float], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> float:
    """Relative difference of <gradient, v> and a central difference along a random v, which is of the inputs' size."""
    generator = torch.Generator().manual_seed(0)
    directions = []
    for x in inputs:
        v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        directions.append(v * x.detach().square().mean().sqrt().clamp_min(1e-2))
    expected = sum(float((g.double() * v.double()).sum()) for g, v in zip(grads, directions, strict=True))
    if any(x.stride() != x.contiguous().stride() for x in inputs):
        raise ValueError("verify: a condition whose rows share their memory cannot be changed; give it contiguous")
    kept = [x.detach().clone() for x in inputs]
    step = 1e-5 if inputs[0].dtype == torch.float64 else 1e-2
    values = []
    try:
        for sign in (1.0, -1.0):
            for x, before, v in zip(inputs, kept, directions, strict=True):
                x.copy_(before + sign * step * v)
            values.append(at())
    finally:
        for x, before in zip(inputs, kept, strict=True):
            x.copy_(before)
    found = (values[0] - values[1]) / (2 * step)
    return abs(found - expected) / max(abs(found), abs(expected), 1e-30)
