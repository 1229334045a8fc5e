"""The affine paths by name: x_t = alpha(t) x1 + sigma(t) x0, t = 0 source, t = 1 data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath, Coefficients, Path
from pantarhei.flow.numbered_path import Numbered
from pantarhei.naming import build
from pantarhei.solve.state import per_row


@dataclass(frozen=True)
class Linear(AffinePath):
    """The straight path of rectified flow (Liu et al. 2209.03003): alpha = t, sigma = 1 - (1 - sigma_min) t."""

    sigma_min: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """1 - (1 - sigma_min) t."""
        return 1 - (1 - self.sigma_min) * t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-(1 - sigma_min)."""
        return torch.full_like(t, -(1 - self.sigma_min))

    def sample(self, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """As on any affine path, in two operations: x_t interpolates and dx_t is a difference."""
        weight = per_row(t, x1).to(x1.dtype)
        x_t = torch.lerp(x0, x1, weight)
        if self.sigma_min:
            x_t = torch.addcmul(x_t, weight, x0, value=self.sigma_min)
        return x_t, torch.sub(x1, x0, alpha=1 - self.sigma_min)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form of ratio = t / (1 - (1 - sigma_min) t)."""
        return (ratio / (1 + (1 - self.sigma_min) * ratio)).clamp(max=1.0)


@dataclass(frozen=True)
class _VarianceLog(AffinePath):
    """Shared by VP and sub-VP (Song et al. 2011.13456): alpha = exp(-(b1-b0) s^2/4 - b0 s/2) with s = 1 - t."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = 1 - t
        return -(self.beta_max - self.beta_min) * s**2 / 4 - self.beta_min * s / 2

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-(beta_max - beta_min)(1-t)^2/4 - beta_min (1-t)/2)."""
        return torch.exp(self._log_alpha(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Alpha times the derivative of its logarithm."""
        return self.alpha(t) * ((self.beta_max - self.beta_min) * (1 - t) / 2 + self.beta_min / 2)

    def _one_minus_alpha_squared(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))  # no cancellation near t = 1

    def _time_of(self, loss: Tensor) -> Tensor:
        """The t at which -log alpha is `loss` >= 0: the root of a quadratic in s, without cancellation."""
        half = self.beta_min / 2
        s = 2 * loss / (half + torch.sqrt(half**2 + (self.beta_max - self.beta_min) * loss))
        return (1 - s).clamp(0.0, 1.0)


