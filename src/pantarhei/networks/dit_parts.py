"""What transformers over image patches share: patches, times, positions, perceptrons and norms that a condition modulates.

Modules are named as in the published checkpoints of DiT (Peebles & Xie 2212.09748) and its kin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SINUSOIDS = 256


class PatchEmbedder(nn.Module):
    """Each patch through one linear map: (B, C, H, W) to (B, tokens, width), row by row."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, tokens, width)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class VectorEmbedder(nn.Module):
    """A vector through a two-layer perceptron."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) to (B, width)."""
        return self.mlp(x.to(next(self.mlp.parameters()).dtype))


class TimeEmbedder(VectorEmbedder):
    """Sinusoids of a time, or any number, through a two-layer perceptron."""

    def __init__(self, width: int):
        super().__init__(SINUSOIDS, width)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        return super().forward(waves(t))


class Perceptron(nn.Module):
    """Linear, GELU (by tanh), linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """A modulated norm and a linear map to the values of a patch."""

    def __init__(self, width: int, values: int):
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """(B, tokens, width) to (B, tokens, values); `activated` is SiLU of the condition."""
        shift, scale = self.adaLN_modulation[1](activated)[:, None].chunk(2, dim=-1)
        return self.linear(modulated(x, shift, scale))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of its own, scaled by 1 + scale and shifted."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def waves(t: Tensor, width: int = SINUSOIDS) -> Tensor:
    """Cosines, then sines, of t at width / 2 frequencies from 1 down to nearly 1e-4; at least single precision."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10_000) / half))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions(side: int, width: int, *, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """Fixed sinusoids of the column (first half), then the row, of each token, float64 (side^2, width), row by row.

    Args:
        side: of the square of tokens.
        width: of a token, a multiple of 4.
        scale, offset: token p lies at p / scale - offset.
    """
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(side, dtype=torch.float32) / scale - offset  # single precision, as published tables have them
    angles = places.double()[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([along.repeat(side, 1), along.repeat_interleave(side, dim=0)], dim=1)


def unpatched(patches: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    """(B, tokens, values), the values of a patch ordered row, column, channel, to (B, C, rows * patch, columns * patch)."""
    x = patches.reshape(patches.shape[0], rows, columns, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(patches.shape[0], -1, rows * patch, columns * patch)


def initialise(network: nn.Module, zero: tuple[str, ...]) -> None:
    """As DiT: linear maps by Glorot's rule without biases, embeddings of time by narrow normals, some parts at zero."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is one row of inputs
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, TimeEmbedder):
            for layer in (module.mlp[0], module.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
    for name, parameter in network.named_parameters():
        if any(part in name for part in zero):
            nn.init.zeros_(parameter)
