"""NCSN++ and DDPM++: the residual U-Net of score-based models (Song et al. 2011.13456, appendix H).

Residual blocks that resample inside (as in BigGAN), attention at chosen resolutions, one skip a block, and optionally a
pyramid of the image at the input and one of the output. The published networks of rectified flow (2209.03003) are the
default (CIFAR-10) and `HIGH_RESOLUTION` (256 x 256).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.networks.attention import attend
from pantarhei.networks.embeddings import ClassEmbedding, check_second_time, sinusoids
from pantarhei.networks.resampling import Resample, check_taps

HALF = math.sqrt(0.5)


@dataclass(frozen=True)
class NCSNppConfig:
    """Sizes and switches of an `NCSNpp`; the default is DDPM++ for CIFAR-10, 61.8 M parameters.

    Attributes:
        size: side of the images; decides where `attention` falls.
        channels: image channels.
        width: feature channels at full resolution.
        multipliers: feature channels of each resolution, as multiples of `width`; the side halves between two.
        blocks: residual blocks a resolution on the way down; there is one more on the way up.
        attention: sides at which there is self-attention (the middle always has it).
        embedding: of the time: "sinusoid", or "fourier" (random frequencies of its logarithm).
        fourier_scale: deviation of the random frequencies.
        time_scale: what multiplies t in [0, 1].
        time_floor: smallest t that is told apart from 0; needed where a logarithm or a division is taken.
        filter: of halving and doubling, (1, 1) or (1, 3, 3, 1).
        input_pyramid: add the halved image, through a 1x1 convolution, at every resolution.
        output_pyramid: sum doubled outputs of every resolution.
        divide: divide the output by the scaled time.
        rescale: multiply sums of a branch and its skip by sqrt(1/2).
        dropout: in the residual blocks.
        classes: number of classes, 0 for none; index `classes` is the null class.
        second_time: there is a branch for a second time.
    """

    size: int = 32
    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    embedding: Literal["sinusoid", "fourier"] = "sinusoid"
    fourier_scale: float = 16.0
    time_scale: float = 999.0
    time_floor: float = 0.0
    filter: tuple[float, ...] = (1, 1)
    input_pyramid: bool = False
    output_pyramid: bool = False
    divide: bool = False
    rescale: bool = True
    dropout: float = 0.0
    classes: int = 0
    second_time: bool = False

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention", "filter"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_taps(self.filter)
        levels = len(self.multipliers)
        if min(self.channels, self.blocks) < 1 or not self.multipliers or self.width < 4 or self.width % 4:
            raise ValueError(f"network: channels, blocks >= 1 and a width that 4 divides are needed, got {self}")
        if self.size < 1 or self.size % 2 ** (levels - 1):
            raise ValueError(
                f"size: {levels} resolutions need a side divisible by {2 ** (levels - 1)}, got {self.size}"
            )
        if self.embedding not in ("sinusoid", "fourier"):
            raise ValueError(f"embedding: must be sinusoid or fourier, got {self.embedding!r}")
        if (self.embedding == "fourier" or self.divide) and not self.time_floor > 0:
            raise ValueError("time_floor: must be positive where the time's logarithm or inverse is taken")

    @property
    def levels(self) -> tuple[tuple[int, bool], ...]:
        """(feature channels, attention or not) of each resolution, from the highest."""
        return tuple((self.width * m, self.size >> i in self.attention) for i, m in enumerate(self.multipliers))


HIGH_RESOLUTION = NCSNppConfig(
    size=256,
    multipliers=(1, 1, 2, 2, 2, 2, 2),
    blocks=2,
    embedding="fourier",
    time_floor=1e-3,
    filter=(1, 3, 3, 1),
    input_pyramid=True,
    output_pyramid=True,
    divide=True,
)


class TimeFeatures(nn.Module):
    """Sinusoids of the scaled time, or of random frequencies of its logarithm: (B,) to (B, width)."""

    frequencies: Tensor

    def __init__(self, config: NCSNppConfig):
        super().__init__()
        self.fourier = config.embedding == "fourier"
        self.width = 2 * config.width if self.fourier else config.width
        if self.fourier:
            self.register_buffer("frequencies", torch.randn(config.width) * config.fourier_scale)

    def forward(self, scaled: Tensor) -> Tensor:
        """Features of the scaled time, sines first."""
        if not self.fourier:
            return sinusoids(scaled, self.width, scale=1.0)
        angles = 2 * math.pi * scaled.log()[:, None] * self.frequencies.to(scaled.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Self-attention of one head over all positions, as a residual."""

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.scale = scale
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        for part in self.qkv.weight.split(channels):
            _uniform(part, 0.1)
        nn.init.zeros_(self.qkv.bias)  # type: ignore[arg-type]
        _initialise(self.out, 1e-10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        b, c, height, width = x.shape
        h = self.norm(x)
        # One head as wide as the features needs two maps instead of four: the scores are h (Wq' Wk) h' (what the key's bias
        # adds to a row of them drops out of the softmax), and the mean of the values is mapped as the values would be.
        wq, wk, wv = self.qkv.weight[:, :, 0, 0].chunk(3)
        wo = self.out.weight[:, :, 0, 0]
        assert self.qkv.bias is not None
        assert self.out.bias is not None
        bq, _, bv = self.qkv.bias.chunk(3)
        asked = pointwise(h, (wk.t() @ wq)[:, :, None, None], bq @ wk)
        query, key = (part.permute(0, 2, 3, 1).reshape(b, 1, height * width, c) for part in (asked, h))
        mixed = attend(query, key, key).reshape(b, height, width, c).permute(0, 3, 1, 2)
        mixed = mixed.contiguous() if x.is_contiguous() else mixed  # in the layout that the rest of the network has
        h = pointwise(mixed, (wo @ wv)[:, :, None, None], self.out.bias + wo @ bv)
        return h.add_(x).mul_(self.scale)


class Block(nn.Module):
    """norm, SiLU, (resample), 3x3, + time, norm, SiLU, dropout, 3x3, + skip; then attention where asked for."""

    def __init__(
        self, config: NCSNppConfig, inputs: int, outputs: int, attention: bool = False, resample: str | None = None
    ):
        super().__init__()
        self.scale = HALF if config.rescale else 1.0
        self.norm0 = _norm(inputs)
        self.conv0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(4 * config.width, outputs)
        self.norm1 = _norm(outputs)
        self.dropout = Dropout(config.dropout) if config.dropout else nn.Identity()
        self.conv1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip: Any = nn.Conv2d(inputs, outputs, 1) if resample or inputs != outputs else None
        self.attention = Attention(outputs, self.scale) if attention else None
        self.resample = Resample(resample, config.filter) if resample else None
        _initialise(self.conv0, 1.0)
        _initialise(self.time, 1.0)
        _initialise(self.conv1, 1e-10)
        if self.skip is not None:
            _initialise(self.skip, 1.0)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, 4 width) to (B, outputs, H', W')."""
        h = F.silu(self.norm0(x))
        if self.resample is None:
            h = self.conv0(h)
            x = self._skipped(x)
        elif self.resample.up:
            # 1x1 convolution and doubling commute: the convolution takes a quarter of the work on the small image.
            h = self.resample.convolved(h, self.conv0)
            x = self.resample(self._skipped(x)) if self.resample.box else self._skipped(self.resample(x))
        else:
            h, x = self.conv0(self.resample(h)), self._skipped(self.resample(x))
        h = h.add_(self.time(embedding)[:, :, None, None])
        h = self.dropout(F.silu(self.norm1(h)))
        h = self.conv1(h).add_(x).mul_(self.scale)
        return h if self.attention is None else self.attention(h)

    def _skipped(self, x: Tensor) -> Tensor:
        return x if self.skip is None else pointwise(x, self.skip.weight, self.skip.bias)


class Head(nn.Module):
    """norm, SiLU, 3x3: features to an image."""

    def __init__(self, features: int, channels: int):
        super().__init__()
        self.norm = _norm(features)
        self.conv = nn.Conv2d(features, channels, 3, padding=1)
        _initialise(self.conv, 1e-10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, features, H, W) to (B, channels, H, W)."""
        return self.conv(F.silu(self.norm(x)))


