"""The embedded default: handwritten digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from pantarhei.images.collection import Collection, PixelContents, no_split

SIDE = 8


def digits(size: int | None, split: str) -> Collection:
    """Return the 1797 images of 8x8 pixels (test set of Alpaydin & Kaynak 1998, UCI repository).

    The pixels count ink from 0 to 16. They stay as they are, so that x = p / 8 - 1 is exact, unless another ``size``
    will have them resized: then they are spread over 0..255 first.

    Raises:
        ValueError: a split is asked for; the set has none.
    """
    from sklearn.datasets import load_digits

    if split != "train":
        raise no_split("digits", split, [])
    loaded = load_digits()
    ink, half = loaded.images[:, None], 8.0
    if size not in (None, SIDE):
        ink, half = np.rint(ink * 255.0 / 16.0), 127.5
    labels = [int(label) for label in loaded.target]
    contents = PixelContents(ink.astype(np.uint8), "digits", half)
    return Collection("digits", "digits", contents, labels, [str(digit) for digit in range(10)])
