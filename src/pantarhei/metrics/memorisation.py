"""Does a model copy its training set: nearest training neighbours of samples, against those of held-out data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_pair, double, positive
from pantarhei.metrics.distances import BLOCK, distance_blocks


@dataclass(frozen=True)
class MemorisationReport:
    """Distances to the nearest training example, of samples and of held-out data.

    Attributes:
        samples_low: 1st percentile over the samples.
        samples_median: median over the samples.
        held_out_low: 1st percentile over the held-out data.
        held_out_median: median over the held-out data.
        closer: share of samples nearer to a training example than `held_out_low`; about 0.01 for fresh draws.
        copies: whether the samples' 1st percentile lies below that of the held-out data.
    """

    samples_low: float
    samples_median: float
    held_out_low: float
    held_out_median: float
    closer: float
    copies: bool


def nearest_neighbours(queries: Tensor, reference: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest points of a reference set, by Euclidean distance, in blocks of bounded memory.

    Args:
        queries: (N, D), or anything (N, ...) that is flattened to that, such as images.
        reference: (M, D) or (M, ...), M >= k.
        k: number of neighbours.

    Returns:
        Distances (N, k), float64, ascending, and indices into `reference` (N, k), int64.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that do not fit, fewer than `k` reference points, or values that are not finite.
    """
    queries, reference = _flat_pair(queries, reference, ("queries", "reference"), positive("k", k))
    found = [distances.topk(k, largest=False).indices for _, distances in distance_blocks(queries, reference)]
    index = torch.cat(found)
    # Search may run by matrix products, which leave 1e-8 where a copy has 0: measure the few that were found exactly.
    step = max(1, BLOCK // (k * reference.shape[1]))
    parts = zip(queries.split(step), index.split(step), strict=True)
    distance = torch.cat([torch.linalg.vector_norm(some[:, None] - reference[near], dim=2) for some, near in parts])
    distance, order = distance.sort(1)
    return distance, index.gather(1, order)


def memorisation_report(samples: Tensor, train: Tensor, held_out: Tensor) -> MemorisationReport:
    """Compare how near samples come to the training set with how near data come that the model never saw.

    In pixels it finds copies up to noise; in features of an extractor also shifted or recoloured ones. The 1st
    percentile of a few hundred examples rests on a handful of them: read `closer` beside `copies`.

    Args:
        samples: (N, ...).
        train: the training set, (M, ...).
        held_out: data of the same law that were not trained on, (K, ...).

    Returns:
        Percentiles of the distances and the verdict.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes that do not fit, empty sets, or values that are not finite.
    """
    _flat_pair(samples, train, ("samples", "train"), 1)
    _flat_pair(held_out, train, ("held_out", "train"), 1)
    of_samples = nearest_neighbours(samples, train)[0].squeeze(1)
    of_held_out = nearest_neighbours(held_out, train)[0].squeeze(1)
    at = torch.tensor([0.01, 0.5], dtype=torch.float64, device=of_samples.device)
    samples_low, samples_median = of_samples.quantile(at).tolist()
    held_out_low, held_out_median = of_held_out.quantile(at).tolist()
    return MemorisationReport(
        samples_low=samples_low,
        samples_median=samples_median,
        held_out_low=held_out_low,
        held_out_median=held_out_median,
        closer=float(double(of_samples < held_out_low).mean()),
        copies=samples_low < held_out_low,
    )


def _flat_pair(a: Tensor, b: Tensor, names: tuple[str, str], rows: int) -> tuple[Tensor, Tensor]:
    for name, value in zip(names, (a, b), strict=True):
        if isinstance(value, Tensor) and value.ndim < 2:
            raise ValueError(f"{name} must have shape (N, D) or (N, ...), got {tuple(value.shape)}")
    flat_a, flat_b = (value.flatten(1) if isinstance(value, Tensor) else value for value in (a, b))
    return as_pair(flat_a, flat_b, names=names, rows=(1, rows))
