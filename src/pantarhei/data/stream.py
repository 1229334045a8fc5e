"""An endless, shuffled stream of batches whose order is a function of (seed, number) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pantarhei.data.seeds import generator
from pantarhei.data.sources import Source

Batch = dict[str, Tensor]
Augment = Callable[[Batch, torch.Generator], Batch]


class Stream:
    """Batches `start`, `start + 1`, ... of a source, each epoch in a new order, without end.

    Batch n holds the positions [n B, (n + 1) B) of the endless row of shuffled epochs, rank r its r-th share, so any
    number of ranks sees the same global batches, and a resumed run needs no state but the number of the next batch.

    Args:
        source: where items come from.
        batch: global batch size B.
        seed: of the order and of the augmentations.
        rank, world: which share of each batch.
        start: number of the first batch.
        augment: `(batch, generator) -> batch`, applied to this rank's share.
        workers: processes that fetch ahead; 0 fetches here.

    Raises:
        ValueError: for a batch that is not divisible by the number of ranks.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        augment: Augment | None = None,
        workers: int = 0,
    ):
        if batch < 1 or batch % world:
            raise ValueError(f"batch: must be a positive multiple of the number of processes, {world}; got {batch}")
        self.source, self.batch, self.seed = source, batch, seed
        self.rank, self.world, self.start = rank, world, start
        self.augment, self.workers = augment, workers
        self._epochs: dict[int, Tensor] = {}

    def indices(self, number: int) -> Tensor:
        """The items of this rank's share of batch `number`."""
        share = self.batch // self.world
        first = number * self.batch + self.rank * share
        size = len(self.source)
        parts = []
        while share > 0:
            epoch, offset = divmod(first, size)
            part = self._order(epoch)[offset : offset + share]
            parts.append(part)
            first, share = first + len(part), share - len(part)
        return torch.cat(parts)

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self._fetched(), self.start):
            if self.augment is not None:
                batch = self.augment(batch, generator(self.seed, number, self.rank, 1))
            yield batch

    def _numbered(self) -> Iterator[Tensor]:
        number = self.start
        while True:
            yield self.indices(number)
            number += 1

    def _fetched(self) -> Iterator[Batch]:
        if self.workers == 0:
            yield from map(self.source.fetch, self._numbered())
            return
        # A "sample" of this loader is a whole batch; its own generator leaves the global random state alone.
        yield from DataLoader(
            _Fetching(self.source),  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Endless(self._numbered),
            num_workers=self.workers,
            generator=generator(self.seed, self.rank, 2),
        )

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            order = torch.randperm(len(self.source), generator=generator(self.seed, epoch, 0))
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1} | {epoch: order}
        return self._epochs[epoch]


class _Fetching:
    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, indices: Tensor) -> Batch:
        return self.source.fetch(indices)


class _Endless:
    def __init__(self, make: Callable[[], Iterator[Tensor]]):
        self.make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self.make()
