"""How sure is a figure: intervals by resampling the data, and the spread between seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pantarhei.metrics.checks import positive


class Interval(NamedTuple):
    """A value and the ends of its interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[..., float],
    *samples: Tensor,
    resamples: int = 200,
    level: float = 0.95,
    method: Literal["subsample", "percentile", "basic"] = "subsample",
    generator: torch.Generator | None = None,
) -> Interval:
    """A value on the full sets, and an interval of what other draws of the same sizes would give.

    Resampling *with* replacement ("percentile", "basic") suits means, accuracies and quantiles. It misleads for
    distances between sets: a resample has only 63 % distinct points, so a Frechet distance (bias of order 1/N) moves
    up, and measures of nearest neighbours meet duplicates at distance 0. The default, "subsample", draws halves
    *without* replacement and puts their scatter around their own mean onto the full value: a half of half the data
    scatters as much as a fresh set of the full size (variance sigma^2 (1 - m/N) / m at m = N/2), has no duplicates, and
    the bias of the smaller size is removed with the mean. (For a Frechet distance close to its floor, the value for
    equal laws, the interval is about 1.4 times too wide: it errs on the safe side.)

    No method removes the bias that the full value itself has.

    Args:
        statistic: takes as many tensors as there are `samples`, returns a number.
        *samples: sets with their examples along the first dimension, resampled independently of each other. What is
            to stay fixed (a reference set, paired rows) belongs into the statistic.
        resamples: number of resamples; the ends of a 95 % interval want at least 100.
        level: the share of resamples inside the interval, in (0, 1).
        method: "subsample" (above); "percentile": quantiles of the resampled values; "basic": the same reflected at
            the value, which corrects bias to first order.
        generator: source of the draws.

    Returns:
        `statistic(*samples)` and the ends. With "percentile" the value may lie outside them, which shows bias.

    Raises:
        TypeError: a sample is no tensor.
        ValueError: no samples, a sample with fewer than 4 rows, or options out of range.

    Source: Efron & Tibshirani 1993, chapter 13 (percentile), Davison & Hinkley 1997, equation 5.6 (basic), Politis,
    Romano & Wolf 1999, section 2 (subsampling).
    """
    positive("resamples", resamples)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if method not in ("subsample", "percentile", "basic"):
        raise ValueError(f'method must be "subsample", "percentile" or "basic", got {method!r}')
    _check_samples(samples)
    replace = method != "subsample"
    value = float(statistic(*samples))
    draws = [float(statistic(*(_resample(x, replace, generator) for x in samples))) for _ in range(resamples)]
    scatter = torch.tensor(draws, dtype=torch.float64)
    low, high = scatter.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    if method == "subsample":
        shift = value - float(scatter.mean())
        return Interval(value, low + shift, high + shift)
    if method == "basic":
        return Interval(value, 2 * value - high, 2 * value - low)
    return Interval(value, low, high)


def spread(values: Sequence[float]) -> Interval:
    """Median and range of a figure over seeds.

    Args:
        values: one value a seed.

    Returns:
        Median, smallest and largest value; the range is the honest statement for the three to five seeds one runs.

    Raises:
        ValueError: no values.
    """
    ordered = _as_vector(values).sort().values
    return Interval(float(ordered.quantile(0.5)), float(ordered[0]), float(ordered[-1]))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (divisor n - 1; 0 for one value) of a figure over seeds.

    Args:
        values: one value a seed.

    Returns:
        The mean and the standard deviation.

    Raises:
        ValueError: no values.
    """
    vector = _as_vector(values)
    return float(vector.mean()), float(vector.std()) if len(vector) > 1 else 0.0


def _as_vector(values: Sequence[float]) -> Tensor:
    if len(values) == 0:
        raise ValueError("values must hold at least one number, got none")
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def _check_samples(samples: tuple[Tensor, ...]) -> None:
    if not samples:
        raise ValueError("samples must hold at least one set, got none")
    for number, sample in enumerate(samples):
        if not isinstance(sample, Tensor):
            raise TypeError(f"samples[{number}] must be a tensor, got {type(sample).__name__}")
        if sample.ndim == 0 or sample.shape[0] < 4:
            raise ValueError(
                f"samples[{number}] must have at least 4 rows to resample, got shape {tuple(sample.shape)}"
            )


def _resample(x: Tensor, replace: bool, generator: torch.Generator | None) -> Tensor:
    n, device = x.shape[0], generator.device if generator is not None else torch.device("cpu")
    if replace:
        index = torch.randint(n, (n,), generator=generator, device=device)
    else:
        index = torch.randperm(n, generator=generator, device=device)[: n // 2]
    return x[index.to(x.device)]
