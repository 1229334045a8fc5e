"""Premetrics: how far a prediction is from its target, one number a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Premetric = Callable[[Tensor, Tensor], Tensor]


def squared(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all but the first dimension, shape (B,)."""
    return (prediction - target).square().flatten(1).mean(dim=1)


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


def _maps(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [features] if isinstance(features, Tensor) else list(features)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(dim=1, keepdim=True) + 1e-10).sqrt()
