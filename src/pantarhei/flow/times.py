"""Laws of the training time: samplers and densities over our t (0 source, 1 data).

A paper's law over its noise fraction u = 1 - t is mirrored: its logit-normal(m, s) is `LogitNormal(-m, s)` here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.naming import build


@dataclass(frozen=True)
class TimeLaw:
    """A probability law on [0, 1], sampled by its quantile function.

    Subclasses give `quantile` and `pdf`, both elementwise and in the dtype of their argument.
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Inverse distribution function on (0, 1)."""
        raise TypeError(f"{type(self).__name__} does not define quantile")

    def pdf(self, t: Tensor) -> Tensor:
        """Density at t in (0, 1)."""
        raise TypeError(f"{type(self).__name__} does not define pdf")

    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        stratified: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw `count` times, shape (count,).

        Args:
            count: how many.
            generator: source of randomness, on `device`.
            stratified: one draw in each of `count` equal slices of probability, in random order: same law for each
                draw, less variance of a batch mean.
            dtype: float32 or float64; half precision would collapse the tails.
            device: where to draw.
        """
        u = torch.rand(count, generator=generator, dtype=dtype, device=device)
        if stratified:
            order = torch.randperm(count, generator=generator, device=device)
            u = (order.to(dtype) + u) / count
        eps = torch.finfo(dtype).eps
        return self.quantile(u.clamp_(eps, 1 - eps))

    def spec(self) -> dict[str, Any]:
        """The law as data."""
        return {"name": next(n for n, kind in TIME_LAWS.items() if kind is type(self)), **asdict(self)}


@dataclass(frozen=True)
class Uniform(TimeLaw):
    """Uniform on [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low, high: 0 <= low < high <= 1 is needed, got {self.low}, {self.high}")

    def quantile(self, u: Tensor) -> Tensor:
        """Linear."""
        if (self.low, self.high) == (0.0, 1.0):
            return u
        return self.low + (self.high - self.low) * u

    def pdf(self, t: Tensor) -> Tensor:
        """1 / (high - low) inside."""
        inside = (t >= self.low) & (t <= self.high)
        return inside.to(t.dtype) / (self.high - self.low)


@dataclass(frozen=True)
class LogitNormal(TimeLaw):
    """Sigmoid of a normal draw (SD3, 2403.03206): mean > 0 favours the data end."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _positive("std", self.std)

    def quantile(self, u: Tensor) -> Tensor:
        """sigmoid(mean + std * normal quantile)."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def pdf(self, t: Tensor) -> Tensor:
        """Zero at both ends."""
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-z.square() / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclass(frozen=True)
class Mode(TimeLaw):
    """SD3's law with heavy tails (2403.03206): u -> 1 - u - s (cos^2(pi u / 2) - 1 + u), s in [-1, 2 / (pi - 2)].

    s > 0 favours the middle, s < 0 the ends, s = 0 is uniform; symmetric about 1/2.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise ValueError(f"scale: must lie in [-1, {2 / (math.pi - 2):.4f}] for a monotone map, got {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        """The map above with u replaced by 1 - u, so that it rises."""
        v = 1 - u
        return 1 - v - self.scale * (torch.cos(math.pi / 2 * v).square() - 1 + v)

    def pdf(self, t: Tensor) -> Tensor:
        """1 / q'(u) at the u with q(u) = t, found by bisection."""
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(50):
            middle = (low + high) / 2
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        v = 1 - (low + high) / 2
        return 1 / (1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * v)))


@dataclass(frozen=True)
class CosMap(TimeLaw):
    """The log-SNR law of the cosine schedule on the linear path (SD3, 2403.03206); symmetric about 1/2."""

    def quantile(self, u: Tensor) -> Tensor:
        """1 - 1 / (tan(pi u / 2) + 1)."""
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)

    def pdf(self, t: Tensor) -> Tensor:
        """2 / (pi (1 - 2 t + 2 t^2))."""
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))


@dataclass(frozen=True)
class UShaped(TimeLaw):
    """Density a cosh(a (t - 1/2)) / (2 sinh(a / 2)): rectified flow++ (2405.20320), whose code uses a = 4."""

    a: float = 4.0

    def __post_init__(self) -> None:
        _positive("a", self.a)

    def quantile(self, u: Tensor) -> Tensor:
        """1/2 + asinh((2u - 1) sinh(a/2)) / a."""
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def pdf(self, t: Tensor) -> Tensor:
        """As above."""
        return self.a * torch.cosh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))


