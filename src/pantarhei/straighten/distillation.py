"""Distillation of a flow to k steps from its stored pairs (Liu et al. 2209.03003, section 2.1 and appendix)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from pantarhei.flow import Flow, FlowMatching, Term
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.numbered import Conditions
from pantarhei.flow.provenance import DISTILLED
from pantarhei.flow.times import Steps
from pantarhei.straighten.pairs import Solver
from pantarhei.straighten.stores import PairSource, check_pairs, find_pairs, split_pairs
from pantarhei.training import FlowTask, Optimization, train


def distillation_task(
    flow: Flow,
    pairs: PairSource,
    *,
    steps: int = 1,
    metric: Premetric | None = None,
    squared_too: bool = False,
    reverse: bool = False,
    eps: float = 0.0,
    start: nn.Module | None = None,
    any_teacher: bool = False,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of distilling a flow to `steps` Euler steps on its own pairs.

    The student is trained at the times i / steps, at which its sampler will ask it, and at no others; so it is a sampler
    of that many steps and no longer a velocity field in between.

    Args:
        flow: the teacher, on the linear path; its network is copied, not changed.
        pairs: its pairs.
        steps: Euler steps of the student.
        metric: compares the predicted x1 with the pair's, row by row: a perceptual premetric, which serves one step best.
            By default the velocity is regressed, |v - (x1 - x0)|^2.
        squared_too: add that to a given metric.
        reverse: distil the way from data to source instead (an encoder); sample it with `invert`.
        eps: first time of the sampler. The published recipe has 1e-3, where its input x_eps = (1 - eps) x0 + eps x1 holds a
            trace of the answer; 0 has none.
        start: network that the student starts from, where it is not the teacher's.
        any_teacher: allow pairs that other weights made.
        optimization: optimiser settings.
        average: decay of the moving average.
        teacher: its name, for the provenance.

    Raises:
        ValueError: the pairs do not fit, or the path is not linear.
    """
    check_teacher(flow, eps)
    check_pairs(pairs, flow, any_teacher=any_teacher)
    terms: tuple[Term, ...] = (Term(name="squared"),) if metric is None or squared_too else ()
    if metric is not None:
        terms = (Term("data" if not reverse else "noise", metric, name="metric"), *terms)
    notes = {
        **flow.provenance.notes,
        "pairs": len(pairs),
        "guidance_in_pairs": pairs.header["guidance"],
        "steps": steps,
    }
    if reverse:
        notes["direction"] = "data to source"
    if metric is not None:
        notes["distillation_metric"] = getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__))
    network = copy.deepcopy(start or flow.network).requires_grad_(True)
    student = flow.like(network, interval=(eps, 1.0), coupling=DISTILLED, teacher=teacher, notes=notes)
    student.codec = None  # pairs live in the flow's space already
    objective = FlowMatching(times=Steps(steps, reverse), terms=terms, coupling=Pairs())
    kept, held_out = split_pairs(pairs)
    return FlowTask(student, objective, kept, held_out=held_out, optimization=optimization, average=average)


def check_teacher(flow: Flow, eps: float = 0.0) -> None:
    """Refuse a flow that cannot be distilled, before pairs are made with it.

    Raises:
        ValueError: the path is not linear, the prediction no velocity, the flow distilled already, or eps out of range.
    """
    flow.require_field()
    if flow.path.spec()["name"] != "linear" or flow.prediction.spec()["name"] != "velocity":
        raise ValueError("flow: k-step distillation is defined for the velocity of the linear path")
    if not 0 <= eps < 0.5:
        raise ValueError(f"eps: must lie in [0, 0.5), got {eps}")


def distil(
    flow: Flow,
    *,
    pairs: int | PairSource | str | Path = 50_000,
    to: str | Path,
    steps: int = 1,
    iterations: int = 10_000,
    seed: int = 0,
    solver: Solver | None = None,
    conditions: Conditions | Any | None = None,
    metric: Premetric | None = None,
    squared_too: bool = False,
    reverse: bool = False,
    eps: float = 0.0,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
    **options: Any,
) -> Flow:
    """Distil a flow to a few steps; returns the student, which samples with `steps=steps`.

    Args:
        flow: the teacher.
        pairs: how many pairs to make (into `to`/pairs, resumable), or pairs of this flow, or their folder.
        to: run folder.
        iterations: training length.
        seed: of pairs and training.
        solver, conditions: see `make_pairs`.
        steps, metric, squared_too, reverse, eps, optimization, average, teacher: see `distillation_task`.
        options: further fields of `LoopConfig`, and `resume`.
    """
    check_teacher(flow, eps)
    shown = options.get("progress", True)
    made = {"seed": seed, "solver": solver, "conditions": conditions, "teacher": teacher, "progress": shown}
    task = distillation_task(
        flow,
        find_pairs(flow, pairs, Path(to) / "pairs", **made),
        steps=steps,
        metric=metric,
        squared_too=squared_too,
        reverse=reverse,
        eps=eps,
        optimization=optimization,
        average=average,
        teacher=teacher,
    )
    config = {"system": "rectified-flow", "kind": "distillation", "teacher": teacher}
    train(task, to, iterations=iterations, seed=seed, config=config, **options)
    result = task.result()
    result.codec = flow.codec
    return result