@dataclass(frozen=True)
class VP(_VarianceLog):
    """Variance preserving: sigma = sqrt(1 - alpha^2). sigma' is infinite at t = 1, so the path is regular up to 1-1e-5.

    At t = 0 alpha is exp(-beta_max/4 - beta_min/4), 0.0066 at the defaults, not 0.
    """

    @property
    def regular(self) -> tuple[float, float]:
        """[0, 1 - 1e-5]."""
        return (0.0, 1.0 - 1e-5)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2)."""
        return torch.sqrt(self._one_minus_alpha_squared(t))

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-alpha alpha' / sigma."""
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form: -log alpha = log(1 + 1 / ratio^2) / 2."""
        return self._time_of(torch.log1p(_positive(ratio).pow(-2)) / 2)


@dataclass(frozen=True)
class SubVP(_VarianceLog):
    """Sub-variance preserving: sigma = 1 - alpha^2."""

    def sigma(self, t: Tensor) -> Tensor:
        """1 - alpha^2."""
        return self._one_minus_alpha_squared(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-2 alpha alpha'."""
        return -2 * self.alpha(t) * self.alpha_dot(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form: alpha = 2 ratio / (1 + sqrt(1 + 4 ratio^2))."""
        r = _positive(ratio)
        return self._time_of(torch.log((1 / r + torch.sqrt(r.pow(-2) + 4)) / 2))


@dataclass(frozen=True)
class Cosine(AffinePath):
    """Trigonometric: alpha = sin(pi t / 2), sigma = cos(pi t / 2) (constant speed on the unit circle)."""

    def alpha(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """cos(pi t / 2)."""
        return torch.cos(math.pi / 2 * t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """pi/2 cos(pi t / 2)."""
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-pi/2 sin(pi t / 2)."""
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form: an angle."""
        return torch.atan(ratio) / (math.pi / 2)


@dataclass(frozen=True)
class Spherical(AffinePath):
    """alpha = t, sigma = sqrt(1 - t^2): variance preserving; sigma' is infinite at t = 1."""

    @property
    def regular(self) -> tuple[float, float]:
        """[0, 1 - 1e-5]."""
        return (0.0, 1.0 - 1e-5)

    def alpha(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - t^2)."""
        return torch.sqrt((1 - t) * (1 + t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-t / sigma."""
        return -t / self.sigma(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form of ratio = t / sqrt(1 - t^2)."""
        return torch.rsqrt(1 + _positive(ratio).pow(-2))


@dataclass(frozen=True)
class VE(AffinePath):
    """Variance exploding: alpha = 1, sigma = sigma_max (sigma_min / sigma_max)^t (sigma_max at t = 0)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _check_noise_levels(self.sigma_min, self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_max (sigma_min / sigma_max)^t."""
        return self.sigma_max * torch.exp(math.log(self.sigma_min / self.sigma_max) * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Sigma times log(sigma_min / sigma_max)."""
        return math.log(self.sigma_min / self.sigma_max) * self.sigma(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form of sigma = 1 / ratio."""
        return (-torch.log(_positive(ratio) * self.sigma_max) / math.log(self.sigma_min / self.sigma_max)).clamp(0, 1)


@dataclass(frozen=True)
class EDM(AffinePath):
    """Karras et al. 2206.00364: alpha = 1, sigma = (smax^(1/rho) + t (smin^(1/rho) - smax^(1/rho)))^rho.

    Equal steps in t are that paper's sampling grid, so `steps=17` is its 18-point grid without the final step to zero
    noise, which `Flow.sample` takes as the denoised last state.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _check_noise_levels(self.sigma_min, self.sigma_max)

    def _root(self, t: Tensor) -> Tensor:
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return high + t * (low - high)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level."""
        return self._root(t) ** self.rho

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Its derivative, negative."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return self.rho * self._root(t) ** (self.rho - 1) * (low - high)

    def time_at(self, ratio: Tensor) -> Tensor:
        """Closed form of sigma = 1 / ratio."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((_positive(ratio) ** (-1 / self.rho) - high) / (low - high)).clamp(0, 1)


@dataclass(frozen=True)
class Custom(AffinePath):
    """A path from two functions of t; derivatives by forward-mode autograd.

    Args:
        data: alpha(t), with alpha(1) = 1.
        source: sigma(t).
        interval: where both and their derivatives are finite.
    """

    data: Callable[[Tensor], Tensor] = lambda t: t
    source: Callable[[Tensor], Tensor] = lambda t: 1 - t
    interval: tuple[float, float] = (0.0, 1.0)

    @property
    def regular(self) -> tuple[float, float]:
        """As given."""
        return self.interval

    def alpha(self, t: Tensor) -> Tensor:
        """As given."""
        return self.data(t)

    def sigma(self, t: Tensor) -> Tensor:
        """As given."""
        return self.source(t)

    def spec(self) -> dict[str, Any]:
        """A path of free functions is not data; it must be given again on loading."""
        return {"name": "custom"}


PATHS: dict[str, type[AffinePath]] = {
    "linear": Linear,
    "vp": VP,
    "sub-vp": SubVP,
    "cosine": Cosine,
    "spherical": Spherical,
    "ve": VE,
    "edm": EDM,
    "numbered": Numbered,
    "custom": Custom,
}


def build_path(spec: str | dict[str, Any] | AffinePath) -> AffinePath:
    """A path from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name, a wrong constant, or a saved custom path (its functions are not saved).
    """
    if isinstance(spec, AffinePath):
        return spec
    if (spec if isinstance(spec, str) else spec.get("name")) == "custom":
        raise ValueError("path: a user-defined path is not saved; pass path=pr.paths.Custom(...) when loading")
    return build("path", PATHS, spec)


def _positive(ratio: Tensor) -> Tensor:
    """A ratio alpha / sigma kept where its powers are finite."""
    return ratio.clamp(1e-12, 1e12)


def change_path(source: AffinePath, target: AffinePath, t: Tensor) -> tuple[Tensor, Tensor]:
    """Where a flow on `source` is when the same flow on `target` is at time t.

    Two affine paths of one coupling differ by a change of time and scale, x_source(t_source) = scale * x_target(t),
    with alpha/sigma equal on both sides (Liu et al. 2209.03003, section 2.3; Karras et al. 2206.00364, appendix B).

    Returns:
        `(t_source, scale)`, shaped like t.
    """
    a, s = target.alpha(t), target.sigma(t)
    t_source = source.time_at((a / s.clamp_min(1e-30)).clamp(max=1e12))
    # alpha and sigma change by the same factor; divide by the larger of the two for accuracy.
    scale = torch.where(a > s, source.alpha(t_source) / a, source.sigma(t_source) / s)
    return t_source, scale


def _check_noise_levels(low: float, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(f"sigma_min, sigma_max: 0 < sigma_min < sigma_max is needed, got {low}, {high}")


__all__ = [
    "EDM",
    "PATHS",
    "VE",
    "VP",
    "AffinePath",
    "Coefficients",
    "Cosine",
    "Custom",
    "Linear",
    "Numbered",
    "Path",
    "Spherical",
    "SubVP",
    "build_path",
    "change_path",
]
