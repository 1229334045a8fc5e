"""Held-out splits that are the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from pantarhei.data.sources import Source, Subset

_CHUNK = 512


def split(source: Source, held_out: float = 0.2, seed: int = 0) -> tuple[Subset, Subset]:
    """Split a source into a training part and a held-out part.

    The split depends on the labels, ``held_out`` and ``seed`` only. Where items carry an integer ``label``, every class
    gives its share: the held-out count of a class differs from ``held_out`` times its size by less than one item.

    Args:
        source: what to split, at least two items.
        held_out: fraction of the items to hold out, in (0, 1).
        seed: picks one of the possible splits.

    Returns:
        ``(train, held_out)``, both non-empty and disjoint, together the whole source, each in the source's order.

    Raises:
        ValueError: ``held_out`` lies outside (0, 1), or the source has fewer than two items.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is {held_out}; give the fraction of items to hold out, between 0 and 1")
    count = len(source)
    if count < 2:
        raise ValueError(f"source {source.name!r} has {count} item; a split needs at least two")
    labels = labels_of(source)
    generator = torch.Generator().manual_seed(seed)
    total = min(max(round(held_out * count), 1), count - 1)
    if labels is None:
        labels = torch.zeros(count, dtype=torch.int64)
    classes, order = labels.sort(stable=True)
    groups = order.split(classes.unique_consecutive(return_counts=True)[1].tolist())
    sizes = _shares([len(group) for group in groups], held_out, total)
    mask = torch.zeros(count, dtype=torch.bool)
    for group, size in zip(groups, sizes, strict=True):
        mask[group[torch.randperm(len(group), generator=generator)[:size]]] = True
    train, rest = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
    return Subset(source, train, f"{source.name}/train"), Subset(source, rest, f"{source.name}/held-out")


def labels_of(source: Source) -> Tensor | None:
    """Return the integer labels of all items, int64 (N,), or None where items carry none.

    A source that keeps them in ``labels`` is asked; otherwise every item is fetched once.
    """
    labels = getattr(source, "labels", None)
    if labels is None:
        first = source.fetch(torch.zeros(1, dtype=torch.int64)).get("label")
        if first is None or not _countable(first):
            return None
        parts = torch.arange(len(source)).split(_CHUNK)
        labels = torch.cat([source.fetch(part)["label"] for part in parts])
    return labels if _countable(labels) else None


def _countable(labels: Tensor) -> bool:
    return labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()


def _shares(sizes: list[int], fraction: float, total: int) -> list[int]:
    # Largest remainders: every class gets the whole part of its share; what is then missing to the total goes to the
    # classes that lost most by rounding down (the earlier class first where two lost the same).
    exact = [size * fraction for size in sizes]
    shares = [int(value) for value in exact]
    order = sorted(range(len(sizes)), key=lambda k: (shares[k] - exact[k], k))
    for k in order[: total - sum(shares)]:
        shares[k] += 1
    return shares
