"""SiT: a transformer over image patches under adaptive layer norm (Ma et al. 2401.08740; the blocks are those of DiT,
Peebles & Xie 2212.09748).

Modules are named as in the published checkpoints, so a state dict of theirs is one of ours. The published models work on
latents of 4 channels and side 32 (256-pixel images) or 64 (512 pixels) and see t in [0, 1] with data at t = 1, as we do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.naming import unknown
from pantarhei.networks.attention import attend
from pantarhei.networks.embeddings import ClassEmbedding, check_second_time

# Depth, width, heads of the published sizes.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)
SINUSOIDS = 256


@dataclass(frozen=True)
class SiTConfig:
    """Sizes of a `SiT`; the default is SiT-S/2 on latents of 256-pixel images, without classes.

    Attributes:
        size: side of the images or latents; fixed by the table of positions.
        patch: side of a patch, which is one token.
        channels: of the images or latents.
        width: features of a token; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp: hidden features of a block's perceptron, as a multiple of `width`.
        classes: number of classes, 0 for none; index `classes` is the null class.
        learn_sigma: the last layer has twice the channels, and the second half is not used. The published weights are so.
        second_time: there is a branch for a second time.
    """

    size: int = 32
    patch: int = 2
    channels: int = 4
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp: float = 4.0
    classes: int = 0
    learn_sigma: bool = True
    second_time: bool = False

    def __post_init__(self) -> None:
        if min(self.size, self.patch, self.channels, self.width, self.depth, self.heads) < 1 or self.classes < 0:
            raise ValueError(f"network: every size must be at least 1 and classes at least 0, got {self}")
        if self.size % self.patch:
            raise ValueError(f"patch: must divide the size {self.size}, got {self.patch}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width: must be a multiple of 4 and of the {self.heads} heads, got {self.width}")
        if self.hidden < 1:
            raise ValueError(f"mlp: must give at least one hidden feature, got {self.mlp}")

    @staticmethod
    def named(name: str, **settings: Any) -> SiTConfig:
        """A published size with other settings as given: `named("XL/2", classes=1000)`.

        Raises:
            ValueError: for a name that is not S, B, L or XL, a slash, and 2, 4 or 8.
        """
        names = {f"{size}/{patch}": (*table, patch) for size, table in SIZES.items() for patch in PATCHES}
        short = name.removeprefix("SiT-")
        if short not in names:
            raise ValueError(unknown("name", name, names))
        depth, width, heads, patch = names[short]
        return SiTConfig(**{"depth": depth, "width": width, "heads": heads, "patch": patch, **settings})

    @property
    def name(self) -> str | None:
        """The published name of this size ("XL/2"); None where it has none."""
        sizes = (self.depth, self.width, self.heads)
        known = [name for name, table in SIZES.items() if table == sizes and self.patch in PATCHES and self.mlp == 4]
        return f"{known[0]}/{self.patch}" if known else None

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.size // self.patch

    @property
    def hidden(self) -> int:
        """Hidden features of a block's perceptron."""
        return round(self.width * self.mlp)


class PatchEmbedder(nn.Module):
    """Each patch through one linear map: (B, C, H, W) to (B, tokens, width), row by row."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.proj = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, tokens, width)."""
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """Sinusoids of t as it is, in [0, 1], through a two-layer perceptron."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, width)."""
        return self.mlp(_sinusoids(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One row a class, the last for no class."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = ClassEmbedding(classes + 1, width)

    def forward(self, label: Tensor | None) -> Tensor:
        """(B,) to (B, width); None to the null class, (1, width)."""
        return self.embedding_table.weight[-1:] if label is None else self.embedding_table(label)


class Attention(nn.Module):
    """Self-attention over all tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        b, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(b, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, tokens, width))


class Perceptron(nn.Module):
    """Linear, GELU (by tanh), linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then a perceptron; the condition shifts and scales the norm before each, and gates what each adds."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.attn = Attention(config.width, config.heads)
        self.mlp = Perceptron(config.width, config.hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """(B, tokens, width) to the same; `activated` is SiLU of the condition, which is the same in every block."""
        modulation = self.adaLN_modulation[1](activated)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(_modulated(x, shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(_modulated(x, shift2, scale2)))


class FinalLayer(nn.Module):
    """A modulated norm and a linear map to the values of a patch."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        values = config.patch**2 * config.channels * (2 if config.learn_sigma else 1)
        self.linear = nn.Linear(config.width, values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """(B, tokens, width) to (B, tokens, values)."""
        shift, scale = self.adaLN_modulation[1](activated)[:, None].chunk(2, dim=-1)
        return self.linear(_modulated(x, shift, scale))


class SiT(nn.Module):
    """`forward(x, t, label=None, s=None)`: x (B, channels, size, size) to the same shape, t (B,) in [0, 1], label (B,) in
    [0, classes], where `classes` (and None) is the null class; s, a second time like t, where the network has a branch for
    it, which is left out without s.

    The output starts at zero, and every block as the identity.
    """

    pos_embed: Tensor

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config
        self.register_buffer("pos_embed", _positions(config.side, config.width))
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimeEmbedder(config.width)
        self.s_embedder = TimeEmbedder(config.width) if config.second_time else None
        self.y_embedder = LabelEmbedder(config.classes, config.width) if config.classes else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """The network's output at (x, t) or (x, t, s) under its condition.

        Raises:
            ValueError: for images of another size, a label where the network has no classes, or an s where it has no branch
                for it.
        """
        check_second_time(self.s_embedder, s)
        config = self.config
        if x.shape[1:] != (config.channels, config.size, config.size):
            expected = (config.channels, config.size, config.size)
            raise ValueError(f"x: this network is for items of shape {expected}, got {tuple(x.shape[1:])}")
        condition = self.t_embedder(t)
        if s is not None:
            assert self.s_embedder is not None
            condition = condition + self.s_embedder(s)
        if self.y_embedder is not None:
            condition = condition + self.y_embedder(label)
        elif label is not None:
            raise ValueError("label: this network was built without classes")
        activated = F.silu(condition)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, activated)
        # The values of a patch are ordered row, column, channel.
        side, patch = config.side, config.patch
        patches = self.final_layer(h, activated).reshape(x.shape[0], side, side, patch, patch, -1)
        return patches[..., : config.channels].permute(0, 5, 1, 3, 2, 4).reshape(x.shape)

    def _initialise(self) -> None:
        """As DiT: linear maps by Glorot's rule, embeddings by narrow normals, modulations and the output at zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch is one row of inputs
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for embedder in (self.t_embedder, self.s_embedder):
            for layer in () if embedder is None else (embedder.mlp[0], embedder.mlp[2]):
                nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                nn.init.zeros_(parameter)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _sinusoids(t: Tensor) -> Tensor:
    """Cosines, then sines, of t at 128 frequencies from 1 down to nearly 1e-4; at least single precision."""
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    half = SINUSOIDS // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(10_000) / half))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _positions(side: int, width: int) -> Tensor:
    """Fixed sinusoids of the column (first half), then the row, of each token: (1, side^2, width)."""
    quarter = width // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([along.repeat(side, 1), along.repeat_interleave(side, dim=0)], dim=1)
    return table[None].to(torch.get_default_dtype())
