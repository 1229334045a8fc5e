"""Training objectives: `objective(flow, batch, generator) -> (loss, log)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from pantarhei.flow.conditions import Condition
from pantarhei.flow.couplings import Coupling, Independent
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.metrics import Premetric, squared
from pantarhei.flow.observations import Observation
from pantarhei.flow.predictions import Velocity, as_rows
from pantarhei.flow.times import TimeLaw, Uniform

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow

Space = Literal["native", "velocity", "data", "noise"]


class Objective(Protocol):
    """A loss on a batch."""

    def __call__(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The 0-d loss to minimise, and detached values to log."""


@dataclass(frozen=True)
class Draw:
    """One training draw, as every term of a loss sees it."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    x_t: Tensor
    velocity: Tensor
    condition: Condition | None
    batch: Mapping[str, Tensor]


class LossTerm(Protocol):
    """One part of a loss; any function with a name will do (masks and weights of the data are in `draw.batch`)."""

    @property
    def name(self) -> str:
        """What the logged value is called."""

    def __call__(self, flow: Flow, draw: Draw, output: Tensor) -> Tensor:
        """The loss of each row, (B,), from the network's raw output."""


@dataclass(frozen=True)
class Term:
    """Compares prediction and target in some space.

    Attributes:
        space: "native" compares the network's raw output with its own target; "velocity", "data" and "noise" convert
            both first (the conversion's factors then weigh the times).
        metric: a premetric, (prediction, target) -> (B,).
        weight: a number, or a function of t (B,) -> (B,).
        name: what the logged value is called.
    """

    space: Space = "native"
    metric: Premetric = squared
    weight: float | Callable[[Tensor], Tensor] = 1.0
    name: str = "term"

    def __post_init__(self) -> None:
        if self.space not in ("native", "velocity", "data", "noise"):
            raise ValueError(f"space: must be native, velocity, data or noise, got {self.space!r}")

    def __call__(self, flow: Flow, draw: Draw, output: Tensor) -> Tensor:
        """weight(t) * metric(prediction, target), (B,)."""
        distance = self.metric(*self._compared(flow, draw, output))
        if callable(self.weight):
            return self.weight(as_rows(draw.t, draw.x1)) * distance
        return distance if self.weight == 1.0 else self.weight * distance

    def _compared(self, flow: Flow, draw: Draw, output: Tensor) -> tuple[Tensor, Tensor]:
        prediction, path = flow.prediction, flow.path
        if self.space == "native":
            if isinstance(prediction, Velocity):
                return output, draw.velocity
            return output, prediction.target(path, draw.x0, draw.x1, draw.t)
        if self.space == "velocity":
            return prediction.velocity(path, draw.x_t, draw.t, output), draw.velocity
        ends = prediction.ends(path, draw.x_t, draw.t, output)
        return (ends.data, draw.x1) if self.space == "data" else (ends.noise, draw.x0)


@dataclass(frozen=True)
class FlowMatching:
    """Regress the conditional velocity of a path (Liu et al. 2209.03003, Lipman et al. 2210.02747), or any prediction.

    L = E_t E_(x0, x1) sum_terms weight(t) metric(prediction(x_t, t), target), with t from `times`, stretched to the
    flow's valid interval. The batch may bring `x0` (pairs) and `t` (given times, as they are).

    Attributes:
        times: law of t.
        terms: what is summed; a single squared error of the network's own target by default.
        coupling: who x0 is paired with.
        dropout: probability with which a row's condition is replaced by null (for classifier-free guidance).
        stratified: spread the batch's times evenly over the law.
        observation: what is known of the data, which becomes a condition.
    """

    times: TimeLaw = field(default_factory=Uniform)
    terms: tuple[LossTerm, ...] = (Term(),)
    coupling: Coupling = field(default_factory=Independent)
    dropout: float = 0.0
    stratified: bool = False
    observation: Observation | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout}")
        if not self.terms:
            raise ValueError("terms: at least one term is needed")

    def draw(self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None) -> Draw:
        """Times, pairs and conditions of one batch."""
        batch, x0, x1, condition = draw_pairs(flow, batch, self.coupling, self.observation, generator)
        low, high = flow.interval
        t = batch["t"] if "t" in batch else draw_times(self.times, x1, (low, high), self.stratified, generator)
        condition = drop_conditions(condition, self.dropout, x1, generator)
        z = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype) if has_latent(flow) else None
        x_t, velocity = flow.path.sample(x0, x1, z, t)
        return Draw(x0, x1, t, x_t, velocity, condition, batch)

    def rows(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> list[tuple[str, Tensor]]:
        """Each term's name and its loss row by row, (B,)."""
        draw = self.draw(flow, batch, generator)
        output = flow.output(draw.x_t, draw.t, draw.condition)
        return [(term.name, term(flow, draw, output)) for term in self.terms]

    def __call__(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logged values of one batch."""
        values = [(name, rows.mean()) for name, rows in self.rows(flow, batch, generator)]
        total = values[0][1] if len(values) == 1 else torch.stack([value for _, value in values]).sum()
        parts = {name: value.detach() for name, value in values} if len(values) > 1 else {}
        return total, {"loss": total.detach(), **parts}


def draw_pairs(
    flow: Flow,
    batch: Mapping[str, Tensor],
    coupling: Coupling,
    observation: Observation | None,
    generator: torch.Generator | None,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Condition | None]:
    """The batch with what is observed of it, x0, x1 in the flow's space, and the condition."""
    batch = {**batch, "x1": flow.encode(batch["x1"])}
    if observation is not None:
        batch.update(observation.observe(batch, generator))
    condition = flow.condition_in(batch)
    return batch, coupling(batch, flow.source, condition, generator), batch["x1"], condition


def draw_times(
    law: TimeLaw, x1: Tensor, interval: tuple[float, float], stratified: bool, generator: torch.Generator | None
) -> Tensor:
    """One time a row, the law stretched to an interval."""
    dtype = x1.dtype if x1.dtype in (torch.float32, torch.float64) else torch.float32
    drawn = law.sample(x1.shape[0], generator, stratified=stratified, dtype=dtype, device=x1.device)
    low, high = interval
    return drawn if (low, high) == (0.0, 1.0) else low + (high - low) * drawn


def drop_conditions(
    condition: Condition | None, dropout: float, x1: Tensor, generator: torch.Generator | None
) -> Condition | None:
    """Conditions with rows replaced by null, each with probability `dropout`."""
    if condition is None or not dropout:
        return condition
    return condition.drop(torch.rand(x1.shape[0], generator=generator, device=x1.device) < dropout)


def has_latent(flow: Flow) -> bool:
    """Whether the flow's path has a latent noise."""
    return isinstance(flow.path, Interpolant)
