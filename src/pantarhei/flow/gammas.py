"""Coefficients gamma(t) of a latent noise: zero at both ends of a path, positive in between (Albergo et al. 2303.08797)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.naming import build


@dataclass(frozen=True)
class Gamma:
    """The latent's coefficient: zero at t = 0 and 1, positive in between.

    Subclasses give `value`, and `product`, gamma gamma' = d(gamma^2)/dt / 2, in closed form: it stays finite at the ends
    also where gamma' does not. Times are clamped to [0, 1], for adaptive solvers step past the ends.
    """

    def value(self, t: Tensor) -> Tensor:
        """gamma(t)."""
        raise TypeError(f"{type(self).__name__} does not define value")

    def product(self, t: Tensor) -> Tensor:
        """gamma(t) gamma'(t)."""
        raise TypeError(f"{type(self).__name__} does not define product")

    def derivative(self, t: Tensor) -> Tensor:
        """gamma'(t)."""
        return self.product(t) / self.value(t)

    def spec(self) -> dict[str, Any]:
        """The latent as data: its name in `GAMMAS` and its constants."""
        return {"name": next(n for n, kind in GAMMAS.items() if kind is type(self)), **asdict(self)}


@dataclass(frozen=True)
class Brownian(Gamma):
    """sqrt(a t (1 - t)): the Brownian bridge of variance a; gamma' is infinite at both ends."""

    a: float = 1.0

    def __post_init__(self) -> None:
        if not self.a > 0:
            raise ValueError(f"a: must be positive, got {self.a}")

    def value(self, t: Tensor) -> Tensor:
        """sqrt(a t (1 - t))."""
        t = t.clamp(0, 1)
        return torch.sqrt(self.a * t * (1 - t))

    def product(self, t: Tensor) -> Tensor:
        """a (1 - 2 t) / 2."""
        return self.a * (0.5 - t.clamp(0, 1))


@dataclass(frozen=True)
class Quadratic(Gamma):
    """t (1 - t): smooth at both ends."""

    def value(self, t: Tensor) -> Tensor:
        """t (1 - t)."""
        t = t.clamp(0, 1)
        return t * (1 - t)

    def derivative(self, t: Tensor) -> Tensor:
        """1 - 2 t."""
        return 1 - 2 * t.clamp(0, 1)

    def product(self, t: Tensor) -> Tensor:
        """t (1 - t)(1 - 2 t)."""
        return self.value(t) * self.derivative(t)


@dataclass(frozen=True)
class SineSquared(Gamma):
    """sin^2(pi t)."""

    def value(self, t: Tensor) -> Tensor:
        """sin^2(pi t)."""
        return torch.sin(math.pi * t.clamp(0, 1)).square()

    def derivative(self, t: Tensor) -> Tensor:
        """pi sin(2 pi t)."""
        return math.pi * torch.sin(2 * math.pi * t.clamp(0, 1))

    def product(self, t: Tensor) -> Tensor:
        """pi sin^2(pi t) sin(2 pi t)."""
        return self.value(t) * self.derivative(t)


@dataclass(frozen=True)
class Sigmoid(Gamma):
    """A bump with a flat top: S(f (t - 1/2) + 1) - S(f (t - 1/2) - 1), less its value at the ends; S is the sigmoid."""

    f: float = 10.0

    def __post_init__(self) -> None:
        if not self.f > 0:
            raise ValueError(f"f: must be positive, got {self.f}")

    def value(self, t: Tensor) -> Tensor:
        """The bump."""
        u = self.f * (t.clamp(0, 1) - 0.5)
        floor = _sigmoid(1 - self.f / 2) - _sigmoid(-1 - self.f / 2)
        return torch.sigmoid(u + 1) - torch.sigmoid(u - 1) - floor

    def derivative(self, t: Tensor) -> Tensor:
        """f (S'(u + 1) - S'(u - 1)) with u = f (t - 1/2)."""
        u = self.f * (t.clamp(0, 1) - 0.5)
        up, down = torch.sigmoid(u + 1), torch.sigmoid(u - 1)
        return self.f * (up * (1 - up) - down * (1 - down))

    def product(self, t: Tensor) -> Tensor:
        """Value times derivative."""
        return self.value(t) * self.derivative(t)


@dataclass(frozen=True)
class Foellmer(Gamma):
    """c (1 - t) sqrt(t): the latent is a Wiener process that dies out towards the data (Chen et al. 2403.13724)."""

    c: float = 1.0

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c: must be positive, got {self.c}")

    def value(self, t: Tensor) -> Tensor:
        """c (1 - t) sqrt(t)."""
        t = t.clamp(0, 1)
        return self.c * (1 - t) * torch.sqrt(t)

    def product(self, t: Tensor) -> Tensor:
        """c^2 (1 - t)(1 - 3 t) / 2."""
        t = t.clamp(0, 1)
        return 0.5 * self.c**2 * (1 - t) * (1 - 3 * t)

    def derivative(self, t: Tensor) -> Tensor:
        """c (1 - 3 t) / (2 sqrt(t))."""
        t = t.clamp(0, 1)
        return 0.5 * self.c * (1 - 3 * t) / torch.sqrt(t)


@dataclass(frozen=True)
class NoLatent(Gamma):
    """gamma = 0: a deterministic interpolant between two data sets. It has no score."""

    def value(self, t: Tensor) -> Tensor:
        """0."""
        return torch.zeros_like(t)

    derivative = product = value


GAMMAS: dict[str, type[Gamma]] = {
    "brownian": Brownian,
    "quadratic": Quadratic,
    "sine-squared": SineSquared,
    "sigmoid": Sigmoid,
    "foellmer": Foellmer,
    "none": NoLatent,
}


def build_gamma(spec: str | dict[str, Any] | Gamma) -> Gamma:
    """A latent's coefficient from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name or a wrong constant.
    """
    return spec if isinstance(spec, Gamma) else build("gamma", GAMMAS, spec)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
