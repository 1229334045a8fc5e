"""NCSN++ / DDPM++ (Song et al. 2011.13456) as the rectified-flow paper's code lays it out, written plainly.

The baseline of `ncsnpp.py`: one flat list of modules walked in order, so that published state dicts fit
(`all_modules.<i>...`), each operation as the formula says it. Nothing is fused, shared or reordered.

    python benchmarks/plain_ncsnpp.py      # parameter counts; the goldens too where $PANTARHEI_GOLDENS is set
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIME_SCALE = 999.0
RESCALE = math.sqrt(2.0)
PARAMETERS = {"cifar10": 61_804_419, "256": 65_574_549}


@dataclass(frozen=True)
class PlainConfig:
    """The switches that the published configurations use; the defaults are CIFAR-10's.

    Attributes:
        size, channels: of the images.
        width, multipliers, blocks: feature channels at full size, their multiples, residual blocks a level.
        attention: side lengths at which attention follows every encoder block (and ends the decoder's level).
        fourier: random Fourier features of log(999 t) in place of sines and cosines of 999 t.
        fir: resampling by the kernel [1, 3, 3, 1] in place of nearest neighbours and means.
        pyramids: the image is fed in at every resolution and the output summed up over them.
        divide_by_time: the output is divided by 999 t.
        dropout: in the residual blocks.
    """

    size: int = 32
    channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 4
    attention: tuple[int, ...] = (16,)
    fourier: bool = False
    fir: bool = False
    pyramids: bool = False
    divide_by_time: bool = False
    dropout: float = 0.15

    @staticmethod
    def from_golden(config: dict[str, Any]) -> PlainConfig:
        """The configuration that a golden's json holds."""
        model = config["model"]
        return PlainConfig(
            size=config["data"]["image_size"],
            channels=config["data"]["num_channels"],
            width=model["nf"],
            multipliers=tuple(model["ch_mult"]),
            blocks=model["num_res_blocks"],
            attention=tuple(model["attn_resolutions"]),
            fourier=model["embedding_type"] == "fourier",
            fir=model["fir"],
            pyramids=model["progressive"] == "output_skip",
            divide_by_time=model["scale_by_sigma"],
            dropout=model["dropout"],
        )


CIFAR10 = PlainConfig()
LARGE = PlainConfig(256, 3, 128, (1, 1, 2, 2, 2, 2, 2), 2, (16,), True, True, True, True, 0.0)


class Fourier(nn.Module):
    """[sin, cos](2 pi W log(999 t)) with a frozen W."""

    def __init__(self, size: int):
        super().__init__()
        self.W = nn.Parameter(16.0 * torch.randn(size), requires_grad=False)

    def forward(self, logarithm: Tensor) -> Tensor:
        """(B,) to (B, 2 size)."""
        angle = 2 * math.pi * logarithm[:, None] * self.W[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Pointwise(nn.Module):
    """A linear map of the channels at every position ("NIN"), its weight stored as (in, out)."""

    def __init__(self, inputs: int, outputs: int, scale: float = 0.1):
        super().__init__()
        self.W = nn.Parameter(torch.empty(inputs, outputs))
        _scaled(self.W, inputs, outputs, scale)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        y = torch.tensordot(x.permute(0, 2, 3, 1), self.W, dims=1) + self.b
        return y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.GroupNorm_0 = _norm(channels)
        self.NIN_0 = Pointwise(channels, channels)
        self.NIN_1 = Pointwise(channels, channels)
        self.NIN_2 = Pointwise(channels, channels)
        self.NIN_3 = Pointwise(channels, channels, scale=1e-10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        batch, channels, height, width = x.shape
        h = self.GroupNorm_0(x)
        q, k, v = self.NIN_0(h), self.NIN_1(h), self.NIN_2(h)
        scores = torch.einsum("bchw,bcij->bhwij", q, k) * channels**-0.5
        weights = scores.reshape(batch, height, width, height * width).softmax(dim=-1)
        weights = weights.reshape(batch, height, width, height, width)
        h = torch.einsum("bhwij,bcij->bchw", weights, v)
        return (x + self.NIN_3(h)) / RESCALE


class Residual(nn.Module):
    """The BigGAN block; `change` is "up", "down" or nothing."""

    def __init__(self, inputs: int, outputs: int, embedding: int, config: PlainConfig, change: str = ""):
        super().__init__()
        self.change, self.fir = change, config.fir
        self.GroupNorm_0 = _norm(inputs)
        self.Conv_0 = _conv(inputs, outputs, 3)
        self.Dense_0 = _linear(embedding, outputs)
        self.GroupNorm_1 = _norm(outputs)
        self.Dropout_0 = nn.Dropout(config.dropout)
        self.Conv_1 = _conv(outputs, outputs, 3, scale=1e-10)
        self.Conv_2 = _conv(inputs, outputs, 1) if inputs != outputs or change else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H', W')."""
        h = F.silu(self.GroupNorm_0(x))
        if self.change:
            h, x = _resample(h, self.change, self.fir), _resample(x, self.change, self.fir)
        h = self.Conv_0(h)
        h = h + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = F.silu(self.GroupNorm_1(h))
        h = self.Conv_1(self.Dropout_0(h))
        if self.Conv_2 is not None:
            x = self.Conv_2(x)
        return (x + h) / RESCALE


class Combine(nn.Module):
    """The features plus a linear map of the image at their size."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.Conv_0 = _conv(inputs, outputs, 1)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        """Image (B, inputs, H, W), features (B, outputs, H, W) to features."""
        return self.Conv_0(image) + h


class PlainNCSNpp(nn.Module):
    """`forward(x, t)`: x (B, C, H, W) to the velocity there, t (B,) in [0, 1]."""

    def __init__(self, config: PlainConfig = CIFAR10):
        super().__init__()
        self.config = config
        embedding, channels, levels = 4 * config.width, config.width, len(config.multipliers)
        modules: list[nn.Module] = [Fourier(config.width)] if config.fourier else []
        modules.append(_linear((2 if config.fourier else 1) * config.width, embedding))
        modules.append(_linear(embedding, embedding))
        modules.append(_conv(config.channels, channels, 3))
        skips, side = [channels], config.size
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.blocks):
                modules.append(Residual(channels, config.width * multiplier, embedding, config))
                channels = config.width * multiplier
                if side in config.attention:
                    modules.append(Attention(channels))
                skips.append(channels)
            if level + 1 < levels:
                modules.append(Residual(channels, channels, embedding, config, "down"))
                side //= 2
                if config.pyramids:
                    modules.append(Combine(config.channels, channels))
                skips.append(channels)
        modules.append(Residual(channels, channels, embedding, config))
        modules.append(Attention(channels))
        modules.append(Residual(channels, channels, embedding, config))
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for _ in range(config.blocks + 1):
                modules.append(Residual(channels + skips.pop(), config.width * multiplier, embedding, config))
                channels = config.width * multiplier
            if side in config.attention:
                modules.append(Attention(channels))
            if config.pyramids or level == 0:
                modules.append(_norm(channels))
                modules.append(_conv(channels, config.channels, 3, scale=1e-10))
            if level:
                modules.append(Residual(channels, channels, embedding, config, "up"))
                side *= 2
        self.all_modules = nn.ModuleList(modules)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at (x, t)."""
        config, levels, module = self.config, len(self.config.multipliers), iter(self.all_modules)
        time = TIME_SCALE * t
        embedding = next(module)(torch.log(time)) if config.fourier else sinusoid(time, config.width)
        embedding = next(module)(embedding)
        embedding = next(module)(F.silu(embedding))
        image, h = x, next(module)(x)
        skips = [h]
        for level in range(levels):
            for _ in range(config.blocks):
                h = next(module)(h, embedding)
                if h.shape[-1] in config.attention:
                    h = next(module)(h)
                skips.append(h)
            if level + 1 < levels:
                h = next(module)(h, embedding)
                if config.pyramids:
                    image = _resample(image, "down", config.fir)
                    h = next(module)(image, h)
                skips.append(h)
        h = next(module)(h, embedding)
        h = next(module)(h)
        h = next(module)(h, embedding)
        output: Tensor | None = None
        for level in reversed(range(levels)):
            for _ in range(config.blocks + 1):
                h = next(module)(torch.cat([h, skips.pop()], dim=1), embedding)
            if h.shape[-1] in config.attention:
                h = next(module)(h)
            if config.pyramids or level == 0:
                part = F.silu(next(module)(h))
                part = next(module)(part)
                output = part if output is None else _resample(output, "up", config.fir) + part
            if level:
                h = next(module)(h, embedding)
        assert output is not None
        return output / time[:, None, None, None] if config.divide_by_time else output


def sinusoid(time: Tensor, size: int) -> Tensor:
    """Sines, then cosines, of `time` at geometrically spaced frequencies from 1 down to 1/10000."""
    half = size // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=time.dtype, device=time.device))
    angle = time[:, None] * frequencies[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def fir(x: Tensor, up: int, down: int, before: int, after: int) -> Tensor:
    """Zeros between the points (`up`), padding, the kernel [1, 3, 3, 1] both ways, every `down`-th point kept."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device)
    kernel = line[:, None] * line[None, :]
    kernel = kernel / kernel.sum() * up**2
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height, up, width, up)
    spread[:, :, :, 0, :, 0] = x
    spread = F.pad(spread.reshape(batch * channels, 1, height * up, width * up), (before, after, before, after))
    y = F.conv2d(spread, kernel.flip(0, 1)[None, None])[:, :, ::down, ::down]
    return y.reshape(batch, channels, y.shape[-2], y.shape[-1])


def _resample(x: Tensor, change: str, smooth: bool) -> Tensor:
    if change == "up":
        return fir(x, 2, 1, 2, 1) if smooth else F.interpolate(x, scale_factor=2.0, mode="nearest")
    return fir(x, 1, 2, 1, 1) if smooth else F.avg_pool2d(x, 2)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(channels // 4, 32), channels, eps=1e-6)


def _conv(inputs: int, outputs: int, kernel: int, scale: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    _scaled(conv.weight, inputs * kernel**2, outputs * kernel**2, scale)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    _scaled(linear.weight, inputs, outputs, 1.0)
    nn.init.zeros_(linear.bias)
    return linear


def _scaled(weight: Tensor, inputs: int, outputs: int, scale: float) -> None:
    """Uniform with variance `scale` over the mean of fan-in and fan-out."""
    bound = math.sqrt(6.0 * scale / (inputs + outputs))
    nn.init.uniform_(weight, -bound, bound)


def largest_error(folder: Path, name: str) -> float:
    """How far the plain network with a golden's weights is from its output, relative to each sample's largest value."""
    from safetensors.torch import load_file

    config = PlainConfig.from_golden(json.loads((folder / f"{name}.json").read_text())["config"])
    tensors = load_file(str(folder / f"{name}.safetensors"))
    network = PlainNCSNpp(config).eval()
    network.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")})
    with torch.no_grad():
        error = (network(tensors["in.x"], tensors["in.t"]) - tensors["out.v"]).abs()
    return float((error.flatten(1).amax(1) / tensors["out.v"].abs().flatten(1).amax(1)).max())


def main() -> int:
    """Print the counts and the errors; 1 if anything is off."""
    good = True
    for config, (name, expected) in zip((CIFAR10, LARGE), PARAMETERS.items(), strict=True):
        with torch.device("meta"):
            count = sum(p.numel() for p in PlainNCSNpp(config).parameters())
        good &= count == expected
        print(f"{name}: {count} parameters, {expected} published")
    if folder := os.environ.get("PANTARHEI_GOLDENS"):
        for name in ("ncsnpp_cifar_style", "ncsnpp_hires_style"):
            error = largest_error(Path(folder) / "rectified-flow", name)
            good &= error <= 1e-4
            print(f"{name}: off by {error:.1e}, 1e-4 allowed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
