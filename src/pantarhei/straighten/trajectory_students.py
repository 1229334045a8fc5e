"""Trajectory models from teachers or from data: CTM, consistency distillation and training, MeanFlow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from pantarhei.flow import Flow, PseudoHuber
from pantarhei.flow.heads import CTM, Consistency, Head, MeanVelocity, Outer, Scaling, build_head
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.predictions import Prediction, build_prediction
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.naming import unknown
from pantarhei.networks.second_time import with_second_time
from pantarhei.straighten.adversarial import Adversarial
from pantarhei.straighten.denoising_term import denoising_objective
from pantarhei.straighten.jump_times import Curriculum, JumpTimes, Span, jump_times, one_interval
from pantarhei.straighten.mean_flow import MeanFlow, MeanFlowTask
from pantarhei.straighten.reflow import check_reflow
from pantarhei.straighten.students import LowRank, linear_student, make_student, name_of, train_low_rank
from pantarhei.straighten.trajectory_matching import TrajectoryMatching, Waypoint
from pantarhei.straighten.trajectory_task import TrajectoryTask
from pantarhei.training import FlowTask, Optimization, train

Kind = Literal["ctm", "cd", "ct", "ict", "meanflow"]
KINDS: dict[str, str] = {
    "ctm": "consistency trajectory model (Kim et al. 2310.02279)",
    "cd": "consistency distillation (Song et al. 2303.01469)",
    "ct": "consistency training, without a teacher (Song et al. 2303.01469)",
    "ict": "improved consistency training, without a teacher (Song & Dhariwal 2310.14189)",
    "meanflow": "mean velocities (Geng et al. 2505.13447)",
}


def trajectory_student(
    flow: Flow,
    head: Head | str = "ctm",
    *,
    predicts: Prediction | str | None = None,
    initial: Literal["zero", "random"] = "zero",
    start: nn.Module | None = None,
    low_rank: LowRank | None = None,
    alone: bool = False,
    teacher: str = "",
    notes: dict[str, Any] | None = None,
) -> TrajectoryModel:
    """A trajectory model that starts as a flow: its network, with a second time where the head asks for one.

    Args:
        flow: the teacher, on an affine path and with any prediction; its network is copied, not changed.
        head: of the student.
        predicts: what its network predicts, where that is not what the teacher's does and another network is given to start.
        initial: what the branch of the second time starts with. With "zero" every jump is the teacher's first-order step at
            first; "random" is the reference's.
        start, low_rank, teacher, notes: as of any student (see `plus_plus_task`).
        alone: it will learn from data, not from the flow.

    Raises:
        ValueError: the flow is distilled, or its path is not affine.
    """
    check_reflow(flow, jumps=True)
    chosen = build_head(head)
    if build_prediction(predicts or flow.prediction).spec()["name"] == "score":
        raise ValueError("flow: jumps of a score prediction are unbounded at both ends; start from another prediction")
    noted = {"low_rank": low_rank.rank} if low_rank is not None else {}
    plain = make_student(flow, start=start, teacher=teacher, notes={**(notes or {}), **noted})
    network: Any = plain.network.requires_grad_(True)
    known = set(network.state_dict())
    if chosen.anywhere:
        network = with_second_time(network, initial=initial)
    new = [parameter for name, parameter in network.named_parameters() if name not in known]
    if low_rank is not None:
        train_low_rank(network, low_rank)
        for parameter in new:  # a branch without a past has to learn as a whole
            parameter.requires_grad_(True)
    settings = flow.settings()
    # The trajectories are the teacher's own, nothing is paired anew; without a teacher they are those of the data.
    origin = {"rectified": 0, "coupling": "independent"} if alone else {"rectified": flow.provenance.rectified}
    settings["provenance"] = replace(plain.provenance, **origin)
    if predicts is not None:
        settings["predicts"] = predicts
    return TrajectoryModel(network, **{**settings, "head": chosen})


def trajectory_task(
    flow: Flow,
    data: Any,
    *,
    kind: Kind = "ctm",
    without_teacher: bool = False,
    times: int | JumpTimes | None = None,
    span: Span = "soft",
    longest: int | None = None,
    per_row: bool = False,
    outer: Outer = "euler",
    scaling: Scaling = "jump",
    predicts: Prediction | str | None = None,
    metric: Premetric | None = None,
    weight: str | None = None,
    denoising: float = 1.0,
    adaptive: bool = True,
    adversarial: Adversarial | None = None,
    waypoint: Waypoint | None = None,
    difference: float | None = 0.03,
    guidance: float = 1.0,
    dropout: float = 0.0,
    iterations: int = 10_000,
    initial: Literal["zero", "random"] = "zero",
    start: nn.Module | None = None,
    low_rank: LowRank | None = None,
    held_out: Any = None,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of learning a flow's trajectories.

    Args:
        flow: the teacher, on any affine path and with any prediction; its network is copied, not changed. Where there is no
            teacher, the flow that says what the student is: its network may be untrained.
        data: real data, or pairs of the teacher, which a rectified one needs.
        kind: see `KINDS`: "ctm" jumps anywhere; "cd", "ct" and "ict" to the data end only; "meanflow" anywhere, on the
            linear path, where velocities are of the size of the data.
        without_teacher: "ctm" takes its own average for the teacher, "meanflow" the velocity of each pair; "ct" and "ict"
            never have one.
        times: how many nodes the grid of jumps has (18 by default; "ct" and "ict" have a curriculum), or the law itself.
        span, longest, per_row: of "ctm", see `JumpTimes`.
        outer: of "ctm", see `heads.CTM`.
        scaling: of consistency models, see `heads.Consistency`; "boundary" is that of the published files.
        metric: compares at the data end: pseudo-Huber with c = 0.00054 sqrt(D) by default.
        weight: of rows, see `TrajectoryMatching`; "uniform" by default, "interval" for "ict".
        denoising: weight of the denoising term of "ctm"; 0 leaves it out.
        adaptive, adversarial: see `TrajectoryTask`.
        waypoint: of "ctm" without a teacher: "self" (one jump of the average) or "self-steps".
        difference: of "meanflow", see `MeanFlow`.
        guidance: of the teacher, which the student then has built in.
        dropout: how often a condition is dropped.
        iterations: training length, which a curriculum is laid out for.
        predicts, initial, start, low_rank, teacher: see `trajectory_student`.
        held_out, optimization, average: as of a `FlowTask`; RAdam with 4e-4 by default.

    Raises:
        ValueError: the flow cannot be a teacher, an unknown kind, or settings that do not go with it.
    """
    alone = without_teacher or kind in ("ct", "ict")
    _check(kind, without_teacher, alone, denoising, adversarial, guidance)
    drawn = isinstance(times, JumpTimes)
    of_ctm = {"outer": outer != "euler", "waypoint": waypoint is not None and not alone}
    of_ctm |= {"span": span != "soft", "longest": longest is not None, "per_row": per_row}
    for name, given in of_ctm.items():
        if given and (kind != "ctm" or (drawn and name not in ("outer", "waypoint"))):
            raise ValueError(f"{name}: goes with kind='ctm'{' and its own times' if drawn else ''}, got kind={kind!r}")
    metric = metric or PseudoHuber(root=True)
    notes: dict[str, Any] = {"method": kind}
    if guidance != 1.0:
        notes |= {"guidance_of_teacher": guidance, "guidance": 1.0}  # built in: none is needed in sampling
    if kind == "meanflow":
        flow = linear_student(flow)  # elsewhere velocities are as large as the noise
    else:
        notes["metric"] = name_of(metric)
    heads: dict[str, Head] = {"ctm": CTM(outer), "meanflow": MeanVelocity()}
    student = trajectory_student(
        flow,
        heads.get(kind, Consistency(scaling)),
        predicts=predicts,
        initial=initial,
        start=start,
        low_rank=low_rank,
        alone=alone,
        teacher=teacher,
        notes=notes,
    )
    frozen = None if alone else flow.like(flow.network)  # asked without gradients, and never trained: no copy is needed
    common: dict[str, Any] = {
        "held_out": held_out,
        "optimization": optimization or Optimization(lr=4e-4, optimizer="radam"),
        "average": average,
    }
    if kind == "meanflow":
        objective = MeanFlow(teacher=frozen, guidance=guidance, dropout=dropout, difference=difference)
        return MeanFlowTask(student, objective, data, **common)
    matching = TrajectoryMatching(
        waypoint="teacher" if not alone else waypoint or ("self" if kind == "ctm" else "data"),
        teacher=frozen,
        guidance=guidance if frozen is not None else 1.0,
        follower="average" if kind in ("cd", "ct") else "student",
        metric=metric,
        weight=weight or ("interval" if kind == "ict" else "uniform"),
    )
    law: JumpTimes | Curriculum
    count = 18 if times is None or isinstance(times, JumpTimes) else times
    if isinstance(times, JumpTimes):
        law = times
    elif kind == "ctm":
        law = jump_times(student, count, span=span, longest=longest, per_row=per_row)
    elif kind == "cd" or times is not None:
        law = one_interval(student, kind, count)
    else:
        law = Curriculum(student, kind, iterations)
    return TrajectoryTask(
        student,
        matching,
        law,
        data,
        denoising=denoising_objective(student, frozen, guidance, dropout) if kind == "ctm" and denoising else None,
        denoising_weight=denoising,
        adaptive=adaptive,
        adversarial=adversarial,
        dropout=dropout,
        **common,
    )


