"""Paths between a source and data: x_t = alpha(t) x1 + sigma(t) x0 (+ gamma(t) z), t = 0 source, t = 1 data.

alpha multiplies data and sigma the source in the whole project, whatever a paper calls them (docs/glossary).
Coefficients are functions of a tensor `t` and keep its dtype and shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pantarhei.naming import build
from pantarhei.solve.state import per_row


@runtime_checkable
class Path(Protocol):
    """Anything that draws a point of a bridge between x0 and x1 and its time derivative."""

    def sample(self, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """`(x_t, dx_t/dt)` for times t of shape (B,) or 0-d; `z` is the latent noise of paths that have one."""


class Coefficients(NamedTuple):
    """alpha, sigma and their time derivatives at some t, shaped to multiply the state."""

    alpha: Tensor
    sigma: Tensor
    alpha_dot: Tensor
    sigma_dot: Tensor


@dataclass(frozen=True)
class AffinePath:
    """A path x_t = alpha(t) x1 + sigma(t) x0 with differentiable coefficients and no latent noise.

    Subclasses give `alpha` and `sigma`, and their derivatives where a closed form exists (else forward-mode autograd).
    `regular` is the closed interval of t on which all four are finite.
    """

    @property
    def regular(self) -> tuple[float, float]:
        """The closed interval of t on which the coefficients and their derivatives are finite."""
        return (0.0, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        """Coefficient of the data."""
        raise TypeError(f"{type(self).__name__} does not define alpha")

    def sigma(self, t: Tensor) -> Tensor:
        """Coefficient of the source."""
        raise TypeError(f"{type(self).__name__} does not define sigma")

    def level(self, t: Tensor) -> Tensor:
        """The noise level, which the score is divided by: sigma."""
        return self.sigma(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        return _derivative(self.alpha, t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt."""
        return _derivative(self.sigma, t)

    def at(self, t: Tensor, like: Tensor) -> Coefficients:
        """All four coefficients at t, 0-d or (B,), in shape and dtype to multiply `like` (B, ...)."""
        values = (self.alpha(t), self.sigma(t), self.alpha_dot(t), self.sigma_dot(t))
        return Coefficients(*(per_row(v, like).to(like.dtype) for v in values))

    def sample(self, x0: Tensor, x1: Tensor, z: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        """The point `x_t` and the derivative `alpha' x1 + sigma' x0`; there is no latent noise, so `z` is not used."""
        c = self.at(t, x1)
        return c.alpha * x1 + c.sigma * x0, c.alpha_dot * x1 + c.sigma_dot * x0

    def time_at(self, ratio: Tensor) -> Tensor:
        """The t at which alpha(t) / sigma(t) equals `ratio` >= 0 (rising in t), by bisection in float64.

        Ratios outside the path's range give its nearest end.
        """
        target = ratio.double()
        low = torch.full_like(target, self.regular[0])
        high = torch.full_like(target, 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            # alpha - ratio sigma rises with t and has no pole where sigma vanishes.
            above = self.alpha(middle) - target * self.sigma(middle) > 0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return ((low + high) / 2).to(ratio.dtype)

    def spec(self) -> dict[str, Any]:
        """The path as data: its name in `PATHS` and its constants."""
        return {"name": _name_of(self), **asdict(self)}


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


@dataclass(frozen=True)
class SubVP(_VarianceLog):
    """Sub-variance preserving: sigma = 1 - alpha^2."""

    def sigma(self, t: Tensor) -> Tensor:
        """1 - alpha^2."""
        return self._one_minus_alpha_squared(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-2 alpha alpha'."""
        return -2 * self.alpha(t) * self.alpha_dot(t)


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


def change_path(source: AffinePath, target: AffinePath, t: Tensor) -> tuple[Tensor, Tensor]:
    """Where a flow on `source` is when the same flow on `target` is at time t.

    Two affine paths of one coupling differ by a change of time and scale, x_source(t_source) = scale * x_target(t),
    with alpha/sigma equal on both sides (Liu et al. 2209.03003, section 2.3; Karras et al. 2206.00364, appendix B).

    Returns:
        `(t_source, scale)`, shaped like t.
    """
    a, s = target.alpha(t), target.sigma(t)
    t_source = source.time_at(a / s.clamp_min(torch.finfo(t.dtype).tiny))
    # alpha and sigma change by the same factor; divide by the larger of the two for accuracy.
    scale = torch.where(a > s, source.alpha(t_source) / a, source.sigma(t_source) / s)
    return t_source, scale


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    pair: Any = torch.func.jvp(function, (t,), (torch.ones_like(t),))
    return pair[1]


def _name_of(path: AffinePath) -> str:
    return next(name for name, kind in PATHS.items() if kind is type(path))


def _check_noise_levels(low: float, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(f"sigma_min, sigma_max: 0 < sigma_min < sigma_max is needed, got {low}, {high}")
