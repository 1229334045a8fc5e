"""Discriminators: real data or samples? Small ones of our own, and heads on somebody's frozen features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


def make_discriminator(shape: Sequence[int], width: int = 64) -> nn.Module:
    """The small discriminator for samples of a shape: images (C, H, W), or points (D,).

    Raises:
        ValueError: another shape.
    """
    if len(shape) == 3:
        return ConvDiscriminator(shape[0], width)
    if len(shape) == 1:
        return PointDiscriminator(shape[0], 2 * width)
    raise ValueError(f"shape: there are discriminators for images (C, H, W) and points (D,), not for {tuple(shape)}")


class ConvDiscriminator(nn.Module):
    """Spectrally normed convolutions, halving the side until it is 4 or less; one logit a remaining position.

    `forward(x)`: images (B, C, H, W) of at least 4 x 4 to logits (B, positions).

    Args:
        channels: of the images.
        width: features at full side, doubled at each halving up to 8 times.
    """

    def __init__(self, channels: int = 3, width: int = 64):
        super().__init__()
        if min(channels, width) < 1:
            raise ValueError(f"channels, width: must be at least 1, got {channels} and {width}")
        self.stem = spectral_norm(nn.Conv2d(channels, width, 3, padding=1))
        sizes = [width * min(2**i, 8) for i in range(7)]
        self.halvings = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in itertools.pairwise(sizes)
        )
        self.heads = nn.ModuleList(spectral_norm(nn.Conv2d(size, 1, 1)) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, positive for what looks real.

        Raises:
            ValueError: not images, or too small ones.
        """
        if x.ndim != 4 or min(x.shape[2:]) < 4:
            raise ValueError(f"x: images (B, C, H, W) of at least 4 x 4 are needed, got {tuple(x.shape)}")
        h, level = F.leaky_relu(self.stem(x), 0.2), 0
        while min(h.shape[2:]) > 4 and level < len(self.halvings):
            h = F.leaky_relu(self.halvings[level](h), 0.2)
            level += 1
        return self.heads[level](h).flatten(1)


class PointDiscriminator(nn.Module):
    """Three spectrally normed linear layers and a logit: points (B, D) to (B, 1).

    Args:
        dimension: D.
        width: of the layers.
    """

    def __init__(self, dimension: int, width: int = 128):
        super().__init__()
        sizes = [dimension, width, width, width]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [spectral_norm(nn.Linear(a, b)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Linear(width, 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, positive for what looks real."""
        return self.layers(x)


class ProjectedDiscriminator(nn.Module):
    """Small heads on the features of frozen networks, mixed at random (Sauer et al. 2111.01007, 2202.00273).

    Features of four scales are mixed across channels by fixed random 1x1 convolutions and, from the coarsest on, across
    scales by doubling and adding. Each scale of each network has a head of spectrally normed 4x4 convolutions. The feature
    networks are the user's: they decide what looks alike, and with features of ImageNet also what Inception distances say.

    `forward(x)`: images (B, 3, H, W) in [-1, 1] to logits (B, sum over heads).

    Args:
        features: frozen modules, images (B, 3, side, side) to feature maps (B, C_i, H_i, W_i), finest first.
        channels: of those maps, for each network.
        mixed: channels after mixing, finest first.
        side: images are resized to it before the features; None leaves them as they are.
        seed: of the random mixing.

    Raises:
        ValueError: no networks, or numbers of maps that do not fit.
    """

    def __init__(
        self,
        features: Sequence[nn.Module],
        channels: Sequence[Sequence[int]],
        *,
        mixed: Sequence[int] = (64, 128, 256, 512),
        side: int | None = 224,
        seed: int = 0,
    ):
        super().__init__()
        if not features or len(features) != len(channels):
            raise ValueError(f"features: {len(features)} networks, but the channels of {len(channels)} are given")
        if any(not 1 <= len(maps) <= len(mixed) for maps in channels):
            raise ValueError(f"channels: each network needs 1 to {len(mixed)} maps, got {[len(c) for c in channels]}")
        self.side = side
        self.features = nn.ModuleList(features).requires_grad_(False).eval()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.mixing = nn.ModuleList(_Mixing(maps, mixed[: len(maps)]) for maps in channels)
        self.mixing.requires_grad_(False)
        self.heads = nn.ModuleList(nn.ModuleList(_Head(size) for size in mixed[: len(maps)]) for maps in channels)

    def train(self, mode: bool = True) -> ProjectedDiscriminator:
        """The feature networks stay in evaluation mode."""
        super().train(mode)
        self.features.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> ProjectedDiscriminator:
        """Of the heads; features and their mixing are frozen."""
        self.heads.requires_grad_(requires_grad)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits, positive for what looks real."""
        if self.side is not None and x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        logits = []
        parts: Any = zip(self.features, self.mixing, self.heads, strict=True)
        for network, mixing, heads in parts:
            for head, mixed in zip(heads, mixing(list(network(x))), strict=True):
                logits.append(head(mixed))
        return torch.cat(logits, dim=1)


class _Mixing(nn.Module):
    """Fixed random mixing across channels, then from coarse to fine across scales."""

    def __init__(self, maps: Sequence[int], mixed: Sequence[int]):
        super().__init__()
        self.across = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(maps, mixed, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in itertools.pairwise(mixed))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """As many maps, finest first."""
        out = [layer(h) for layer, h in zip(self.across, maps, strict=True)]
        for i in reversed(range(len(out) - 1)):
            finer = F.interpolate(out[i + 1], size=out[i].shape[2:], mode="bilinear", align_corners=False)
            out[i] = out[i] + self.down[i](finer)
        return out


class _Head(nn.Module):
    """Halves a map until its side is 8 or less; logits (B, positions)."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(channels, width, 1))
        self.halvings = nn.ModuleList(
            nn.Sequential(spectral_norm(nn.Conv2d(width, width, 4, 2, 1)), nn.BatchNorm2d(width), nn.LeakyReLU(0.2))
            for _ in range(4)
        )
        self.last = spectral_norm(nn.Conv2d(width, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        halvings = max(0, math.ceil(math.log2(max(h.shape[2:]) / 8)))
        for layer in list(self.halvings)[:halvings]:
            h = layer(h)
        short = [max(0, 4 - size) for size in h.shape[2:]]
        return self.last(F.pad(h, (0, short[1], 0, short[0]))).flatten(1)
