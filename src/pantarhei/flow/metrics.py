"""Premetrics: how far a prediction is from its target, one number a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Premetric = Callable[[Tensor, Tensor], Tensor]


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first dimension, shape (B,)."""
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)


@dataclass(frozen=True)
class PseudoHuber:
    """Pseudo-Huber: quadratic below c, linear above.

    Attributes:
        c: the transition. A row of D elements uses (sqrt(|d|^2 + (c D)^2) - c D) / D with c = 0.00054 in rectified
            flow++ (2405.20320; linear in D); elementwise it is mean(sqrt(d^2 + c^2) - c), c = 0.001 in rectified
            diffusion (2410.07303).
        elementwise: which of the two.
    """

    c: float = 0.00054
    elementwise: bool = False

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c: must be positive, got {self.c}")

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Shape (B,)."""
        difference = (prediction - target).flatten(1)
        if self.elementwise:
            return (torch.sqrt(difference.square() + self.c**2) - self.c).mean(dim=1)
        size = difference.shape[1]
        c = self.c * size
        return (torch.sqrt(difference.square().sum(dim=1) + c**2) - c) / size


class GradientPyramid:
    """Differences of image gradients at several scales: a perceptual distance that needs no learned features.

    At each scale sqrt(d^2 + c^2) - c of the horizontal and vertical differences of (prediction - target), averaged; the next
    scale is the 2 x 2 mean; the coarsest adds the difference itself. It forgives a flat offset less than LPIPS and knows
    nothing of texture: a surrogate, and named so wherever it is used.

    Args:
        scales: how many, the image's own the first.
        c: below it differences count squared.
    """

    name = "gradient pyramid (surrogate, no learned features)"

    def __init__(self, scales: int = 3, c: float = 0.05):
        if scales < 1 or not c > 0:
            raise ValueError(f"scales, c: must be positive, got {scales} and {c}")
        self.scales, self.c = scales, c

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Images (B, C, H, W) to (B,)."""
        d = prediction - target
        if d.ndim != 4:
            raise ValueError(f"metric: the gradient pyramid compares images (B, C, H, W), got shape {tuple(d.shape)}")
        total = d.new_zeros(d.shape[0])
        for scale in range(self.scales):
            if scale:
                d = F.avg_pool2d(d, 2, ceil_mode=True)
            for axis in (2, 3):
                if d.shape[axis] > 1:
                    total = total + self._robust(d.diff(dim=axis))
        return (total + self._robust(d)) / (2 * self.scales + 1)

    def _robust(self, d: Tensor) -> Tensor:
        return ((d.square() + self.c**2).sqrt() - self.c).flatten(1).mean(dim=1)


class Perceptual:
    """Distance of network features, with each position's channels scaled to unit length (as in LPIPS, 1801.03924).

    Args:
        network: maps images (B, C, H, W) to one feature map (B, F, h, w) or a sequence of them. It is used as it is:
            put it in eval mode and freeze it.
        weight: one weight a feature map; equal weights by default.

    Its name says which network it is, because a perceptual loss is only as good as its features.
    """

    def __init__(self, network: Callable[[Tensor], Tensor | Sequence[Tensor]], weight: Sequence[float] | None = None):
        self.network = network
        self.weight = weight
        self.name = f"perceptual ({getattr(network, 'name', type(network).__name__)})"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Shape (B,)."""
        follow(self.network, prediction)
        with torch.no_grad():
            wanted = _maps(self.network(target))
        found = _maps(self.network(prediction))
        weights = self.weight or [1.0 / len(found)] * len(found)
        if len(weights) != len(found):
            raise ValueError(f"weight: the network gives {len(found)} feature maps, got {len(weights)} weights")
        parts = [
            w * (_unit(a) - _unit(b)).square().sum(dim=1).flatten(1).mean(dim=1)
            for w, a, b in zip(weights, found, wanted, strict=True)
        ]
        return torch.stack(parts).sum(dim=0)


def follow(network: object, x: Tensor) -> None:
    """Move a module (or the owner of a method) to the device of x: a loss is no module, so nobody else does."""
    module = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
    if isinstance(module, nn.Module):
        parameter = next(module.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            module.to(x.device)


def _maps(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
