"""Sampling grids: where the steps of a fixed-step sampler are, as floats rising from the source end to the data end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch

from pantarhei.flow.paths import AffinePath, Numbered
from pantarhei.flow.times import shift_time
from pantarhei.solve.steps import Step

GridName = Literal["uniform", "quadratic", "cosine", "logsnr", "karras", "edm", "reference"]
Grid = tuple[float, ...]
SD3_LEVELS = 1000  # of its table
EDM_LEVELS = (0.002, 80.0)  # its least and its largest sigma / alpha (Karras et al. 2206.00364)
# Plain functions of floats, so that a compiled sampler sees constants.
WARPS: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: u,
    "quadratic": lambda u: u * u,
    "cosine": lambda u: (1 - math.cos(math.pi * u)) / 2,
}


def make_grid(
    steps: int,
    interval: tuple[float, float] = (0.0, 1.0),
    *,
    kind: GridName | Callable[[float], float] = "uniform",
    shift: float = 1.0,
    path: AffinePath | None = None,
    rho: float = 7.0,
) -> Grid:
    """Times t_0 < ... < t_steps over `interval`, its ends included.

    Args:
        steps: number of steps, at least 1.
        interval: first and last time, inside [0, 1].
        kind: "uniform" (on a numbered path its whole numbers, "trailing": K - 1, K - 1 - K / steps, ..., and 0 at the
            end); "quadratic" (denser at the source: u^2); "cosine" (denser at both ends); "logsnr" (equal steps
            of log(alpha/sigma)), "karras" (equal steps of (sigma/alpha)^(1/rho)) and "edm" (the same between EDM's noise
            levels 80 and 0.002, whatever lies beyond them at the ends), which need a path; "reference", that of SD3's
            published code: noise levels from the first to the last of 1000 shifted ones, shifted a second time, and 0; or
            any rising function of u in [0, 1] onto [0, 1].
        shift: SD3's resolution shift, t -> t / (shift - (shift - 1) t), applied once, to i/steps; > 1 spends more steps
            near the noise.
        path: the path, for the kinds that need one; where it has a kink, the nearest node is put there.
        rho: exponent of "karras".

    Raises:
        ValueError: for steps < 1, an unknown kind, a non-positive shift or a grid that does not rise.
    """
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if not shift > 0:
        raise ValueError(f"shift: must be positive, got {shift}")
    low, high = interval
    whole = kind == "uniform" and interval == (0.0, 1.0)
    if whole and isinstance(path, Numbered) and trailing(path.count, steps)[-2] > 0:
        times = [1 - k / (path.count - 1) for k in trailing(path.count, steps)]
    elif callable(kind) or kind in WARPS:
        warp = kind if callable(kind) else WARPS[kind]
        times = [low + (high - low) * float(warp(i / steps)) for i in range(steps + 1)]
    elif kind in ("logsnr", "karras", "edm"):
        times = _by_noise_level(steps, interval, kind, path, rho)
    elif kind == "reference":
        last = 1 - shift_time(1 - 1 / SD3_LEVELS, shift)
        times = [low + (high - low) * (1 - last) * i / max(steps - 1, 1) for i in range(steps)] + [high]
    else:
        raise ValueError(
            f"grid: must be {', '.join(WARPS)}, logsnr, karras, edm, reference or a function, got {kind!r}"
        )
    if shift != 1.0:
        times = [min(max(shift_time(t, shift), low), high) for t in times]
    kink = getattr(path, "kink", None)
    if kink is not None and steps > 1 and low < kink < high:
        nearest = min(range(1, steps), key=lambda i: abs(times[i] - kink))
        times[nearest] = kink
    grid = (low, *times[1:-1], high)
    if any(b <= a for a, b in pairwise(grid)):
        raise ValueError("grid: times must rise strictly")
    return grid


def solver_grid(
    path: Any,
    steps: int | Grid,
    times: Sequence[float],
    kind: GridName | Callable[[float], float] = "uniform",
    shift: float = 1.0,
) -> Grid:
    """The grid of so many steps from the first to the last of some times, either way; a grid as it is.

    Args:
        path: of the flow: affine, or an interpolant, whose ends are.
        steps, kind, shift: as of `make_grid`.
        times: rising or falling.
    """
    if not isinstance(steps, int):
        return tuple(steps)
    affine = path if isinstance(path, AffinePath) else getattr(path, "ends", None)
    nodes = make_grid(steps, (min(times), max(times)), kind=kind, shift=shift, path=affine)
    return nodes if times[-1] > times[0] else nodes[::-1]


def optional_grid(step: Step, path: Any, steps: int | Grid | None, *how: Any) -> Grid | None:
    """That of a step; None, for error control, as it is.

    Raises:
        ValueError: None for a step without error control.
    """
    if steps is not None:
        return solver_grid(path, steps, *how)
    if not step.adaptive:
        raise ValueError(f"steps: {step.name} has no error control; give a number of steps")
    return None


def shift_for(
    tokens: int,
    *,
    few: tuple[int, float] = (256, 0.5),
    many: tuple[int, float] = (4096, 1.15),
    exponential: bool = True,
) -> float:
    """The resolution shift of an image of so many tokens: e^mu, mu linear in their number (Flux; dynamic in diffusers).

    Args:
        tokens: patches of the image.
        few, many: two numbers of tokens, and mu there.
        exponential: else mu itself is the shift.
    """
    (low, first), (high, last) = few, many
    mu = first + (last - first) * (tokens - low) / (high - low)
    return math.exp(mu) if exponential else mu


def trailing(count: int, steps: int) -> list[int]:
    """Numbers at which a sampler of a numbered diffusion is evaluated, from the noisiest, and the number 0 at its end."""
    return [*(round(count - count * i / steps) - 1 for i in range(steps)), 0]


def _by_noise_level(
    steps: int, interval: tuple[float, float], kind: str, path: AffinePath | None, rho: float
) -> list[float]:
    if path is None:
        raise ValueError(f"grid: kind={kind!r} needs a path")
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    if kind == "edm":
        ends = torch.tensor(interval, dtype=torch.float64)
        first, last = (path.sigma(ends) / path.alpha(ends).clamp_min(1e-30)).clamp(*EDM_LEVELS)
    else:
        # Keep away from the ends at which the noise level is infinite or zero.
        ends = torch.tensor([max(interval[0], 1e-3), min(interval[1], 1 - 1e-3)], dtype=torch.float64)
        first, last = path.sigma(ends) / path.alpha(ends)
    if kind == "logsnr":
        level = torch.exp(torch.log(first) + u * (torch.log(last) - torch.log(first)))
    else:
        level = (first ** (1 / rho) + u * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return path.time_at(1 / level).tolist()
