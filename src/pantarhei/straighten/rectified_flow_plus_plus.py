"""Rectified flow++ (Lee, Lin, Fanti 2405.20320): one reflow round from a diffusion model, with better loss and times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.flow import Flow, FlowMatching, PseudoHuber, Term
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.objectives import LossTerm
from pantarhei.flow.times import TimeLaw, UShaped
from pantarhei.straighten.reflow import check_reflow
from pantarhei.straighten.stores import PairSource, check_pairs, split_pairs
from pantarhei.straighten.students import LowRank, linear_student, make_student, name_of
from pantarhei.training import FlowTask, Optimization

EDGE = 1e-5  # how near the data end a weight 1 / (1 - t) may come


def plus_plus_task(
    flow: Flow,
    pairs: PairSource,
    *,
    metric: Premetric | None = None,
    perceptual: Premetric | None = None,
    divided: bool = True,
    times: TimeLaw | None = None,
    start: nn.Module | None = None,
    low_rank: LowRank | None = None,
    any_teacher: bool = False,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of one rectified flow++ round.

    The student is the teacher's network seen, exactly, as a velocity field on the linear path; it goes on training on the
    teacher's pairs with t from a U-shaped law and the loss t * huber(velocity) + perceptual(data) / (1 - t) (configuration F
    of the paper; E does not divide). The Huber term fades towards pure noise, where the perceptual one counts least.

    Args:
        flow: the teacher, on any affine path; its network is copied, not changed.
        pairs: its pairs, or a mixture with inverted data (`straighten.MixedPairs`).
        metric: compares velocities; pseudo-Huber with c = 0.00054 D by default. Alone it is not weighted.
        perceptual: compares data estimates, such as LPIPS; it needs weights of the user's, and a surrogate names itself.
        divided: divide the perceptual term by 1 - t.
        times: law of the training time, U-shaped with a = 4 by default.
        start: network that the student starts from, where it is not the teacher's.
        low_rank: train low-rank additions only.
        any_teacher: allow pairs that other weights made.
        optimization: optimiser settings.
        average: decay of the moving average.
        teacher: name of the teacher, for the provenance.

    Raises:
        ValueError: the pairs do not fit, or the flow cannot be rectified.
    """
    check_reflow(flow)
    check_pairs(pairs, flow, any_teacher=any_teacher)
    moved = linear_student(flow)
    metric = metric or PseudoHuber()
    notes: dict[str, Any] = {"velocity_metric": name_of(metric)}
    if perceptual is not None:
        notes["perceptual_metric"] = name_of(perceptual)
    terms = plus_plus_terms(metric, perceptual, divided)
    student = make_student(moved, pairs, start=start, low_rank=low_rank, teacher=teacher, notes=notes)
    objective = FlowMatching(times=times or UShaped(4.0), coupling=Pairs(), terms=terms)
    kept, held_out = split_pairs(pairs)
    return FlowTask(student, objective, kept, held_out=held_out, optimization=optimization, average=average)


def plus_plus_terms(metric: Premetric, perceptual: Premetric | None, divided: bool = True) -> tuple[LossTerm, ...]:
    """The terms of the loss: see `plus_plus_task`."""
    if perceptual is None:
        return (Term("velocity", metric, name="velocity"),)
    return (
        Term("velocity", metric, weight=_time, name="velocity"),
        Term("data", perceptual, weight=_divided if divided else 1.0, name="perceptual"),
    )


def _time(t: Tensor) -> Tensor:
    return t


def _divided(t: Tensor) -> Tensor:
    return 1 / (1 - t).clamp_min(EDGE)


@torch.no_grad()
def huber_transition(flow: Flow, pairs: PairSource, metric: PseudoHuber, *, count: int = 256, seed: int = 0) -> float:
    """Median over pairs and times of the error's norm / (c D): above 1 the loss acts as a norm, below as a square.

    Args:
        flow: the student.
        pairs: what it trains on.
        metric: whose transition is asked for.
        count: pairs.
        seed: of the times.
    """
    from pantarhei.data.seeds import generator as seeded

    batch = {name: value.to(flow.device) for name, value in pairs.tensors(count).items()}
    draw = FlowMatching(times=UShaped(4.0), coupling=Pairs()).draw(flow, batch, seeded(seed, 60, device=flow.device))
    error = (flow.velocity(draw.x_t, draw.t, draw.condition) - draw.velocity).flatten(1)
    size = error.norm(dim=1) / (error.shape[1] * metric.c)
    return float((error.abs().median() / metric.c) if metric.elementwise else size.median())
