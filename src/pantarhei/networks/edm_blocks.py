"""What the two U-Nets of EDM are made of (Karras et al. 2206.00364, appendix F): convolutions that resample, residual
blocks, embeddings of the noise level, and their initial values.

Modules are named as in the published files, so a state dict of theirs (without the prefix `model.`) is one of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.networks.attention import attend
from pantarhei.networks.ncsnpp import Dropout, pointwise
from pantarhei.networks.resampling import Resample, check_taps

Direction = Literal["up", "down"]
_REPEATED = Resample("up")  # of two equal taps: nothing is stored in it


class Initial(NamedTuple):
    """How a layer starts: uniform within sqrt(6 / (fan in + fan out)) ("xavier") or sqrt(3 / fan in) ("kaiming"), times a
    scale for the weights and one for the biases."""

    rule: Literal["xavier", "kaiming"]
    weight: float = 1.0
    bias: float = 0.0


@dataclass(frozen=True)
class BlockStyle:
    """What the blocks of a network have in common.

    Attributes:
        embedding: features of the embedded noise level.
        eps: of the group norms.
        scale: what multiplies the sum of a branch and its skip.
        adaptive: the embedding scales and shifts the second norm; else it is added before it.
        project: a block that resamples has a 1x1 convolution in its skip even where the channels stay.
        heads: number of attention heads of so many channels; 0 is no attention.
        filter: of halving and doubling.
        dropout: before the second convolution.
        initial, final, attention: initial values of most layers, of the last of each branch, and of queries, keys, values.
        groups: of the group norms; 0 for at most 32 groups of at least 4 channels.
        second_time: the embedding of a second time is added to what that of the first one does, through a layer of its own.
    """

    embedding: int
    eps: float
    scale: float
    adaptive: bool
    project: bool
    heads: Callable[[int], int]
    filter: tuple[float, ...]
    dropout: float
    initial: Initial
    final: Initial
    attention: Initial
    groups: int = 0
    second_time: bool = False


class Linear(nn.Linear):
    """A linear layer with EDM's initial values."""

    def __init__(self, inputs: int, outputs: int, initial: Initial, bias: bool = True):
        super().__init__(inputs, outputs, bias=bias)
        _initialise(self, initial)

    def reset_parameters(self) -> None:
        """Nothing: values are drawn once, by the rule given."""


