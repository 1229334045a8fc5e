"""Random changes of image batches that keep what the images show.

The functions work on images (B, C, H, W) and draw one change per image. The frozen classes below them are the same
changes as configuration: callables ``(batch, generator) -> batch`` that act on ``x1`` and leave all else alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pantarhei.naming import unknown

Augmentation = Callable[[dict[str, Tensor], torch.Generator | None], dict[str, Tensor]]


def horizontal_flip(images: Tensor, p: float = 0.5, generator: torch.Generator | None = None) -> Tensor:
    """Mirror each image left to right with probability ``p``; (B, C, H, W) to the same shape."""
    chance = torch.rand(len(images), generator=generator, device=_draw_device(images, generator)).to(images.device)
    return torch.where((chance < p)[:, None, None, None], images.flip(-1), images)


def random_crop(images: Tensor, padding: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Continue each image by reflection on all sides, then cut it out again at a random place.

    Args:
        images: (B, C, H, W).
        padding: pixels added on each side, at least 0 and below H and W; each axis moves by at most this many.
        generator: of the draws.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: ``padding`` is not below the height and the width, where a reflection ends.
    """
    if padding >= min(images.shape[-2:]):
        height, width = images.shape[-2:]
        raise ValueError(f"padding {padding} of random_crop must be below the height {height} and width {width}")
    return _cut_out(F.pad(images, [padding] * 4, mode="reflect"), padding, images, generator)


def random_shift(images: Tensor, most: int = 2, fill: float = -1.0, generator: torch.Generator | None = None) -> Tensor:
    """Move each image by up to ``most`` pixels along each axis; what becomes free is ``fill`` (-1: black).

    Args:
        images: (B, C, H, W).
        most: largest move in pixels, at least 0.
        fill: value of the free pixels.
        generator: of the draws.

    Returns:
        (B, C, H, W).
    """
    return _cut_out(F.pad(images, [most] * 4, value=fill), most, images, generator)


@dataclass(frozen=True)
class HorizontalFlip:
    """`horizontal_flip` of ``x1``."""

    p: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"p of HorizontalFlip is {self.p}; give a probability from 0 to 1")

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Mirror the images of ``batch`` and return the new batch."""
        return _on_images(batch, lambda images: horizontal_flip(images, self.p, generator))


@dataclass(frozen=True)
class RandomCrop:
    """`random_crop` of ``x1``."""

    padding: int = 4

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding of RandomCrop is {self.padding}; give 0 or more pixels")

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Crop the images of ``batch`` and return the new batch."""
        return _on_images(batch, lambda images: random_crop(images, self.padding, generator))


@dataclass(frozen=True)
class RandomShift:
    """`random_shift` of ``x1``."""

    most: int = 2
    fill: float = -1.0

    def __post_init__(self) -> None:
        if self.most < 0:
            raise ValueError(f"most of RandomShift is {self.most}; give 0 or more pixels")

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Shift the images of ``batch`` and return the new batch."""
        return _on_images(batch, lambda images: random_shift(images, self.most, self.fill, generator))


@dataclass(frozen=True)
class Compose:
    """Several augmentations, first to last; none at all leaves the batch as it is."""

    parts: tuple[Augmentation, ...] = ()

    def __call__(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Apply all parts and return the new batch."""
        for part in self.parts:
            batch = part(batch, generator)
        return batch


AUGMENTATIONS: dict[str, Callable[[], Augmentation]] = {
    "flip": HorizontalFlip,
    "crop": RandomCrop,
    "shift": RandomShift,
}
"""Every augmentation by its name on the command line."""


def augmentation(names: str | Sequence[str]) -> Compose:
    """Return the named augmentations, in the given order, with their default strengths.

    Raises:
        ValueError: a name is not in `AUGMENTATIONS`.
    """
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if name not in AUGMENTATIONS:
            raise ValueError(unknown("augmentation", name, AUGMENTATIONS))
    return Compose(tuple(AUGMENTATIONS[name]() for name in listed))


def _on_images(batch: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    if "x0" in batch:
        raise ValueError("a batch of stored pairs (it has 'x0') cannot be augmented: a changed x1 has another x0")
    if batch["x1"].ndim != 4:
        raise ValueError(f"x1 has shape {tuple(batch['x1'].shape)}; augmentations work on images (B, C, H, W)")
    return {**batch, "x1": change(batch["x1"])}


def _cut_out(padded: Tensor, margin: int, images: Tensor, generator: torch.Generator | None) -> Tensor:
    batch, _, height, width = images.shape
    drawn = torch.randint(2 * margin + 1, (2, batch), generator=generator, device=_draw_device(images, generator)).to(
        images.device
    )
    rows = drawn[0, :, None] + torch.arange(height, device=images.device)  # (B, H)
    columns = drawn[1, :, None] + torch.arange(width, device=images.device)  # (B, W)
    every = torch.arange(batch, device=images.device)
    # Indices around the sliced channel axis put it last.
    return padded[every[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _draw_device(images: Tensor, generator: torch.Generator | None) -> torch.device:
    return images.device if generator is None else generator.device
