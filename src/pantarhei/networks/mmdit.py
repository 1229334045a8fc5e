"""MM-DiT: text and image tokens with weights of their own that meet in attention (Esser et al. 2403.03206; SD3).

Modules are named as in the published single files of SD3 and SD3.5 (under `model.diffusion_model.`), so a state dict of
theirs is one of ours. The published networks give noise minus data at a noise level times 1000; `MMDiT` is the velocity of
our convention, data minus noise at t = 1 - level.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

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
    VectorEmbedder,
    initialise,
    modulated,
    positions,
    unpatched,
)

LEVELS = 1000  # the network sees the noise level times this
DUAL = tuple(range(13))  # blocks of SD3.5 medium with a second attention
# Depth, normed queries and keys, blocks with a second attention, side of the table of positions.
SIZES: dict[str, tuple[int, bool, tuple[int, ...], int]] = {
    "sd3-medium": (24, False, (), 192),
    "sd3.5-medium": (24, True, DUAL, 384),
    "sd3.5-large": (38, True, (), 192),
}
EPS = 1e-6
Streams = Literal["two", "one", "cross"]
STREAMS: dict[str, str] = {
    "two": "text and image have weights of their own (MM-DiT)",
    "one": "text and image are one sequence with one set of weights (DiT)",
    "cross": "the image attends to itself, then to the text, which no block changes (CrossDiT)",
}


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an `MMDiT`; the default is that of SD3 medium.

    Attributes:
        channels: of the images or latents.
        patch: side of a patch, which is one token.
        width: features of a token; a multiple of 4 and of `heads`.
        depth: number of blocks.
        heads: attention heads.
        mlp: hidden features of a block's perceptron, as a multiple of `width`.
        text_width: features of a text token.
        pooled_width: features of the whole text's vector.
        side: of the table of positions, in patches: the longest side of an image.
        base: side in patches that the model was trained at first: the table is stretched so that this many patches lie where
            those of the training did, around the middle (2403.03206, section 5.3.2); 0 puts them one apart from 0 on.
        qk_norm: queries and keys are divided by their root mean square, head by head.
        dual: blocks in which the image also attends to itself alone (SD3.5 medium).
        streams: see `STREAMS`.
    """

    channels: int = 16
    patch: int = 2
    width: int = 1536
    depth: int = 24
    heads: int = 24
    mlp: float = 4.0
    text_width: int = 4096
    pooled_width: int = 2048
    side: int = 192
    base: int = 0
    qk_norm: bool = False
    dual: tuple[int, ...] = ()
    streams: Streams = "two"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual", tuple(self.dual))
        sizes = (
            self.channels,
            self.patch,
            self.width,
            self.depth,
            self.heads,
            self.text_width,
            self.pooled_width,
            self.side,
        )
        if min(sizes) < 1 or self.base < 0 or round(self.width * self.mlp) < 1:
            raise ValueError(f"network: every size must be at least 1, got {self}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width: must be a multiple of 4 and of the {self.heads} heads, got {self.width}")
        if any(not 0 <= block < self.depth for block in self.dual):
            raise ValueError(f"dual: must name blocks 0 to {self.depth - 1}, got {self.dual}")
        if self.streams not in STREAMS:
            raise ValueError(unknown("streams", self.streams, STREAMS))
        if self.dual and self.streams != "two":
            raise ValueError(f"dual: goes with two streams, got {self.streams!r}")

    @staticmethod
    def named(name: str, **settings: Any) -> MMDiTConfig:
        """A published size with other settings as given, or "d12": depth 12 by the rule of the paper, width 64 a block.

        Raises:
            ValueError: for another name.
        """
        if name.startswith("d") and name[1:].isdigit() and int(name[1:]):
            depth = int(name[1:])
            return MMDiTConfig(**{"depth": depth, "width": 64 * depth, "heads": depth, "qk_norm": True, **settings})
        if name not in SIZES:
            raise ValueError(unknown("name", name, (*SIZES, "d12", "d24")))
        depth, normed, dual, side = SIZES[name]
        sizes = {"depth": depth, "width": 64 * depth, "heads": depth, "qk_norm": normed, "dual": dual, "side": side}
        return MMDiTConfig(**{**sizes, **settings})

    @property
    def hidden(self) -> int:
        """Hidden features of a block's perceptron."""
        return round(self.width * self.mlp)