class Conv(nn.Conv2d):
    """A 1x1 or 3x3 convolution, with halving before it or doubling.

    Args:
        inputs, outputs: channels.
        side: of the kernel.
        initial: initial values.
        resample: "up", "down" or None.
        filter: its taps.
        late: halve after the convolution instead of before it.
    """

    resample_filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        side: int,
        initial: Initial,
        resample: Direction | None = None,
        filter: tuple[float, ...] = (1, 1),
        late: bool = False,
    ):
        super().__init__(inputs, outputs, side, padding=side // 2)
        self.resample, self.late = resample, late
        if resample:
            self.register_buffer("resample_filter", filter_of(filter))
        _initialise(self, initial)

    def reset_parameters(self) -> None:
        """Nothing: values are drawn once, by the rule given."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W')."""
        assert self.bias is not None
        box = self.resample is not None and self.resample_filter.shape[-1] == 2
        if self.late:
            # Filters commute: smoothed first, only the pixels that stay are convolved, at a quarter of the work.
            kernel = self.resample_filter.expand(self.in_channels, 1, -1, -1)
            smooth = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=self.in_channels)
            return F.conv2d(smooth, self.weight, self.bias, stride=2)
        if self.resample == "up" and self.kernel_size[0] == 1:
            # The same for doubling. The bias comes after it, because the filter loses some of a constant at the border.
            h = resampled(F.conv2d(x, self.weight), self.resample_filter, "up")
            return h.add_(self.bias[:, None, None])
        if self.resample == "up" and box:
            return _REPEATED.convolved(x, self)
        if self.resample:
            x = resampled(x, self.resample_filter, self.resample)
        if self.kernel_size[0] == 1:
            return pointwise(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class Resampling(nn.Module):
    """Halving or doubling without weights."""

    resample_filter: Tensor

    def __init__(self, direction: Direction, filter: tuple[float, ...]):
        super().__init__()
        self.direction = direction
        self.register_buffer("resample_filter", filter_of(filter))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W) or (B, C, H/2, W/2)."""
        return resampled(x, self.resample_filter, self.direction)


class Block(nn.Module):
    """norm, SiLU, (resampling) 3x3, embedding, norm, SiLU, dropout, 3x3, + skip; then attention where asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: BlockStyle,
        *,
        attention: bool = False,
        resample: Direction | None = None,
    ):
        super().__init__()
        self.scale, self.adaptive = style.scale, style.adaptive
        self.heads = style.heads(outputs) if attention else 0
        self.norm0 = group_norm(inputs, style.eps, style.groups)
        self.conv0 = Conv(inputs, outputs, 3, style.initial, resample, style.filter)
        modulations = outputs * (2 if style.adaptive else 1)
        self.affine = Linear(style.embedding, modulations, style.initial)
        self.affine_s = Linear(style.embedding, modulations, style.initial) if style.second_time else None
        self.norm1 = group_norm(outputs, style.eps, style.groups)
        self.dropout = Dropout(style.dropout) if style.dropout else nn.Identity()
        self.conv1 = Conv(outputs, outputs, 3, style.final)
        self.skip: Any = None
        if inputs != outputs or (resample and style.project):
            self.skip = Conv(inputs, outputs, 1, style.initial, resample, style.filter)
        elif resample:
            self.skip = Resampling(resample, style.filter)
        if self.heads:
            self.norm2 = group_norm(outputs, style.eps, style.groups)
            self.qkv = Conv(outputs, 3 * outputs, 1, style.attention)
            self.proj = Conv(outputs, outputs, 1, style.final)

    def forward(self, x: Tensor, embedding: Tensor, second: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W), (B, features), for the second time the same or None, to (B, outputs, H', W')."""
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(embedding)
        if second is not None:
            assert self.affine_s is not None
            modulation = modulation + self.affine_s(second)
        modulation = modulation[:, :, None, None]
        if self.adaptive:
            scale, shift = modulation.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm1(h), 1 + scale)
        else:
            h = self.norm1(h.add_(modulation))
        h = self.conv1(self.dropout(F.silu(h))).add_(x if self.skip is None else self.skip(x))
        h = self._scaled(h)
        return self._attended(h) if self.heads else h

    def _scaled(self, h: Tensor) -> Tensor:
        return h if self.scale == 1 else h.mul_(self.scale)

    def _attended(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm2(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        # The 3 c outputs of `qkv` are ordered head, feature, and last which of the three.
        parts = self.qkv.weight.reshape(c, 3, c).unbind(1)
        wo, bo = self.proj.weight[:, :, 0, 0], self.proj.bias
        assert self.qkv.bias is not None
        assert bo is not None
        biases = self.qkv.bias.reshape(c, 3).unbind(1)
        if self.heads == 1:
            # One head as wide as the features needs two maps instead of four: the scores are h (Wq' Wk) h' (what the key's
            # bias adds to a row of them drops out of the softmax), and the mean of the values is mapped as they would be.
            wq, wk, wv = parts
            asked = F.linear(h, wk.t() @ wq, biases[0] @ wk)
            mixed = attend(asked[:, None], h[:, None], h[:, None])[:, 0]
            mixed = F.linear(mixed, wo @ wv, bo + wo @ biases[2])
        else:
            qkv = F.linear(h, torch.cat(parts), torch.cat(biases))
            q, k, v = qkv.reshape(b, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.linear(attend(q, k, v).transpose(1, 2).reshape(b, -1, c), wo, bo)
        # x comes first: the sum has its memory layout, which is that of the rest of the network.
        return self._scaled(x + mixed.reshape(b, height, width, c).permute(0, 3, 1, 2))


class FourierEmbedding(nn.Module):
    """Cosines, then sines, of random frequencies."""

    freqs: Tensor

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2) * scale)

    def _apply(self, fn: Any, recurse: bool = True) -> FourierEmbedding:
        # Angles reach hundreds of radians: rounded to half precision these frequencies would be others.
        kept = self.freqs
        super()._apply(fn, recurse)
        if self.freqs.dtype in (torch.float16, torch.bfloat16):
            self.freqs = kept.to(self.freqs.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, width), at least in single precision."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        angles = t[:, None] * (2 * math.pi * self.freqs).to(t.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class PositionalEmbedding(nn.Module):
    """Cosines, then sines, of frequencies from 1 to 1/10000 (that last one included or not)."""

    def __init__(self, width: int, endpoint: bool):
        super().__init__()
        self.count, self.last = width // 2, width // 2 - (1 if endpoint else 0)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B, width), at least in single precision."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        powers = torch.arange(self.count, device=t.device, dtype=t.dtype) * (-math.log(10_000) / self.last)
        angles = t[:, None] * powers.exp()
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def levels(config: Any) -> list[tuple[int, int, bool]]:
    """(side, feature channels, attention or not) of each resolution, from the highest."""
    sides = [config.size >> level for level in range(len(config.multipliers))]
    return [
        (side, config.width * m, side in config.attention) for side, m in zip(sides, config.multipliers, strict=True)
    ]


def check(config: Any) -> None:
    """Make tuples of a configuration's lists, and refuse sizes that make no network.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("multipliers", "attention", "filter"):
        if hasattr(config, name):
            object.__setattr__(config, name, tuple(getattr(config, name)))
    if hasattr(config, "filter"):
        check_taps(config.filter)
    least = min(config.channels, config.blocks, config.embedding_multiplier, *config.multipliers, 1)
    if least < 1 or not config.multipliers or min(config.classes, config.augment_dim) < 0:
        raise ValueError(f"network: every size must be at least 1, classes and augment_dim at least 0, got {config}")
    if config.width < 4 or config.width % 4:
        raise ValueError(f"width: must be a positive multiple of 4, got {config.width}")
    factor = 2 ** (len(config.multipliers) - 1)
    if config.size < 1 or config.size % factor:
        raise ValueError(
            f"size: {len(config.multipliers)} resolutions need a side divisible by {factor}, got {config.size}"
        )
    for name in ("dropout", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: must lie in [0, 1), got {getattr(config, name)}")


def label_rows(network: nn.Module, label: Tensor | None, like: Tensor) -> Tensor | None:
    """What the class embedding is given: rows of (B, classes), one-hot or zero for the null class; None for none at all.

    Args:
        network: with a `config`.
        label: indices (B,) in [0, classes], where `classes` is the null class, or rows as they are.
        like: has the device and the dtype that is wanted.

    Raises:
        ValueError: a label for a network without classes, or rows of another width.
    """
    config: Any = network.config
    if label is None:
        return None
    if not config.classes:
        raise ValueError("label: this network was built without classes")
    if label.is_floating_point():
        if label.ndim != 2 or label.shape[1] != config.classes:
            expected = f"(B, {config.classes})"
            raise ValueError(f"label: rows of numbers must have the shape {expected}, got {tuple(label.shape)}")
        rows = label.to(like.dtype)
    else:
        rows = (label[:, None] == torch.arange(config.classes, device=label.device)).to(like.dtype)
    if network.training and config.label_dropout:
        rows = rows * (torch.rand_like(rows[:, :1]) >= config.label_dropout)
    return rows


def augmented(network: nn.Module, features: Tensor, augment: Tensor | None) -> Tensor:
    """Features of the noise level, plus those of what was done to the images (B, augment_dim) where that is given.

    Raises:
        ValueError: for a network without such a place, or rows of another width.
    """
    config: Any = network.config
    if augment is None:
        return features
    if augment.ndim != 2 or augment.shape[1] != config.augment_dim or not config.augment_dim:
        expected = f"takes rows of shape (B, {config.augment_dim})" if config.augment_dim else "takes none"
        raise ValueError(f"augment: this network {expected}, got {tuple(augment.shape)}")
    map_augment: Any = network.map_augment
    return features + map_augment(augment.to(features.dtype))


def group_norm(channels: int, eps: float, groups: int = 0) -> nn.GroupNorm:
    """So many groups; by default at most 32, of at least 4 channels.

    Raises:
        ValueError: the channels do not split so.
    """
    multiple = groups or 32
    groups = groups or max(1, min(32, channels // 4))
    if channels % groups:
        raise ValueError(
            f"width: {channels} feature channels do not split into {groups} groups; take a multiple of {multiple}"
        )
    return nn.GroupNorm(groups, channels, eps=eps)


def filter_of(taps: tuple[float, ...]) -> Tensor:
    """The kernel of halving, (1, 1, k, k): taps by taps, summing to 1."""
    line = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(line, line) / line.sum() ** 2)[None, None]


def resampled(x: Tensor, kernel: Tensor, direction: str) -> Tensor:
    """(B, C, H, W) doubled or halved with an even, symmetric kernel; there are zeros beyond the border."""
    channels, taps = x.shape[1], kernel.shape[-1]
    if taps == 2:  # both the same
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if direction == "up" else F.avg_pool2d(x, 2)
    kernel = kernel.expand(channels, 1, -1, -1)
    margin = taps // 2 - 1
    if direction == "up":  # a pixel is spread over four
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=margin, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=margin, groups=channels)


@torch.no_grad()
def _initialise(layer: nn.Linear | nn.Conv2d, initial: Initial) -> None:
    outputs, inputs = layer.weight.shape[:2]
    area = layer.weight[0, 0].numel() if layer.weight.ndim > 2 else 1
    bound = math.sqrt(6 / (area * (inputs + outputs)) if initial.rule == "xavier" else 3 / (area * inputs))
    layer.weight.uniform_(-bound, bound).mul_(initial.weight)
    if layer.bias is not None:
        layer.bias.uniform_(-bound, bound).mul_(initial.bias)
