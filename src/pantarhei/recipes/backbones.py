"""Which network a recipe trains: sizes that follow from the data where they are left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pantarhei.data.seeds import mix
from pantarhei.networks import NETWORKS, ADMConfig, MLPConfig, NCSNppConfig, SiTConfig, SongUNetConfig, UNetConfig


@dataclass(frozen=True)
class NetworkConfig:
    """Network sizes; what is left out follows from the data.

    Attributes:
        architecture: of image networks: unet (compact, quick on a CPU), ncsnpp (DDPM++, rectified flow's), songunet or
            adm (EDM's NCSN++, and its network for classes) or sit (the transformer of SiT, with patches of 2 pixels).
        width: feature channels at full resolution (images), hidden width (points, sit).
        multipliers: channels of each resolution as multiples of `width`.
        blocks: residual blocks a side, one number for all resolutions or (unet) one each; hidden layers for points, blocks
            in all for sit.
        attention: self-attention, at the lowest resolution (unet), at side 16 (ncsnpp, songunet) or at 32, 16 and 8 (adm).
        dropout: in the residual blocks.
    """

    architecture: Literal["unet", "ncsnpp", "songunet", "adm", "sit"] = "unet"
    width: int | None = None
    multipliers: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    attention: bool = True
    dropout: float = 0.0


def build_network(
    config: NetworkConfig, shape: tuple[int, ...], classes: int, seed: int, *, context: int = 0, fields: int = 1
) -> nn.Module:
    """A network for images (C, H, W) or an MLP for points (D,), with weights drawn from `seed`.

    Args:
        config: architecture and sizes.
        shape: of one sample.
        classes: number of classes, 0 for none.
        seed: of the weights.
        context: channels of an image (or width of a vector) that it is given beside the state.
        fields: how many fields it predicts.

    Raises:
        ValueError: sizes that do not fit the data, or an architecture that cannot do this.
    """
    sizes: Any
    if len(shape) == 3 and config.architecture != "unet" and (context or fields > 1):
        raise ValueError(f"architecture: {config.architecture} takes no context and predicts one field; take unet")
    if len(shape) == 3 and config.architecture == "ncsnpp":
        multipliers = config.multipliers or default_multipliers(min(shape[1:]))
        attention = (16,) if config.attention and 16 in [min(shape[1:]) >> i for i in range(len(multipliers))] else ()
        blocks = config.blocks or (4,)
        if len(blocks) > 1 or shape[1] != shape[2]:
            raise ValueError(f"network: ncsnpp takes one number of blocks and square images, got {blocks} and {shape}")
        sizes = NCSNppConfig(
            size=shape[1],
            channels=shape[0],
            width=config.width or 128,
            multipliers=multipliers,
            blocks=blocks[0],
            attention=attention,
            dropout=config.dropout,
            classes=classes,
        )
    elif len(shape) == 3 and config.architecture in ("songunet", "adm"):
        sizes = _edm_sizes(config, shape, classes)
    elif len(shape) == 3 and config.architecture == "sit":
        width = config.width or 384
        if shape[1] != shape[2] or width % 8:
            raise ValueError(f"network: sit takes square images and a width divisible by 8, got {shape} and {width}")
        heads = max(1, width // 64)
        depth = config.blocks[0] if config.blocks else 12
        sizes = SiTConfig(shape[1], 2, shape[0], width, depth, heads, classes=classes, learn_sigma=False)
    elif len(shape) == 1:
        layers = config.blocks[0] if config.blocks else 3
        sizes = MLPConfig(shape[0], config.width or 128, layers, classes, vector=context, fields=fields)
    elif len(shape) == 3:
        multipliers = config.multipliers or default_multipliers(min(shape[1:]))
        factor = 2 ** (len(multipliers) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"multipliers: {len(multipliers)} resolutions need images divisible by {factor}, got {shape[1]}x{shape[2]}; "
                "give --size or fewer multipliers"
            )
        width = config.width or (32 if min(shape[1:]) <= 16 else 64)
        blocks = config.blocks or (*(1,) * (len(multipliers) - 1), 4 if len(multipliers) < 3 else 2)
        blocks = blocks * len(multipliers) if len(blocks) == 1 else blocks
        sizes = UNetConfig(
            *(shape[0], width, multipliers, blocks, config.attention, classes),
            dropout=config.dropout,
            context=context,
            fields=fields,
        )
    else:
        raise ValueError(f"data: images (C, H, W) or points (D,) are needed, got samples of shape {shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 30))
        return NETWORKS[type(sizes)](sizes)


def _edm_sizes(config: NetworkConfig, shape: tuple[int, ...], classes: int) -> SongUNetConfig | ADMConfig:
    multipliers = config.multipliers or default_multipliers(min(shape[1:]))
    song = config.architecture == "songunet"
    blocks = config.blocks or (4 if song else 3,)
    if len(blocks) > 1 or shape[1] != shape[2]:
        name = config.architecture
        raise ValueError(f"network: {name} takes one number of blocks and square images, got {blocks} and {shape}")
    sides = [shape[1] >> level for level in range(len(multipliers))]
    attended = ((16,) if song else (32, 16, 8)) if config.attention else ()
    common: dict[str, Any] = {
        "size": shape[1],
        "channels": shape[0],
        "width": config.width or (128 if song else 192),
        "multipliers": multipliers,
        "blocks": blocks[0],
        "attention": tuple(side for side in attended if side in sides),
        "dropout": config.dropout,
        "classes": classes,
        "augment_dim": 0,
    }
    return SongUNetConfig(**common) if song else ADMConfig(**common)


def default_multipliers(size: int) -> tuple[int, ...]:
    """Resolutions down to 4 (tiny images) or 8 pixels."""
    if size <= 8:
        return (1, 2)
    count = 1
    while size % 2 == 0 and size > 8 and count < 4:
        size, count = size // 2, count + 1
    return (1, 2, 2, 2)[:count]
