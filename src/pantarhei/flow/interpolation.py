"""The quadratic objectives of stochastic interpolants (Albergo et al. 2303.08797, section 2.3), with antithetic latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pantarhei.flow.couplings import Coupling, Independent
from pantarhei.flow.fields import Fields
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.objectives import draw_pairs, draw_times, drop_conditions
from pantarhei.flow.observations import Observation
from pantarhei.flow.predictions import Score
from pantarhei.flow.times import TimeLaw, Uniform

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow


@dataclass(frozen=True)
class Interpolation:
    """Regress the fields of a stochastic interpolant: E[|f|^2 / 2 - target . f], mean over dimensions, summed over fields.

    The minimisers are those of the squared error, whose constant E|target|^2 / 2 is left out: it is infinite where a target
    has 1 / gamma or an unbounded gamma' in it. There, the latents z and -z are used together: the gradient's variance then
    stays bounded towards the ends, where it would grow like 1 / gamma (appendix of the paper).

    Works for one-sided flows too (an affine path from noise): their latent is x0, their field what they predict.

    Attributes:
        times: law of t, stretched to [edge, 1 - edge] and to the flow's interval.
        antithetic: whether each pair is seen with z and with -z (two rows of the network); by default where the path and
            the fields need it.
        weights: factors of the fields' losses by name, 1 by default.
        coupling: who x0 is paired with.
        dropout: probability with which a row's condition is replaced by null.
        stratified: spread the batch's times evenly over the law.
        observation: what is known of the data, which becomes a condition.
        edge: distance kept from the ends on a path with a latent.
    """

    times: TimeLaw = field(default_factory=Uniform)
    antithetic: bool | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    coupling: Coupling = field(default_factory=Independent)
    dropout: float = 0.0
    stratified: bool = False
    observation: Observation | None = None
    edge: float = 2e-4

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: must lie in [0, 1), got {self.dropout}")
        if not 0 <= self.edge < 0.5:
            raise ValueError(f"edge: must lie in [0, 0.5), got {self.edge}")

    def rows(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> list[tuple[str, Tensor]]:
        """Each field's name and its loss row by row, (B,). The batch may bring `x0`, `t` and the latent `z`."""
        batch, x0, x1, condition = draw_pairs(flow, batch, self.coupling, self.observation, generator)
        low, high = flow.interval
        if isinstance(flow.path, Interpolant):
            low, high = max(low, self.edge), min(high, 1 - self.edge)
        t = batch["t"] if "t" in batch else draw_times(self.times, x1, (low, high), self.stratified, generator)
        condition = drop_conditions(condition, self.dropout, x1, generator)
        z = batch.get("z")
        if isinstance(flow.path, Interpolant) and z is None:
            z = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
        draws = [_draw(flow, x0, x1, z, t)]
        if self.antithetic or (self.antithetic is None and needs_antithetic(flow)):
            draws.append(_draw(flow, *((x0, x1, -z, t) if z is not None else (-x0, x1, None, t))))
            t = torch.cat([t, t]) if t.ndim else t
            condition = None if condition is None else condition.cat(condition)
        output = flow.output(torch.cat([x_t for x_t, _ in draws]), t, condition)
        names = list(draws[0][1])
        unknown = set(self.weights) - set(names)
        if unknown:
            raise ValueError(f"weights: this flow has the fields {', '.join(names)}, got {', '.join(sorted(unknown))}")
        fields = output.chunk(len(names), dim=1)
        found = []
        for name, predicted in zip(names, fields, strict=True):
            target = torch.cat([targets[name] for _, targets in draws])
            loss = (predicted * (0.5 * predicted - target)).flatten(1).mean(dim=1)
            loss = loss.reshape(len(draws), -1).mean(dim=0)
            found.append((name, loss * self.weights.get(name, 1.0)))
        return found

    def __call__(
        self, flow: Flow, batch: Mapping[str, Tensor], generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logged values of one batch."""
        values = {name: rows.mean() for name, rows in self.rows(flow, batch, generator)}
        total = torch.stack(list(values.values())).sum()
        parts = {name: value.detach() for name, value in values.items()} if len(values) > 1 else {}
        return total, {"loss": total.detach(), **parts}


def needs_antithetic(flow: Flow) -> bool:
    """Whether a target of this flow is unbounded at an end: one with 1 / gamma, or with a gamma' that diverges."""
    if not isinstance(flow.path, Interpolant):
        return isinstance(flow.prediction, Score)
    if not isinstance(flow.prediction, Fields) or "score" in flow.prediction.names:
        return True
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    steep = not bool(flow.path.gamma.derivative(ends).isfinite().all())
    numeric = "drift" in flow.prediction.names and flow.prediction.epsilon != "foellmer"
    return numeric or (steep and "velocity" in flow.prediction.names)


def _draw(flow: Flow, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    x_t, _ = flow.path.sample(x0, x1, z, t)
    if isinstance(flow.prediction, Fields) and z is not None:
        return x_t, flow.prediction.targets(flow.path, x0, x1, z, t)
    return x_t, {"native": flow.prediction.target(flow.path, x0, x1, t)}
