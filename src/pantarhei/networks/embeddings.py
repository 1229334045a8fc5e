"""Embeddings of the time and of classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoids(t: Tensor, width: int, *, scale: float = 1000.0, longest: float = 10_000.0) -> Tensor:
    """Sines, then cosines, of `scale * t` at `width / 2` geometric frequencies from 1 to 1/longest.

    Args:
        t: (B,), in [0, 1] for the default scale.
        width: even number of features.
        scale: multiplies t (Vaswani et al. 1706.03762 use integers up to some thousand).
        longest: the largest period over 2 pi.

    Returns:
        (B, width), in t's dtype.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(longest) / (half - 1)))
    angles = scale * t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def check_second_time(branch: nn.Module | None, s: Tensor | None) -> None:
    """Refuse a second time that the network has no branch for.

    Raises:
        ValueError: naming s.
    """
    if s is not None and branch is None:
        raise ValueError("s: this network was built without a second time; with_second_time(network) makes one with it")


class ClassEmbedding(nn.Embedding):
    """A row a class, the last for no class. Floating-point labels (B, width) are rows of their own: unknowns to optimise."""

    def forward(self, label: Tensor) -> Tensor:
        """(B,) numbers, or (B, width) as they are, to (B, width).

        Raises:
            ValueError: rows of another width.
        """
        if not label.is_floating_point():
            return super().forward(label)
        if label.ndim != 2 or label.shape[1] != self.embedding_dim:
            raise ValueError(
                f"label: whole numbers (B,), or rows (B, {self.embedding_dim}) are needed, got {tuple(label.shape)}"
            )
        return label


class TimeEmbedding(nn.Module):
    """Sinusoids of t through a two-layer perceptron."""

    def __init__(self, width: int, sinusoid_width: int = 64):
        super().__init__()
        self.sinusoid_width = sinusoid_width
        self.layers = nn.Sequential(nn.Linear(sinusoid_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        features = sinusoids(t, self.sinusoid_width)
        return self.layers(features.to(next(self.layers.parameters()).dtype))
