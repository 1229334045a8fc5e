"""The denoising term of trajectory models: what keeps the network at s = t the flow's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.flow import Flow, FlowMatching, Term, evaluation_mode, squared
from pantarhei.flow.affine import AffinePath
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.grids import EDM_LEVELS
from pantarhei.flow.objectives import Draw, LossTerm
from pantarhei.flow.predictions import EDMPreconditioned
from pantarhei.flow.times import TimeLaw, Uniform
from pantarhei.flow.trajectory import TrajectoryModel


def denoising_objective(
    model: TrajectoryModel, teacher: Flow | None = None, guidance: float = 1.0, dropout: float = 0.0
) -> FlowMatching:
    """The denoising term at s = t: EDM's loss at the published times, or flow matching at uniform ones.

    Args:
        model: the student.
        teacher, guidance: where the student has guidance built in, its estimate is compared with the guided teacher's: that
            of data would pull the other way.
        dropout: how often a condition is dropped.
    """
    law = DenoisingTimes(model.path, model.interval) if isinstance(model.prediction, EDMPreconditioned) else Uniform()
    terms: tuple[LossTerm, ...] = (Term(),)
    if teacher is not None and guidance != 1.0:
        terms = (TowardsTeacher(teacher, guidance),)
    return FlowMatching(times=law, terms=terms, dropout=dropout)


@dataclass(frozen=True)
class TowardsTeacher:
    """A term of flow matching whose target is what a guided teacher estimates.

    Attributes:
        teacher: frozen, on the student's path.
        guidance: its guidance.
    """

    teacher: Flow
    guidance: float
    name = "towards_teacher"

    def __call__(self, flow: Flow, draw: Draw, output: Tensor) -> Tensor:
        """Mean squared error of the network's own target, (B,)."""
        with torch.no_grad(), evaluation_mode(self.teacher.network):
            ends = Estimates(self.teacher, self.guidance, ()).ends(draw.x_t, draw.t, draw.condition)
            target = flow.prediction.target(flow.path, ends.noise, ends.data, draw.t)
        return squared(output, target)


@dataclass(frozen=True)
class DenoisingTimes(TimeLaw):
    """Times of the denoising term of CTM (2310.02279, code): half of them EDM's, half noisier.

    ln(sigma / alpha) is normal in one half; the other is uniform in the first `share` of EDM's grid, which spans the levels
    80 to 0.32 with 0.7.

    Attributes:
        path: where the levels become times.
        interval: of the flow; levels beyond it are kept at its ends.
        mean, deviation: of the normal law.
        share: of the grid.
        rho: its exponent.
    """

    path: AffinePath
    interval: tuple[float, float]
    mean: float = -1.2
    deviation: float = 1.2
    share: float = 0.7
    rho: float = 7.0

    def quantile(self, u: Tensor) -> Tensor:
        """The first half of u for the noisy half of the law; as a fraction of the interval."""
        wide = u.double()
        low, high = (level ** (1 / self.rho) for level in EDM_LEVELS)
        noisy = (high + (2 * wide).clamp(max=1) * self.share * (low - high)) ** self.rho
        normal = torch.special.ndtri((2 * wide - 1).clamp(1e-6, 1 - 1e-6))
        level = torch.where(wide < 0.5, noisy, torch.exp(self.mean + self.deviation * normal))
        first, last = self.interval
        t = self.path.time_at(1 / level).clamp(first, last)
        return ((t - first) / (last - first)).to(u.dtype)

    def pdf(self, t: Tensor) -> Tensor:
        """Not known in closed form."""
        raise ValueError("times: this law has no closed density")
