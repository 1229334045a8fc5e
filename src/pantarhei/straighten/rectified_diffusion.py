"""Rectified diffusion (Wang et al. 2410.07303): a diffusion model goes on training, in its own form, on its own pairs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei.flow import Condition, Flow, FlowMatching, PseudoHuber, Term, squared
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.numbered_path import BetaSchedule
from pantarhei.flow.paths import Numbered
from pantarhei.flow.sources import SourceLaw
from pantarhei.flow.times import Numbers, TimeLaw, Uniform
from pantarhei.straighten.reflow import check_reflow
from pantarhei.straighten.stores import PairSource, check_pairs, split_pairs
from pantarhei.straighten.students import LowRank, make_student
from pantarhei.training import FlowTask, Optimization

LossName = Literal["data-huber", "noise-mse", "velocity", "native"]
# Elementwise pseudo-Huber of the data estimate: nearly L1. On a noise prediction it weighs errors by sigma / alpha, so it
# looks where one-step sampling does; the plain square of the noise hardly does.
LOSSES: dict[str, Term] = {
    "data-huber": Term("data", PseudoHuber(0.001, elementwise=True), name="data"),
    "noise-mse": Term("noise", squared, name="noise"),
    "velocity": Term("velocity", squared, name="velocity"),
    "native": Term("native", squared, name="native"),
}


class PlainNoiseLoss(UserWarning):
    """The plain squared error of the noise hardly learns what one step needs."""


@dataclass(frozen=True)
class StateAnchor:
    """Pairs whose x0 is the state that the sampler started from, not the noise in it.

    Where the schedule leaves data in its noisiest state (alpha > 0 at the first time: 0.04 in Stable Diffusion's linear
    schedule) a sampler starts from sigma x0 alone. The first-order path through that state and x1 has the noise
    x0 - (alpha / sigma) x1; taking x0 itself, as the published code does, puts alpha x1 into states in which the sampler
    never starts. Both are offered.

    Attributes:
        ratio: alpha / sigma at the first time.
    """

    ratio: float
    name = "states"

    def __call__(
        self,
        batch: dict[str, Tensor],
        source: SourceLaw,
        condition: Condition | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The noise of the path, like x1."""
        return batch["x0"] - self.ratio * batch["x1"]


def rectified_diffusion_task(
    flow: Flow,
    pairs: PairSource,
    *,
    loss: LossName | Term = "data-huber",
    anchor: Literal["noise", "state"] = "noise",
    schedule: BetaSchedule | None = None,
    times: TimeLaw | None = None,
    dropout: float = 0.0,
    start: nn.Module | None = None,
    low_rank: LowRank | None = None,
    any_teacher: bool = False,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of rectifying a diffusion model as it is: schedule, prediction and network stay.

    Args:
        flow: the teacher, on any affine path and with any prediction; its network is copied, not changed.
        pairs: its pairs.
        loss: "data-huber" compares data estimates (elementwise pseudo-Huber, c = 0.001); "noise-mse" is the paper's
            Algorithm 4, with a warning; "velocity" and "native" are squared errors of velocity and output; or a term.
        anchor: what a pair's x0 is: the noise in the noisiest state ("noise", as published) or that state ("state", see
            `StateAnchor`); they differ where data are left in it.
        schedule: of betas that a numbered student has instead of its teacher's: the pairs stay the same, and a lower
            signal in the noisiest state fits pure noise better (the published student of Stable Diffusion has "linear").
        times: law of the training time; uniform by default, over the numbers of a numbered schedule.
        dropout: how often the condition is dropped; guidance at sampling needs it.
        start, low_rank, any_teacher, optimization, average, teacher: as in `plus_plus_task`.

    Raises:
        ValueError: the pairs do not fit, or the flow cannot be rectified.
    """
    check_reflow(flow)
    check_pairs(pairs, flow, any_teacher=any_teacher)
    if loss == "noise-mse":
        warnings.warn(
            "the plain squared error of the noise hardly weighs the noisiest times, where one-step samples are made; "
            "'data-huber' is the published code's loss",
            PlainNoiseLoss,
            stacklevel=2,
        )
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"loss: must be {', '.join(LOSSES)} or a term, got {loss!r}")
    term = LOSSES[loss] if isinstance(loss, str) else loss
    if schedule is not None:
        if not isinstance(flow.path, Numbered):
            raise ValueError(f"schedule: only a numbered path has one, this flow's is {flow.path.spec()['name']}")
        flow = flow.like(flow.network, path=replace(flow.path, schedule=schedule, betas=None))
    notes: dict[str, Any] = {"loss": loss if isinstance(loss, str) else term.name, "anchor": anchor}
    student = make_student(flow, pairs, start=start, low_rank=low_rank, teacher=teacher, notes=notes)
    coupling: Any = Pairs() if anchor == "noise" else StateAnchor(first_ratio(flow))
    objective = FlowMatching(times=times or own_times(flow), coupling=coupling, terms=(term,), dropout=dropout)
    kept, held_out = split_pairs(pairs)
    return FlowTask(student, objective, kept, held_out=held_out, optimization=optimization, average=average)


def own_times(flow: Flow) -> TimeLaw:
    """Uniform over the numbers of a numbered schedule, else over all times."""
    return Numbers(flow.path.count) if isinstance(flow.path, Numbered) else Uniform()


def first_ratio(flow: Flow) -> float:
    """alpha / sigma at the first time."""
    t = torch.tensor(flow.interval[0], dtype=torch.float64)
    return float(flow.path.alpha(t) / flow.path.sigma(t))
