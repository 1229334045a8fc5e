"""What a feature extractor is, and how a whole set goes through one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pantarhei.data import Source, as_source
from pantarhei.metrics.checks import positive


@runtime_checkable
class FeatureExtractor(Protocol):
    """A callable from images to features that can say what it is.

    Attributes:
        name: printed in every table, because distances in different features cannot be compared.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W) in [-1, 1]."""
        ...


@torch.no_grad()
def extract(
    extractor: FeatureExtractor,
    source: Tensor | Source | Dataset[Any] | Iterable[Any],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """Features of a whole set.

    Args:
        extractor: images (B, C, H, W) in [-1, 1] -> features (B, D).
        source: images (N, C, H, W); or whatever `pantarhei.data.as_source` takes (a source, a data set of images); or
            a loader or iterator of batches: tensors, dicts with the images under "x1", or tuples that begin with them.
        batch_size: images that go through the extractor at once (an iterable keeps its own batches).
        device: where to work; the extractor is moved there if it has a `to`. None leaves everything where it is.

    Returns:
        (N, D), on the device on which the extractor answers.

    Raises:
        TypeError: an item holds no image tensor.
        ValueError: no images, images of the wrong shape, or a batch size below 1.
    """
    positive("batch_size", batch_size)
    if device is not None and hasattr(extractor, "to"):
        extractor.to(device)
    features = []
    for images in _batches(source, batch_size):
        if images.ndim != 4:
            raise ValueError(f"source must give images (B, C, H, W), got {tuple(images.shape)}")
        features.append(extractor(images if device is None else images.to(device)))
    if not features:
        raise ValueError("source has no images, at least one is needed")
    return torch.cat(features)


def _batches(source: Any, batch_size: int) -> Iterator[Tensor]:
    if isinstance(source, Tensor):  # stays on its device
        yield from source.split(batch_size) if source.shape[0] else ()
    elif isinstance(source, Source) or hasattr(source, "__getitem__"):
        source = as_source(source)
        for rows in torch.arange(len(source)).split(batch_size):
            yield source.fetch(rows)["x1"]
    else:
        yield from map(_images, source)


def _images(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    found = batch.get("x1") if isinstance(batch, Mapping) else batch[0] if isinstance(batch, tuple | list) else None
    if not isinstance(found, Tensor):
        raise TypeError(f'source must give image tensors, dicts with "x1" or tuples, got {type(batch).__name__}')
    return found
