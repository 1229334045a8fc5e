"""SongUNet: NCSN++ and DDPM++ as EDM builds them (Karras et al. 2206.00364, appendix F; Song et al. 2011.13456).

`SongUNetConfig()` is the NCSN++ of CIFAR-10, `DDPMPP` what EDM calls VP, `FACES` the NCSN++ of AFHQ and FFHQ
at 64 x 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.naming import unknown
from pantarhei.networks import edm_blocks as edm
from pantarhei.networks.embeddings import check_second_time

HALF = math.sqrt(0.5)
_INITIAL = edm.Initial("xavier")
_FINAL = edm.Initial("xavier", 1e-5)


@dataclass(frozen=True)
class SongUNetConfig:
    """Sizes and switches of a `SongUNet`; the default is NCSN++ for CIFAR-10, 56.4 M parameters.

    Attributes:
        size: side of the images; decides where `attention` falls.
        channels: image channels.
        width: feature channels, before the first multiplier.
        multipliers: feature channels of each resolution, as multiples of `width`; the side halves between two.
        blocks: residual blocks a resolution on the way down; there is one more on the way up.
        attention: sides at which there is self-attention (the lowest resolution always has some).
        embedding: of the noise level: "fourier" (random frequencies; NCSN++) or "positional" (DDPM++).
        encoder: "residual" (the image, halved and convolved, is added at every resolution; NCSN++) or "standard" (DDPM++).
        filter: of halving and doubling, (1, 3, 3, 1) for NCSN++ and (1, 1) for DDPM++.
        embedding_multiplier: features of the embedding, as a multiple of `width`.
        noise_multiplier: features of the noise level before it is embedded, likewise.
        fourier_scale: deviation of the random frequencies.
        dropout: in the residual blocks.
        classes: number of classes, 0 for none; index `classes` is the null class.
        label_dropout: how often a label is replaced by the null class while training.
        augment_dim: numbers that say what augmentation did to an image, 0 for none.
        second_time: there is a branch for a second time (Kim et al. 2310.02279).
    """

    size: int = 32
    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    embedding: Literal["fourier", "positional"] = "fourier"
    encoder: Literal["residual", "standard"] = "residual"
    filter: tuple[float, ...] = (1, 3, 3, 1)
    embedding_multiplier: int = 4
    noise_multiplier: int = 2
    fourier_scale: float = 16.0
    dropout: float = 0.13
    classes: int = 0
    label_dropout: float = 0.0
    augment_dim: int = 9
    second_time: bool = False

    def __post_init__(self) -> None:
        edm.check(self)
        for name, known in (("embedding", ("fourier", "positional")), ("encoder", ("residual", "standard"))):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, str(getattr(self, name)), known))
        if self.noise_multiplier < 1:
            raise ValueError(f"noise_multiplier: must be at least 1, got {self.noise_multiplier}")


class SongUNet(nn.Module):
    """`forward(x, t, label=None, augment=None, s=None)`: x (B, C, H, W) to the same shape; t (B,) is the noise label,
    ln(sigma) / 4 in EDM's preconditioning, and s the same of a second time; without s its branch is left out.

    `label` is an index (B,) in [0, classes] (`classes`, and None, for the null class) or rows (B, classes) as they are;
    `augment` rows (B, augment_dim), zeros where left out. H and W must be divisible by 2^(resolutions - 1). The weights
    decide the precision; the output has that of x.
    """

    def __init__(self, config: SongUNetConfig):
        super().__init__()
        self.config = config
        features, embedding = config.noise_multiplier * config.width, config.embedding_multiplier * config.width
        self.map_noise: nn.Module
        if config.embedding == "fourier":
            self.map_noise = edm.FourierEmbedding(features, config.fourier_scale)
        else:
            self.map_noise = edm.PositionalEmbedding(features, endpoint=True)
        self.map_label = edm.Linear(config.classes, features, _INITIAL) if config.classes else None
        augment = config.augment_dim
        self.map_augment = edm.Linear(augment, features, _INITIAL, bias=False) if augment else None
        self.map_layer0 = edm.Linear(features, embedding, _INITIAL)
        self.map_layer1 = edm.Linear(embedding, embedding, _INITIAL)
        second = config.second_time
        self.map_layer0_s = edm.Linear(features, embedding, _INITIAL) if second else None
        self.map_layer1_s = edm.Linear(embedding, embedding, _INITIAL) if second else None
        style = edm.BlockStyle(
            embedding=embedding,
            eps=1e-6,
            scale=HALF,
            adaptive=False,
            project=True,
            heads=_one_head,
            filter=config.filter,
            dropout=config.dropout,
            initial=_INITIAL,
            final=_FINAL,
            attention=edm.Initial("xavier", math.sqrt(0.2)),
            second_time=config.second_time,
        )
        skips: list[int] = []
        self.enc = nn.ModuleDict(dict(self._encoder(style, skips)))
        self.dec = nn.ModuleDict(dict(self._decoder(style, skips)))

    def _encoder(self, style: edm.BlockStyle, skips: list[int]) -> Iterator[tuple[str, nn.Module]]:
        """The way down, by the published names; `skips` gets the channels of what it leaves for the way up."""
        config = self.config
        channels, image = config.width, config.channels
        for level, (side, features, attention) in enumerate(edm.levels(config)):
            if level == 0:
                yield f"{side}x{side}_conv", edm.Conv(config.channels, channels, 3, _INITIAL)
            else:
                yield f"{side}x{side}_down", edm.Block(channels, channels, style, resample="down")
                if config.encoder == "residual":
                    residual = edm.Conv(image, channels, 3, _INITIAL, "down", config.filter, late=True)
                    yield f"{side}x{side}_aux_residual", residual
                    image = channels
            skips.append(channels)
            for i in range(config.blocks):
                yield f"{side}x{side}_block{i}", edm.Block(channels, features, style, attention=attention)
                channels = features
                skips.append(channels)

    def _decoder(self, style: edm.BlockStyle, skips: list[int]) -> Iterator[tuple[str, nn.Module]]:
        """The way up: every block takes one skip, and the last of a resolution has its attention."""
        config = self.config
        table = edm.levels(config)
        channels = table[-1][1]
        for level, (side, features, attention) in reversed(list(enumerate(table))):
            if level + 1 == len(table):
                yield f"{side}x{side}_in0", edm.Block(channels, channels, style, attention=True)
                yield f"{side}x{side}_in1", edm.Block(channels, channels, style)
            else:
                yield f"{side}x{side}_up", edm.Block(channels, channels, style, resample="up")
            for i in range(config.blocks + 1):
                here = attention and i == config.blocks
                inputs = channels + skips.pop()
                yield f"{side}x{side}_block{i}", edm.Block(inputs, features, style, attention=here)
                channels = features
        yield f"{config.size}x{config.size}_aux_norm", edm.group_norm(channels, 1e-6)
        yield f"{config.size}x{config.size}_aux_conv", edm.Conv(channels, config.channels, 3, _FINAL)

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
        embedding, second = self.embed(t, label, augment, s)
        h = image = x.to(embedding.dtype)
        skips: list[Tensor] = []
        for name, module in self.enc.items():
            layer: Any = module
            if name.endswith("_aux_residual"):
                h = image = skips[-1] = layer(image).add_(h).mul_(HALF)
            else:
                h = layer(h) if name.endswith("_conv") else layer(h, embedding, second)
                skips.append(h)
        for name, module in self.dec.items():
            layer = module
            if name.endswith("_aux_norm"):
                h = F.silu(layer(h))
            elif name.endswith("_aux_conv"):
                h = layer(h)
            else:
                h = layer(torch.cat([h, skips.pop()], dim=1) if "_block" in name else h, embedding, second)
        return h.to(x.dtype)

    def embed(
        self, t: Tensor, label: Tensor | None, augment: Tensor | None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Each time with the conditions as one vector a sample, (B, embedding_multiplier * width); None without s."""
        features = self._features(t)
        rows = edm.label_rows(self, label, features)
        named: Tensor | None = None
        if self.map_label is not None:
            # No label is a row of zeros, of which the bias is left.
            named = self.map_label.bias if rows is None else self.map_label(rows * math.sqrt(self.config.classes))
            features = features + named
        features = edm.augmented(self, features, augment)
        embedding = F.silu(self.map_layer1(F.silu(self.map_layer0(features))))
        if s is None:
            return embedding, None
        assert self.map_layer0_s is not None
        assert self.map_layer1_s is not None
        other = self._features(s)
        other = edm.augmented(self, other if named is None else other + named, augment)
        return embedding, F.silu(self.map_layer1_s(F.silu(self.map_layer0_s(other))))

    def _features(self, t: Tensor) -> Tensor:
        """Sines, then cosines, of a noise label."""
        cosines, sines = self.map_noise(t).chunk(2, dim=1)
        return torch.cat([sines, cosines], dim=1).to(self.map_layer0.weight.dtype)


def _one_head(channels: int) -> int:
    return 1


FACES = SongUNetConfig(size=64, multipliers=(1, 2, 2, 2), dropout=0.25)
DDPMPP = SongUNetConfig(embedding="positional", encoder="standard", filter=(1, 1), noise_multiplier=1)
