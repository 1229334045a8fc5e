"""Writing pairs as noise states and PNG samples: small finished parts, merged into the archives at the end."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pantarhei.data.shards import HEADER, ShardStore
from pantarhei.files import is_leftover, read_json, sync_folder, write_atomically
from pantarhei.flow import Flow
from pantarhei.straighten.noise_states import BIT_GENERATOR, checksum, noise_from_states, numbered_state
from pantarhei.straighten.state_files import LABELS, SAMPLES, STATES, pair_name

KIND = "states"  # what the header calls this kind of store
_CLIPPED = 0.1  # most that clipping may change samples by (root mean square): overshoot passes, other data do not
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of all entries: the same pairs give the same bytes


def check_storable(flow: Flow) -> None:
    """Refuse a flow whose pairs are not (Gaussian noise, image).

    Raises:
        ValueError: it starts from something else, makes latents or no images, or has conditions besides `label`.
    """
    instead = "take store='tensors'"
    if not getattr(flow.source, "gaussian", False):
        raise ValueError(f"store: states hold unit normal noise, this flow starts from something else; {instead}")
    if flow.codec is not None or flow.shape is None or len(flow.shape) != 3 or flow.shape[0] not in (1, 3):
        what = "latents of a codec" if flow.codec is not None else f"samples of shape {flow.shape}"
        raise ValueError(f"store: states go with images of 1 or 3 channels, this flow makes {what}; {instead}")
    others = [name for name in flow.conditions if name != "label"]
    if others:
        raise ValueError(f"store: states hold no condition but label, this flow has {', '.join(others)}; {instead}")


class StateParts:
    """A store of noise states and PNG samples in the making.

    Each part is one small zip in `parts/`, written whole or not at all, so a killed job goes on with the missing ones and
    several processes share them by number. Whoever finds all there merges them into the archives.

    Args:
        folder: one that `create` made.
    """

    def __init__(self, folder: str | Path):
        self._store = ShardStore(folder)
        self.folder, self.header = self._store.folder, self._store.header
        self.shards, self.items = self._store.shards, self._store.items

    @staticmethod
    def create(
        folder: str | Path, flow: Flow, count: int, header: Mapping[str, Any], stream: int, shard_size: int = 1024
    ) -> StateParts:
        """Start a store of `count` pairs of a flow, or go on with the one that is there if it was asked for the same.

        Args:
            folder: where.
            flow: the teacher.
            count: number of pairs.
            header: how they are made.
            stream: seed of the noise states.
            shard_size: pairs in a part.

        Raises:
            ValueError: the flow's pairs cannot be stored like this, or the folder holds others; nothing is changed.
        """
        check_storable(flow)
        folder, before = Path(folder), {}
        if (folder / HEADER).is_file():
            before = read_json(folder / HEADER)
        elif any((folder / name).exists() for name in (f"{SAMPLES}.zip", f"{STATES}.zip", SAMPLES, STATES)):
            raise ValueError(f"{folder} already holds pairs that were not made here; choose another folder")
        noise = checksum(noise_from_states([numbered_state(stream, 0)], flow.shape or ()))
        # The version that draws the noise may change on the way, as long as the noise does not.
        drawn = {name: before.get(name, new) for name, new in (("numpy", np.__version__), ("first_noise", noise))}
        wanted = {**header, "store": KIND, "bit_generator": BIT_GENERATOR, **drawn}
        ShardStore.create(folder, count, wanted, shard_size=shard_size)
        parts = StateParts(folder)
        parts.check_noise(noise)
        return parts

    def __len__(self) -> int:
        return len(self._store)

    @property
    def finished(self) -> bool:
        """Whether the archives are there; the states come last."""
        return (self.folder / f"{STATES}.zip").is_file()

    def check_noise(self, drawn: str) -> None:
        """Compare the first noise, as it is drawn here, with the one that the header tells of.

        Args:
            drawn: its `checksum`.

        Raises:
            ValueError: they differ.
        """
        if drawn != self.header["first_noise"]:
            raise ValueError(
                f"pairs: {self.folder} was begun with NumPy {self.header['numpy']}; this one, {np.__version__}, draws other "
                "noise from its states, or they were exchanged: install that version, or make the pairs anew"
            )

    def path(self, shard: int) -> Path:
        """File of a part."""
        return self.folder / "parts" / f"{shard:05d}.zip"

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Parts not written yet, of this rank's share."""
        if self.finished:
            return []
        return [shard for shard in range(rank, self.shards, world) if not self.path(shard).is_file()]

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a part.

        Args:
            shard: its number.
            tensors: `state` uint8 (B, 32), `x1` (B, C, H, W) and, of a flow with labels, `label` (B,).

        Raises:
            ValueError: for a wrong number of rows, NaN or infinity, or samples that are not in [-1, 1].
            OSError: the disk is full; what was written before is whole.
        """
        from PIL import Image

        numbers, x1 = self.items(shard), tensors["x1"]
        for name, value in tensors.items():
            if len(value) != len(numbers):
                raise ValueError(f"part {shard}: {name} needs {len(numbers)} rows, got {len(value)}")
        if not bool(x1.isfinite().all()):
            raise ValueError(f"part {shard}: x1 holds NaN or infinity; it was not written")
        clipped = float((x1 - x1.clamp(-1, 1)).square().mean().sqrt())
        if clipped > _CLIPPED:
            raise ValueError(
                f"part {shard}: x1 is not an image in [-1, 1], clipping changes it by {clipped:.2g} (root mean square); "
                "take store='tensors', or a better teacher"
            )
        # As the reference writes them: x 127.5 + 128, cut off, is rounding.
        pixels = (x1 * 127.5 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        states, labels = tensors["state"].numpy(), tensors.get("label")
        content, lines = io.BytesIO(), []
        with zipfile.ZipFile(content, "w") as archive:
            for row, number in enumerate(numbers):
                name, png = pair_name(number, len(self)), io.BytesIO()
                Image.fromarray(pixels[row, ..., 0] if x1.shape[1] == 1 else pixels[row]).save(png, "PNG")
                _add(archive, f"{SAMPLES}/{name}.png", png.getvalue())
                _add(archive, f"{STATES}/{name}.bin", states[row].tobytes())
                if labels is not None:
                    lines.append(f"{name}.png,{int(labels[row])}\n")
            if labels is not None:
                _add(archive, LABELS, "".join(lines).encode())
        write_atomically(self.path(shard), content.getvalue())

    def finish(self) -> bool:
        """Merge the parts into the archives if all are there and it is not done; whether the store is finished."""
        if self.finished and not self.path(0).parent.is_dir():
            return True
        if self.missing():
            return False
        try:
            with _alone(self.path(0).parent):
                for leftover in filter(is_leftover, self.folder.iterdir()):
                    leftover.unlink()
                if not self.finished:
                    self._merge()
        except FileNotFoundError:  # another process has just merged and removed them
            if not self.finished:
                raise
        shutil.rmtree(self.path(0).parent, ignore_errors=True)
        return True

    def _merge(self) -> None:
        targets = [self.folder / f"{name}.zip" for name in (SAMPLES, STATES)]
        temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in targets]
        labels = io.BytesIO()
        try:
            with ExitStack() as stack:
                files = [stack.enter_context(path.open("wb")) for path in temporary]
                archives = [stack.enter_context(zipfile.ZipFile(file, "w")) for file in files]
                for shard in range(self.shards):
                    self._copy(shard, archives, labels)
                for archive, file in zip(archives, files, strict=True):
                    archive.close()
                    file.flush()
                    os.fsync(file.fileno())
            if labels.getvalue():
                write_atomically(self.folder / LABELS, labels.getvalue())
            for path, target in zip(temporary, targets, strict=True):
                os.replace(path, target)
            sync_folder(self.folder)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)

    def _copy(self, shard: int, archives: list[zipfile.ZipFile], labels: io.BytesIO) -> None:
        path = self.path(shard)
        try:
            with zipfile.ZipFile(path) as part:
                for number in self.items(shard):
                    name = pair_name(number, len(self))
                    _add(archives[0], f"{name}.png", part.read(f"{SAMPLES}/{name}.png"))
                    _add(archives[1], f"{name}.bin", part.read(f"{STATES}/{name}.bin"))
                if LABELS in part.namelist():
                    labels.write(part.read(LABELS))
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process, so that a kill leaves none behind."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except ImportError:  # no such locks on Windows: then two may merge the same parts into the same archives
            pass
        yield
