"""CIFAR-10 as its authors publish it: Python pickles of 10,000 images each (Krizhevsky 2009)."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pantarhei.data.pickles import restricted_load
from pantarhei.images.collection import Collection, PixelContents, no_split, number_labels

FOLDER = "cifar-10-batches-py"
_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_META = "batches.meta"


def is_cifar10_folder(folder: Path) -> bool:
    """Whether a folder holds (or is) the unpacked archive."""
    return any(
        (place / name).is_file() for place in (folder, folder / FOLDER) for name in ("data_batch_1", "test_batch")
    )


def cifar10(path: Path, split: str) -> Collection:
    """Read the training or the test images.

    Args:
        path: the folder ``cifar-10-batches-py``, the folder around it, or ``cifar-10-python.tar.gz``.
        split: ``"train"`` or ``"test"``.

    Raises:
        FileNotFoundError: one of the batches is missing.
        ValueError: another split, a damaged file, or a pickle that holds something else.
    """
    if split not in _FILES:
        raise no_split(str(path), split, list(_FILES))
    wanted = _FILES[split]
    files = _from_folder(path, wanted) if path.is_dir() else _from_archive(path, wanted)
    missing = [name for name in wanted if name not in files]
    if missing:
        raise FileNotFoundError(f"{path} lacks {', '.join(missing)} of CIFAR-10 (python version)")
    batches = [_batch(files[name], f"{path}: {name}") for name in wanted]
    names = _class_names(files, f"{path}: {_META}")
    labels, classes = number_labels([label for _, part in batches for label in part], str(path), names)
    pixels = np.concatenate([part for part, _ in batches])
    return Collection("cifar10", "cifar10", PixelContents(pixels, f"{path} ({split})"), labels, classes)


def _from_folder(path: Path, wanted: list[str]) -> dict[str, bytes]:
    inside = path / FOLDER if (path / FOLDER).is_dir() else path
    return {name: (inside / name).read_bytes() for name in (*wanted, _META) if (inside / name).is_file()}


def _from_archive(path: Path, wanted: list[str]) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = member.name.split("/")[-1]
                stream = archive.extractfile(member) if name in (*wanted, _META) else None
                if stream is not None:
                    files[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = str(error).split("\n")[0].rstrip(":")
        raise ValueError(f"cannot read {path}: not a tar archive, or cut short ({reason})") from None
    return files


def _batch(content: bytes, where: str) -> tuple[np.ndarray, list[Any]]:
    loaded = restricted_load(content, name=where)
    data = loaded.get("data") if isinstance(loaded, dict) else None
    labels = loaded.get("labels") if isinstance(loaded, dict) else None
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{where} is no CIFAR-10 batch: 'data' should be uint8 of shape (N, 3072)")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise ValueError(f"{where} is no CIFAR-10 batch: 'labels' should be a list of {len(data)} integers")
    return data.reshape(-1, 3, 32, 32), labels


def _class_names(files: dict[str, bytes], where: str) -> list[str] | None:
    if _META not in files:
        return None
    loaded = restricted_load(files[_META], name=where)
    names = loaded.get("label_names") if isinstance(loaded, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else None
