"""Stochastic interpolants (Albergo et al. 2303.08797): x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) z, with a latent noise z.

gamma vanishes at both ends, so the path joins any two densities; between them the latent smooths, and gives the path a
score, -E[z | x_t] / gamma, whatever the coupling of x0 and x1. Their letters alpha and beta are our sigma and alpha.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow.gammas import Brownian, Foellmer, Gamma, NoLatent, SineSquared, build_gamma
from pantarhei.flow.paths import PATHS, AffinePath, Cosine, Linear, build_path
from pantarhei.naming import build, unknown
from pantarhei.solve.state import per_row


@dataclass(frozen=True)
class EncodingDecoding(AffinePath):
    """The source fades out before the data fade in: cos^2(pi t) of x0 up to t = 1/2, of x1 from there on.

    At t = 1/2 only the latent is left (with `SineSquared`); the second derivatives jump there, so grids have a node there.
    """

    kink = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        """cos^2(pi t) in the second half, else 0."""
        return torch.where(t > 0.5, torch.cos(math.pi * t).square(), 0.0)

    def sigma(self, t: Tensor) -> Tensor:
        """cos^2(pi t) in the first half, else 0."""
        return torch.where(t < 0.5, torch.cos(math.pi * t).square(), 0.0)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """-pi sin(2 pi t) in the second half."""
        return torch.where(t > 0.5, -math.pi * torch.sin(2 * math.pi * t), 0.0)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-pi sin(2 pi t) in the first half."""
        return torch.where(t < 0.5, -math.pi * torch.sin(2 * math.pi * t), 0.0)


@dataclass(frozen=True)
class Mirror(AffinePath):
    """Both ends are the same data: alpha = 1, sigma = 0. The path leaves a sample and comes back to another one."""

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    alpha_dot = sigma_dot = sigma


