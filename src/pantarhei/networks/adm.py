"""ADM: the U-Net of guided diffusion as EDM builds it (Dhariwal & Nichol 2105.05233; Karras et al. 2206.00364, appendix F).

`ADMConfig()` is the network of ImageNet at 64 x 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.networks import edm_blocks as edm

HEAD = 64  # features of an attention head
_INITIAL = edm.Initial("kaiming", math.sqrt(1 / 3), math.sqrt(1 / 3))
_FINAL = edm.Initial("kaiming", 0.0)


@dataclass(frozen=True)
class ADMConfig:
    """Sizes of an `ADM`; the default is that of ImageNet at 64 x 64, 295.9 M parameters.

    Attributes:
        size: side of the images; decides where `attention` falls.
        channels: image channels.
        width: feature channels, before the multipliers.
        multipliers: feature channels of each resolution, as multiples of `width`; the side halves between two.
        blocks: residual blocks a resolution on the way down; there is one more on the way up.
        attention: sides at which there is self-attention, one head for every 64 channels: fewer than 64 have none. The
            lowest resolution always has some.
        embedding_multiplier: features of the embedding, as a multiple of `width`.
        dropout: in the residual blocks.
        classes: number of classes, 0 for none; index `classes` is the null class.
        label_dropout: how often a label is replaced by the null class while training.
        augment_dim: numbers that say what augmentation did to an image, 0 for none.
    """

    size: int = 64
    channels: int = 3
    width: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (32, 16, 8)
    embedding_multiplier: int = 4
    dropout: float = 0.1
    classes: int = 1000
    label_dropout: float = 0.0
    augment_dim: int = 0

    def __post_init__(self) -> None:
        edm.check(self)
        last = len(self.multipliers) - 1
        for level, (_, channels, attention) in enumerate(edm.levels(self)):
            if (attention or level == last) and channels >= HEAD and channels % (channels // HEAD):
                heads = channels // HEAD
                raise ValueError(
                    f"width: {channels} channels do not split into {heads} heads; take a multiple of {HEAD}"
                )


class ADM(nn.Module):
    """`forward(x, t, label=None, augment=None)`: x (B, C, H, W) to the same shape; t (B,) is the noise label,
    ln(sigma) / 4 in EDM's preconditioning.

    `label` is an index (B,) in [0, classes] (`classes`, and None, for the null class) or rows (B, classes) as they are;
    `augment` rows (B, augment_dim), zeros where left out. H and W must be divisible by 2^(resolutions - 1). The weights
    decide the precision; the output has that of x. It starts at zero.
    """

    def __init__(self, config: ADMConfig):
        super().__init__()
        self.config = config
        width, embedding = config.width, config.embedding_multiplier * config.width
        self.map_noise = edm.PositionalEmbedding(width, endpoint=False)
        augment = config.augment_dim
        self.map_augment = edm.Linear(augment, width, _FINAL, bias=False) if augment else None
        self.map_layer0 = edm.Linear(width, embedding, _INITIAL)
        self.map_layer1 = edm.Linear(embedding, embedding, _INITIAL)
        self.map_label = edm.Linear(config.classes, embedding, _INITIAL, bias=False) if config.classes else None
        if self.map_label is not None:
            # Every class is a row of standard normals: deviation sqrt(1 / classes), times sqrt(classes).
            nn.init.normal_(self.map_label.weight)
        style = edm.BlockStyle(
            embedding=embedding,
            eps=1e-5,
            scale=1.0,
            adaptive=True,
            project=False,
            heads=_heads,
            filter=(1, 1),
            dropout=config.dropout,
            initial=_INITIAL,
            final=_FINAL,
            attention=_INITIAL,
        )
        skips: list[int] = []
        self.enc = nn.ModuleDict(dict(self._encoder(style, skips)))
        self.dec = nn.ModuleDict(dict(self._decoder(style, skips)))
        channels = edm.levels(config)[0][1]
        self.out_norm = edm.group_norm(channels, 1e-5)
        self.out_conv = edm.Conv(channels, config.channels, 3, _FINAL)

    def _encoder(self, style: edm.BlockStyle, skips: list[int]) -> Iterator[tuple[str, nn.Module]]:
        """The way down, by the published names; `skips` gets the channels of what it leaves for the way up."""
        table = edm.levels(self.config)
        channels = table[0][1]
        for level, (side, features, attention) in enumerate(table):
            if level == 0:
                yield f"{side}x{side}_conv", edm.Conv(self.config.channels, channels, 3, _INITIAL)
            else:
                yield f"{side}x{side}_down", edm.Block(channels, channels, style, resample="down")
            skips.append(channels)
            for i in range(self.config.blocks):
                yield f"{side}x{side}_block{i}", edm.Block(channels, features, style, attention=attention)
                channels = features
                skips.append(channels)

    def _decoder(self, style: edm.BlockStyle, skips: list[int]) -> Iterator[tuple[str, nn.Module]]:
        """The way up: every block takes one skip."""
        table = edm.levels(self.config)
        channels = table[-1][1]
        for level, (side, features, attention) in reversed(list(enumerate(table))):
            if level + 1 == len(table):
                yield f"{side}x{side}_in0", edm.Block(channels, channels, style, attention=True)
                yield f"{side}x{side}_in1", edm.Block(channels, channels, style)
            else:
                yield f"{side}x{side}_up", edm.Block(channels, channels, style, resample="up")
            for i in range(self.config.blocks + 1):
                inputs = channels + skips.pop()
                yield f"{side}x{side}_block{i}", edm.Block(inputs, features, style, attention=attention)
                channels = features

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        """The network's output at x under the noise label t and its conditions.

        Raises:
            ValueError: for a condition that the network was built without, or of another width.
        """
        embedding = self.embed(t, label, augment)
        h = x.to(embedding.dtype)
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            layer: Any = module
            h = layer(h) if name.endswith("_conv") else layer(h, embedding)
            skips.append(h)
        for name, module in self.dec.items():
            layer = module
            h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding)
        return self.out_conv(F.silu(self.out_norm(h))).to(x.dtype)

    def embed(self, t: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """The noise label and the conditions as one vector a sample, (B, embedding_multiplier * width)."""
        features = edm.augmented(self, self.map_noise(t).to(self.map_layer0.weight.dtype), augment)
        embedding = self.map_layer1(F.silu(self.map_layer0(features)))
        rows = edm.label_rows(self, label, embedding)
        if rows is not None:
            assert self.map_label is not None
            embedding = embedding + self.map_label(rows)
        return F.silu(embedding)


def _heads(channels: int) -> int:
    return channels // HEAD