class Projections(nn.Module):
    """Queries, keys and values of one stream, and its way out of attention."""

    def __init__(self, config: MMDiTConfig, *, out: bool = True):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width) if out else None
        norm = config.qk_norm
        self.ln_q = nn.RMSNorm(config.width // config.heads, eps=EPS) if norm else None
        self.ln_k = nn.RMSNorm(config.width // config.heads, eps=EPS) if norm else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, tokens, width) to three of (B, tokens, heads, features)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.ln_q is not None and self.ln_k is not None:
            q, k = self.ln_q(q).to(v.dtype), self.ln_k(k).to(v.dtype)
        return q, k, v


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, tokens, heads, features) each, to (B, tokens, width)."""
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2).flatten(2)


class StreamBlock(nn.Module):
    """One stream's part of a block: shifts and scales its norms, projects, and adds what attention and perceptron give.

    Args:
        config: sizes.
        last: the stream ends here: it gives queries, keys and values, and nothing is added to it.
        dual: it has a second attention, to itself alone.
    """

    def __init__(self, config: MMDiTConfig, *, last: bool = False, dual: bool = False):
        super().__init__()
        self.last, self.dual = last, dual
        self.attn = Projections(config, out=not last)
        self.attn2 = Projections(config) if dual else None
        self.mlp = None if last else Perceptron(config.width, config.hidden)
        parts = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, parts * config.width))

    def modulation(self, activated: Tensor) -> tuple[Tensor, ...]:
        """Shifts, scales and gates, (B, 1, width) each; `activated` is SiLU of the condition."""
        width = self.attn.qkv.in_features
        return self.adaLN_modulation[1](activated)[:, None].split(width, dim=-1)

    def project(self, x: Tensor, parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Queries, keys and values, and what the second attention adds."""
        qkv = self.attn(modulated(x, parts[0], parts[1]))
        if self.attn2 is None or self.attn2.proj is None:
            return qkv, None
        alone = self.attn2.proj(attended(*self.attn2(modulated(x, parts[6], parts[7]))))
        return qkv, parts[8] * alone

    def add(self, x: Tensor, attention: Tensor, alone: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        """The stream after the block."""
        assert self.attn.proj is not None
        assert self.mlp is not None
        x = torch.addcmul(x, parts[2], self.attn.proj(attention))
        if alone is not None:
            x = x + alone
        return torch.addcmul(x, parts[5], self.mlp(modulated(x, parts[3], parts[4])))


class JointBlock(nn.Module):
    """Both streams through one attention, each by its own weights."""

    def __init__(self, config: MMDiTConfig, *, last: bool = False, dual: bool = False):
        super().__init__()
        self.context_block = StreamBlock(config, last=last)
        self.x_block = StreamBlock(config, dual=dual)

    def forward(self, x: Tensor, text: Tensor, activated: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image tokens (B, N, width) and text tokens (B, L, width) to the same; no text after the last block."""
        of_image, of_text = self.x_block.modulation(activated), self.context_block.modulation(activated)
        image_qkv, alone = self.x_block.project(x, of_image)
        text_qkv, _ = self.context_block.project(text, of_text)
        joint = attended(*(torch.cat(both, dim=1) for both in zip(text_qkv, image_qkv, strict=True)))
        to_text, to_image = joint[:, : text.shape[1]], joint[:, text.shape[1] :]
        x = self.x_block.add(x, to_image, alone, of_image)
        return x, None if self.context_block.last else self.context_block.add(text, to_text, None, of_text)


class SharedBlock(nn.Module):
    """Text and image as one sequence with one set of weights (DiT)."""

    def __init__(self, config: MMDiTConfig, *, last: bool = False, dual: bool = False):
        super().__init__()
        self.block = StreamBlock(config)

    def forward(self, x: Tensor, text: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, width) and text tokens (B, L, width) to the same."""
        parts = self.block.modulation(activated)
        both = torch.cat([text, x], dim=1)
        qkv, alone = self.block.project(both, parts)
        both = self.block.add(both, attended(*qkv), alone, parts)
        return both[:, text.shape[1] :], both[:, : text.shape[1]]


class CrossBlock(nn.Module):
    """The image attends to itself, then to the text, then goes through a perceptron (CrossDiT)."""

    def __init__(self, config: MMDiTConfig, *, last: bool = False, dual: bool = False):
        super().__init__()
        self.block = StreamBlock(config)
        self.queries = nn.Linear(config.width, config.width)
        self.keys_values = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, text: Tensor, activated: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, width) to the same; the text as it is."""
        heads = self.block.attn.heads
        parts = self.block.modulation(activated)
        qkv, _ = self.block.project(x, parts)
        q = self.queries(F.layer_norm(x, x.shape[-1:], eps=EPS)).unflatten(-1, (heads, -1))
        k, v = self.keys_values(text).unflatten(-1, (2, heads, -1)).unbind(2)
        return self.block.add(x, attended(*qkv), self.proj(attended(q, k, v)), parts), text


BLOCKS: dict[str, type[nn.Module]] = {"two": JointBlock, "one": SharedBlock, "cross": CrossBlock}


class MMDiT(nn.Module):
    """`forward(x, t, text, pooled, skip=())`: the velocity of images x (B, channels, H, W), sides multiples of the patch.

    t (B,) in [0, 1]; text (B, L, text_width), of any length and without a mask; pooled (B, pooled_width). `skip` names
    blocks to leave out, for skip-layer guidance. The output starts at zero, and every block as the identity.
    """

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        table = position_table(config.side, config.width, config.base, config.patch)
        self.register_buffer("pos_embed", table[None].to(torch.get_default_dtype()))
        self.x_embedder = PatchEmbedder(config.channels, config.width, config.patch)
        self.t_embedder = TimeEmbedder(config.width)
        self.y_embedder = VectorEmbedder(config.pooled_width, config.width)
        self.context_embedder = nn.Linear(config.text_width, config.width)
        kind, last = BLOCKS[config.streams], config.depth - 1
        self.joint_blocks = nn.ModuleList(
            kind(config, last=i == last, dual=i in config.dual) for i in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.patch**2 * config.channels)
        initialise(self, ("adaLN_modulation", "final_layer.linear"))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, skip: Collection[int] = ()) -> Tensor:
        """The velocity at (x, t) of a text.

        Raises:
            ValueError: for images that are no multiple of the patch, or longer than the table of positions.
        """
        rows, columns = self._grid(x)
        h, text, activated = self.entered(x, LEVELS * (1 - t), text, pooled)
        for number, block in enumerate(self.joint_blocks):
            if number not in skip:
                h, text = block(h, text, activated)
        # Published networks give noise minus data.
        return -unpatched(self.final_layer(h, activated), rows, columns, self.config.patch)

    def entered(self, x: Tensor, level: Tensor, text: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens at their places, text tokens, and SiLU of the condition; `level` is the noise level times 1000."""
        rows, columns = self._grid(x)
        condition = self.t_embedder(level) + self.y_embedder(pooled)
        h = self.x_embedder(x) + self.cropped(rows, columns)
        return h, self.context_embedder(text.to(self.context_embedder.weight.dtype)), F.silu(condition)

    def cropped(self, rows: int, columns: int) -> Tensor:
        """The middle of the table of positions, (1, rows * columns, width)."""
        side = self.config.side
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.pos_embed.reshape(1, side, side, -1)[:, top : top + rows, left : left + columns]
        return table.reshape(1, rows * columns, -1)

    def _grid(self, x: Tensor) -> tuple[int, int]:
        config = self.config
        rows, columns = x.shape[-2] // config.patch, x.shape[-1] // config.patch
        if x.ndim != 4 or x.shape[1] != config.channels or x.shape[-2] % config.patch or x.shape[-1] % config.patch:
            raise ValueError(
                f"x: (B, {config.channels}, H, W) with sides that are multiples of {config.patch} are needed, got "
                f"{tuple(x.shape)}"
            )
        if max(rows, columns) > config.side:
            raise ValueError(
                f"x: sides of at most {config.side * config.patch} fit the table of positions, got {tuple(x.shape)}"
            )
        return rows, columns


def position_table(side: int, width: int, base: int = 0, patch: int = 2) -> Tensor:
    """Sinusoids of each place of a square of patches, float64 (side^2, width).

    With a base, place p of `side` lies at ((p - (side - base) / 2) 16 / base: the base's patches where those of a
    256-pixel image of 16 x 16 lie, and those beyond around them.
    """
    if not base:
        return positions(side, width)
    scale = base / 16
    return positions(side, width, scale=scale, offset=(side - base) / 2 / scale)
