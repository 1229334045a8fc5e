"""Series of states in time: pairs of a present and a later one, splits by trajectory, files, and small sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.items import first_bad_item
from pantarhei.data.seeds import generator as seeded
from pantarhei.data.simulations import double_well, kolmogorov_flow
from pantarhei.data.sources import TensorSource
from pantarhei.files import read_tensors


def series_pairs(series: Tensor, lag: int = 1) -> dict[str, Tensor]:
    """Every state of a series beside the one `lag` saved steps later.

    Args:
        series: (trajectories, steps, ...).
        lag: how far ahead, in 1..steps - 1.

    Returns:
        ``past`` and ``x1``, both (trajectories * (steps - lag), ...), one trajectory after the other.

    Raises:
        TypeError: ``series`` is no floating tensor.
        ValueError: it has fewer than three axes, is too short for ``lag``, or holds values that are not finite.
    """
    _check_series(series, "series")
    if isinstance(lag, bool) or not isinstance(lag, int) or not 1 <= lag < series.shape[1]:
        raise ValueError(f"lag is {lag!r}; a series of {series.shape[1]} states has lags 1..{series.shape[1] - 1}")
    return {"past": series[:, :-lag].flatten(0, 1), "x1": series[:, lag:].flatten(0, 1)}


def split_series(
    series: Tensor, held_out: float = 0.2, seed: int = 0, *, lag: int = 1, name: str = "series"
) -> tuple[TensorSource, TensorSource]:
    """Pairs to train on and pairs to test on, from different trajectories: neighbours in time are nearly copies.

    Args:
        series: (trajectories, steps, ...), at least two trajectories.
        held_out: fraction of the trajectories to hold out, in (0, 1); at least one is held out and one kept.
        seed: picks them.
        lag: as in `series_pairs`.
        name: what tables call the set.

    Returns:
        ``(train, held_out)``, sources whose batches are ``past`` and ``x1``.

    Raises:
        TypeError: as in `series_pairs`.
        ValueError: as in `series_pairs`, or ``held_out`` lies outside (0, 1), or there is one trajectory only.
    """
    parts = zip(split_trajectories(series, held_out, seed), ("train", "held-out"), strict=True)
    train, rest = (TensorSource(series_pairs(rows, lag), f"{name}/{part}") for rows, part in parts)
    return train, rest


def split_trajectories(series: Tensor, held_out: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Trajectories to train on and trajectories to test on.

    Raises:
        TypeError, ValueError: as `split_series`.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is {held_out}; give the fraction of trajectories to hold out, between 0 and 1")
    _check_series(series, "series")
    count = len(series)
    if count < 2:
        raise ValueError(
            "series has 1 trajectory; a split needs two (cut a long one: series.unflatten(1, (parts, -1))[0])"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = count - min(max(round(held_out * count), 1), count - 1)
    return series[order[:kept].sort().values], series[order[kept:].sort().values]


def read_series(path: str | Path) -> Tensor:
    """Read series from a .npy file, or from the entry `series` (or the only one) of a .safetensors file.

    Returns:
        (trajectories, steps, ...), float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, truncated, holds objects, has too few axes or states, or its numbers are not
            finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        tensors = read_tensors(path)
        if "series" not in tensors and len(tensors) != 1:
            raise ValueError(f"{path} holds {sorted(tensors)}; 'series' (trajectories, steps, ...) is missing")
        found = tensors["series"] if "series" in tensors else next(iter(tensors.values()))
    elif path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
            found = torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
        except (ValueError, TypeError, AttributeError, EOFError, OSError) as error:
            raise ValueError(f"{path}: expected an array of numbers (trajectories, steps, ...): {error}") from None
    else:
        raise ValueError(f"{path} is no series: give a .npy or .safetensors file")
    if found.is_complex():
        raise ValueError(f"{path} holds complex numbers; give their real and imaginary parts as components")
    found = found.float()
    _check_series(found, str(path))
    return found


SERIES: dict[str, Callable[[int], Tensor]] = {
    "double_well": lambda seed: double_well(512, 40, generator=seeded(seed, 71)),
    "kolmogorov": lambda seed: kolmogorov_flow(64, 40, generator=seeded(seed, 72)),
}
"""Small data sets by name: seed -> (trajectories, steps, ...), float32."""


def _check_series(series: Tensor, where: str) -> None:
    if not isinstance(series, Tensor) or not series.is_floating_point():
        got = series.dtype if isinstance(series, Tensor) else type(series).__name__
        raise TypeError(f"{where} must be a tensor of floats (trajectories, steps, ...), got {got}")
    if series.ndim < 3 or series.shape[1] < 2 or series.numel() == 0:
        raise ValueError(
            f"{where} has shape {tuple(series.shape)}; give (trajectories, steps, ...) with at least 2 steps "
            "(one number a state: (trajectories, steps, 1))"
        )
    bad = first_bad_item(series)
    if bad is not None:
        raise ValueError(f"{where} holds NaN or infinity in {bad[0]} of {len(series)} trajectories (first: {bad[1]})")
