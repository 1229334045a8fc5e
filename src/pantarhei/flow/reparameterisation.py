"""Exponential integration as a change of variables: a scaled state against another clock, whose slope is one estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.predictions import Ends
from pantarhei.naming import unknown
from pantarhei.solve.state import Field

Variables = Literal["rho", "snr", "flow", "angle"]


@dataclass(frozen=True)
class _Rule:
    """Scale c, clock tau, and the slope dy/dtau of y = x / c, from alpha and sigma; alpha / sigma from the clock."""

    scale: Callable[[Tensor, Tensor], Tensor]
    clock: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Ends, Tensor], Tensor]
    ratio: Callable[[Tensor], Tensor]


RULES: dict[str, _Rule] = {
    "rho": _Rule(
        scale=lambda a, s: a, clock=lambda a, s: s / a, slope=lambda ends, tau: ends.noise, ratio=lambda tau: 1 / tau
    ),
    "snr": _Rule(
        scale=lambda a, s: s, clock=lambda a, s: a / s, slope=lambda ends, tau: ends.data, ratio=lambda tau: tau
    ),
    "flow": _Rule(
        scale=lambda a, s: a + s,
        clock=lambda a, s: a / (a + s),
        slope=lambda ends, tau: ends.data - ends.noise,
        ratio=lambda tau: tau / (1 - tau),
    ),
    "angle": _Rule(
        scale=lambda a, s: torch.sqrt(a**2 + s**2),
        clock=torch.atan2,
        slope=lambda ends, tau: torch.cos(tau) * ends.data - torch.sin(tau) * ends.noise,
        ratio=torch.tan,
    ),
}
LARGEST = 1e12  # ratio alpha / sigma, or its inverse, that counts as infinite


@dataclass(frozen=True)
class Reparameterisation:
    """The ODE of an affine path in other variables: y = x / c(t) against tau(t), with dy/dtau an estimate of the network's.

    - "rho": x / alpha against sigma / alpha, whose slope is the noise (2307.10711; DDIM's and EDM's equation);
    - "snr": x / sigma against alpha / sigma, the data;
    - "flow": x / (alpha + sigma) against alpha / (alpha + sigma), data - noise: the linear path's own equation;
    - "angle": the same on the circle; both are bounded at either end.

    Euler's step is DDIM's in the first three; those of higher order differ, and so do all continuous adjoints.

    Attributes:
        name: which variables.
        path: an affine path.
        interval: of the flow's times; what leaves it by rounding is put back.
        snapped: clocks that tau is rounded to when the network is asked: what the reference code does with the stages of its
            methods, which are of first order then. None goes by the clock itself, as one should.
    """

    name: Variables
    path: AffinePath
    interval: tuple[float, float] = (0.0, 1.0)
    snapped: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(unknown("reparameterisation", self.name, RULES))

    def clock(self, t: Tensor | float) -> Tensor:
        """tau at t, float64.

        Raises:
            ValueError: it is infinite there.
        """
        tau = RULES[self.name].clock(*self._coefficients(t))
        if not bool((tau.abs() < LARGEST).all()):
            raise ValueError(
                f"reparameterisation: {self.name} is singular at t = {float(torch.as_tensor(t).reshape(-1)[0]):g} on this "
                "path; take 'flow'"
            )
        return tau

    def time(self, tau: Tensor | float) -> Tensor:
        """t at tau, float64: the path's own inverse, continuous in tau."""
        tau = tau if isinstance(tau, Tensor) else torch.tensor(tau, dtype=torch.float64)
        if self.snapped is not None:
            nodes = torch.tensor(self.snapped, dtype=tau.dtype, device=tau.device)
            tau = nodes[(tau[..., None] - nodes).abs().argmin(dim=-1)]
        ratio = RULES[self.name].ratio(tau.double()).nan_to_num(LARGEST, posinf=LARGEST).clamp(0, LARGEST)
        return self.path.time_at(ratio).clamp(*self.interval)

    def scale(self, t: Tensor | float) -> Tensor:
        """c at t, float64."""
        return RULES[self.name].scale(*self._coefficients(t))

    def grid(self, times: Sequence[float]) -> tuple[float, ...]:
        """The clock at some times."""
        return tuple(self.clock(torch.tensor(list(times), dtype=torch.float64)).tolist())

    def encode(self, x: Tensor, t: float) -> Tensor:
        """y of a state x at t."""
        return x / float(self.scale(t))

    def decode(self, y: Tensor, t: float) -> Tensor:
        """x of a state y at the clock of t."""
        return float(self.scale(t)) * y

    def field(self, estimates: Estimates) -> Field:
        """dy/dtau at (y, tau[, condition]) by a flow's estimates, guided and transformed as these are."""
        rule = RULES[self.name]

        def slope(y: Tensor, tau: Tensor, condition: Any = None) -> Tensor:
            t = self.time(tau.detach())
            x = self.scale(t).to(y.dtype) * y
            return rule.slope(estimates.ends(x, t.to(tau.dtype), condition), tau.to(y.dtype))

        return slope

    def _coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=torch.float64)
        return self.path.alpha(t), self.path.sigma(t)
