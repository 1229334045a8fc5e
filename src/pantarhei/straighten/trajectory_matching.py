"""Consistency trajectory matching: a jump over any time must land where the teacher's way and a shorter jump land.

Soft consistency matching of CTM (Kim et al. 2310.02279, section 3.2), with consistency distillation and training (Song et
al. 2303.01469, 2310.14189) as its special cases: one interval from t to u, and jumps to the data end only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow import Condition, Flow, evaluation_mode, squared
from pantarhei.flow.affine import AffinePath
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.flow.updates import carry_rows
from pantarhei.naming import unknown
from pantarhei.solve.randomness import drawn_again, random_state
from pantarhei.straighten.jump_times import JumpDraw

Waypoint = Literal["teacher", "self", "self-steps", "data"]
Follower = Literal["student", "average"]
Weight = Literal["uniform", "snr", "snr+1", "karras", "truncated-snr", "root", "length", "interval"]
# Weights of rows, from sigma / alpha at t, u and s.
WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "uniform": lambda t, u, s, sd: torch.ones_like(t),
    "snr": lambda t, u, s, sd: t**-2,
    "snr+1": lambda t, u, s, sd: t**-2 + 1,
    "karras": lambda t, u, s, sd: t**-2 + sd**-2,
    "truncated-snr": lambda t, u, s, sd: (t**-2).clamp_min(1),
    "root": lambda t, u, s, sd: t.sqrt(),
    "length": lambda t, u, s, sd: 1 / (1 - s / t).clamp_min(1e-6),
    "interval": lambda t, u, s, sd: 1 / (t - u).clamp_min(1e-12),
}


class Compared(NamedTuple):
    """Both sides of the comparison at the data end, and the student's own landing that the first was made of."""

    estimate: Tensor
    target: Tensor
    landing: Tensor


@dataclass(frozen=True)
class TrajectoryMatching:
    """How a trajectory model is compared with itself further along its trajectory.

    Attributes:
        waypoint: how the state at u is found: by the "teacher", by one jump of the average ("self") or one a node
            ("self-steps"), or from the "data" with the noise that made x_t (consistency training).
        teacher: a frozen flow on the student's path, for the first.
        guidance: of the teacher.
        follower: who jumps from u to s, without a gradient: the "student", as in CTM, or the "average", as in
            consistency distillation.
        metric: compares both sides at the data end.
        weight: of rows, by name: "uniform", "snr", "snr+1", "karras", "truncated-snr", "root", "length" (1 / (1 - s / t)) or
            "interval" (1 / (t - u), of 2310.14189), where t, u and s stand for sigma / alpha there.
        shared_dropout: the student drops the same features in both jumps (2310.14189).
    """

    waypoint: Waypoint = "teacher"
    teacher: Flow | None = None
    guidance: float = 1.0
    follower: Follower = "student"
    metric: Premetric = squared
    weight: str = "uniform"
    shared_dropout: bool = True

    def __post_init__(self) -> None:
        if self.waypoint not in ("teacher", "self", "self-steps", "data"):
            raise ValueError(unknown("waypoint", self.waypoint, ["teacher", "self", "self-steps", "data"]))
        if (self.teacher is None) == (self.waypoint == "teacher"):
            raise ValueError("teacher: is needed for the waypoint 'teacher', and for no other")
        if self.follower not in ("student", "average"):
            raise ValueError(unknown("follower", self.follower, ["student", "average"]))
        if self.weight not in WEIGHTS:
            raise ValueError(unknown("weight", self.weight, WEIGHTS))

    def compare(
        self,
        student: TrajectoryModel,
        average: TrajectoryModel,
        draw: JumpDraw,
        x0: Tensor,
        x1: Tensor,
        condition: Condition | None = None,
    ) -> Compared:
        """Both sides for a batch; gradients flow into the estimate, through the input of the average's jump.

        Args:
            student: is trained.
            average: of it, whose parameters are constants.
            draw: the jumps.
            x0, x1: noise and data (B, ...).
            condition: of student and teacher.
        """
        x = student.path.sample(x0, x1, None, draw.t)[0]
        state = random_state(x.device) if self.shared_dropout and student.network.training else None
        landing = student.land(x, draw.t, draw.s, condition)
        with torch.no_grad():
            waypoint = self.at_u(average, draw, x, x0, x1, condition)
            with drawn_again(state, x.device):
                follower = student if self.follower == "student" else average
                following = follower.land(waypoint, draw.u, draw.s, condition)
            target = to_data(average, following, draw.s, condition)
        return Compared(to_data(average, landing, draw.s, condition), target, landing)

    def at_u(
        self,
        average: TrajectoryModel,
        draw: JumpDraw,
        x: Tensor,
        x0: Tensor,
        x1: Tensor,
        condition: Condition | None,
    ) -> Tensor:
        """The state at u of the trajectory through x at t; no graph is kept."""
        with torch.no_grad():
            if self.waypoint == "data":
                return average.path.sample(x0, x1, None, draw.u)[0]
            if self.waypoint == "teacher":
                assert self.teacher is not None
                guided = Estimates(self.teacher, self.guidance, ())
                with evaluation_mode(self.teacher.network):
                    return carry_rows(
                        lambda x, t: guided.ends(x, t, condition), self.teacher.path, x, draw.nodes.unbind()
                    )
            stops = draw.nodes[1:] if self.waypoint == "self-steps" else draw.nodes[-1:]
            t = draw.t
            for s in stops:
                x, t = average.land(x, t, s, condition), s
            return x

    def loss(self, student: TrajectoryModel, draw: JumpDraw, compared: Compared) -> Tensor:
        """The weighted distance of each row, (B,)."""
        distance = self.metric(compared.estimate, compared.target)
        return distance if self.weight == "uniform" else self.row_weights(student, draw) * distance

    def row_weights(self, student: TrajectoryModel, draw: JumpDraw) -> Tensor:
        """The weight of each row, (B,)."""
        t, u, s = (level_at(student.path, time) for time in (draw.t, draw.u, draw.s))
        return WEIGHTS[self.weight](t, u, s, getattr(student.prediction, "sigma_data", 0.5))


def to_data(average: TrajectoryModel, x: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
    """The average's jump from s to the data end, differentiable in x; x itself where the head knows no other landing.

    All of the gradient of the comparison goes through here: without it the student would learn nothing from it.
    """
    if not average.head.anywhere:
        return x
    return average.land(x, s, s.new_full((), average.interval[1]), condition)


def level_at(path: AffinePath, t: Tensor) -> Tensor:
    """sigma / alpha at t, finite."""
    return path.sigma(t) / path.alpha(t).clamp_min(1e-6)
