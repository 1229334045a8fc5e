"""The adversarial term of trajectory models: a discriminator, what it sees, and its losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.naming import unknown
from pantarhei.straighten.jump_times import JumpTimes
from pantarhei.training import Optimization

DISCRIMINATOR = Optimization(lr=2e-3, optimizer="radam", betas=(0.5, 0.9), clip=None)


@dataclass(frozen=True)
class Adversarial:
    """An adversarial term (Goodfellow et al. 1406.2661, hinge form; section 3.3 of 2310.02279).

    Attributes:
        discriminator: a module, samples (B, ...) to logits (B, n), positive for what looks real.
        weight: of the term, times its adaptive weight.
        after: iterations of training without it; the paper's second phase.
        limits: of its adaptive weight.
        shows: what is judged false: the "estimate" of the comparison, or the student's own "jump" to the data end.
        times: law of jumps of its own for what is judged; those of the comparison where none is given. The published
            training on ImageNet has one with `favour_long=False`.
        augment: show the discriminator augmented images (Zhao et al. 2006.10738), or it learns few real data by heart.
        optimization: of the discriminator.
    """

    discriminator: nn.Module
    weight: float = 1.0
    after: int = 0
    limits: tuple[float, float] = (0.01, 10.0)
    shows: Literal["estimate", "jump"] = "estimate"
    times: JumpTimes | None = None
    augment: bool = True
    optimization: Optimization = field(default_factory=lambda: DISCRIMINATOR)

    def __post_init__(self) -> None:
        if not self.weight > 0 or self.after < 0 or not 0 <= self.limits[0] <= self.limits[1]:
            raise ValueError(
                f"adversarial: weight > 0, after >= 0 and rising limits are needed, got {self.weight:g}, {self.after}, "
                f"{self.limits}"
            )

        if self.shows not in ("estimate", "jump"):
            raise ValueError(unknown("shows", self.shows, ["estimate", "jump"]))

    def shown(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """What the discriminator sees of samples."""
        return augmented(x, generator) if self.augment and x.ndim == 4 else x


def generator_loss(fake: Tensor) -> Tensor:
    """-E D(fake) from the logits, 0-d."""
    return -fake.mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """E max(0, 1 + D(fake)) + E max(0, 1 - D(real)) from the logits, 0-d."""
    return F.relu(1 + fake).mean() + F.relu(1 - real).mean()


def augmented(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Differentiable augmentation of images (Zhao et al. 2006.10738): colour, translation by 1/8, a hole of 1/5 of the side.

    Args:
        x: images (B, C, H, W).
        generator: draws it, row by row.
    """
    rows, _, height, width = x.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(rows, *shape, generator=generator, device=x.device, dtype=x.dtype)

    x = x + (uniform(1, 1, 1) - 0.5)  # brightness
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (2 * uniform(1, 1, 1))  # saturation
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (0.5 + uniform(1, 1, 1))  # contrast
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)[None]
    # Translation: pixels from outside are zero.
    reach = [max(1, round(size / 8)) for size in (height, width)]
    down, right = (((2 * r + 1) * uniform(1, 1)).floor().long() - r for r in reach)
    from_row, from_column = row - down, column - right
    inside = (from_row >= 0) & (from_row < height) & (from_column >= 0) & (from_column < width)
    index = (from_row.clamp(0, height - 1) * width + from_column.clamp(0, width - 1)).flatten(1)
    moved = x.flatten(2).gather(2, index[:, None].expand(-1, x.shape[1], -1)).reshape(x.shape)
    x = moved * inside[:, None]
    # A hole.
    size = [max(1, round(0.2 * side)) for side in (height, width)]
    top, left = (
        (uniform(1, 1) * (side + 1)).floor().long() - s // 2 for side, s in zip((height, width), size, strict=True)
    )
    hole = (row >= top) & (row < top + size[0]) & (column >= left) & (column < left + size[1])
    return x * ~hole[:, None]
