"""Numbered small files in a zip archive or a folder, read at random by many threads and processes.

The layout is that of rectified flow++: `samples.zip` with `<index:05d>.png` (in a folder `<index // 60000>` where there are
more than 60,000), `z.zip` with `.bin` files of the same names, and `images_labels.csv` with lines `name.png,label`.
"""

from __future__ import annotations

import csv
import mmap
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

SAMPLES, STATES, LABELS = "samples", "z", "images_labels.csv"
_PER_FOLDER = 60_000
_LABEL = re.compile("[0-9]{1,18}")  # what int64 holds; isdigit() would take superscripts
_LARGEST = 1 << 26  # bytes of a file by default: as much as 4096 x 4096 pixels take that nothing compresses
_LOCAL_HEADER = 30  # bytes before the name in front of each entry of a zip archive


def pair_name(number: int, count: int) -> str:
    """Name of pair `number` of `count`, without suffix."""
    return f"{number // _PER_FOLDER}/{number:05d}" if count > _PER_FOLDER else f"{number:05d}"


class Entries(Protocol):
    """Files by number."""

    root: Path
    names: list[str]

    def read(self, number: int) -> bytes:
        """The content of a file."""
        ...


class FolderEntries:
    """The files of one suffix in a folder and all below it, of which `most` bytes are expected at most."""

    def __init__(self, root: Path, suffix: str, most: int = _LARGEST):
        self.root, self._most = root, most
        self.names = sorted(p.relative_to(root).as_posix() for p in root.rglob(f"*{suffix}") if p.is_file())

    def read(self, number: int) -> bytes:
        """The content of a file."""
        path = self.root / self.names[number]
        with path.open("rb") as file:
            content = file.read(self._most + 1)
        if len(content) > self._most:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; expected at most {self._most}")
        return content


class ZipEntries:
    """The entries of one suffix in a zip archive, stored or deflated.

    The archive is mapped into memory: there is no file position that threads or forked processes could fight over, and
    after the first access a read costs no system call. An entry may not unpack to more than `most` bytes.

    Raises:
        ValueError: the file is no zip archive, is cut short, or is encrypted; on `read`: an entry is damaged.
    """

    def __init__(self, root: Path, suffix: str, most: int = _LARGEST):
        self.root, self._most = root, most
        try:
            with zipfile.ZipFile(root) as opened:
                found = [entry for entry in opened.infolist() if entry.filename.endswith(suffix)]
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError):  # as the damage may be
            raise ValueError(f"{root} is not a zip archive, or is cut short") from None
        for entry in found:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{root}/{entry.filename} is encrypted or compressed in an unusual way; pack it anew")
        self.names = [entry.filename for entry in found]
        columns = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in found]
        if any(max(column) >= 1 << 63 for column in columns):
            raise ValueError(f"{root} is no zip archive that any writer made: an entry lies beyond all files")
        self._table = np.array(columns, dtype=np.int64).reshape(-1, 5)  # far smaller than the objects
        self._map: mmap.mmap | None = None

    def read(self, number: int) -> bytes:
        """The content of an entry."""
        if self._map is None:
            with self.root.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offset, size, whole, method, crc = self._table[number].tolist()
        if whole > self._most:
            raise ValueError(f"{self.root}/{self.names[number]} has {whole} bytes; expected at most {self._most}")
        try:
            name, extra = struct.unpack_from("<HH", self._map, offset + _LOCAL_HEADER - 4)
            start = offset + _LOCAL_HEADER + name + extra
            content = self._map[start : start + size]
            if method == zipfile.ZIP_DEFLATED:
                # No further than the directory says: a thousand times as much may be packed.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, whole + 1)
        except (struct.error, zlib.error) as error:
            raise ValueError(f"cannot read {self.root}/{self.names[number]}: {error}") from None
        if len(content) != whole or zlib.crc32(content) != crc:
            raise ValueError(f"cannot read {self.root}/{self.names[number]}: wrong size or checksum, it is damaged")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}


def find_entries(folder: Path, stem: str, suffix: str, most: int = _LARGEST) -> Entries:
    """The archive or folder `stem`, of whose files none may have more than `most` bytes.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it has no file of this suffix, or is no zip archive.
    """
    archive, plain = folder / f"{stem}.zip", folder / stem
    if not archive.is_file() and not plain.is_dir():
        raise FileNotFoundError(f"pairs: {folder} has no {stem}.zip and no folder {stem}")
    found: Entries = ZipEntries(archive, suffix, most) if archive.is_file() else FolderEntries(plain, suffix, most)
    if not found.names:
        raise ValueError(f"pairs: {found.root} holds no {suffix} files")
    return found


def read_labels(path: Path, names: list[str]) -> Tensor:
    """The labels of images from `name.png,label` lines, int64 (N,), in the order of `names`.

    Raises:
        ValueError: a line is of another form, or an image has no label.
    """
    found: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row or (number == 1 and len(row) == 2 and not row[0].strip().endswith(".png")):
                    continue  # an empty line, or a line of headings
                if len(row) != 2 or not _LABEL.fullmatch(row[1].strip()):
                    raise ValueError(f"{path}, line {number}: expected name.png,label, got {','.join(row)[:80]!r}")
                found[row[0].strip().removeprefix(f"{SAMPLES}/")] = int(row[1])
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table of name.png,label ({error})") from None
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} has no label for {len(missing)} of {len(names)} images (first: {missing[0]})")
    return torch.tensor([found[name] for name in names], dtype=torch.int64)