@dataclass(frozen=True)
class LateData(AffinePath):
    """sigma = 1 - t, alpha = t^2: alpha'(0) = 0 keeps the target's variance finite at a point source (2403.13724)."""

    def alpha(self, t: Tensor) -> Tensor:
        """t^2."""
        return t * t

    def sigma(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """2 t."""
        return 2 * t

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-1."""
        return torch.full_like(t, -1.0)


@dataclass(frozen=True)
class Shrunk(AffinePath):
    """A path scaled by sqrt(1 - gamma^2), which leaves room for the latent: with `Cosine` the variance of a bridge between
    unit-variance ends stays one. gamma must not exceed 1."""

    base: AffinePath = field(default_factory=Cosine)
    gamma: Gamma = field(default_factory=Brownian)

    def __post_init__(self) -> None:
        if isinstance(self.base, dict):  # from a saved spec
            object.__setattr__(self, "base", build_path(self.base))
        if isinstance(self.gamma, dict):
            object.__setattr__(self, "gamma", build_gamma(self.gamma))
        middle = torch.linspace(0, 1, 101, dtype=torch.float64)
        highest = float(self.gamma.value(middle).max())
        if highest > 1 + 1e-9:
            raise ValueError(f"gamma: must not exceed 1 on this path, got up to {highest:.3g}; take a smaller constant")

    def _scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.sqrt((1 - self.gamma.value(t).square()).clamp_min(0))
        # Where gamma reaches 1 the scale has a kink; its derivative there is set to 0.
        return scale, -self.gamma.product(t) / scale.clamp_min(1e-12)

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(1 - gamma^2) times the base's."""
        return self._scale(t)[0] * self.base.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - gamma^2) times the base's."""
        return self._scale(t)[0] * self.base.sigma(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """By the product rule."""
        scale, rate = self._scale(t)
        return scale * self.base.alpha_dot(t) + rate * self.base.alpha(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """By the product rule."""
        scale, rate = self._scale(t)
        return scale * self.base.sigma_dot(t) + rate * self.base.sigma(t)

    def spec(self) -> dict[str, Any]:
        """With its parts."""
        return {"name": "shrunk", "base": self.base.spec(), "gamma": self.gamma.spec()}


ENDS: dict[str, type[AffinePath]] = {
    **PATHS,
    "encoding-decoding": EncodingDecoding,
    "mirror": Mirror,
    "late-data": LateData,
    "shrunk": Shrunk,
}


class LatentCoefficients(NamedTuple):
    """alpha, sigma, gamma, their derivatives and gamma gamma' at some t, shaped to multiply the state."""

    alpha: Tensor
    sigma: Tensor
    gamma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor
    gamma_dot: Tensor
    product: Tensor


@dataclass(frozen=True)
class Interpolant:
    """x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) z with z ~ N(0, I) independent of the pair.

    Attributes:
        ends: alpha and sigma.
        gamma: coefficient of the latent.
    """

    ends: AffinePath = field(default_factory=Linear)
    gamma: Gamma = field(default_factory=Brownian)

    @property
    def regular(self) -> tuple[float, float]:
        """Where the velocity exists: gamma' may be infinite at the ends, the velocity is finite there."""
        return self.ends.regular

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""
        return self.ends.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the source."""
        return self.ends.sigma(t)

    def level(self, t: Tensor) -> Tensor:
        """The noise level, which the score is divided by: gamma."""
        return self.gamma.value(t)

    def at(self, t: Tensor, like: Tensor) -> LatentCoefficients:
        """All coefficients at t, 0-d or (B,), in shape and dtype to multiply `like` (B, ...)."""
        ends, gamma = self.ends, self.gamma
        values = (
            *(ends.alpha(t), ends.sigma(t), gamma.value(t)),
            *(ends.alpha_dot(t), ends.sigma_dot(t), gamma.derivative(t), gamma.product(t)),
        )
        return LatentCoefficients(*(per_row(v, like).to(like.dtype) for v in values))

    def sample(self, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """The point x_t and its time derivative, of pairs and latents (B, ...) at times (B,) or 0-d.

        Raises:
            ValueError: without z.
        """
        point, rate = self.ends.sample(x0, x1, None, t)
        if isinstance(self.gamma, NoLatent):
            return point, rate
        if z is None:
            raise ValueError("z: this path has a latent; give standard normal z like x1")
        gamma, gamma_dot = (per_row(v, x1).to(x1.dtype) for v in (self.gamma.value(t), self.gamma.derivative(t)))
        return point + gamma * z, rate + gamma_dot * z

    def spec(self) -> dict[str, Any]:
        """The path as data."""
        name = next(name for name, kind in ENDS.items() if kind is type(self.ends))
        ends = self.ends.spec() if name == "shrunk" else {"name": name, **asdict(self.ends)}
        return {"name": "interpolant", "ends": ends, "gamma": self.gamma.spec()}


def linear(gamma: Gamma | str = "brownian") -> Interpolant:
    """alpha = t, sigma = 1 - t."""
    return Interpolant(Linear(), build_gamma(gamma))


def trigonometric(gamma: Gamma | str = "quadratic") -> Interpolant:
    """Sine and cosine scaled by sqrt(1 - gamma^2): unit variance throughout between uncorrelated unit-variance ends."""
    gamma = build_gamma(gamma)
    return Interpolant(Shrunk(Cosine(), gamma), gamma)


def encoding_decoding() -> Interpolant:
    """Source to latent to data, with gamma = sin^2(pi t)."""
    return Interpolant(EncodingDecoding(), SineSquared())


def mirror(a: float = 1.0) -> Interpolant:
    """From the data to the data, x_t = x1 + sqrt(a t (1 - t)) z: one field, E[z | x_t], is all there is to learn."""
    return Interpolant(Mirror(), Brownian(a))


def foellmer(c: float = 1.0) -> Interpolant:
    """From one point to the law of what follows it (2403.13724): sigma = 1 - t, alpha = t^2, gamma = c (1 - t) sqrt(t)."""
    return Interpolant(LateData(), Foellmer(c))


INTERPOLANTS = {
    "linear": linear,
    "trigonometric": trigonometric,
    "encoding-decoding": encoding_decoding,
    "mirror": mirror,
    "foellmer": foellmer,
}


def build_interpolant(spec: str | dict[str, Any] | Interpolant) -> Interpolant:
    """An interpolant from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name or a wrong constant.
    """
    if isinstance(spec, Interpolant):
        return spec
    if isinstance(spec, dict):
        return Interpolant(build("ends", ENDS, spec["ends"]), build_gamma(spec["gamma"]))
    if spec not in INTERPOLANTS:
        raise ValueError(unknown("interpolant", spec, INTERPOLANTS))
    return INTERPOLANTS[spec]()
