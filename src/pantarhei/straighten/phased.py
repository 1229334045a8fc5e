"""Phased rectified diffusion (Wang et al. 2410.07303, section 4.3): first-order within each of M phases, from real data.

No pairs are stored: a real item is noised to the start of a phase, the teacher carries it to the phase's end, and the
student learns the first-order path between the two. M phases give an M-step sampler; one phase is rectified diffusion with
pairs made on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pantarhei.flow import Condition, Flow, PseudoHuber
from pantarhei.flow.couplings import Independent
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.grids import make_grid
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.objectives import draw_pairs, drop_conditions
from pantarhei.flow.paths import Numbered
from pantarhei.flow.updates import carry_rows
from pantarhei.straighten.first_order import segment_ends
from pantarhei.straighten.reflow import check_reflow
from pantarhei.straighten.students import LowRank, make_student
from pantarhei.training import FlowTask, Optimization

Spacing = Literal["time", "logsnr"]
ELEMENTWISE = PseudoHuber(0.001, elementwise=True)


@dataclass(frozen=True)
class Phases:
    """M phases of a flow's time.

    Attributes:
        bounds: s_0 < s_1 < ... < s_M, from the noisiest time to the cleanest.
    """

    bounds: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.bounds) < 2 or any(b <= a for a, b in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"bounds: two or more rising times are needed, got {self.bounds}")

    @property
    def count(self) -> int:
        """M."""
        return len(self.bounds) - 1

    @staticmethod
    def of(flow: Flow, count: int, spacing: Spacing = "time") -> Phases:
        """Phases of a flow: even in its own time (for a numbered schedule: in the number), or in log(alpha / sigma).

        The published four phases of a schedule of 1,000 numbers begin at 999, 749, 499 and 249; the last one ends at 0.

        Raises:
            ValueError: for count < 1.
        """
        if count < 1:
            raise ValueError(f"phases: must be at least 1, got {count}")
        low, high = flow.interval
        if spacing == "logsnr":
            return Phases(make_grid(count, (low, high), kind="logsnr", path=flow.path))
        return Phases(make_grid(count, (low, high), path=flow.path))


class Segment(NamedTuple):
    """The ends of each row's phase and its first-order path."""

    start: Tensor
    end: Tensor
    x_start: Tensor
    x_end: Tensor
    data: Tensor
    noise: Tensor


