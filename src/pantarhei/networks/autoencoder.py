"""The variational autoencoder of latent diffusion (Rombach et al. 2112.10752) as SD3 has it.

There are 16 channels, and no further convolutions at the latents.

Modules are named as in the published single files (under `first_stage_model.`), so a state dict of theirs is one of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.networks.attention import attend

EPS = 1e-6
LOGVAR = (-30.0, 20.0)


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an `Autoencoder`; the default is that of SD3.

    Attributes:
        image_channels: of the images.
        channels: of the latents.
        width: features at full resolution.
        multipliers: features of each resolution as multiples of `width`; each but the first halves the sides.
        blocks: residual blocks a resolution in the encoder; the decoder has one more.
        groups: of the norms.
        attention: between the two blocks in the middle.
        scale, shift: latents are (mean - shift) scale where a flow models them.
    """

    image_channels: int = 3
    channels: int = 16
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    groups: int = 32
    attention: bool = True
    scale: float = 1.5305
    shift: float = 0.0609

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        sizes = (self.image_channels, self.channels, self.width, self.blocks, self.groups, *self.multipliers)
        if not self.multipliers or min(sizes) < 1 or not self.scale > 0:
            raise ValueError(f"autoencoder: every size must be at least 1 and the scale positive, got {self}")
        if any(m * self.width % self.groups for m in self.multipliers):
            raise ValueError(f"groups: must divide all widths, got {self.groups} of {self.width} x {self.multipliers}")

    @property
    def factor(self) -> int:
        """How many times smaller a latent's side is."""
        return 2 ** (len(self.multipliers) - 1)


class Latents(NamedTuple):
    """The normal law of an image's latents: mean and log-variance, (B, channels, H / factor, W / factor)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw; gradients flow through it."""
        mean = self.mean
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + torch.exp(self.logvar / 2) * noise

    def divergence(self) -> Tensor:
        """KL divergence from the standard normal law in nats, (B,)."""
        parts = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return parts.flatten(1).sum(dim=1) / 2


class Autoencoder(nn.Module):
    """`forward(x)`: images (B, image_channels, H, W), sides multiples of the factor, to their decoded mean latents."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)

    def latents(self, x: Tensor) -> Latents:
        """The law of the latents of images in [-1, 1].

        Raises:
            ValueError: sides that are no multiples of the factor.
        """
        if x.ndim != 4 or any(side % self.config.factor for side in x.shape[2:]):
            raise ValueError(
                f"x: images with sides that are multiples of {self.config.factor} are needed, got {tuple(x.shape)}"
            )
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return Latents(mean, logvar.clamp(*LOGVAR))

    def encode(self, x: Tensor) -> Tensor:
        """Images to the latents that a flow models: the mean, shifted and scaled."""
        return (self.latents(x).mean - self.config.shift) * self.config.scale

    def decode(self, z: Tensor) -> Tensor:
        """These latents to images."""
        return self.decoder(z / self.config.scale + self.config.shift)

    def forward(self, x: Tensor) -> Tensor:
        """Images as they come back."""
        return self.decoder(self.latents(x).mean)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, EPS), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after, EPS), nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class _Attention(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        return x + self.proj_out(attend(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


class _Halved(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Doubled(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Middle(nn.Module):
    def __init__(self, width: int, config: AutoencoderConfig):
        super().__init__()
        self.block_1 = _Residual(width, width, config.groups)
        self.attn_1 = _Attention(width, config.groups) if config.attention else nn.Identity()
        self.block_2 = _Residual(width, width, config.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    """The blocks of one resolution, and what leads to the next."""

    def __init__(self, widths: list[int], groups: int):
        super().__init__()
        self.block = nn.ModuleList(_Residual(before, after, groups) for before, after in pairwise(widths))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.block, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.image_channels, config.width, 3, padding=1)
        self.down = nn.ModuleList()
        before = config.width
        for number, width in enumerate(widths):
            level = _Level([before] + [width] * config.blocks, config.groups)
            if number + 1 < len(widths):
                level.downsample = _Halved(width)
            self.down.append(level)
            before = width
        self.mid = _Middle(before, config)
        self.norm_out = nn.GroupNorm(config.groups, before, EPS)
        self.conv_out = nn.Conv2d(before, 2 * config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        before = widths[-1]
        self.conv_in = nn.Conv2d(config.channels, before, 3, padding=1)
        self.mid = _Middle(before, config)
        levels = []
        for number in range(len(widths) - 1, -1, -1):
            level = _Level([before] + [widths[number]] * (config.blocks + 1), config.groups)
            if number:
                level.upsample = _Doubled(widths[number])
            levels.append(level)
            before = widths[number]
        self.up = nn.ModuleList(levels[::-1])  # numbered by their resolution, the finest first
        self.norm_out = nn.GroupNorm(config.groups, before, EPS)
        self.conv_out = nn.Conv2d(before, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
