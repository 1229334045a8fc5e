"""One sharded store on disk for everything made in bulk: pairs, features, latents, simulations.

A store is a folder with `header.json` (what was asked for; it never changes) and shards `00000.safetensors`, ... of a
fixed number of items. Each shard is written whole or not at all, so a killed job goes on with the missing shards, and
several processes share the work by shard number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.files import read_json, read_tensors, write_json, write_tensors

HEADER = "header.json"


class ShardStore:
    """A folder of shards; also a data `Source` over its items.

    Use `ShardStore.create` to write and `ShardStore(folder)` to read.

    Attributes:
        header: what `create` was given, with `count` and `shard_size`.
    """

    def __init__(self, folder: str | Path, *, cache_shards: int = 64):
        self.folder = Path(folder)
        if not (self.folder / HEADER).is_file():
            raise FileNotFoundError(f"{self.folder} is not a shard store: it has no {HEADER}")
        self.header: dict[str, Any] = read_json(self.folder / HEADER)
        if not {"count", "shard_size"} <= self.header.keys():
            raise ValueError(f"{self.folder / HEADER} has no count or shard_size: not the header of a shard store")
        self.name = str(self.header.get("name", self.folder.name))
        self._cache: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._cache_shards = cache_shards

    @staticmethod
    def create(folder: str | Path, count: int, header: Mapping[str, Any], *, shard_size: int = 1024) -> ShardStore:
        """Start a store of `count` items, or go on with the one that is there if it was asked for the same.

        Raises:
            ValueError: for count or shard_size < 1, or an existing store with another header (nothing is changed).
        """
        if count < 1 or shard_size < 1:
            raise ValueError(f"count and shard_size must be at least 1, got {count} and {shard_size}")
        folder = Path(folder)
        wanted = {**header, "count": count, "shard_size": shard_size}
        if (folder / HEADER).is_file():
            store = ShardStore(folder)
            old = store.header
            changed = [
                _change(k, old, wanted) for k in sorted(wanted.keys() | old.keys()) if wanted.get(k) != old.get(k)
            ]
            if changed:
                raise ValueError(
                    f"{folder} already holds a store made with another {', '.join(changed)}; choose another folder "
                    "or delete it"
                )
            return store
        write_json(folder / HEADER, wanted)
        return ShardStore(folder)

    def __len__(self) -> int:
        return int(self.header["count"])

    @property
    def shards(self) -> int:
        """Number of shards of the finished store."""
        return -(-len(self) // int(self.header["shard_size"]))

    def items(self, shard: int) -> range:
        """The item numbers of a shard."""
        size = int(self.header["shard_size"])
        return range(shard * size, min((shard + 1) * size, len(self)))

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"{shard:05d}.safetensors"

    def missing(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards not written yet, of this rank's share."""
        return [i for i in range(rank, self.shards, world) if not self.path(i).is_file()]

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard.

        Raises:
            ValueError: for a wrong number of rows, or NaN or infinity in them.
            OSError: the disk is full; what was written before is whole.
        """
        rows = len(self.items(shard))
        for name, value in tensors.items():
            if len(value) != rows:
                raise ValueError(f"shard {shard}: {name} needs {rows} rows, got {len(value)}")
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"shard {shard}: {name} holds NaN or infinity; it was not written")
        write_tensors(self.path(shard), tensors)

    def read(self, shard: int) -> dict[str, Tensor]:
        """A shard's tensors (cached)."""
        if shard not in self._cache:
            if not self.path(shard).is_file():
                raise ValueError(f"{self.folder}: shard {shard} of {self.shards} is missing; finish the store first")
            self._cache[shard] = read_tensors(self.path(shard))
            while len(self._cache) > self._cache_shards:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard)
        return self._cache[shard]

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The items at `indices` (B,) as one batch."""
        size = int(self.header["shard_size"])
        which = indices // size
        out: dict[str, Tensor] = {}
        for shard in which.unique().tolist():
            rows = (which == shard).nonzero()[:, 0]
            for name, value in self.read(shard).items():
                if name not in out:
                    out[name] = value.new_empty(len(indices), *value.shape[1:])
                out[name][rows] = value[indices[rows] - shard * size]
        return out

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """All items (or the first `limit`) in memory."""
        return self.fetch(torch.arange(min(len(self), limit or len(self))))


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """A changed entry, with both values where they are short."""
    values = [old.get(key), new.get(key)]
    plain = all(value is None or isinstance(value, (int, float, str)) for value in values)
    return f"{key} ({values[0]}, now {values[1]})" if plain else key