@dataclass(frozen=True)
class PhasedObjective:
    """The loss of a student at the end of its phase.

    Attributes:
        teacher: a frozen flow on the student's path.
        phases: M phases.
        substeps: DDIM steps of the teacher through a phase.
        guidance: of the teacher: cond + (g - 1) (cond - null) (the published code writes w = g - 1: 2 for Stable Diffusion
            1.5, 6.5 for XL).
        metric: compares states at the end of the phase, elementwise pseudo-Huber with c = 0.001 by default.
        dropout: how often the student's condition is dropped.
        straight: interpolate the state linearly in t within the phase, as piecewise rectified flow does, instead of along
            the first-order path (for comparison; the same on the linear path).
    """

    teacher: Flow
    phases: Phases
    substeps: int = 10
    guidance: float = 1.0
    metric: Premetric = ELEMENTWISE
    dropout: float = 0.0
    straight: bool = False

    def segment(self, x1: Tensor, x0: Tensor, phase: Tensor, condition: Condition | None) -> Segment:
        """Noise items to the start of their phases and let the teacher carry them to the end, each row on a grid of its own.

        Args:
            x1, x0: items and noise (B, ...).
            phase: which phase, (B,), 0 the noisiest.
            condition: of the teacher.
        """
        bounds = torch.tensor(self.phases.bounds, dtype=_time_type(x1), device=x1.device)
        start, end = bounds[phase], bounds[phase + 1]
        path = self.teacher.path
        x_start = path.sample(x0, x1, None, start)[0]
        guided = Estimates(self.teacher, self.guidance, ())
        times = _grid(path, start, end, self.substeps)
        with torch.no_grad(), evaluation_mode(self.teacher.network):
            x = carry_rows(lambda x, t: guided.ends(x, t, condition), path, x_start, times, corrected=False)
        return Segment(start, end, x_start, x, *segment_ends(path, x_start, start, x, end))

    def at(self, segment: Segment, t: Tensor) -> Tensor:
        """The state at t on the first-order path (or the chord) of each row."""
        path = self.teacher.path
        if self.straight:
            share = ((t - segment.start) / (segment.end - segment.start)).reshape(-1, *[1] * (segment.data.ndim - 1))
            return torch.lerp(segment.x_start, segment.x_end, share.to(segment.x_start.dtype))
        at = path.at(t, segment.data)
        return at.alpha * segment.data + at.sigma * segment.noise

    def arrival(self, student: Flow, segment: Segment, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """Where the student's estimate at (x, t) leads in one step to the end of the phase."""
        if self.straight:
            velocity = student.velocity(x, t, condition)
            rest = (segment.end - t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
            return x + rest * velocity
        output = student.output(x, t, condition)
        ends = student.prediction.ends(student.path, x, t, output)
        to = student.path.at(segment.end, x)
        return to.alpha * ends.data + to.sigma * ends.noise

    def __call__(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logged values of a batch of real items."""
        _, x0, x1, condition = draw_pairs(flow, batch, Independent(), None, generator)
        rows = len(x1)
        phase = torch.randint(self.phases.count, (rows,), generator=generator, device=x1.device)
        segment = self.segment(x1, x0, phase, condition)
        u = torch.rand(rows, generator=generator, device=x1.device, dtype=_time_type(x1))
        t = draw_within(flow, segment.start, segment.end, u)
        condition = drop_conditions(condition, self.dropout, x1, generator)
        arrived = self.arrival(flow, segment, self.at(segment, t), t, condition)
        loss = self.metric(arrived, segment.x_end).mean()
        return loss, {"loss": loss.detach()}


def draw_within(flow: Flow, start: Tensor, end: Tensor, u: Tensor) -> Tensor:
    """Times in [start, end) from uniform numbers u; of a numbered schedule whole numbers, the end's left out."""
    if not isinstance(flow.path, Numbered):
        return start + u * (end - start)
    first, last = (torch.round(flow.path.number_of(t)) for t in (start, end))
    number = first - torch.floor(u * (first - last)).clamp(max=first - last - 1)
    return 1 - number / (flow.path.count - 1)


class PhasedTask(FlowTask):
    """A flow task whose objective asks a frozen teacher, which moves with it to its device."""

    def __init__(self, flow: Flow, objective: PhasedObjective, data: Any, **options: Any):
        super().__init__(flow, objective, data, **options)
        self.teacher = objective.teacher


def phased_task(
    flow: Flow,
    data: Any,
    *,
    phases: int | Phases = 4,
    spacing: Spacing = "time",
    substeps: int = 10,
    guidance: float = 1.0,
    metric: Premetric | None = None,
    dropout: float = 0.0,
    straight: bool = False,
    held_out: Any = None,
    start: nn.Module | None = None,
    low_rank: LowRank | None = None,
    optimization: Optimization | None = None,
    average: float = 0.999,
    teacher: str = "",
) -> FlowTask:
    """The task of phased rectification, on real data.

    Args:
        flow: the teacher, on any affine path and with any prediction; its network is copied, not changed.
        data, held_out: real data.
        phases: how many, or which.
        spacing: of so many, see `Phases.of`.
        substeps, guidance, metric, dropout, straight: see `PhasedObjective`.
        start, low_rank, optimization, average, teacher: as in `plus_plus_task`.

    Raises:
        ValueError: the flow cannot be rectified, or for substeps < 1.
    """
    check_reflow(flow)
    if substeps < 1:
        raise ValueError(f"substeps: must be at least 1, got {substeps}")
    chosen = Phases.of(flow, phases, spacing) if isinstance(phases, int) else phases
    notes = {"phases": list(chosen.bounds), "guidance_of_teacher": guidance, "sampling_steps": chosen.count}
    student = make_student(flow, start=start, low_rank=low_rank, teacher=teacher, notes=notes)
    frozen = flow.like(flow.network)  # asked without gradients, and never trained: no copy is needed
    metric = metric or ELEMENTWISE
    student.codec = flow.codec  # the data come as images
    objective = PhasedObjective(frozen, chosen, substeps, guidance, metric, dropout, straight)
    return PhasedTask(student, objective, data, held_out=held_out, optimization=optimization, average=average)


def _grid(path: Any, start: Tensor, end: Tensor, substeps: int) -> Sequence[Tensor]:
    """The teacher's times, row by row: even, and whole numbers of a numbered schedule."""
    shares = [i / substeps for i in range(substeps + 1)]
    if not isinstance(path, Numbered):
        return [start + (end - start) * share for share in shares]
    # DDIM's grid of a phase from k_s: k_s, k_s - stride, ...; the last stride ends on the phase's own end.
    first, last = (torch.round(path.number_of(t)) for t in (start, end))
    # The last phase of an even division is one number short of the others, whose stride it keeps.
    length = torch.where(last == 0, first + 1, first - last)
    numbers = [first - torch.round(length * share) for share in shares[:-1]]
    numbers = [torch.maximum(number, last) for number in numbers]
    return [*(1 - number / (path.count - 1) for number in numbers), end]


def _time_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
