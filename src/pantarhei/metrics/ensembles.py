"""Proper scores of ensemble forecasts, and whether an ensemble's spread is honest.

An ensemble is `members` (M, N, ...): M equally likely forecasts of each of N cases; `truth` (N, ...) is what happened.
All arithmetic is in float64, a block of cases at a time, so memory stays bounded whatever the size of the ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pantarhei.metrics.checks import double, positive

_BLOCK = 2**22  # entries of an ensemble that are worked on at once (32 MiB)


def energy_score(members: Tensor, truth: Tensor, *, fair: bool = True) -> Tensor:
    """The energy score ``E|X - y| - E|X - X'| / 2`` of every case, with the plain Euclidean norm; smaller is better.

    Strictly proper: on average only the true law of the state scores best. It sees how components depend on each other,
    which `crps` does not.

    Args:
        members: (M, N, ...), M >= 1. One member is a deterministic forecast, whose score is the Euclidean error.
        truth: (N, ...).
        fair: average |X - X'| over pairs of different members: the score then has the same expectation for every M,
            that of the law from which the members come. Otherwise over all M^2 pairs: the score of the M points
            themselves as a law, which favours large ensembles.

    Returns:
        (N,) float64.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: shapes do not fit, there is no member, case or component, or a value is not finite.

    Source: Gneiting & Raftery 2007 (doi:10.1198/016214506000001437), equation 22; fair scores: Ferro 2014
    (doi:10.1002/qj.2270).
    """
    _check(members, truth)
    pairs = _pairs(len(members), fair)
    scores = []
    for error in _errors(members, truth):
        x = error.transpose(0, 1).contiguous()
        # Without the product form, whose rounding would be a distance between equal members.
        between = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2))
        scores.append(error.norm(dim=2).mean(0) - between / (2 * pairs))
    return torch.cat(scores)


def crps(members: Tensor, truth: Tensor, *, fair: bool = True) -> Tensor:
    """The continuous ranked probability score ``E|X - y| - E|X - X'| / 2``, averaged over the components of a case.

    Each component is scored by itself; smaller is better. Time grows as M log M.

    Args:
        members: (M, N, ...), M >= 1. One member is a deterministic forecast, whose score is the mean absolute error.
        truth: (N, ...).
        fair: as in `energy_score`.

    Returns:
        (N,) float64.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: shapes do not fit, there is no member, case or component, or a value is not finite.

    Source: Gneiting & Raftery 2007 (doi:10.1198/016214506000001437), equation 21; fair scores: Ferro 2014
    (doi:10.1002/qj.2270).
    """
    _check(members, truth)
    count = len(members)
    pairs = _pairs(count, fair)
    # In the sum of x_(j) - x_(i) over i < j, the k-th smallest (from 0) is added k times and taken off count - 1 - k times.
    weights = torch.arange(1 - count, count, 2, dtype=torch.float64)
    scores = []
    for error in _errors(members, truth):
        ordered = error.permute(1, 2, 0).contiguous().sort(dim=2).values  # sorting along the last axis is much faster
        between = ordered @ weights.to(error.device)
        scores.append((error.abs().mean(0) - between / pairs).mean(1))
    return torch.cat(scores)


def rank_histogram(
    members: Tensor, truth: Tensor, bins: int | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """How often the truth takes each rank among the members, over all cases and components.

    Flat where truth and members come from one law; a valley means too little spread, a hill too much, a slope a bias.

    Args:
        members: (M, N, ...), M >= 1.
        truth: (N, ...).
        bins: number of bins; M + 1, one a rank, if left out. Where it does not divide M + 1, a rank that spans several
            bins falls into one of them at random, so that the histogram of an honest ensemble is still flat.
        generator: breaks ties between the truth and members (and draws the bins as above).

    Returns:
        Counts, int64 (bins,), from "below all members" to "above all members"; they add up to N times the number of
        components.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: shapes do not fit, a value is not finite, or ``bins`` is below 1.

    Source: Hamill 2001 (doi:10.1175/1520-0493(2001)129<0550:IORHFV>2.0.CO;2).
    """
    _check(members, truth)
    ranks = len(members) + 1
    bins = ranks if bins is None else positive("bins", bins)
    counts = torch.zeros(bins, dtype=torch.int64)
    for error in _errors(members, truth):
        below, ties = (error < 0).sum(0), (error == 0).sum(0)
        # Among t equal members the truth stands at any of t + 1 places; the minimum guards u * (t + 1) against rounding.
        rank = below + torch.minimum((_uniform(ties, generator) * (ties + 1)).long(), ties)
        if ranks % bins == 0:
            place = rank // (ranks // bins)
        else:
            place = ((rank + _uniform(ties, generator)) * (bins / ranks)).long().clamp(max=bins - 1)
        counts += torch.bincount(place.flatten(), minlength=bins).cpu()
    return counts


def spread_skill(members: Tensor, truth: Tensor) -> float:
    """The ensemble's spread over the error of its mean: 1 for an honest ensemble, below 1 for one too sure of itself.

    ``sqrt((M + 1) / M * mean variance) / root mean square error``, both means over cases and components, the variance
    with divisor M - 1: the mean of M members errs by itself with 1 / M of the variance, which the first factor allows
    for.

    Args:
        members: (M, N, ...), M >= 2.
        truth: (N, ...).

    Returns:
        The ratio; infinity where the mean has no error, NaN where there is no spread either.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: shapes do not fit, there is only one member, or a value is not finite.

    Source: Fortin et al. 2014 (doi:10.1175/JHM-D-14-0008.1).
    """
    _check(members, truth)
    count = len(members)
    if count < 2:
        raise ValueError("members holds 1 forecast a case; the spread needs at least 2")
    spread = square = 0.0
    for error in _errors(members, truth):
        spread += float(error.var(0).sum())
        square += float(error.mean(0).square().sum())
    if square == 0:
        return math.inf if spread > 0 else math.nan
    return math.sqrt((count + 1) / count * spread / square)


def _check(members: Tensor, truth: Tensor) -> None:
    for name, value in (("members", members), ("truth", truth)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.is_complex():
            raise TypeError(f"{name} must hold real numbers, got {value.dtype}; torch.view_as_real gives two each")
    if members.ndim < 2 or members.shape[1:] != truth.shape:
        raise ValueError(
            f"members must have shape (M, N, ...) and truth (N, ...), got {tuple(members.shape)} and "
            f"{tuple(truth.shape)}; a single forecast (N, ...) becomes an ensemble by [None]"
        )
    if members.numel() == 0:
        raise ValueError(f"members has shape {tuple(members.shape)}; at least one member, case and component is needed")
    if members.device != truth.device:
        raise ValueError(f"members is on {members.device} and truth on {truth.device}; move them to one device")
    for name, value, axis in (("members", members, 1), ("truth", truth, 0)):
        finite = torch.cat([torch.isfinite(part).flatten(1).all(1) for part in _blocks(value.movedim(axis, 0))])
        bad = int((~finite).sum())
        if bad:
            raise ValueError(f"{name} has NaN or infinite values in {bad} of {len(finite)} cases; all must be finite")


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """Rows of (N, ...) by the block; (n, K) each."""
    rows = max(1, _BLOCK // max(1, values[0].numel()))
    for part in values.split(rows):
        yield part.reshape(len(part), -1)


def _errors(members: Tensor, truth: Tensor) -> Iterator[Tensor]:
    """X - y by the block of cases: (M, n, D) float64. Differences and norms do not feel the shift, rounding does."""
    rows = max(1, _BLOCK // members[:, 0].numel())
    for x, y in zip(members.split(rows, dim=1), truth.split(rows), strict=True):
        n = len(y)
        yield double(x).reshape(len(members), n, -1) - double(y).reshape(n, -1)


def _pairs(count: int, fair: bool) -> int:
    # One member has no pair: its own distance, 0, leaves the absolute error.
    return count * (count - 1) if fair and count > 1 else count * count


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, device=device, dtype=torch.float64).to(like.device)
