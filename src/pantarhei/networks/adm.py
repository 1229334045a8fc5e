"""ADM: the U-Net of guided diffusion as EDM builds it (Dhariwal & Nichol 2105.05233; Karras et al. 2206.00364, appendix F).

`ADMConfig()` is EDM's network of ImageNet at 64 x 64. `GUIDED` is the original one, of guided diffusion, consistency models
and consistency trajectory models: the same but for its groups and for the unit of its times.
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
from pantarhei.networks.embeddings import check_second_time

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
        attention: sides at which there is self-attention; the lowest resolution always has some.
        embedding_multiplier: features of the embedding, as a multiple of `width`.
        dropout: in the residual blocks.
        classes: number of classes, 0 for none; index `classes` is the null class.
        label_dropout: how often a label is replaced by the null class while training.
        augment_dim: numbers that say what augmentation did to an image, 0 for none.
        groups: of the group norms; 0 for at most 32 groups of at least 4 channels.
        head: channels of an attention head. There is no attention where there are fewer.
        time_scale: multiplies the noise label before it is embedded.
        adaptive: the embedding scales and shifts the second norm of a block; else it is added before it.
        second_time: there is a branch for a second time (Kim et al. 2310.02279).
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
    groups: int = 0
    head: int = 64
    time_scale: float = 1.0
    adaptive: bool = True
    second_time: bool = False

    def __post_init__(self) -> None:
        edm.check(self)
        if self.groups < 0:
            raise ValueError(f"groups: must be at least 0, got {self.groups}")
        if self.head < 1:
            raise ValueError(f"head: must be at least 1, got {self.head}")
        last = len(self.multipliers) - 1
        for level, (_, channels, attention) in enumerate(edm.levels(self)):
            heads = self.heads(channels)
            if (attention or level == last) and heads and channels % heads:
                raise ValueError(
                    f"width: {channels} channels do not split into {heads} heads; take a multiple of {self.head}"
                )

    def heads(self, channels: int) -> int:
        """Attention heads of so many channels."""
        return channels // self.head


class ADM(nn.Module):
    """`forward(x, t, label=None, augment=None, s=None)`: x (B, C, H, W) to the same shape; t (B,) is the noise label,
    ln(sigma) / 4 in EDM's preconditioning, and s the same of a second time; without s its branch is left out.

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
        second = config.second_time
        self.map_layer0_s = edm.Linear(width, embedding, _INITIAL) if second else None
        self.map_layer1_s = edm.Linear(embedding, embedding, _INITIAL) if second else None
        self.map_label = edm.Linear(config.classes, embedding, _INITIAL, bias=False) if config.classes else None
        if self.map_label is not None:
            # Every class is a row of standard normals: deviation sqrt(1 / classes), times sqrt(classes).
            nn.init.normal_(self.map_label.weight)
        style = edm.BlockStyle(
            embedding=embedding,
            eps=1e-5,
            scale=1.0,
            adaptive=config.adaptive,
            project=False,
            heads=config.heads,
            filter=(1, 1),
            dropout=config.dropout,
            initial=_INITIAL,
            final=_FINAL,
            attention=_INITIAL,
            groups=config.groups,
            second_time=config.second_time,
        )
        skips: list[int] = []
        self.enc = nn.ModuleDict(dict(self._encoder(style, skips)))
        self.dec = nn.ModuleDict(dict(self._decoder(style, skips)))
        channels = edm.levels(config)[0][1]
        self.out_norm = edm.group_norm(channels, 1e-5, config.groups)
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

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        augment: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        """The network's output at x under the noise label t (and s) and its conditions.

        Raises:
            ValueError: for a condition or a second time that the network was built without, or one of another width.
        """
        check_second_time(self.map_layer0_s, s)
        embedding = self.embed(t, label, augment)
        second = None if s is None else self.embed_second(s)
        h = x.to(embedding.dtype)
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            layer: Any = module
            h = layer(h) if name.endswith("_conv") else layer(h, embedding, second)
            skips.append(h)
        for name, module in self.dec.items():
            layer = module
            h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding, second)
        return self.out_conv(F.silu(self.out_norm(h))).to(x.dtype)

    def embed(self, t: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """The noise label and the conditions as one vector a sample, (B, embedding_multiplier * width)."""
        features = edm.augmented(self, self._features(t), augment)
        embedding = self.map_layer1(F.silu(self.map_layer0(features)))
        rows = edm.label_rows(self, label, embedding)
        if rows is not None:
            assert self.map_label is not None
            embedding = embedding + self.map_label(rows)
        return F.silu(embedding)

    def embed_second(self, s: Tensor) -> Tensor:
        """The second noise label as one vector a sample, like that of `embed`; conditions enter the first one only."""
        assert self.map_layer0_s is not None
        assert self.map_layer1_s is not None
        return F.silu(self.map_layer1_s(F.silu(self.map_layer0_s(self._features(s)))))

    def _features(self, t: Tensor) -> Tensor:
        """Cosines, then sines, of a noise label."""
        scale = self.config.time_scale
        return self.map_noise(t if scale == 1 else scale * t).to(self.map_layer0.weight.dtype)


GUIDED = ADMConfig(dropout=0.0, groups=32, time_scale=1000.0)
