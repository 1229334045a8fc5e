"""How figures are written, in one place: terminals, files and pages show the same digits."""

from __future__ import annotations

import math
from typing import Any

from pantarhei.metrics import Interval

DIGITS = 3
_NOTHING = "–"


def format_number(value: float, digits: int = DIGITS) -> str:
    """Write a number.

    Args:
        value: whole numbers are written in full (1,797); others with `digits` significant digits, from 1000 on rounded
            to a whole number, and with an exponent below 0.001 and from a million on.
        digits: significant digits.

    Returns:
        The text: "0.860", "12.3", "4,567", "1.20e-05", "nan".
    """
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{_decimals(size, digits)}f}"


def format_interval(interval: Interval) -> str:
    """Write a value with its interval, such as "0.86 [0.80, 0.93]".

    The interval's width decides how many decimals are meant: two of its digits, but never more than three significant
    digits of the largest number.

    Args:
        interval: value and ends.

    Returns:
        The text; the value alone where the interval has no width.
    """
    width, size = interval.high - interval.low, max(abs(number) for number in interval)
    if not (math.isfinite(width) and math.isfinite(size)) or size == 0 or size < 1e-3 or size >= 1e6:
        value, low, high = (format_number(float(number)) for number in interval)
    else:
        decimals = _decimals(size, DIGITS) if width <= 0 else min(_decimals(width, 2), _decimals(size, DIGITS))
        value, low, high = (f"{number:,.{decimals}f}" for number in interval)
    return value if width == 0 else f"{value} [{low}, {high}]"


def format_cell(value: Any) -> str:
    """Write whatever stands in a table.

    Args:
        value: a number, an `Interval`, a bool ("yes" or "no"), None (a dash), a 0-d tensor or NumPy scalar, or anything
            with a `str`.

    Returns:
        The text.
    """
    if value is None:
        return _NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Interval):
        return format_interval(value)
    if not isinstance(value, str | int | float) and hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return format_cell(value.item())
    return format_number(value) if isinstance(value, int | float) else str(value)


def is_numeric(value: Any) -> bool:
    """Whether a cell holds a figure, which tables put to the right.

    Args:
        value: as for `format_cell`.

    Returns:
        True for numbers, intervals and scalar tensors.
    """
    scalar = not isinstance(value, str) and hasattr(value, "item") and getattr(value, "ndim", 0) == 0
    return (isinstance(value, int | float | Interval) and not isinstance(value, bool)) or scalar


def _decimals(size: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of a number after rounding: 9.996 has two, not three (10.00)."""
    if size == 0:
        return digits - 1
    exponent = int(f"{size:.{digits - 1}e}".split("e")[1])
    return max(0, digits - 1 - exponent)
