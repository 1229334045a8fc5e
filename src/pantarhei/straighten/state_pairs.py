"""Pairs as rectified flow++ keeps them: noise as generator states, samples as PNG files; an eighth of float32 arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.shards import HEADER
from pantarhei.files import read_json
from pantarhei.straighten.noise_states import STATE_BYTES, checksum, noise_from_states
from pantarhei.straighten.state_files import (
    LABELS,
    SAMPLES,
    STATES,
    Entries,
    find_entries,
    pair_name,
    read_labels,
)
from pantarhei.straighten.state_parts import KIND, StateParts


def holds_states(folder: str | Path) -> bool:
    """Whether a folder holds noise states: ours (finished or not), or the layout of rectified flow++."""
    folder = Path(folder)
    if (folder / HEADER).is_file():
        return read_json(folder / HEADER).get("store") == KIND
    return any((folder / name).exists() for name in (f"{STATES}.zip", STATES))


class StatePairs:
    """Pairs of regenerated noise and decoded images: `x0`, `x1` float32 (B, C, H, W) and, where the csv is there, `label`.

    The folder holds `samples.zip` (PNG) and `z.zip` (32 bytes a pair, see `noise_from_states`), or folders `samples` and `z`
    of the same, and maybe `images_labels.csv`. Pixels p become (p / 255 - 0.5) / 0.5. A folder of `make_pairs(...,
    store="states")` has a header besides, which may be of a store still in the making; then pair i is the one of number i,
    else pairs are sorted by the names of their states.

    Rounding to 8 bits moves x1 by 5.1e-6 in mean square.

    Args:
        folder: where.

    Attributes:
        folder, name: where, and its last part.
        header: how the pairs were made; of foreign ones what is known.
        labels: int64 (N,) or None.

    Raises:
        FileNotFoundError: samples, states or the labels that the header speaks of are not there.
        ValueError: an archive is cut short, samples and states do not belong together, or this NumPy draws other noise
            from the states than the one that made them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = self.folder.name
        self.labels: Tensor | None = None
        self._parts: StateParts | None = None
        self._samples: Entries | None = None
        if (self.folder / HEADER).is_file():
            if not holds_states(self.folder):
                raise ValueError(f"{self.folder} holds another kind of store; open it with open_pairs")
            self._parts = StateParts(self.folder)
            self.header: dict[str, Any] = self._parts.header
            self._shape: tuple[int, ...] = tuple(self.header["flow"]["shape"])
            if self._parts.finished:
                self._open()
        else:
            self._open()

    def __len__(self) -> int:
        return int(self.header["count"])

    def missing(self) -> list[int]:
        """Parts that are not there yet; all of them while they wait to be merged."""
        if self._parts is None or self._parts.finished:
            return []
        return self._parts.missing() or list(range(self._parts.shards))

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The pairs at `indices` (B,).

        Raises:
            ValueError: the store is not finished, or a file is damaged or of another size than the others.
        """
        self._need()
        assert self._samples is not None
        rows = indices.tolist()
        numbers = self._state_rows[indices.numpy()].tolist()
        names = [f"{self._states.root}/{self._states.names[k]}" for k in numbers]
        x0 = noise_from_states([self._states.read(k) for k in numbers], self._shape, names)
        channels, height, width = self._shape
        pixels = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        for row, number in enumerate(self._sample_rows[indices.numpy()].tolist()):
            pixels[row] = self._image(number)
        x1 = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        batch = {"x0": x0, "x1": x1.div_(255).sub_(0.5).div_(0.5)}
        if self.labels is not None:
            batch["label"] = self.labels[indices]
        return batch

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first `limit` pairs."""
        return self.fetch(torch.arange(min(len(self), limit or len(self))))

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}

    def _need(self) -> None:
        """Open a store that was in the making when this object was built."""
        if self._samples is None:
            if self.missing():
                raise ValueError(f"{self.folder}: {len(self.missing())} parts are missing; finish the store first")
            self._open()

    def _open(self) -> None:
        states = find_entries(self.folder, STATES, ".bin", STATE_BYTES)
        samples = find_entries(self.folder, SAMPLES, ".png")
        count = len(self) if self._parts is not None else len(states.names)
        if self._parts is None:
            names = sorted(name.removesuffix(".bin") for name in states.names)
        else:
            names = [pair_name(number, count) for number in range(count)]
        self._states = states
        self._state_rows = _rows(names, states, ".bin", samples.root)
        self._sample_rows = _rows(names, samples, ".png", states.root)
        labelled = (self.folder / LABELS).is_file()
        if self._parts is not None and "label" in self.header["conditions"] and not labelled:
            raise FileNotFoundError(f"pairs: {self.folder} has no {LABELS}, but its pairs have labels")
        if labelled:
            self.labels = read_labels(self.folder / LABELS, [f"{name}.png" for name in names])
        if self._parts is None:
            self._shape = _shape(samples, int(self._sample_rows[0]))
            self.header = {
                "kind": "pairs",
                "count": count,
                "guidance": 1.0,
                "conditions": ["label"] if labelled else [],
                "teacher": "",
                "flow": {"shape": list(self._shape), "source": {"name": "normal"}},
            }
        # The first noise must come out as it did when the pairs were made.
        first = int(self._state_rows[0])
        noise = noise_from_states([states.read(first)], self._shape, [f"{states.root}/{states.names[first]}"])
        if self._parts is not None:
            self._parts.check_noise(checksum(noise))
        self._samples = samples

    def _image(self, number: int) -> np.ndarray:
        assert self._samples is not None
        pixels = _decoded(self._samples, number, self._shape[0])
        if pixels.shape[:2] != self._shape[1:]:
            name = f"{self._samples.root}/{self._samples.names[number]}"
            got, want = (f"{w}x{h}" for h, w in (pixels.shape[:2], self._shape[1:]))
            raise ValueError(f"pairs: {name} has {got} pixels, expected {want} (width x height)")
        return pixels


def _rows(names: Sequence[str], entries: Entries, suffix: str, other: Path) -> np.ndarray:
    """Where the pairs of these names are among the entries, which must be of these pairs and no others."""
    where = {name: row for row, name in enumerate(entries.names)}
    lacking = [name for name in names if f"{name}{suffix}" not in where]
    if lacking:
        raise ValueError(
            f"pairs: {entries.root} lacks {len(lacking)} of {len(names)} files (first: {lacking[0]}{suffix}); "
            f"it does not belong to {other}, or is incomplete"
        )
    if len(where) != len(names):
        raise ValueError(
            f"pairs: {entries.root} holds {len(where)} {suffix} files for {len(names)} pairs; it does not belong to {other}"
        )
    return np.array([where[f"{name}{suffix}"] for name in names], dtype=np.int64)


def _shape(samples: Entries, number: int) -> tuple[int, ...]:
    pixels = _decoded(samples, number, None)
    return (pixels.shape[2], *pixels.shape[:2])


def _decoded(samples: Entries, number: int, channels: int | None) -> np.ndarray:
    """Pixels uint8 (H, W, C), C being 1 for grey and 3 for colour."""
    from PIL import Image

    content = samples.read(number)
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=("PNG",))
        grey = image.mode in ("1", "L") if channels is None else channels == 1
        mode = "L" if grey else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        pixels = np.asarray(image)
    except Exception as error:  # decoders of damaged files raise whatever they stumble over
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {samples.root}/{samples.names[number]}: {reason}") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels
