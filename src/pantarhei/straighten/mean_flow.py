"""MeanFlow (Geng et al. 2505.13447): the mean velocity between two times, learned from its own derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.flow import Condition, Flow, evaluation_mode
from pantarhei.flow.couplings import Independent
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.heads import MeanVelocity
from pantarhei.flow.objectives import draw_pairs, draw_times, drop_conditions
from pantarhei.flow.times import TimeLaw, Uniform
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.solve.state import per_row
from pantarhei.straighten.stores import check_data
from pantarhei.training import FlowTask
from pantarhei.training.task import unwrapped


@dataclass(frozen=True)
class MeanFlow:
    """The loss of a trajectory model whose head is "mean-velocity".

    (s - t) u(x_t, t, s) is the way from t to s; its derivative along the flow gives u = v + (s - t) du/dt, whose right-hand
    side, with the derivative of the present network, is the target. The squared error |d|^2 of a
    row, summed, is divided by (|d|^2 + c)^p.

    Attributes:
        teacher: a frozen flow on the student's path whose velocity v is; without one v is that of the pair (x0, x1).
        guidance: of the teacher; without one v becomes g v + (1 - g) u(x_t, t, t) with no condition (its equation 21), but
            for rows whose condition is dropped.
        share: of rows with s > t; the others learn the velocity.
        times: law of both times, of which the earlier one is t; the paper has LogitNormal(0.4, 1) for ImageNet.
        power, constant: p and c; the paper has p = 0.75 for CIFAR-10 and 1 for ImageNet, points want less.
        dropout: how often a condition is dropped.
        difference: du/dt is that between times this far to both sides. None takes the exact derivative (forward mode), as
            the paper does; but time embeddings that turn fast, as those of most U-Nets (by 1,000 radians), make it noise.
    """

    teacher: Flow | None = None
    guidance: float = 1.0
    share: float = 0.75
    times: TimeLaw = field(default_factory=Uniform)
    power: float = 0.5
    constant: float = 1e-3
    dropout: float = 0.0
    difference: float | None = 0.03

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: must lie in [0, 1], got {self.share}")
        if self.power < 0 or not self.constant > 0:
            raise ValueError(f"power, constant: must not be negative, got {self.power} and {self.constant}")
        if self.difference is not None and not 0 < self.difference < 0.5:
            raise ValueError(f"difference: must lie in (0, 0.5), or be None for the derivative, got {self.difference}")

    def __call__(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logged values of a batch.

        Raises:
            ValueError: another head.
        """
        if not (isinstance(flow, TrajectoryModel) and isinstance(flow.head, MeanVelocity)):
            raise ValueError("flow: MeanFlow trains a TrajectoryModel with head='mean-velocity'")
        _, x0, x1, condition = draw_pairs(flow, batch, Independent(), None, generator)
        condition = drop_conditions(condition, self.dropout, x1, generator)
        pair = [draw_times(self.times, x1, flow.interval, False, generator) for _ in range(2)]
        t, s = torch.minimum(*pair), torch.maximum(*pair)
        apart = torch.rand(len(x1), generator=generator, device=x1.device) < self.share
        s = torch.where(apart, s, t)
        x, straight = flow.path.sample(x0, x1, None, t)
        velocity = self._velocity(flow, x, t, straight, condition)

        u = _mean_velocity(flow, condition)(x, t, s)
        if self.difference is None:
            slope = _slope(flow, condition, x, t, s, velocity)
        else:
            slope = _difference(flow, condition, x, t, s, velocity, self.difference)
        target = (velocity + per_row(s - t, x).to(x.dtype) * slope).detach()
        error = (u - target).square().flatten(1).sum(dim=1)
        weight = (error.detach() + self.constant) ** -self.power
        loss = (weight * error).mean()
        return loss, {"loss": loss.detach(), "error": error.detach().mean()}

    @torch.no_grad()
    def _velocity(self, flow: TrajectoryModel, x: Tensor, t: Tensor, straight: Tensor, condition: Any) -> Tensor:
        """The velocity at (x, t) that is averaged."""
        if self.teacher is not None:
            with evaluation_mode(self.teacher.network):
                return Estimates(self.teacher, self.guidance, ()).velocity(x, t, condition)
        if self.guidance == 1.0 or condition is None:
            return straight
        null = condition.null()
        guided = self.guidance * straight + (1 - self.guidance) * flow.velocity(x, t, null)
        dropped = torch.stack([(condition[name] == null[name]).reshape(len(t), -1).all(dim=1) for name in null]).all(
            dim=0
        )
        return torch.where(per_row(dropped, x), straight, guided)


def _mean_velocity(flow: TrajectoryModel, condition: Condition | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda x, t, s: flow.prediction.velocity(flow.path, x, t, flow.raw(x, t, s, condition))


@torch.no_grad()
def _slope(
    flow: TrajectoryModel, condition: Condition | None, x: Tensor, t: Tensor, s: Tensor, velocity: Tensor
) -> Tensor:
    """du/dt along the flow, s fixed: forward mode, without a graph.

    What wraps the network for several devices has no forward mode, so the network itself is asked.
    """
    network = unwrapped(flow.network)
    if any(p.ndim == 4 and not p.is_contiguous() for p in network.parameters()):
        raise ValueError("channels_last: group norms have no forward mode in it; take differences, or train without")
    plain: Any = flow.like(network)
    tangents = (velocity, torch.ones_like(t), torch.zeros_like(s))
    moved: Any = torch.func.jvp(_mean_velocity(plain, condition), (x, t, s), tangents)
    return moved[1]


@torch.no_grad()
def _difference(
    flow: TrajectoryModel,
    condition: Condition | None,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    velocity: Tensor,
    reach: float,
) -> Tensor:
    """The same between two times of the flow at most `reach` before and after t, neither after s."""
    low, high = flow.interval
    early = (t - reach).clamp_min(low)
    late = torch.maximum(torch.minimum(t + reach, s), early + 1e-4).clamp_max(high)  # at s = t the slope does not count
    u = _mean_velocity(flow, condition)
    with evaluation_mode(flow.network):  # what is dropped would make a difference, too
        before, after = (u(x + per_row(at - t, x) * velocity, at, torch.maximum(s, at)) for at in (early, late))
    return (after - before) / per_row(late - early, x)


class MeanFlowTask(FlowTask):
    """Train mean velocities.

    Args:
        model: a trajectory model with the head "mean-velocity".
        objective: its loss.
        data, options: see `FlowTask`.

    Raises:
        ValueError: pairs that a rectified teacher needs are not there.
    """

    def __init__(self, model: TrajectoryModel, objective: MeanFlow, data: Any, **options: Any):
        super().__init__(model, objective, data, **options)
        self.teacher = objective.teacher
        check_data(objective.teacher, self.data)

    def config(self) -> dict[str, Any]:
        """Flow, network, and what is learned, as data: resuming compares them."""
        of: Any = self.objective
        learned = {
            name: getattr(of, name) for name in ("guidance", "share", "power", "constant", "dropout", "difference")
        }
        return {**super().config(), "jumps": {**learned, "teacher": self.teacher is not None, "times": of.times.spec()}}

    def preview(self, folder: Path, iteration: int) -> None:
        """Samples of one jump."""
        self._draw_preview(folder, iteration, steps=1)