class Down(nn.Module):
    """One resolution on the way down: halve (but at the first), add the image pyramid, blocks."""

    def __init__(self, config: NCSNppConfig, level: int):
        super().__init__()
        features, attention = config.levels[level]
        above = config.levels[max(level - 1, 0)][0]
        self.halving = Block(config, above, above, resample="down") if level else None
        self.pyramid = nn.Conv2d(config.channels, above, 1) if level and config.input_pyramid else None
        self.shrink = Resample("down", config.filter)
        if self.pyramid is not None:
            _initialise(self.pyramid, 1.0)
        sizes = [above if level else config.width, *(features,) * config.blocks]
        self.blocks = nn.ModuleList(Block(config, a, b, attention) for a, b in pairwise(sizes))

    def forward(self, h: Tensor, image: Tensor, embedding: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features and image of this resolution; every block leaves its result in `skips`."""
        if self.halving is not None:
            h = self.halving(h, embedding)
            if self.pyramid is not None:
                image = self.shrink(image)
                h = h + self.pyramid(image)
            skips.append(h)
        for block in self.blocks:
            h = block(h, embedding)
            skips.append(h)
        return h, image


class Up(nn.Module):
    """One resolution on the way up: double (but at the lowest), blocks with one skip each, an output where asked for."""

    def __init__(self, config: NCSNppConfig, level: int, skips: list[int]):
        super().__init__()
        features, attention = config.levels[level]
        lowest = level + 1 == len(config.levels)
        below = features if lowest else config.levels[level + 1][0]
        self.doubling = None if lowest else Block(config, below, below, resample="up")
        self.blocks = nn.ModuleList()
        for i in range(config.blocks + 1):
            inputs = (below if i == 0 else features) + skips.pop()
            self.blocks.append(Block(config, inputs, features, attention and i == config.blocks))
        self.head = Head(features, config.channels) if config.output_pyramid or level == 0 else None
        self.enlarge = Resample("up", config.filter)

    def forward(
        self, h: Tensor, out: Tensor | None, embedding: Tensor, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Features of this resolution and the output so far."""
        if self.doubling is not None:
            h = self.doubling(h, embedding)
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        if self.head is None:
            return h, out
        part = self.head(h)
        return h, part if out is None else self.enlarge(out) + part


class NCSNpp(nn.Module):
    """`forward(x, t, label=None, s=None)`: x (B, C, H, W) to the same shape, t (B,) in [0, 1]; s, a second time like t,
    where the network has a branch for it, which is left out without s.

    H and W must be divisible by 2^(resolutions - 1); attention sits at fixed depths, wherever `size` put it.
    """

    def __init__(self, config: NCSNppConfig):
        super().__init__()
        self.config = config
        self.features = TimeFeatures(config)
        self.time0 = nn.Linear(self.features.width, 4 * config.width)
        self.time1 = nn.Linear(4 * config.width, 4 * config.width)
        second = config.second_time
        self.time0_s = nn.Linear(self.features.width, 4 * config.width) if second else None
        self.time1_s = nn.Linear(4 * config.width, 4 * config.width) if second else None
        self.classes = ClassEmbedding(config.classes + 1, self.features.width) if config.classes else None
        self.stem = nn.Conv2d(config.channels, config.width, 3, padding=1)
        for layer in (self.time0, self.time1, self.time0_s, self.time1_s, self.stem):
            if layer is not None:
                _initialise(layer, 1.0)
        levels = range(len(config.levels))
        self.down = nn.ModuleList(Down(config, level) for level in levels)
        lowest = config.levels[-1][0]
        self.middle = nn.ModuleList([Block(config, lowest, lowest, attention=True), Block(config, lowest, lowest)])
        skips = self._skips(config)
        self.up = nn.ModuleList(Up(config, level, skips) for level in reversed(levels))

    @staticmethod
    def _skips(config: NCSNppConfig) -> list[int]:
        """Channels of everything that the way down leaves for the way up, in order."""
        skips = [config.width]
        for level, (features, _) in enumerate(config.levels):
            skips += [config.levels[level - 1][0]] * (level > 0) + [features] * config.blocks
        return skips

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, s: Tensor | None = None) -> Tensor:
        """The network's output at (x, t) or (x, t, s) under its condition.

        Raises:
            ValueError: for a label or a second time that the network was built without.
        """
        check_second_time(self.time0_s, s)
        scaled = self._scaled(t)
        embedding = self._embed(scaled, label, s)
        image, h = x, self.stem(x)
        skips = [h]
        for down in self.down:
            h, image = down(h, image, embedding, skips)
        for block in self.middle:
            h = block(h, embedding)
        out: Tensor | None = None
        for up in self.up:
            h, out = up(h, out, embedding, skips)
        assert out is not None
        return out / scaled[:, None, None, None].to(out.dtype) if self.config.divide else out

    def _scaled(self, t: Tensor) -> Tensor:
        return self.config.time_scale * t.clamp_min(self.config.time_floor)

    def _embed(self, scaled: Tensor, label: Tensor | None, s: Tensor | None) -> Tensor:
        features = self.features(scaled).to(self.time0.weight.dtype)
        if self.classes is not None:
            if label is None:
                label = torch.full(scaled.shape, self.config.classes, device=scaled.device)
            features = features + self.classes(label)
        elif label is not None:
            raise ValueError("label: this network was built without classes")
        embedding = self.time1(F.silu(self.time0(features)))
        if s is not None:
            assert self.time0_s is not None
            assert self.time1_s is not None
            second = self.features(self._scaled(s)).to(self.time0.weight.dtype)
            embedding = embedding + self.time1_s(F.silu(self.time0_s(second)))
        return F.silu(embedding)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution.

    On one thread PyTorch takes the slow one of its two CPU libraries below 16 images; rows may as well be the images.
    """
    b, c, height, width = x.shape
    few = x.device.type == "cpu" and b < 16
    if not few or not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, weight, bias)
    rows = x.permute(0, 2, 3, 1).reshape(b * height, 1, width, c).permute(0, 3, 1, 2)
    return F.conv2d(rows, weight, bias).permute(0, 2, 3, 1).reshape(b, height, width, -1).permute(0, 3, 1, 2)


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn at half the price on a CPU (uniform numbers in place of Bernoulli ones)."""

    def forward(self, input: Tensor) -> Tensor:
        """Like the input."""
        if not self.training or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        return input.mul_(torch.rand_like(input).ge_(self.p).mul_(1 / (1 - self.p)))


def _norm(channels: int) -> nn.GroupNorm:
    groups = max(1, min(32, channels // 4))
    if channels % groups:
        raise ValueError(f"width: {channels} feature channels do not split into {groups} groups; take a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _initialise(layer: nn.Linear | nn.Conv2d, scale: float) -> None:
    _uniform(layer.weight, scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


@torch.no_grad()
def _uniform(weight: Tensor, scale: float) -> None:
    """Uniform with variance scale / mean of fan-in and fan-out."""
    area = weight[0, 0].numel() if weight.ndim > 2 else 1
    bound = math.sqrt(3 * scale / (area * (weight.shape[0] + weight.shape[1]) / 2))
    weight.uniform_(-bound, bound)
