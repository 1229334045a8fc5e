"""Two-dimensional toy sets, drawn fresh from closed-form laws.

Every law is centred and of roughly unit scale: the standard deviation of a coordinate, given in each docstring, lies
between 0.6 and 2.4, so that a standard normal source overlaps all of them. A toy is a function ``(count, generator) ->
(count, 2)``, float32, on the generator's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pantarhei.data.sources import TensorSource
from pantarhei.naming import unknown

Toy = Callable[[int, torch.Generator | None], Tensor]


def eight_gaussians(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Eight Gaussians of deviation 0.2, evenly on a ring of radius 2. Coordinate deviation sqrt(2.04) = 1.43."""
    angle = math.pi / 4 * _integers(count, 8, generator)
    return 2.0 * _on_circle(angle) + 0.2 * _normal(count, generator)


def two_moons(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Two interleaved half circles of radius 1.5 with noise of deviation 0.08. Coordinate deviations 1.30, 0.75.

    The upper moon is the upper half circle, the lower one the lower half circle moved by (1, 1/2) radii (the layout of
    scikit-learn's ``make_moons``); the mean (1/2, 1/4) is taken off.
    """
    lower = _integers(count, 2, generator)
    angle = math.pi * _uniform(count, generator)
    arc = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
    point = torch.where(lower[:, None] == 1, torch.stack([1.0 - arc[:, 0], 0.5 - arc[:, 1]], dim=1), arc)
    return 1.5 * (point - point.new_tensor([0.5, 0.25])) + 0.08 * _normal(count, generator)


def checkerboard(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Uniform on the eight dark squares (side 2) of a 4x4 board over [-4, 4]^2. Coordinate deviation 4/sqrt(3) = 2.31.

    With a ~ U(-2, 2), u ~ U(0, 1), b ~ Bernoulli(1/2): 2 (a, u - 2 b + floor(a) mod 2).
    """
    first = 4.0 * _uniform(count, generator) - 2.0
    half = _integers(count, 2, generator)
    second = _uniform(count, generator) - 2.0 * half + torch.remainder(torch.floor(first), 2.0)
    return 2.0 * torch.stack([first, second], dim=1)


def spiral(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Two arms with noise 0.1. Coordinate deviations 1.53, 1.48.

    Radius 3 s at the angles 3 pi s and 3 pi s + pi, where s = sqrt(U(0, 1)): the square root spreads the points about
    evenly along an arm.
    """
    radius = torch.sqrt(_uniform(count, generator))
    arm = _integers(count, 2, generator)
    angle = 3.0 * math.pi * radius + math.pi * arm
    return 3.0 * radius[:, None] * _on_circle(angle) + 0.1 * _normal(count, generator)


def pinwheel(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Five curved blades. Coordinate deviation 1.48.

    A point lies at the distance r = 1 + 0.3 z1 along its blade and s = 0.1 z2 beside it; the blade is turned by
    0.25 exp(r), so its tip trails (the warp of Johnson et al. 2016, "Composing graphical models with neural networks"),
    and all is doubled.
    """
    blade = _integers(count, 5, generator)
    normal = _normal(count, generator)
    along, beside = 1.0 + 0.3 * normal[:, 0], 0.1 * normal[:, 1]
    angle = 2.0 * math.pi / 5.0 * blade + 0.25 * torch.exp(along)
    forward = _on_circle(angle)
    sideways = torch.stack([-forward[:, 1], forward[:, 0]], dim=1)
    return 2.0 * (along[:, None] * forward + beside[:, None] * sideways)


def circles(count: int, generator: torch.Generator | None = None) -> Tensor:
    """Two concentric circles of radii 1 and 2 with noise 0.08, equally likely. Coordinate deviation 1.12."""
    radius = 1.0 + _integers(count, 2, generator)
    angle = 2.0 * math.pi * _uniform(count, generator)
    return radius[:, None] * _on_circle(angle) + 0.08 * _normal(count, generator)


def swiss_roll(count: int, generator: torch.Generator | None = None) -> Tensor:
    """One arm r = a / 5 over the angles a ~ U(3 pi / 2, 9 pi / 2), noise 0.06. Coordinate deviations 1.33, 1.39.

    The profile of the usual three-dimensional roll; its mean (2/5, 2 / (15 pi)) is taken off.
    """
    low, high = 1.5 * math.pi, 4.5 * math.pi
    angle = low + (high - low) * _uniform(count, generator)
    point = (angle / 5.0)[:, None] * _on_circle(angle)
    return point - point.new_tensor([0.4, 2.0 / (15.0 * math.pi)]) + 0.06 * _normal(count, generator)


TOYS: dict[str, Toy] = {
    "eight_gaussians": eight_gaussians,
    "two_moons": two_moons,
    "checkerboard": checkerboard,
    "spiral": spiral,
    "pinwheel": pinwheel,
    "circles": circles,
    "swiss_roll": swiss_roll,
}
"""Every toy by its name."""


def toy_source(name: str, count: int = 10_000, seed: int = 0) -> TensorSource:
    """Draw a toy set once and keep it.

    Args:
        name: one of `TOYS`; hyphens may stand for underscores.
        count: number of points, at least 1.
        seed: of the draw; no global state is touched.

    Raises:
        ValueError: the name is unknown or ``count`` is below 1.
    """
    key = name.replace("-", "_")
    if key not in TOYS:
        raise ValueError(unknown("toy", name, TOYS))
    if count < 1:
        raise ValueError(f"count is {count}; a toy set needs at least 1 point")
    return TensorSource({"x1": TOYS[key](count, torch.Generator().manual_seed(seed))}, key)


def _device(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


def _uniform(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(count, generator=generator, device=_device(generator), dtype=torch.float32)


def _normal(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(count, 2, generator=generator, device=_device(generator), dtype=torch.float32)


def _integers(count: int, below: int, generator: torch.Generator | None) -> Tensor:
    drawn = torch.randint(below, (count,), generator=generator, device=_device(generator))
    return drawn.to(torch.float32)


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([torch.cos(angle), torch.sin(angle)], dim=1)
