"""A compact U-Net for small images, made to be quick on a CPU as well.

Residual blocks with GroupNorm and time-dependent scale and shift (Dhariwal & Nichol 2105.05233), attention at the lowest
resolution only, a stride-2 convolution down and nearest-neighbour up, one skip a resolution instead of one a block: the
fewest large operations for a given number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.networks.attention import attend
from pantarhei.networks.embeddings import ClassEmbedding, TimeEmbedding, check_second_time


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a `UNet`.

    Attributes:
        channels: image channels.
        width: feature channels at full resolution.
        multipliers: feature channels of each resolution, as multiples of `width`; halves the image between two.
        blocks: residual blocks on each side of each resolution: one number for all, or one each. Blocks at the lowest
            resolution are cheap for their parameters.
        attention: self-attention in the middle, at the lowest resolution.
        classes: number of classes, 0 for none; index `classes` is the null class.
        vector: width of a conditioning vector, 0 for none (null: zeros).
        dropout: in the residual blocks.
        context: channels of an image of the same size that the network is given beside x, 0 for none (null: zeros).
        fields: how many fields like x are predicted, stacked along dimension 1.
        second_time: there is a branch for a second time.
    """

    channels: int = 3
    width: int = 64
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int | tuple[int, ...] = 2
    attention: bool = True
    classes: int = 0
    vector: int = 0
    dropout: float = 0.0
    context: int = 0
    fields: int = 1
    second_time: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if not isinstance(self.blocks, int):
            object.__setattr__(self, "blocks", tuple(self.blocks))
        if min(self.channels, self.fields) < 1 or self.width < 8 or self.width % 8 or not self.multipliers:
            raise ValueError(
                f"network: channels and fields >= 1, width a multiple of 8 and a multiplier are needed, got {self}"
            )
        if len(self.block_counts) != len(self.multipliers) or min(self.block_counts) < 1:
            raise ValueError(
                f"blocks: one number >= 1, or one for each of {len(self.multipliers)} resolutions, got {self.blocks}"
            )

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Residual blocks of each resolution."""
        return (self.blocks,) * len(self.multipliers) if isinstance(self.blocks, int) else self.blocks


class ResidualBlock(nn.Module):
    """x + conv(silu(scale, shift (norm(conv(silu(norm(x)))))))."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(_groups(inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2 = nn.GroupNorm(_groups(outputs), outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W), (B, embedding) to (B, outputs, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.skip(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all positions, heads of about 32 channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // 32)
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        b, c, height, width = x.shape
        q, k, v = (
            part.reshape(b, self.heads, c // self.heads, height * width).transpose(-1, -2)
            for part in self.qkv(self.norm(x)).chunk(3, dim=1)
        )
        mixed = attend(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(b, c, height, width))


class UNet(nn.Module):
    """`forward(x, t, label=None, vector=None, context=None, s=None)`: x (B, C, H, W) to (B, fields * C, H, W), t (B,) in
    [0, 1]; s, a second time like t, where the network has a branch for it, which is left out without s.

    H and W must be divisible by 2^(resolutions - 1). The output layer starts at zero.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.multipliers]
        embedding = 4 * config.width
        self.time = TimeEmbedding(embedding)
        self.time_s = TimeEmbedding(embedding) if config.second_time else None
        self.classes = ClassEmbedding(config.classes + 1, embedding) if config.classes else None
        self.vector = nn.Linear(config.vector, embedding) if config.vector else None
        self.stem = nn.Conv2d(config.channels + config.context, widths[0], 3, padding=1)

        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, embedding, config.dropout)

        counts = config.block_counts
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            self.encoder.append(nn.ModuleList(block(width, width) for _ in range(counts[i])))
            if i + 1 < len(widths):
                self.downs.append(nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1))
        self.middle = Attention(widths[-1]) if config.attention else nn.Identity()
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(widths))):
            first = block(2 * widths[i], widths[i])
            self.decoder.append(nn.ModuleList([first, *(block(widths[i], widths[i]) for _ in range(counts[i] - 1))]))
            if i:
                self.ups.append(nn.Conv2d(widths[i], widths[i - 1], 3, padding=1))
        self.norm = nn.GroupNorm(_groups(widths[0]), widths[0])
        self.head = nn.Conv2d(widths[0], config.fields * config.channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        context: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        """The network's output at (x, t) or (x, t, s) under its conditions.

        Raises:
            ValueError: for a condition or a second time that the network was built without.
        """
        check_second_time(self.time_s, s)
        embedding = self._embed(t, label, vector, s)
        h, skips = self.stem(self._beside(x, context)), []
        for i, blocks in enumerate(self.encoder):
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
            skips.append(h)
            if i < len(self.downs):
                h = self.downs[i](h)
        h = self.middle(h)
        for i, blocks in enumerate(self.decoder):
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
            if i < len(self.ups):
                # Convolved before it is enlarged: a quarter of the work, and the next block convolves at full size.
                h = F.interpolate(self.ups[i](h), scale_factor=2.0, mode="nearest")
        return self.head(F.silu(self.norm(h)))

    def _beside(self, x: Tensor, context: Tensor | None) -> Tensor:
        if not self.config.context:
            if context is not None:
                raise ValueError("context: this network was built without a context image")
            return x
        if context is None:
            context = x.new_zeros(x.shape[0], self.config.context, *x.shape[2:])
        return torch.cat([x, context], dim=1)

    def _embed(self, t: Tensor, label: Tensor | None, vector: Tensor | None, s: Tensor | None) -> Tensor:
        embedding = self.time(t)
        if s is not None:
            assert self.time_s is not None
            embedding = embedding + self.time_s(s)
        if self.classes is not None:
            if label is None:
                label = torch.full((t.shape[0],), self.config.classes, device=t.device)
            embedding = embedding + self.classes(label)
        elif label is not None:
            raise ValueError("label: this network was built without classes")
        if self.vector is not None:
            if vector is not None:
                embedding = embedding + self.vector(vector)
        elif vector is not None:
            raise ValueError("vector: this network was built without a conditioning vector")
        return F.silu(embedding)


def _groups(channels: int) -> int:
    """Groups of about 16 channels, at most 8 of them."""
    groups = max(1, min(8, channels // 16))
    while channels % groups:
        groups -= 1
    return groups
