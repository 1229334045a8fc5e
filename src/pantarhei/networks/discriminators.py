"""Discriminators: real data or samples? Small ones of our own, and heads on somebody's frozen features."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
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
        return ConvDiscriminator(shape[0], width, max(4, min(shape[1:])))
    if len(shape) == 1:
        return PointDiscriminator(shape[0], 2 * width)
    raise ValueError(f"shape: there are discriminators for images (C, H, W) and points (D,), not for {tuple(shape)}")


class ConvDiscriminator(nn.Module):
    """Spectrally normed convolutions, halving the side until it is 4 or less; one logit a remaining position.

    `forward(x)`: images (B, C, H, W) to logits (B, positions).

    Args:
        channels: of the images.
        width: features at full side, doubled at each halving up to 8 times.
        side: of the images, at least 4; larger ones give more positions.
    """

    def __init__(self, channels: int = 3, width: int = 64, side: int = 32):
        super().__init__()
        if min(channels, width) < 1 or side < 4:
            raise ValueError(f"channels, width, side: at least 1, 1 and 4 are needed, got {channels}, {width}, {side}")
        halvings = math.floor(math.log2(side / 5)) + 1  # 5 to 9 pixels become 4 or less, 10 to 19 are halved twice
        sizes = [width * min(2**i, 8) for i in range(halvings + 1)]
        self.stem = spectral_norm(nn.Conv2d(channels, width, 3, padding=1))
        self.halvings = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in pairwise(sizes)
        )
        self.head = spectral_norm(nn.Conv2d(sizes[-1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, positive for what looks real.

        Raises:
            ValueError: not images, or too small ones.
        """
        if x.ndim != 4 or min(x.shape[2:]) < 2 ** len(self.halvings):
            least = 2 ** len(self.halvings)
            raise ValueError(f"x: images (B, C, H, W) of at least {least} x {least} are needed, got {tuple(x.shape)}")
        h = F.leaky_relu(self.stem(x), 0.2)
        for halving in self.halvings:
            h = F.leaky_relu(halving(h), 0.2)
        return self.head(h).flatten(1)


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
        for a, b in pairwise(sizes):
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
        features: frozen modules, images (B, 3, side, side) in [-1, 1] to feature maps (B, C_i, H_i, W_i), finest first; the
            coarsest are looked at, so many as `mixed` has. They are no part of the state: checkpoints hold heads and mixing.
        mixed: channels after mixing, finest first.
        side: images are resized to it.
        seed: of the random mixing.

    Raises:
        ValueError: no networks, or one whose output is no list of maps.
    """

    def __init__(
        self,
        features: Sequence[nn.Module],
        *,
        mixed: Sequence[int] = (64, 128, 256, 512),
        side: int = 224,
        seed: int = 0,
    ):
        super().__init__()
        if not features:
            raise ValueError("features: at least one feature network is needed")
        self.side, self.count = side, len(mixed)
        self.features = [network.requires_grad_(False).eval() for network in features]
        shapes = [[tuple(h.shape[1:]) for h in maps] for maps in self._maps(torch.zeros(1, 3, side, side))]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.mixing = nn.ModuleList(_Mixing([s[0] for s in own], mixed[: len(own)]) for own in shapes)
        self.mixing.requires_grad_(False)
        self.heads = nn.ModuleList(
            nn.ModuleList(_Head(c, max(s[1:])) for c, s in zip(mixed, own, strict=False)) for own in shapes
        )

    def _maps(self, x: Tensor) -> Iterator[list[Tensor]]:
        """The maps of each network that are looked at."""
        for network in self.features:
            maps = network(x)
            if not isinstance(maps, (list, tuple)) or not maps or any(h.ndim != 4 for h in maps):
                kind = type(network).__name__
                raise ValueError(f"features: {kind} must give a list of maps (B, C, H, W), finest first")
            yield list(maps[-self.count :])

    def _apply(self, fn: Any, recurse: bool = True) -> ProjectedDiscriminator:
        for network in self.features:
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> ProjectedDiscriminator:
        """Of the heads; features and their mixing are frozen."""
        self.heads.requires_grad_(requires_grad)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits, positive for what looks real."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"x: grey or colour images (B, C, H, W) are needed, got {tuple(x.shape)}")
        x = x.expand(-1, 3, -1, -1)
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        parts: Any = zip(self._maps(x), self.mixing, self.heads, strict=True)
        return torch.cat(
            [head(h) for maps, mixing, heads in parts for head, h in zip(heads, mixing(maps), strict=True)], dim=1
        )


class VGGMaps(nn.Module):
    """The maps of a VGG16 for images (B, 3, H, W) in [-1, 1], which it wants in the scale of its training.

    Args:
        network: its features, such as `VGG16Features.from_file(...)`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("deviation", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values)[:, None, None])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five maps, finest first."""
        return list(self.network(((x + 1) / 2 - self.mean) / self.deviation))


class _Mixing(nn.Module):
    """Fixed random mixing across channels, then from coarse to fine across scales."""

    def __init__(self, maps: Sequence[int], mixed: Sequence[int]):
        super().__init__()
        self.across = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(maps, mixed, strict=True))
        self.down = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(mixed))
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

    def __init__(self, channels: int, side: int, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [spectral_norm(nn.Conv2d(channels, width, 1))]
        while side > 8:
            halving = spectral_norm(nn.Conv2d(width, width, 4, 2, 1))
            layers += [halving, nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
            side //= 2
        self.layers = nn.Sequential(*layers)
        self.last = spectral_norm(nn.Conv2d(width, 1, min(4, side)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(x)).flatten(1)
