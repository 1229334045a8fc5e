"""Reflow: train a flow on its own pairs (Liu et al. 2209.03003, section 2.1)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pantarhei.data.shards import ShardStore
from pantarhei.flow import Flow, FlowMatching
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.numbered import Conditions
from pantarhei.flow.times import TimeLaw, Uniform
from pantarhei.straighten.pairs import Solver, make_pairs
from pantarhei.training import FlowTask, Optimization, train


def reflow_task(
    flow: Flow,
    pairs: ShardStore,
    *,
    times: TimeLaw | None = None,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of one reflow round: the teacher's network goes on training, on the teacher's pairs.

    Args:
        flow: the teacher; its network is copied, not changed.
        pairs: a finished pair store of this flow.
        times: law of the training time.
        optimization: optimiser settings.
        average: decay of the moving average.
        teacher: name of the teacher, for the provenance.

    Raises:
        ValueError: the pairs are not finished, or were made for another shape.
    """
    if pairs.missing():
        missing = f"{len(pairs.missing())} of {pairs.shards} shards are missing"
        raise ValueError(f"pairs: {pairs.folder} is not finished, {missing}")
    shape = tuple(pairs.header["flow"]["shape"])
    if shape != flow.shape:
        raise ValueError(f"pairs: made for samples of shape {shape}, this flow's are {flow.shape}")
    notes = {**flow.provenance.notes, "pairs": len(pairs), "guidance_in_pairs": pairs.header["guidance"]}
    network = copy.deepcopy(flow.network).requires_grad_(True)
    student = flow.like(network, rectified=flow.provenance.rectified + 1, teacher=teacher, notes=notes)
    student.codec = None  # pairs live in the flow's space already
    objective = FlowMatching(times=times or Uniform(), coupling=Pairs())
    return FlowTask(student, objective, pairs, optimization=optimization, average=average)


def reflow(
    flow: Flow,
    *,
    pairs: int | ShardStore | str | Path = 50_000,
    to: str | Path,
    iterations: int = 10_000,
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
        pairs: how many pairs to make (into `to`/pairs, resumable), or a finished store or its folder.
        to: run folder of the new flow.
        iterations: training length.
        seed: of pairs and training.
        solver, conditions: see `make_pairs`.
        times, optimization, average, teacher: see `reflow_task`.
        options: further fields of `LoopConfig`, and `resume`.
    """
    if isinstance(pairs, int):
        store = make_pairs(
            flow,
            pairs,
            Path(to) / "pairs",
            seed=seed,
            solver=solver,
            conditions=conditions,
            teacher=teacher,
            progress=options.get("progress", True),
        )
    else:
        store = pairs if isinstance(pairs, ShardStore) else ShardStore(pairs)
    task = reflow_task(flow, store, times=times, optimization=optimization, average=average, teacher=teacher)
    config = {"system": "rectified-flow", "kind": "reflow", "teacher": teacher}
    train(task, to, iterations=iterations, seed=seed, config=config, **options)
    result = task.result()
    result.codec = flow.codec
    return result
