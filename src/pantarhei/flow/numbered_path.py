"""Schedules of numbered diffusion models (DDPM, Stable Diffusion) as affine paths of continuous time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath

BetaSchedule = Literal["linear", "scaled-linear", "cosine"]


@dataclass(frozen=True)
class Numbered(AffinePath):
    """Ho et al. 2006.11239: alpha_k^2 = prod_{i <= k} (1 - beta_i), sigma_k^2 = 1 - alpha_k^2; k = 0 is nearly clean.

    Our time is t = 1 - k / (K - 1). Between two numbers the angle atan2(alpha, sigma) is interpolated linearly, so that
    every time has a place on the circle, with finite derivatives, and the numbers have exactly theirs. At t = 1 a little
    noise is left (sigma_0 = 0.029 for Stable Diffusion).

    Attributes:
        schedule: of beta: "linear", "scaled-linear" (linear in sqrt(beta); Stable Diffusion), "cosine" (2102.09672).
        beta_min, beta_max: first and last beta of the two linear ones.
        count: K.
        zero_snr: rescale so that no data are left at t = 0 (Lin et al. 2305.08891).
        betas: all of them, instead of a schedule.
    """

    schedule: BetaSchedule = "scaled-linear"
    beta_min: float = 0.00085
    beta_max: float = 0.012
    count: int = 1000
    zero_snr: bool = False
    betas: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.betas is not None:
            object.__setattr__(self, "betas", tuple(float(b) for b in self.betas))
            object.__setattr__(self, "count", len(self.betas or ()))
        if self.count < 2:
            raise ValueError(f"count: at least 2 numbers are needed, got {self.count}")
        if self.schedule not in ("linear", "scaled-linear", "cosine"):
            raise ValueError(f"schedule: must be linear, scaled-linear or cosine, got {self.schedule!r}")
        if not all(0 < b < 1 for b in self.betas or (self.beta_min, self.beta_max)):
            raise ValueError("betas: must lie strictly between 0 and 1")

    def time_of(self, number: int | Tensor) -> float | Tensor:
        """t of the number k (an int or a tensor)."""
        return 1 - number / (self.count - 1)

    def number_of(self, t: Tensor) -> Tensor:
        """k at t, a real number."""
        return (1 - t) * (self.count - 1)

    def alphas_cumprod(self) -> Tensor:
        """alpha_k^2, float64 (K,)."""
        return _squares(self)

    def alpha(self, t: Tensor) -> Tensor:
        """Sine of the angle."""
        return torch.sin(self._angle(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Its cosine, as the sine of the other angle, which keeps its digits where it is small."""
        return torch.sin(self._angle(t, 1))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Sigma times the angle's speed."""
        return self.sigma(t) * self._speed(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-alpha times the angle's speed."""
        return -self.alpha(t) * self._speed(t)

    def time_at(self, ratio: Tensor) -> Tensor:
        """From the angle atan(ratio), by search in the table."""
        table = _angles(self, ratio.dtype, ratio.device)[0].flip(0)  # rising
        wanted = torch.atan(ratio).clamp(table[0], table[-1]).contiguous()
        above = torch.searchsorted(table, wanted).clamp(1, self.count - 1)
        low, high = table[above - 1], table[above]
        return (above - 1 + (wanted - low) / (high - low)) / (self.count - 1)

    def _angle(self, t: Tensor, which: int = 0) -> Tensor:
        table = _angles(self, t.dtype, t.device)[which]
        below, part = self._place(t)
        return torch.lerp(table[below], table[below + 1], part)

    def _speed(self, t: Tensor) -> Tensor:
        table = _angles(self, t.dtype, t.device)[0]
        below, _ = self._place(t)
        return (table[below] - table[below + 1]) * (self.count - 1)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        number = self.number_of(t)
        # A number that t in float32 only just misses is that number, and not the segment on its other side.
        off = (number - number.round()).detach()
        number = number - torch.where(off.abs() < 1e-3, off, torch.zeros_like(off))
        below = number.detach().floor().clamp(0, self.count - 2).long()
        return below, number - below


@lru_cache(maxsize=32)
def _squares(path: Numbered) -> Tensor:
    if path.betas is not None:
        betas = torch.tensor(path.betas, dtype=torch.float64)
    elif path.schedule == "cosine":
        at = torch.arange(path.count + 1, dtype=torch.float64) / path.count
        curve = torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    else:
        power = 0.5 if path.schedule == "scaled-linear" else 1.0
        ends = path.beta_min**power, path.beta_max**power
        betas = torch.linspace(*ends, path.count, dtype=torch.float64) ** (1 / power)
    squares = torch.cumprod(1 - betas, 0)
    if path.zero_snr:
        roots = squares.sqrt()
        squares = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    return squares


@lru_cache(maxsize=64)
def _angles(path: Numbered, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """atan2(alpha, sigma) and atan2(sigma, alpha) of every number."""
    squares = _squares(path)
    alpha, sigma = squares.sqrt(), (1 - squares).sqrt()
    return torch.atan2(alpha, sigma).to(device, dtype), torch.atan2(sigma, alpha).to(device, dtype)
