"""Fidelity and diversity apart: do samples lie where real data lie, and do they reach all of it.

All four measures put a ball around each point, as wide as the distance to its k-th neighbour in its own set, and count
which points of the other set fall into the balls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_pair, positive
from pantarhei.metrics.distances import distance_blocks, kth_neighbour_distances


class PrecisionRecall(NamedTuple):
    """Share of samples inside the real manifold, and share of real data inside the samples' manifold."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """How densely real neighbourhoods hold samples (1 for equal laws; may exceed 1), and the share of them that do."""

    density: float
    coverage: float


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall.

    Args:
        real: features of real data, (N, D) with N > k.
        fake: features of samples, (M, D) with M > k.
        k: which neighbour sets a ball's radius.

    Returns:
        Precision: share of samples in the ball of at least one real point. Recall: the same with the sets exchanged.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, at most `k` rows, or values that are not finite.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991), equations 1 and 2.
    """
    real, fake = as_pair(real, fake, names=("real", "fake"), rows=positive("k", k) + 1)
    radius_real, radius_fake = kth_neighbour_distances(real, k), kth_neighbour_distances(fake, k)
    in_real = in_fake = 0
    covered = torch.zeros(fake.shape[0], dtype=torch.bool, device=fake.device)
    for rows, distances in distance_blocks(real, fake):
        covered |= (distances <= radius_real[rows, None]).any(0)
        in_fake += int((distances <= radius_fake).any(1).sum())
    in_real = int(covered.sum())
    return PrecisionRecall(in_real / fake.shape[0], in_fake / real.shape[0])


def density_coverage(real: Tensor, fake: Tensor, k: int = 5) -> DensityCoverage:
    """Density and coverage: like precision and recall, but robust against outliers and only with balls of real data.

    Args:
        real: features of real data, (N, D) with N > k.
        fake: features of samples, (M, D) with M >= 1.
        k: which neighbour sets a ball's radius. Two sets of one law have density 1 and, for N = M large,
            coverage 1 - 2^-k (0.97 for 5) in expectation.

    Returns:
        Density: mean over the samples of the number of real balls around it, divided by k. Coverage: share of real
        balls with a sample inside.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, too few rows, or values that are not finite.

    Source: Naeem et al. 2020 (arXiv:2002.09797), equations 3 and 4.
    """
    real, fake = as_pair(real, fake, names=("real", "fake"), rows=(positive("k", k) + 1, 1))
    radius = kth_neighbour_distances(real, k)
    hits = covered = 0
    for rows, distances in distance_blocks(real, fake):
        inside = distances < radius[rows, None]
        hits += int(inside.sum())
        covered += int(inside.any(1).sum())
    return DensityCoverage(hits / (k * fake.shape[0]), covered / real.shape[0])
