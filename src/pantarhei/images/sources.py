"""Image sets as sources: `open_images` takes a name or a path and finds out what it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pantarhei.images.cifar import cifar10, is_cifar10_folder
from pantarhei.images.collection import Collection, PixelContents
from pantarhei.images.decode import decode
from pantarhei.images.digits import digits
from pantarhei.images.files import SUFFIXES, image_folder, image_zip
from pantarhei.images.tables import hub, parquet, parquet_files

KINDS = (
    "digits, a folder of images, a .zip of images, a .parquet file or a folder of them, CIFAR-10 (its folder "
    "cifar-10-batches-py or .tar.gz), hf:NAME[:SPLIT]"
)
_GIB = 2**30
_CHUNK = 256  # images that threads decode before an error or Ctrl-C is seen
_WORTH_A_THREAD = 2**14  # bytes of an image file; decoding smaller ones costs less than handing them to a thread


class ImageSource:
    """A collection of images as a source: ``x1`` float32 (B, C, H, W) in [-1, 1], ``label`` int64 (B,) where known.

    A pixel p becomes ``p / 127.5 - 1``. Images are decoded to bytes once if they all fit ``cache_bytes``, and checked
    at that; otherwise each is decoded and checked when it is fetched.

    Args:
        collection: the undecoded images.
        size: side of the square that images are resized and cropped to; None keeps them, and they must be alike.
        channels: 1 (greyscale) or 3 (RGB); None takes those of the first image.
        cache_bytes: most memory for decoded images, in bytes.

    Attributes:
        name: what tables call the set.
        shape: (C, H, W).
        classes: names of the classes, or None.
        labels: int64 (N,), or None.

    Raises:
        ValueError: an image cannot be read, or has another size than the first (both are named).
    """

    def __init__(
        self, collection: Collection, size: int | None = None, channels: int | None = None, cache_bytes: int = 4 * _GIB
    ) -> None:
        self.name = collection.name
        self.classes = collection.classes
        self.labels = None if collection.labels is None else torch.tensor(collection.labels, dtype=torch.int64)
        self._kind = collection.kind
        self._count = len(collection.contents)
        self._contents = collection.contents
        self._size = size
        content = self._contents.read(0)
        self._threaded = len(content) >= _WORTH_A_THREAD
        first = decode(content, self._contents.name(0), size, channels)
        self.shape: tuple[int, int, int] = first.shape
        self._half = getattr(self._contents, "half", 127.5)
        self._cache: Tensor | None = None
        if isinstance(self._contents, PixelContents) and self._contents.pixels.shape[1:] == first.shape:
            self._cache = torch.from_numpy(np.ascontiguousarray(self._contents.pixels))
        elif len(self) * first.size <= cache_bytes:
            self._cache = self._decode(range(len(self)))
        if self._cache is not None:
            del self._contents  # the undecoded files are not needed any more

    def __len__(self) -> int:
        return self._count

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """Return the images at ``indices`` (int64 (B,)) as ``x1``, with their ``label`` where there is one."""
        pixels = self._decode(indices.tolist()) if self._cache is None else self._cache[indices]
        batch = {"x1": pixels.to(torch.float32).div_(self._half).sub_(1.0)}
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        return batch

    def describe(self) -> dict[str, Any]:
        """Return name, kind, count, shape, dtype, levels of a pixel, conditions and classes."""
        return {
            "name": self.name,
            "kind": self._kind,
            "count": len(self),
            "shape": list(self.shape),
            "dtype": "float32",
            "levels": round(2 * self._half) + 1,
            "conditions": {} if self.labels is None else {"label": {"shape": [], "dtype": "int64"}},
            "classes": self.classes,
        }

    def _decode(self, indices: Sequence[int]) -> Tensor:
        pixels = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, image in enumerate(self._decoded(indices)):
            pixels[row] = image
        return torch.from_numpy(pixels)

    def _decoded(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        if not self._threaded:
            yield from map(self._decode_one, indices)
            return
        # Decoders release the interpreter's lock, so threads use all cores.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(indices), _CHUNK):
                yield from pool.map(self._decode_one, indices[start : start + _CHUNK])

    def _decode_one(self, index: int) -> np.ndarray:
        name = self._contents.name(index)
        image = decode(self._contents.read(index), name, self._size, self.shape[0])
        if image.shape != self.shape:
            raise ValueError(
                f"images of mixed sizes: {self._contents.name(0)} is {_size(self.shape)}, {name} is "
                f"{_size(image.shape)} (width x height); give a size (--size N) to resize and crop them alike"
            )
        return image


def open_images(
    data: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    split: str = "train",
    cache_bytes: int = 4 * _GIB,
) -> ImageSource:
    """Open a set of images, whatever it is stored as.

    Args:
        data: one of

            - ``"digits"``: scikit-learn's 1797 digits of 8x8 pixels (greyscale, x = p / 8 - 1 for p of 0..16);
            - a folder of images (png, jpg, bmp, webp, tif), searched with all below it and sorted by path; where there
              are sub-folders, those of the first level are the classes, in sorted order. Sub-folders that are called
              train, test, ... are splits instead, with the classes below them;
            - a zip archive of the same;
            - CIFAR-10 in its python version: the folder ``cifar-10-batches-py`` or the tar.gz;
            - parquet: a file, or a folder of files; columns ``image`` (bytes, or records of bytes and path) and
              ``label``;
            - ``"hf:NAME"`` or ``"hf:NAME:SPLIT"``: a data set of the Hugging Face hub.
        size: resize the short side to this and cut out the centre square; needed where images differ in size.
        channels: 1 for greyscale, 3 for RGB; None takes those of the first image. Transparency is laid on white.
        split: which part, where the data come in parts; ``"train"`` is all of data that do not.
        cache_bytes: decoded images are kept in memory if they need no more than this.

    Returns:
        A source with ``x1`` (B, C, H, W) in [-1, 1] and, where there are classes, ``label``.

    Raises:
        FileNotFoundError: no such name or path.
        ImportError: parquet or the hub without the extra ``images``.
        ValueError: an option out of range, an unknown kind of file, no images, mixed sizes, or an unreadable file.
    """
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; give the side of the images in pixels, at least 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels is {channels}; give 1 (greyscale) or 3 (RGB)")
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes is {cache_bytes}; give 0 (nothing is kept) or more")
    return ImageSource(_collection(data, size, split), size, channels, cache_bytes)


def _collection(data: str | Path, size: int | None, split: str) -> Collection:
    if data == "digits":
        return digits(size, split)
    if isinstance(data, str) and data.startswith("hf:"):
        name, _, own = data.removeprefix("hf:").partition(":")
        if not name:
            raise ValueError(f"data {data!r} names no data set; give hf:NAME or hf:NAME:SPLIT")
        return hub(name, own or split)
    path = Path(data).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if not path.exists():
        raise FileNotFoundError(_unknown(str(data), path))
    name = path.name.lower()
    if name.endswith(".zip"):
        return image_zip(path, split)
    if name.endswith(".parquet"):
        return parquet(path, parquet_files(path, split))
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return cifar10(path, split)
    if name.endswith(SUFFIXES):
        raise ValueError(f"{path} is a single image; give the folder that it lies in")
    raise ValueError(f"{path} is a file of no known kind; data may be: {KINDS}")


def _folder(path: Path, split: str) -> Collection:
    if is_cifar10_folder(path):
        return cifar10(path, split)
    images = image_folder(path, split)
    if images is not None:
        return images
    files = parquet_files(path, split)
    if files:
        return parquet(path, files)
    raise ValueError(f"no images in {path}; files that end in {', '.join(SUFFIXES)} or .parquet are wanted")


def _unknown(data: str, path: Path) -> str:
    beside = [str(path.parent / entry.name) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = get_close_matches(data, ["digits", *beside], n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"no data {data!r}: neither a name nor a path that exists{hint} Data may be: {KINDS}"


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]}"