def _check(
    kind: str, without_teacher: bool, alone: bool, denoising: float, adversarial: Adversarial | None, guidance: float
) -> None:
    """Refuse settings that a kind has not."""
    if kind not in KINDS:
        raise ValueError(unknown("kind", kind, KINDS))
    if kind == "cd" and without_teacher:
        raise ValueError("without_teacher: consistency distillation has one; without a teacher take 'ct' or 'ict'")
    if denoising < 0:
        raise ValueError(f"denoising: a weight must not be negative, got {denoising:g}")
    if kind != "ctm" and denoising not in (0, 1.0):
        raise ValueError(f"denoising: goes with 'ctm', '{kind}' has no such term")
    if kind == "meanflow" and adversarial is not None:
        raise ValueError("adversarial: mean velocities land nowhere while they learn; it goes with the other kinds")
    if guidance != 1.0 and alone and kind != "meanflow":
        raise ValueError(f"guidance: is that of a teacher, which {kind} has not here; got {guidance:g}")


def distil_trajectory(
    flow: Flow,
    data: Any,
    *,
    to: str | Path,
    kind: Kind = "ctm",
    iterations: int = 10_000,
    seed: int = 0,
    teacher: str = "",
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> TrajectoryModel:
    """Learn a flow's trajectories; returns the model, which samples with `steps=1` and more.

    Args:
        flow, data, kind, teacher: see `trajectory_task`.
        to: run folder.
        iterations: training length.
        seed: of the training.
        settings: further arguments of `trajectory_task`.
        options: further fields of `LoopConfig`, and `resume`.
    """
    task = trajectory_task(flow, data, kind=kind, iterations=iterations, teacher=teacher, **(settings or {}))
    config = {"system": "consistency-trajectory-models", "kind": kind, "teacher": teacher}
    train(task, to, iterations=iterations, seed=seed, config=config, **options)
    result: Any = task.result()
    return result
