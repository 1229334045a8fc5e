"""How much noise an SDE has over time: epsilon(t), chosen at sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from pantarhei.flow.interpolants import Interpolant
from pantarhei.naming import unknown

Epsilon = float | Callable[[float], float]
NoiseForm = Literal["constant", "sigma", "variance", "linear", "decreasing", "bump", "diffusion", "fading"]


def noise_amount(form: NoiseForm, scale: float, path: Any) -> Callable[[float], float]:
    """epsilon(t) by name, times or at `scale` c; the noise level n is sigma, or gamma on a path with a latent.

    Args:
        form: "constant" c; "sigma" c n(t), SiT's default (Ma et al. 2401.08740, whose w is 2 epsilon); "variance" c n^2,
            which keeps epsilon / n^2 bounded; "linear" c (1 - t); "decreasing" (c cos(pi t) + 1)^2 / 4; "bump" c sin^2(pi t)
            (SiT's increasing-decreasing); "diffusion" c (alpha'/alpha sigma^2 - sigma sigma'), which turns the flow into the
            score-based diffusion of its path (SBDM); "fading" c (1 - t)^2 / 2.
        scale: c >= 0.
        path: an affine path or an interpolant.

    Raises:
        ValueError: for an unknown form, a negative scale, or "diffusion" on a path with a latent.
    """
    if form not in get_args(NoiseForm):
        raise ValueError(unknown("form", form, get_args(NoiseForm)))
    if not scale >= 0:
        raise ValueError(f"epsilon: must not be negative, got {scale}")
    if form == "diffusion" and isinstance(path, Interpolant):
        raise ValueError("form: 'diffusion' is for one-sided paths; on a path with a latent take 'variance'")

    def at(function: Callable[[torch.Tensor], torch.Tensor], t: float) -> float:
        return float(function(torch.tensor(t, dtype=torch.float64)))

    def level(t: float) -> float:
        return at(path.level, t)

    def diffusion(t: float) -> float:
        ratio = at(path.alpha_dot, t) / max(at(path.alpha, t), 1e-12)
        return ratio * level(t) ** 2 - level(t) * at(path.sigma_dot, t)

    forms: dict[str, Callable[[float], float]] = {
        "constant": lambda t: scale,
        "sigma": lambda t: scale * level(t),
        "variance": lambda t: scale * level(t) ** 2,
        "linear": lambda t: scale * (1 - t),
        "decreasing": lambda t: (scale * math.cos(math.pi * t) + 1) ** 2 / 4,
        "bump": lambda t: scale * math.sin(math.pi * t) ** 2,
        "diffusion": lambda t: scale * diffusion(t),
        "fading": fading(scale),
    }
    return forms[form]


def fading(scale: float) -> Callable[[float], float]:
    """epsilon(t) = scale (1 - t)^2 / 2: noise that dies out towards the data, where the score is largest."""
    return lambda t: 0.5 * scale * (1 - t) ** 2
