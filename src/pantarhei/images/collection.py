"""Collections: images that are found and counted, but not yet decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev")


class Contents(Protocol):
    """The undecoded images themselves."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def name(self, index: int) -> str:
        """Return what errors call an image: its path, or the row of its file."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """Return the content of an image file, or pixels: uint8 (H, W) or (H, W, C)."""
        ...


@dataclass(frozen=True)
class PixelContents:
    """Images that are pixels already.

    Attributes:
        pixels: uint8 (N, C, H, W).
        origin: what the images are called, with their number.
        half: half of the largest pixel value, so that x = p / half - 1.
    """

    pixels: np.ndarray
    origin: str
    half: float = 127.5

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Return the origin and the number of an image."""
        return f"{self.origin} image {index}"

    def read(self, index: int) -> np.ndarray:
        """Return the pixels (H, W) or (H, W, C)."""
        image = self.pixels[index]
        return image[0] if len(image) == 1 else image.transpose(1, 2, 0)


@dataclass(frozen=True)
class Collection:
    """Images with their labels.

    Attributes:
        name: what tables call the set.
        kind: where it came from (``"folder"``, ``"zip"``, ...).
        contents: the images.
        labels: one integer per image, or None.
        classes: names of the classes, or None.
    """

    name: str
    kind: str
    contents: Contents
    labels: list[int] | None = None
    classes: list[str] | None = None


def number_labels(
    raw: Sequence[Any], where: str, names: Sequence[str] | None = None
) -> tuple[list[int] | None, list[str] | None]:
    """Turn labels as they are stored into integers and class names.

    Args:
        raw: integers from 0, or strings; -1 throughout is how hubs mark a split without labels.
        where: how errors name the labels.
        names: names of the classes where they are known.

    Returns:
        ``(labels, classes)``; integers without names get their digits as names, strings count in sorted order. Both are
        None if no image is labelled.

    Raises:
        ValueError: a label is missing, negative, without a name, or neither an integer nor a string.
    """
    labels = list(raw)
    if all(label is None or label == -1 for label in labels):
        return None, None
    for index, label in enumerate(labels):
        if not isinstance(label, (int, np.integer, str)):
            raise ValueError(f"label {index} in {where} is {label!r}; an integer from 0 or a name is wanted")
    if any(isinstance(label, str) for label in labels):
        classes = sorted({str(label) for label in labels})
        position = {label: index for index, label in enumerate(classes)}
        return [position[str(label)] for label in labels], classes
    numbers = [int(label) for label in labels]
    if min(numbers) < 0:
        raise ValueError(f"label {numbers.index(min(numbers))} in {where} is {min(numbers)}; labels count from 0")
    classes = list(names) if names else [str(index) for index in range(max(numbers) + 1)]
    if max(numbers) >= len(classes):
        raise ValueError(f"{where} has a label {max(numbers)}, but names for {len(classes)} classes only")
    return numbers, classes


def no_split(where: str, split: str, known: Sequence[str]) -> ValueError:
    """Return the error for a split that the data do not have."""
    if known:
        return ValueError(f"{where} has no split {split!r}; it has: {', '.join(sorted(known))}")
    return ValueError(f"{where} has no split {split!r}: it is one set (pantarhei.data.split holds a part of it out)")
