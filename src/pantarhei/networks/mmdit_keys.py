"""Names of an MM-DiT's weights in its two published layouts: the single file, which is ours, and the folder of diffusers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.networks.mmdit import MMDiT, MMDiTConfig

# Ours, and what diffusers calls it; {} is a number of a block.
WHOLE = {
    "pos_embed": "pos_embed.pos_embed",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "context_embedder": "context_embedder",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
IN_BLOCKS = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Translation:
    """What one of our tensors is in diffusers' layout: the parts that are stacked, or one whose halves are exchanged."""

    theirs: tuple[str, ...]
    swapped: bool = False

    def split(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Their tensors."""
        if self.swapped:  # shift and scale here, scale and shift there
            ours = torch.cat(ours.chunk(2)[::-1])
        yield from zip(self.theirs, ours.chunk(len(self.theirs)), strict=True)

    def joined(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """Our tensor."""
        ours = torch.cat([theirs[name] for name in self.theirs]) if len(self.theirs) > 1 else theirs[self.theirs[0]]
        return torch.cat(ours.chunk(2)[::-1]) if self.swapped else ours


def translation(name: str, depth: int) -> Translation:
    """That of one of our tensors, in a network of so many blocks.

    Raises:
        ValueError: no MM-DiT has such a tensor.
    """
    layer, dot, kind = name.rpartition(".") if name != "pos_embed" else (name, "", "")
    if layer in WHOLE:
        return Translation((WHOLE[layer] + dot + kind,), layer == "final_layer.adaLN_modulation.1")
    match = BLOCK.fullmatch(layer)
    if match is None or match[2] not in IN_BLOCKS:
        raise ValueError(f"{name}: no MM-DiT has a tensor of this name")
    swapped = match[2] == "context_block.adaLN_modulation.1" and int(match[1]) == depth - 1
    return Translation(tuple(f"transformer_blocks.{match[1]}.{part}.{kind}" for part in IN_BLOCKS[match[2]]), swapped)


def infer_config(shapes: Mapping[str, tuple[int, ...]], where: str, heads: int | None = None) -> MMDiTConfig:
    """The sizes of the network that these tensors, under our names, belong to.

    Args:
        shapes: name -> shape.
        where: the file, for messages.
        heads: attention heads, where neither normed queries nor heads of 64 features, as published, tell them.

    Raises:
        ValueError: this is no MM-DiT, or its sizes contradict each other.
    """
    blocks = {int(match[1]) for name in shapes if (match := BLOCK.match(name))}
    wanted = ("x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "y_embedder.mlp.0.weight")
    missing = [name for name in (*wanted, "joint_blocks.0.x_block.mlp.fc1.weight") if name not in shapes]
    if missing or blocks != set(range(len(blocks))):
        raise ValueError(f"{where}: no MM-DiT; it lacks {missing[0] if missing else 'some of its blocks'}")
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    places = shapes["pos_embed"][1]
    side = round(places**0.5)
    if side * side != places:
        raise ValueError(f"{where}: pos_embed has {places} places; expected a square number of patches")
    normed = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    features = normed[0] if normed else 64
    heads = heads or (width // features if width % features == 0 else 0)
    if not heads:
        raise ValueError(f"{where}: heads: give their number; {width} features make no heads of {features}")
    return MMDiTConfig(
        channels=channels,
        patch=patch,
        width=width,
        depth=len(blocks),
        heads=heads,
        mlp=shapes["joint_blocks.0.x_block.mlp.fc1.weight"][0] / width,
        text_width=shapes["context_embedder.weight"][1],
        pooled_width=shapes["y_embedder.mlp.0.weight"][1],
        side=side,
        qk_norm=normed is not None,
        dual=tuple(i for i in sorted(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
    )


def expected(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a network of these sizes, without making it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in MMDiT(config).state_dict().items()}


def from_diffusers(theirs: Mapping[str, Tensor], names: Collection[str], depth: int) -> dict[str, Tensor]:
    """Our tensors of these names from those of diffusers."""
    return {name: translation(name, depth).joined(theirs) for name in names}


def to_diffusers(ours: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of diffusers from ours."""
    return dict(pair for name, value in ours.items() for pair in translation(name, depth).split(value))
