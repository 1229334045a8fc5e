"""Pairs of real data and the noise they invert to, and mixtures of pairs (2405.20320, configuration G)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data import Source
from pantarhei.data.shards import ShardStore
from pantarhei.flow import Flow
from pantarhei.report.progress import Progress
from pantarhei.straighten.pairs import Solver, pair_header
from pantarhei.straighten.stores import PairSource, split_pairs


def invert_data(
    flow: Flow,
    data: Source,
    folder: str | Path,
    *,
    solver: Solver | None = None,
    teacher: str = "",
    batch: int = 256,
    shard_size: int = 1024,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> ShardStore:
    """Store real data with the source draws that the flow maps to them.

    Args:
        flow: the teacher.
        data: real data with the flow's conditions.
        folder: where the store is, or goes on: finished shards are kept.
        solver: method and steps; guidance is not inverted and must be 1.
        teacher, batch, shard_size, rank, world, progress: as in `make_pairs`.

    Raises:
        ValueError: for guidance, or an existing store made otherwise.
    """
    solver = solver or Solver()
    if solver.guidance != 1.0:
        raise ValueError(f"guidance: real data are inverted without guidance, got {solver.guidance:g}")
    header = {**pair_header(flow, solver, 0, teacher), "made": "inverted", "data": data.describe().get("name", "")}
    store = ShardStore.create(folder, len(data), header, shard_size=shard_size)
    options: dict[str, Any] = {k: v for k, v in solver.options().items() if k != "guidance"}
    done = 0
    with Progress(len(data), "inverting", "items", shown=progress and rank == 0) as shown:
        for shard in store.missing(rank, world):
            parts: list[dict[str, Tensor]] = []
            for rows in torch.tensor(list(store.items(shard))).split(batch):
                items = data.fetch(rows)
                named = {name: items[name] for name in flow.conditions}
                x1 = flow.encode(items["x1"].to(flow.device, flow.dtype))
                x0 = flow.invert(x1, condition=named or None, encode=False, **options)
                parts.append({"x0": x0.float().cpu(), "x1": x1.float().cpu(), **named})
                done += len(rows)
                shown.update(done)
            store.write(shard, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
    return store


class Mixture:
    """Two sources as one, the second repeated until it has a given share.

    Args:
        made, real: the sources.
        share: of the second in the whole, in (0, 1).
    """

    def __init__(self, made: Source, real: Source, share: float):
        if not 0 < share < 1:
            raise ValueError(f"share: must lie strictly between 0 and 1, got {share}")
        self._made, self._real, self.share = made, real, share
        self._extra = max(1, round(len(made) * share / (1 - share)))
        self.name = f"{made.name} with {100 * share:g} % of {real.name}"

    def __len__(self) -> int:
        return len(self._made) + self._extra

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The items at `indices` (B,)."""
        real = indices >= len(self._made)
        parts = []
        if bool((~real).any()):
            parts.append((~real, self._made.fetch(indices[~real])))
        if bool(real.any()):
            parts.append((real, self._real.fetch((indices[real] - len(self._made)) % len(self._real))))
        out: dict[str, Tensor] = {}
        for mask, part in parts:
            for name, value in part.items():
                out.setdefault(name, value.new_empty(len(indices), *value.shape[1:]))[mask] = value
        return out

    def describe(self) -> dict[str, Any]:
        """Name and count."""
        return {"name": self.name, "count": len(self)}


class MixedPairs(Mixture):
    """Two stores of pairs as one, the second repeated until it has a given share.

    Args:
        made: pairs that the flow made.
        real: pairs of real data.
        share: of the second in the whole, in (0, 1).

    Raises:
        ValueError: for another share.
    """

    def __init__(self, made: PairSource, real: PairSource, share: float = 0.5):
        super().__init__(made, real, share)
        self._stores = (made, real)
        self.folder = getattr(made, "folder", None)
        self.header: dict[str, Any] = {**made.header, "count": len(self), "real_share": share}

    def missing(self) -> list[int]:
        """Parts of either that are not there yet."""
        return [part for store in self._stores for part in store.missing()]

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first `limit` pairs, which are made ones."""
        return self.fetch(torch.arange(min(len(self), limit or len(self))))

    def split(self) -> tuple[Source, Source | None]:
        """The training parts of both mixed, and the held-out parts of both, none of which is trained on."""
        (made, made_apart), (real, real_apart) = (split_pairs(store) for store in self._stores)
        if made_apart is None or real_apart is None:
            return Mixture(made, real, self.share), made_apart or real_apart
        return Mixture(made, real, self.share), Mixture(made_apart, real_apart, self.share)

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}