@dataclass(frozen=True)
class Beta(TimeLaw):
    """The beta law; a, b > 0. Its quantiles have no closed form: it is drawn from two gamma variables."""

    a: float = 2.0
    b: float = 2.0

    def __post_init__(self) -> None:
        _positive("a", self.a)
        _positive("b", self.b)

    def quantile(self, u: Tensor) -> Tensor:
        """By SciPy, on the CPU."""
        from scipy.special import betaincinv

        return torch.as_tensor(betaincinv(self.a, self.b, u.double().cpu().numpy())).to(u)

    def pdf(self, t: Tensor) -> Tensor:
        """t^(a-1) (1-t)^(b-1) / B(a, b)."""
        log_beta = math.lgamma(self.a) + math.lgamma(self.b) - math.lgamma(self.a + self.b)
        return torch.exp((self.a - 1) * torch.log(t) + (self.b - 1) * torch.log1p(-t) - log_beta)

    def sample(
        self,
        count: int,
        generator: torch.Generator | None = None,
        *,
        stratified: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw from two gamma variables (or, stratified, through the quantiles)."""
        if stratified:
            return super().sample(count, generator, stratified=True, dtype=dtype, device=device)
        x = torch._standard_gamma(torch.full((count,), self.a, dtype=dtype, device=device), generator=generator)
        y = torch._standard_gamma(torch.full((count,), self.b, dtype=dtype, device=device), generator=generator)
        return x / (x + y)


@dataclass(frozen=True)
class Shifted(TimeLaw):
    """A law pushed through t -> t / (shift - (shift - 1) t): shift > 1 moves towards noise (SD3's resolution shift)."""

    base: TimeLaw = Uniform()
    shift: float = 3.0

    def __post_init__(self) -> None:
        _positive("shift", self.shift)
        if isinstance(self.base, dict):  # from a saved spec
            object.__setattr__(self, "base", build_time_law(self.base))

    def quantile(self, u: Tensor) -> Tensor:
        """The base's quantile, shifted."""
        return shift_time(self.base.quantile(u), self.shift)

    def pdf(self, t: Tensor) -> Tensor:
        """By change of variables."""
        before = shift_time(t, 1 / self.shift)
        jacobian = self.shift / (1 + (self.shift - 1) * t).square()
        return self.base.pdf(before) * jacobian

    def spec(self) -> dict[str, Any]:
        """The law as data, with its base."""
        return {"name": "shifted", "base": self.base.spec(), "shift": self.shift}


@dataclass(frozen=True)
class Steps(TimeLaw):
    """The starts of `count` equal steps, equally likely: what a `count`-step sampler evaluates (distillation).

    Attributes:
        count: number of steps, at least 1.
        reverse: the ends of the steps instead, for a sampler that runs from data to source.
    """

    count: int = 1
    reverse: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: must be at least 1, got {self.count}")

    def quantile(self, u: Tensor) -> Tensor:
        """floor(count u) / count, one step later in reverse."""
        return (torch.floor(u * self.count) + (1 if self.reverse else 0)) / self.count

    def pdf(self, t: Tensor) -> Tensor:
        """There is none."""
        raise ValueError("times: a law on finitely many times has no density")


@dataclass(frozen=True)
class Numbers(TimeLaw):
    """`count` equally likely times, both ends included: the numbers k = 0 ... count - 1 of a numbered diffusion.

    Attributes:
        count: at least 2.
    """

    count: int = 1000

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"count: must be at least 2, got {self.count}")

    def quantile(self, u: Tensor) -> Tensor:
        """floor(count u) / (count - 1)."""
        return torch.floor(u * self.count).clamp(max=self.count - 1) / (self.count - 1)

    def pdf(self, t: Tensor) -> Tensor:
        """There is none."""
        raise ValueError("times: a law on finitely many times has no density")


def shift_time(t: Any, shift: float) -> Any:
    """t / (shift - (shift - 1) t), of a tensor or a float; shift s / (1 + (shift - 1) s) on the noise level s = 1 - t."""
    return t / (shift - (shift - 1) * t)


TIME_LAWS: dict[str, type[TimeLaw]] = {
    "uniform": Uniform,
    "logit-normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "u-shaped": UShaped,
    "beta": Beta,
    "shifted": Shifted,
    "steps": Steps,
    "numbers": Numbers,
}


def build_time_law(spec: str | dict[str, Any] | TimeLaw) -> TimeLaw:
    """A law from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name or constant.
    """
    return spec if isinstance(spec, TimeLaw) else build("times", TIME_LAWS, spec)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: must be positive, got {value}")
