"""All set measures at once, as an evaluation table wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_pair
from pantarhei.metrics.frechet import frechet_distance
from pantarhei.metrics.intervals import Interval, bootstrap
from pantarhei.metrics.kernel import KernelDistance, kernel_distance
from pantarhei.metrics.manifold import density_coverage, precision_recall


@dataclass(frozen=True)
class SetScores:
    """How samples compare with real data, all in the features of one extractor.

    Attributes:
        frechet: Frechet distance with its interval (the value thrice where no interval was asked for).
        kernel: kernel distance, mean and deviation over subsets.
        precision: share of samples inside the real manifold.
        recall: share of real data inside the samples' manifold.
        density: density of samples in real neighbourhoods, 1 for equal laws.
        coverage: share of real neighbourhoods that hold a sample.
        real: number of real examples.
        fake: number of samples.
    """

    frechet: Interval
    kernel: KernelDistance
    precision: float
    recall: float
    density: float
    coverage: float
    real: int
    fake: int


def evaluate_sets(
    real: Tensor,
    fake: Tensor,
    *,
    resamples: int = 0,
    level: float = 0.95,
    generator: torch.Generator | None = None,
) -> SetScores:
    """Frechet and kernel distance, precision and recall, density and coverage of samples against real data.

    Args:
        real: features of real data, (N, D) with N >= 6.
        fake: features of samples from the same extractor, (M, D) with M >= 4.
        resamples: resamples for the interval of the Frechet distance; 0 for none. Only the samples are resampled: the
            interval says what other samples of the same model would give.
        level: the interval's level.
        generator: source of the draws.

    Returns:
        The scores.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, too few rows, or values that are not finite.
    """
    as_pair(real, fake, names=("real", "fake"), rows=(6, 4))
    if resamples:
        frechet = bootstrap(
            lambda some: frechet_distance(real, some), fake, resamples=resamples, level=level, generator=generator
        )
    else:
        value = frechet_distance(real, fake)
        frechet = Interval(value, value, value)
    precision, recall = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    return SetScores(
        frechet=frechet,
        kernel=kernel_distance(real, fake, generator=generator),
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        real=real.shape[0],
        fake=fake.shape[0],
    )
