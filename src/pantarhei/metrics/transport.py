"""Distances that need no kernel width and no Gaussian: (sliced) Wasserstein and energy distance."""

from __future__ import annotations

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_pair, positive
from pantarhei.metrics.distances import distance_blocks, own_distance_blocks

_PROJECTED = 2**23  # entries of the projected set that are sorted at once (64 MiB)


def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    p: float = 2,
    projections: int = 256,
    generator: torch.Generator | None = None,
) -> float:
    """The p-Wasserstein distance of one-dimensional projections, averaged over random directions.

    ``(mean over directions of W_p^p)^(1/p)``. Each W_p^p is the exact integral over quantiles of |F^-1 - G^-1|^p, also
    for sets of different size, where both quantile functions are steps.

    Args:
        a: (N, D).
        b: (M, D).
        p: the order, at least 1.
        projections: number of directions, drawn uniformly from the sphere.
        generator: source of the directions.

    Returns:
        The distance, at least 0. Between two Gaussians that differ in their mean by m it is |m| / sqrt(D) for p = 2.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, values that are not finite, or p below 1.

    Source: Bonneel et al. 2015 (doi:10.1007/s10851-014-0506-3), section 3.
    """
    a, b = as_pair(a, b, rows=1)
    _check_order(p)
    positive("projections", projections)
    device = generator.device if generator is not None else torch.device("cpu")
    directions = torch.randn(projections, a.shape[1], generator=generator, device=device, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=1).to(a.device)
    total = 0.0
    for some in directions.split(max(1, _PROJECTED // max(a.shape[0], b.shape[0]))):
        total += float(_line_cost(some @ a.T, some @ b.T, p).sum())
    return (total / projections) ** (1 / p)


def wasserstein(a: Tensor, b: Tensor, p: float = 2) -> float:
    """The exact p-Wasserstein distance of two small sets with equal weights, ground distance Euclidean.

    Time grows with the cube of the size: a few thousand points at most. Sets of different size need POT.

    Args:
        a: (N, D).
        b: (M, D).
        p: the order, at least 1.

    Returns:
        The distance, at least 0.

    Raises:
        ImportError: N and M differ and POT is not installed.
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, values that are not finite, or p below 1.
    """
    a, b = as_pair(a, b, rows=1)
    _check_order(p)
    # Without the product form: a set's distance to itself is then exactly 0.
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").pow(p).cpu().numpy()
    if a.shape[0] == b.shape[0]:
        from scipy.optimize import linear_sum_assignment

        rows, columns = linear_sum_assignment(cost)
        return float(cost[rows, columns].mean()) ** (1 / p)
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            f"a has {a.shape[0]} rows and b has {b.shape[0]}; the exact distance of sets of different size needs POT: "
            'pip install "pantarhei[ot]"'
        ) from error
    # Empty weights mean equal ones; the default of 100,000 pivots ends too early from about 1,000 points on.
    return max(0.0, float(ot.emd2([], [], cost, numItermax=10_000_000))) ** (1 / p)


def energy_distance(a: Tensor, b: Tensor, *, unbiased: bool = False) -> float:
    """The energy distance ``2 E|X - Y| - E|X - X'| - E|Y - Y'|`` (its square-root form is a metric).

    Args:
        a: (N, D).
        b: (M, D).
        unbiased: leave out the distances of points to themselves: the expectation is then the true distance (0 for
            equal laws, so the value may be negative). Otherwise the distance of the two point sets themselves, at
            least 0, and 0 for equal sets only.

    Returns:
        The distance, in the units of the features.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, values that are not finite, or one row where `unbiased` needs two.

    Source: Szekely & Rizzo 2013 (doi:10.1016/j.jspi.2013.03.018), equations 2.1 and 6.1.
    """
    a, b = as_pair(a, b, rows=2 if unbiased else 1)

    def within(x: Tensor) -> float:
        n = x.shape[0]
        total = sum(float(distances.sum()) for _, distances in own_distance_blocks(x, diagonal=0.0))
        return total / (n * (n - 1 if unbiased else n))

    between = sum(float(distances.sum()) for _, distances in distance_blocks(a, b)) / (a.shape[0] * b.shape[0])
    value = 2 * between - within(a) - within(b)
    return value if unbiased else max(0.0, value)


def _check_order(p: float) -> None:
    if not 1 <= p < float("inf"):
        raise ValueError(f"p must be a finite order of at least 1, got {p}")


def _line_cost(x: Tensor, y: Tensor, p: float) -> Tensor:
    """W_p^p of sets on the line, (P, N) and (P, M) -> (P,)."""
    x, y = x.sort(1).values, y.sort(1).values
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return (x - y).abs().pow(p).mean(1)
    # In units of 1/(n m) the steps of F^-1 end at multiples of m and those of G^-1 at multiples of n: whole numbers, so
    # that no rounding shifts a step.
    ends = torch.cat(
        [torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n]
    ).unique()
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).to(x.dtype) / (n * m)
    gaps = (x[:, (ends - 1) // m] - y[:, (ends - 1) // n]).abs()
    return gaps.pow(p) @ widths
