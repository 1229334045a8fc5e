"""Schroedinger bridges as flows: what they are made from, and how they are run from either end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.flow import Flow, evaluation_mode, transport_sde
from pantarhei.flow.entropic import check_epsilon
from pantarhei.flow.fields import Fields
from pantarhei.flow.gammas import Brownian
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.paths import Linear


def bridge_flow(
    network: nn.Module,
    epsilon: float,
    *,
    source: Any = None,
    shape: Sequence[int],
    **options: Any,
) -> Flow:
    """A flow whose path has the Brownian bridges of dX = sqrt(2 epsilon) dW, to be made a Schroedinger bridge.

    Args:
        network: predicts the forward drift and E[z | x_t], stacked along dimension 1.
        epsilon: amount of noise, positive.
        source: law of x0: samples, a mixture or another source law; the standard normal by default.
        shape: of one sample.
        options: further settings of `Flow`.

    Raises:
        ValueError: epsilon is not positive.
    """
    path = Interpolant(Linear(), Brownian(2 * check_epsilon(epsilon)))
    fields = Fields(names=("drift", "latent"), epsilon=float(epsilon))
    return Flow(network, path=path, predicts=fields, source=source, shape=shape, **options)


@dataclass(frozen=True)
class Bridge:
    """A flow that is (close to) a Schroedinger bridge: a process that can be run from either end.

    Attributes:
        flow: on the path of `bridge_flow`; its provenance says which method made it.
    """

    flow: Flow

    def __post_init__(self) -> None:
        check_bridge_flow(self.flow)

    @property
    def epsilon(self) -> float:
        """Amount of noise: dX = drift dt + sqrt(2 epsilon) dW."""
        return float(self.flow.path.gamma.a) / 2

    @torch.no_grad()
    def forward(
        self, x0: Tensor, *, steps: int | Sequence[float] = 50, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Carry source points to the data end, (B, *shape); `options` of `transport_sde`."""
        return self._carry(x0, self.flow.interval, steps, generator, options)

    @torch.no_grad()
    def backward(
        self, x1: Tensor, *, steps: int | Sequence[float] = 50, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Carry data back to the source end, (B, *shape)."""
        return self._carry(x1, self.flow.interval[::-1], steps, generator, options)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the equation run from t = 0 up, v + epsilon s; t 0-d or (B,), inside the flow's interval."""
        output = self.flow.output(x, t)
        fields = self.flow.prediction.split(output)
        return fields["drift"] if "drift" in fields else self._velocity_and_score(x, t, output, 1.0)

    def backward_drift(self, x: Tensor, t: Tensor) -> Tensor:
        """Of the equation run from t = 1 down: v - epsilon s."""
        return self._velocity_and_score(x, t, self.flow.output(x, t), -1.0)

    def _velocity_and_score(self, x: Tensor, t: Tensor, output: Tensor, sign: float) -> Tensor:
        path, prediction = self.flow.path, self.flow.prediction
        latent = prediction.latent(path, x, t, output)
        return prediction.velocity(path, x, t, output) - sign * self.epsilon / path.at(t, x).gamma * latent

    def _carry(
        self, x: Tensor, times: tuple[float, float], steps: Any, generator: Any, options: dict[str, Any]
    ) -> Tensor:
        with evaluation_mode(self.flow.network):
            # Short steps at both ends: there the drift is steep, and the noise of the last step is not taken back.
            options = {"grid": "cosine", **options}
            drifts = times[1] > times[0] and "drift" in self.flow.prediction.names
            epsilon: Any = "trained" if drifts else self.epsilon
            return transport_sde(self.flow, x, times, epsilon, steps=steps, generator=generator, **options).x


def check_bridge_flow(flow: Flow) -> None:
    """Check that a flow has the path of a bridge.

    Raises:
        ValueError: its path is not linear with a Brownian latent, or its score is not known.
    """
    path = flow.path
    if not (isinstance(path, Interpolant) and type(path.ends) is Linear and isinstance(path.gamma, Brownian)):
        raise ValueError(
            "flow: a bridge needs the path Interpolant(Linear(), Brownian(2 * epsilon)); make the flow with bridge_flow"
        )
    flow.require_score()
    trained, wanted = flow.prediction.epsilon, path.gamma.a / 2
    if "drift" in flow.prediction.names and trained != wanted:
        raise ValueError(f"flow: its drift belongs to epsilon {trained}, its path to {wanted:g}; take bridge_flow")
