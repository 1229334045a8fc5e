"""Euclidean distances between two sets, a block of rows at a time, so that 50,000 x 50,000 fits into memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Entries of one block: 2^25 float64 are 256 MiB.
BLOCK = 2**25
# Up to this width differences are taken exactly; above it |x|^2 + |y|^2 - 2 x.y, a matrix product, is much faster.
_EXACT_WIDTH = 32


def distance_blocks(a: Tensor, b: Tensor, *, block: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Walk over the distance matrix of two sets by blocks of rows.

    Args:
        a: (N, D), float64.
        b: (M, D), float64.
        block: the most entries of one block.

    Yields:
        The slice of rows of `a`, and its distances to all of `b`, (rows, M).
    """
    exact = a.shape[1] <= _EXACT_WIDTH
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist"
    if not exact:
        # The product form cancels: its error grows with the distance to the origin, so the origin moves into the data.
        centre = b.mean(0)
        a, b = a - centre, b - centre
    step = max(1, block // b.shape[0])
    for start in range(0, a.shape[0], step):
        rows = slice(start, min(start + step, a.shape[0]))
        yield rows, torch.cdist(a[rows], b, compute_mode=mode)


def own_distance_blocks(a: Tensor, *, block: int = BLOCK, diagonal: float) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of a set's distances to itself, with the distance of each point to itself replaced.

    Args:
        a: (N, D), float64.
        block: the most entries of one block.
        diagonal: what stands for the distance of a point to itself: 0 in sums, infinity in neighbour searches.

    Yields:
        As `distance_blocks`.
    """
    for rows, distances in distance_blocks(a, a, block=block):
        distances.diagonal(rows.start).fill_(diagonal)
        yield rows, distances


def kth_neighbour_distances(a: Tensor, k: int, *, block: int = BLOCK) -> Tensor:
    """The distance of each point of a set to its k-th nearest other point.

    Args:
        a: (N, D), float64, N > k.
        k: 1 for the nearest.
        block: the most entries of one block.

    Returns:
        (N,).
    """
    blocks = own_distance_blocks(a, block=block, diagonal=float("inf"))
    # topk, since kthvalue takes ten times as long on the CPU.
    return torch.cat([distances.topk(k, dim=1, largest=False).values[:, -1] for _, distances in blocks])
