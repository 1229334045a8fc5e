"""What every measure asks of its feature sets: checked once, where they enter, and turned into float64."""

from __future__ import annotations

import torch
from torch import Tensor


def double(x: Tensor) -> Tensor:
    """`x` in float64 on its own device, or on the CPU where the device (Apple's MPS) has no float64."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def as_features(name: str, value: Tensor, rows: int = 2) -> Tensor:
    """Check one feature set and return it in float64.

    Args:
        name: the argument's name, for messages.
        value: features, (N, D).
        rows: the fewest rows that the measure can work with.

    Returns:
        (N, D) float64.

    Raises:
        TypeError: it is no tensor.
        ValueError: not two-dimensional, too few rows, no columns, or not finite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of features (N, D), got {type(value).__name__}")
    if value.ndim != 2 or value.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(value.shape)}; flatten images with .flatten(1)")
    if value.shape[0] < rows:
        raise ValueError(f"{name} has {value.shape[0]} row(s), this measure needs at least {rows}")
    value = double(value)
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).any(1).sum())
        raise ValueError(
            f"{name} has NaN or infinite values in {bad} of {value.shape[0]} rows; features must be finite"
        )
    return value


def as_pair(
    a: Tensor, b: Tensor, *, names: tuple[str, str] = ("a", "b"), rows: int | tuple[int, int] = 2
) -> tuple[Tensor, Tensor]:
    """Check two feature sets that are to be compared: each by itself, then that width and device agree.

    Args:
        a: features, (N, D).
        b: features, (M, D).
        names: the arguments' names, for messages.
        rows: the fewest rows of either, or of each.

    Returns:
        Both in float64.

    Raises:
        TypeError: one is no tensor.
        ValueError: one is malformed, or widths or devices differ.
    """
    rows_a, rows_b = (rows, rows) if isinstance(rows, int) else rows
    a, b = as_features(names[0], a, rows_a), as_features(names[1], b, rows_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} has {a.shape[1]} columns and {names[1]} has {b.shape[1]}; "
            "both must come from the same feature extractor"
        )
    if a.device != b.device:
        raise ValueError(f"{names[0]} is on {a.device} and {names[1]} on {b.device}; move them to one device")
    return a, b


def positive(name: str, value: int) -> int:
    """Return `value` if it is an integer of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value
