"""Doubling and halving images with a small separable filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Resample(nn.Module):
    """Doubles or halves height and width with an even, symmetric filter, channel by channel.

    The filter (1, 1) repeats pixels, or takes the mean of 2 x 2; (1, 3, 3, 1) is the usual anti-aliasing one (Karras et al.
    1912.04958). It sums to one in both directions, so that a constant image stays as it is away from the border, beyond
    which there are zeros.

    Args:
        direction: "up" or "down".
        taps: the filter along one axis.

    Raises:
        ValueError: the filter is not symmetric with an even number of taps.
    """

    kernel: Tensor

    def __init__(self, direction: str, taps: Sequence[float] = (1, 1)):
        super().__init__()
        check_taps(taps)
        self.up = direction == "up"
        self.box = len(taps) == 2
        self.margin = len(taps) // 2 - 1
        line = torch.tensor(taps, dtype=torch.float32) / sum(taps)
        # Doubling spreads a pixel over four.
        self.register_buffer("kernel", torch.outer(line, line) * (4.0 if self.up else 1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W), or (B, C, H/2, W/2) for even H and W."""
        if self.box:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, kernel, stride=2, padding=self.margin, groups=channels)
        return F.conv2d(x, kernel, stride=2, padding=self.margin, groups=channels)

    def convolved(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """A 3x3 convolution (zero padding 1) of the doubled image, (B, C, H, W) to (B, C', 2H, 2W).

        Where pixels are repeated, each output pixel sees only 2 x 2 different ones: the convolution is a transposed one of
        4 x 4 with summed weights, at four ninths of the multiplications.
        """
        if not (self.up and self.box):
            return conv(self(x))
        weight = _repeated(_repeated(conv.weight, 2), 3).transpose(0, 1)
        return F.conv_transpose2d(x, weight, conv.bias, stride=2, padding=1)


def _repeated(weight: Tensor, axis: int) -> Tensor:
    """Three taps over repeated pixels as the four taps of a transposed convolution of stride 2."""
    a, b, c = weight.unbind(axis)
    return torch.stack([c, b + c, a + b, a], dim=axis)


def check_taps(taps: Sequence[float]) -> None:
    """Refuse a filter that is not symmetric with an even number of taps.

    Raises:
        ValueError: it is not.
    """
    if len(taps) < 2 or len(taps) % 2 or list(taps) != list(reversed(taps)) or not sum(taps) > 0:
        raise ValueError(f"filter: an even, symmetric row of taps such as (1, 1) or (1, 3, 3, 1) is needed, got {taps}")
