"""The Frechet distance between two feature sets, each described by the Gaussian with its mean and covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_features, double

Moments = tuple[Tensor, Tensor]


def moments(features: Tensor) -> Moments:
    """Mean and covariance of a feature set.

    Args:
        features: (N, D) with N >= 2.

    Returns:
        The mean (D,) and the covariance (D, D) with divisor N - 1, both float64.

    Raises:
        TypeError: `features` is no tensor.
        ValueError: wrong shape, fewer than two rows, or values that are not finite.
    """
    features = as_features("features", features)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (features.shape[0] - 1)


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """The squared 2-Wasserstein distance of the two Gaussians: FID, whatever the features are.

    ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``; the root of the symmetric product is taken from its
    eigenvalues, so it is real also for covariances without full rank (fewer rows than columns).

    The estimate is biased upward by about 1/N, so distances are comparable only between sets of equal size.

    Args:
        a: features (N, D), or their `moments`.
        b: features (M, D), or their `moments`.

    Returns:
        The distance, at least 0.

    Raises:
        TypeError: an argument is neither a tensor nor a pair of tensors.
        ValueError: wrong shapes, different widths, fewer than two rows, or values that are not finite.

    Source: Heusel et al. 2017 (arXiv:1706.08500), equation 6; Dowson & Landau 1982 for the closed form.
    """
    mean_a, covariance_a = _as_moments("a", a)
    mean_b, covariance_b = _as_moments("b", b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"a has {mean_a.shape[0]} columns and b has {mean_b.shape[0]}; "
            "both must come from the same feature extractor"
        )
    root = symmetric_root(covariance_a)
    product = root @ covariance_b @ root
    spectrum = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    shift = (mean_a - mean_b).square().sum()
    spread = covariance_a.trace() + covariance_b.trace() - 2 * spectrum.sqrt().sum()
    # Rounding may leave a tiny negative number for equal sets.
    return max(0.0, float(shift + spread))


def symmetric_root(matrix: Tensor) -> Tensor:
    """The positive semi-definite square root of a symmetric matrix; negative eigenvalues (rounding) count as 0.

    Args:
        matrix: (D, D), symmetric.

    Returns:
        (D, D), symmetric.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _as_moments(name: str, value: Tensor | Moments) -> Moments:
    if isinstance(value, Tensor):
        return moments(as_features(name, value))
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)):
        raise TypeError(f"{name} must be features (N, D) or the pair (mean, covariance), got {type(value).__name__}")
    mean, covariance = (double(part) for part in value)
    if mean.ndim != 1 or covariance.shape != (mean.shape[0], mean.shape[0]):
        raise ValueError(
            f"{name} must be a mean (D,) and a covariance (D, D), got {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(covariance).all()):
        raise ValueError(f"{name} has moments with NaN or infinite values; they must be finite")
    return mean, covariance
