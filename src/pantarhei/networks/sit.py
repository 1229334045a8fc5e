"""SiT: a transformer over image patches under adaptive layer norm (Ma et al. 2401.08740; the blocks are those of DiT,
Peebles & Xie 2212.09748).

Modules are named as in the published checkpoints, so a state dict of theirs is one of ours. The published models work on
latents of 4 channels and side 32 (256-pixel images) or 64 (512 pixels) and see t in [0, 1] with data at t = 1, as we do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.naming import unknown
from pantarhei.networks.attention import attend
from pantarhei.networks.dit_parts import (
    FinalLayer,
    PatchEmbedder,
    Perceptron,
    TimeEmbedder,
    initialise,
    modulated,
    positions,
    unpatched,
)
from pantarhei.networks.embeddings import ClassEmbedding, check_second_time

# Depth, width, heads of the published sizes.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)


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
        x = torch.addcmul(x, gate1, self.attn(modulated(x, shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulated(x, shift2, scale2)))


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
        table = positions(config.side, config.width)[None]
        self.register_buffer("pos_embed", table.to(torch.get_default_dtype()))
        self.x_embedder = PatchEmbedder(config.channels, config.width, config.patch)
        self.t_embedder = TimeEmbedder(config.width)
        self.s_embedder = TimeEmbedder(config.width) if config.second_time else None
        self.y_embedder = LabelEmbedder(config.classes, config.width) if config.classes else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        values = config.patch**2 * config.channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(config.width, values)
        initialise(self, ("adaLN_modulation", "final_layer.linear"))
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

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
        patches = self.final_layer(h, activated)
        return unpatched(patches, config.side, config.side, config.patch)[:, : config.channels]
