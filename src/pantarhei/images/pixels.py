"""Between pixels (bytes, 0..255) and the values that flows move (floats, -1..1)."""

from __future__ import annotations

import torch
from torch import Tensor


def from_uint8(pixels: Tensor) -> Tensor:
    """Return ``pixels / 127.5 - 1``: 0 becomes -1, 255 becomes 1.

    Args:
        pixels: uint8 of any shape.

    Returns:
        float32 of the same shape, on the same device.

    Raises:
        TypeError: ``pixels`` is not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels have dtype {str(pixels.dtype).removeprefix('torch.')}; give uint8")
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(values: Tensor) -> Tensor:
    """Return the nearest pixels: ``floor(127.5 (x + 1) + 1/2)`` (halves round up), cut to 0..255.

    It undoes `from_uint8` exactly. Values beyond [-1, 1] are cut; NaN becomes 0.

    Args:
        values: floating tensor of any shape; half precisions are computed in float32.

    Returns:
        uint8 of the same shape, on the same device.

    Raises:
        TypeError: ``values`` is not floating.
    """
    if not values.is_floating_point():
        raise TypeError(f"values have dtype {str(values.dtype).removeprefix('torch.')}; give floats in [-1, 1]")
    wide = values if values.dtype == torch.float64 else values.to(torch.float32)
    scaled = torch.floor((wide + 1.0) * 127.5 + 0.5).clamp(0.0, 255.0)
    return torch.nan_to_num(scaled, nan=0.0).to(torch.uint8)
