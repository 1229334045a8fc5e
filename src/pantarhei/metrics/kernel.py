"""The kernel distance (KID): squared maximum mean discrepancy under a polynomial kernel, without bias."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_pair, positive


class KernelDistance(NamedTuple):
    """A kernel distance: the mean over subsets and the standard deviation between them."""

    mean: float
    std: float


def kernel_distance(
    a: Tensor,
    b: Tensor,
    *,
    degree: int = 3,
    subset_size: int = 1000,
    subsets: int = 100,
    generator: torch.Generator | None = None,
) -> KernelDistance:
    """Unbiased squared MMD with the kernel ``(x.y / D + 1)^degree``, averaged over random subsets.

    Unlike the Frechet distance its expectation does not depend on the sizes of the sets; it may be negative when they
    are alike.

    Args:
        a: features (N, D).
        b: features (M, D).
        degree: degree of the polynomial kernel; it tells sets apart whose first `degree` moments differ.
        subset_size: rows drawn from each set (without replacement) for one subset; never more than the smaller set has.
        subsets: number of subsets. When a subset is the whole of both sets there is one, and the deviation is 0.
        generator: source of the draws.

    Returns:
        Mean over the subsets, and standard deviation between them (divisor `subsets`).

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, fewer than two rows, values that are not finite, or a size below 2 (1 for `subsets`).

    Source: Binkowski et al. 2018 (arXiv:1801.01401), section 4; Gretton et al. 2012, lemma 6 for the estimator.
    """
    a, b = as_pair(a, b)
    positive("degree", degree)
    positive("subsets", subsets)
    if subset_size < 2:
        raise ValueError(f"subset_size must be at least 2, got {subset_size}")
    size = min(subset_size, a.shape[0], b.shape[0])
    if size == a.shape[0] == b.shape[0]:
        return KernelDistance(float(squared_mmd(a, b, degree=degree)), 0.0)
    values = torch.stack(
        [squared_mmd(_draw(a, size, generator), _draw(b, size, generator), degree=degree).cpu() for _ in range(subsets)]
    )
    return KernelDistance(float(values.mean()), float(values.std(correction=0)))


def squared_mmd(a: Tensor, b: Tensor, *, degree: int = 3) -> Tensor:
    """The U-statistic of the squared MMD under the kernel ``(x.y / D + 1)^degree``.

    Args:
        a: (N, D), N >= 2.
        b: (M, D), M >= 2.
        degree: degree of the kernel.

    Returns:
        0-d; its expectation is 0 when both sets have one law.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** degree

    def within(x: Tensor) -> Tensor:
        # A point is not compared with itself: that is what removes the bias.
        n, values = x.shape[0], kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (n * (n - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def _draw(x: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return x[torch.randperm(x.shape[0], generator=generator, device=device)[:size].to(x.device)]
