"""Image files in a folder or in a zip archive."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pantarhei.images.collection import SPLITS, Collection, no_split, number_labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class FolderContents:
    """Image files under a folder, by their paths relative to it."""

    root: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.paths[index])

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""
        return (self.root / self.paths[index]).read_bytes()


class ZipContents:
    """Image files in a zip archive, by their paths in it."""

    def __init__(self, archive: Path, paths: Sequence[str]) -> None:
        self.archive = archive
        self.paths = tuple(paths)
        self._handle: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the archive and the path in it."""
        return f"{self.archive}/{self.paths[index]}"

    def read(self, index: int) -> bytes:
        """Return the content of an image file."""
        # A forked process shares the file position of its parent, so each process opens the archive for itself.
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = (os.getpid(), zipfile.ZipFile(self.archive))
        try:
            return self._handle[1].read(self.paths[index])
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: it has a password
            raise ValueError(f"cannot read image {self.name(index)}: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}


def image_folder(root: Path, split: str) -> Collection | None:
    """Find the images under ``root``, sorted by path; None if there is none. See `_arrange` for classes and splits."""
    found = sorted(path for path in _walk(root) if _is_image(path))
    if not found:
        return None
    paths, labels, classes = _arrange(found, "", split, str(root))
    return Collection(root.resolve().name, "folder", FolderContents(root, tuple(paths)), labels, classes)


def image_zip(archive: Path, split: str) -> Collection:
    """Find the images in a zip archive like those of a folder; one folder around everything is passed over.

    Raises:
        ValueError: the file is no zip archive, or has no images.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            found = sorted(path for path in opened.namelist() if _is_image(path))
    except zipfile.BadZipFile:
        raise ValueError(f"{archive} is not a zip archive, or is cut short") from None
    if not found:
        raise ValueError(f"no images in {archive}; files that end in {', '.join(SUFFIXES)} are wanted")
    tops = {path.split("/")[0] for path in found}
    wrapped = len(tops) == 1 and "/" in found[0] and not tops <= set(SPLITS)
    paths, labels, classes = _arrange(found, f"{tops.pop()}/" if wrapped else "", split, str(archive))
    return Collection(archive.stem, "zip", ZipContents(archive, paths), labels, classes)


def _arrange(
    paths: list[str], prefix: str, split: str, where: str
) -> tuple[list[str], list[int] | None, list[str] | None]:
    # What lies below the prefix is either one folder a split (train/, test/, ...: the asked one is entered), or one
    # folder a class, or images without classes.
    tops = {path[len(prefix) :].split("/")[0] for path in paths}
    if tops <= set(SPLITS):
        if split not in tops:
            raise no_split(where, split, list(tops))
        prefix = f"{prefix}{split}/"
        paths = [path for path in paths if path.startswith(prefix)]
    elif split != "train":
        raise no_split(where, split, [])
    inner = [path[len(prefix) :].split("/") for path in paths]
    loose = [path for path, parts in zip(paths, inner, strict=True) if len(parts) == 1]
    if len(loose) == len(paths):
        return paths, None, None
    if loose:
        raise ValueError(
            f"{len(loose)} of {len(paths)} images in {where} lie beside the class folders (first: {loose[0]}); "
            "move them into a class folder, or all images into one folder"
        )
    return paths, *number_labels([parts[0] for parts in inner], where)


def _is_image(path: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))
    return path.lower().endswith(SUFFIXES) and not hidden


def _walk(root: Path) -> Iterator[str]:
    # Class folders are often links; a link that leads back up is entered once.
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        for file in files:
            yield (Path(folder) / file).relative_to(root).as_posix()
