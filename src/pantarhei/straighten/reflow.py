"""Reflow: train a flow on its own pairs (Liu et al. 2209.03003, section 2.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from pantarhei.flow import Flow, FlowMatching, Interpolant, TrajectoryModel
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.numbered import Conditions
from pantarhei.flow.times import TimeLaw, Uniform
from pantarhei.straighten.pairs import Solver
from pantarhei.straighten.stores import PairSource, check_pairs, find_pairs, split_pairs
from pantarhei.straighten.students import make_student
from pantarhei.training import FlowTask, Optimization, train


def reflow_task(
    flow: Flow,
    pairs: PairSource,
    *,
    start: nn.Module | None = None,
    any_teacher: bool = False,
    times: TimeLaw | None = None,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of one reflow round: the teacher's network goes on training, on the teacher's pairs.

    Args:
        flow: the teacher; its network is copied, not changed.
        pairs: a finished pair store of this flow, or other pairs (see `straighten.stores`).
        start: network that the student starts from, where it is not the teacher's: the published recipe goes on from the
            raw weights, while the averaged ones made the pairs.
        any_teacher: allow pairs that other weights made.
        times: law of the training time.
        optimization: optimiser settings.
        average: decay of the moving average.
        teacher: name of the teacher, for the provenance.

    Raises:
        ValueError: the pairs are not finished, swapped, of another shape or of another teacher.
    """
    check_reflow(flow)
    check_pairs(pairs, flow, any_teacher=any_teacher)
    student = make_student(flow, pairs, start=start, teacher=teacher)
    objective = FlowMatching(times=times or Uniform(), coupling=Pairs())
    kept, held_out = split_pairs(pairs)
    return FlowTask(student, objective, kept, held_out=held_out, optimization=optimization, average=average)


def check_reflow(flow: Flow, *, jumps: bool = False) -> None:
    """Refuse a flow that cannot be straightened by going on, before pairs are made with it.

    Args:
        flow: the flow.
        jumps: whether the student will learn jumps, too.

    Raises:
        ValueError: it was distilled, its path has a latent, or it jumps and the student's jumps would go stale.
    """
    flow.require_field()
    if isinstance(flow, TrajectoryModel) and not jumps:
        raise ValueError("flow: only its field would go on learning, and its jumps go stale; straighten its teacher")
    if isinstance(flow.path, Interpolant):
        raise ValueError(
            "flow: its path has a latent, which pairs of its ODE do not need; train a straight flow on them instead "
            "(Flow(path='linear', source=...) and reflow_task(any_teacher=True))"
        )


def reflow(
    flow: Flow,
    *,
    pairs: int | PairSource | str | Path = 50_000,
    to: str | Path,
    iterations: int = 10_000,
    rounds: int = 1,
    seed: int = 0,
    solver: Solver | None = None,
    conditions: Conditions | Any | None = None,
    times: TimeLaw | None = None,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
    **options: Any,
) -> Flow:
    """Straighten a flow: make pairs, train on them, return the straightened flow.

    Args:
        flow: the teacher.
        pairs: how many pairs to make (into `to`/pairs, resumable), or finished ones or their folder (first round only).
        to: run folder of the new flow; with several rounds the folder of `round-1`, `round-2`, ...
        iterations: training length of a round.
        rounds: how often; each round starts from the flow of the one before and makes new pairs with it.
        seed: of pairs and training.
        solver, conditions: see `make_pairs`.
        times, optimization, average, teacher: see `reflow_task`.
        options: further fields of `LoopConfig`, and `resume`.

    Raises:
        ValueError: for rounds < 1, or given pairs in more than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: must be at least 1, got {rounds}")
    if rounds > 1 and not isinstance(pairs, int):
        raise ValueError("pairs: later rounds need pairs of their own; give a number of pairs")
    check_reflow(flow)
    for number in range(1, rounds + 1):
        folder = Path(to) / f"round-{number}" if rounds > 1 else Path(to)
        # New draws in every round, as the method asks.
        made = {"seed": seed + number - 1, "solver": solver, "conditions": conditions, "teacher": teacher}
        store = find_pairs(flow, pairs, folder / "pairs", progress=options.get("progress", True), **made)
        task = reflow_task(flow, store, times=times, optimization=optimization, average=average, teacher=teacher)
        config = {"system": "rectified-flow", "kind": "reflow", "teacher": teacher}
        train(task, folder, iterations=iterations, seed=seed, config=config, **options)
        result, codec = task.result(), flow.codec
        result.codec = codec
        flow, teacher = result, str(folder)
    return flow
