"""`ADM` weights under the names of guided diffusion (Dhariwal & Nichol 2105.05233), which OpenAI's consistency models
(Song et al. 2303.01469) and consistency trajectory models of ImageNet (Kim et al. 2310.02279) are published with.

There a U-Net is three lists, `input_blocks.<i>`, `middle_block.<i>`, `output_blocks.<i>`, whose entries are lists of layers;
nothing else in a file says what the network looks like, so `infer_config` reads the architecture off them. The channels of
`qkv` are ordered query, key, value there (each head, feature), and head, feature, query-key-value here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.networks.adm import ADM, ADMConfig
from pantarhei.networks.edm_blocks import filter_of, levels

Kind = Literal["plain", "table", "block", "attention"]
_BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "affine_s": "emb_layers_s.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
_ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}
_FILTER = "resample_filter"  # a buffer of ours, of two equal taps
# Sides of images that the published networks with these resolutions are for; 64 for all others.
_SIZES = {(1, 1, 2, 2, 4, 4): 256, (1, 1, 2, 3, 4): 128}


def is_published(names: Mapping[str, Any]) -> bool:
    """Whether names look like guided diffusion's."""
    return "time_embed.0.weight" in names and "input_blocks.0.0.weight" in names


def has_second_time(names: Mapping[str, Any]) -> bool:
    """Whether there is the branch for a second time among them."""
    return any(name.startswith("time_embed_s.") for name in names)


def layers(config: ADMConfig) -> Iterator[tuple[Kind, str, str]]:
    """What each layer is, its published name and ours."""
    yield from (("plain", f"time_embed.{2 * i}", f"map_layer{i}") for i in (0, 1))
    if config.second_time:
        yield from (("plain", f"time_embed_s.{2 * i}", f"map_layer{i}_s") for i in (0, 1))
    if config.classes:
        yield "table", "label_emb", "map_label"
    table = levels(config)

    def block(place: str, ours: str, features: int, attention: bool) -> Iterator[tuple[Kind, str, str]]:
        yield "block", f"{place}.0", ours
        if attention and config.heads(features):
            yield "attention", f"{place}.1", ours

    count = 0
    for level, (side, features, attention) in enumerate(table):
        if level == 0:
            yield "plain", "input_blocks.0.0", f"enc.{side}x{side}_conv"
        else:
            yield "block", f"input_blocks.{count}.0", f"enc.{side}x{side}_down"
        for i in range(config.blocks):
            yield from block(f"input_blocks.{count + 1 + i}", f"enc.{side}x{side}_block{i}", features, attention)
        count += config.blocks + 1
    lowest, features, _ = table[-1]
    attended = bool(config.heads(features))
    yield from block("middle_block", f"dec.{lowest}x{lowest}_in0", features, True)
    yield "block", f"middle_block.{1 + attended}", f"dec.{lowest}x{lowest}_in1"
    count = 0
    for level, (side, features, attention) in reversed(list(enumerate(table))):
        for i in range(config.blocks + 1):
            yield from block(f"output_blocks.{count + i}", f"dec.{side}x{side}_block{i}", features, attention)
        count += config.blocks + 1
        if level:  # the block that doubles to the next resolution closes the last entry of this one
            place = 1 + bool(attention and config.heads(features))
            yield "block", f"output_blocks.{count - 1}.{place}", f"dec.{2 * side}x{2 * side}_up"
    yield "plain", "out.0", "out_norm"
    yield "plain", "out.2", "out_conv"


def to_published(state: Mapping[str, Tensor], config: ADMConfig) -> dict[str, Tensor]:
    """The state dict of an `ADM` under the published names.

    Raises:
        ValueError: the network has something that the published one has no place for.
    """
    if config.augment_dim:
        raise ValueError("network: the layout of guided diffusion has no place for what augmentation did (augment_dim)")
    return {theirs: _turned(theirs, state[ours], back=True) for theirs, ours in _names(config) if ours in state}


def from_published(tensors: Mapping[str, Tensor], config: ADMConfig, where: str) -> dict[str, Tensor]:
    """The state dict of an `ADM` from the published names.

    Args:
        tensors: weights by the published names.
        config: what they should fit.
        where: the file, for messages.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place; the message names it and what was expected.
    """
    with torch.device("meta"):
        own = ADM(config).state_dict()
    expected = {name: tuple(value.shape) for name, value in to_published(own, config).items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in [*expected, *found]:
        if name not in found:
            raise ValueError(f"{where}: {name} is missing; expected a tensor of shape {expected[name]}")
        if name not in expected:
            raise ValueError(f"{where}: {name} {found[name]} has no place in an ADM of {len(expected)} tensors")
        if found[name] != expected[name]:
            raise ValueError(f"{where}: {name} has shape {found[name]}, expected {expected[name]}")
    out = {ours: _turned(theirs, tensors[theirs]) for theirs, ours in _names(config) if theirs in tensors}
    return out | {name: filter_of((1, 1)) for name in own if name.endswith(_FILTER)}


def infer_config(
    tensors: Mapping[str, Tensor], where: str, *, size: int | None = None, head: int = 64, **overrides: Any
) -> ADMConfig:
    """The architecture that published weights belong to.

    They do not say the size of the images nor the width of an attention head.

    Args:
        tensors: weights by the published names.
        where: the file, for messages.
        size: side of the images; by default that of the published network with these resolutions, or 64.
        head: channels of an attention head.
        overrides: fields of `ADMConfig` that are known better (`dropout`, `label_dropout`).

    Raises:
        ValueError: this is no such network, or the sizes contradict each other.
    """
    if not is_published(tensors):
        raise ValueError(f"{where}: expected weights named time_embed.0.weight and input_blocks.0.0.weight, got others")
    plain = [name for name in tensors if re.fullmatch(r"(input|output)_blocks\.\d+\.\d+\.(op|conv)\.weight", name)]
    if plain:
        raise ValueError(f"{where}: {plain[0]} resamples outside a residual block; this ADM does it inside one")
    channels = _shape(tensors, "input_blocks.0.0.weight", 4, where)[1]
    embedded, width = _shape(tensors, "time_embed.0.weight", 2, where)
    outputs = _shape(tensors, "out.2.weight", 4, where)[0]
    if outputs != channels:
        raise ValueError(
            f"{where}: {channels} channels in and {outputs} out; equal numbers are needed (a learned variance is not read)"
        )
    count, blocks = _depth(tensors, where)
    entries = [1 + level * (blocks + 1) for level in range(count // (blocks + 1))]
    features = [_shape(tensors, f"input_blocks.{i}.0.out_layers.3.weight", 4, where)[0] for i in entries]
    for number in features:
        if number % width:
            raise ValueError(f"{where}: {number} feature channels are no multiple of the width {width}")
    attended = [f"input_blocks.{i}.1.qkv.weight" in tensors for i in entries]
    for number, attention in zip(features, [*attended[:-1], True], strict=True):
        if attention and (head < 1 or number % head):
            raise ValueError(f"heads: {number} channels do not split into heads of {head}; give the channels of a head")
    for name in tensors:
        if name.endswith("qkv.weight") and tensors[name].ndim == 3:
            raise ValueError(
                f"{where}: {name} has shape {tuple(tensors[name].shape)}: guided diffusion's own files order its channels "
                f"otherwise and predict numbered noise; expected a 1x1 convolution (4 dimensions)"
            )
    multipliers = tuple(number // width for number in features)
    side = _SIZES.get(multipliers, 64) if size is None else size
    adaptive = _shape(tensors, "input_blocks.1.0.emb_layers.1.weight", 2, where)[0] == 2 * features[0]
    settings: dict[str, Any] = {
        "size": side,
        "channels": channels,
        "width": width,
        "multipliers": multipliers,
        "blocks": blocks,
        "attention": tuple(side >> level for level, attention in enumerate(attended) if attention),
        "embedding_multiplier": embedded // width,
        "classes": _shape(tensors, "label_emb.weight", 2, where)[0] if "label_emb.weight" in tensors else 0,
        "dropout": 0.0,
        "groups": 32,
        "head": head,
        "time_scale": 1000.0,
        "adaptive": adaptive,
        "second_time": has_second_time(tensors),
    }
    try:
        return ADMConfig(**settings | overrides)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _names(config: ADMConfig) -> Iterator[tuple[str, str]]:
    """The published name of a tensor and ours."""
    for kind, theirs, ours in layers(config):
        if kind in ("plain", "table"):
            yield from ((f"{theirs}.{p}", f"{ours}.{p}") for p in ("weight", "bias")[: 1 if kind == "table" else 2])
        else:
            parts = _BLOCK if kind == "block" else _ATTENTION
            yield from ((f"{theirs}.{t}.{p}", f"{ours}.{o}.{p}") for o, t in parts.items() for p in ("weight", "bias"))


def _turned(theirs: str, value: Tensor, back: bool = False) -> Tensor:
    """A tensor in our order of its numbers; `back` in theirs."""
    if theirs == "label_emb.weight":  # a table there, a linear map of one-hot rows here
        return value.t().contiguous()
    if ".qkv." in theirs:
        split = (-1, 3) if back else (3, -1)
        return value.reshape(*split, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    return value


def _depth(tensors: Mapping[str, Tensor], where: str) -> tuple[int, int]:
    """Entries of either list, and residual blocks a resolution."""
    numbers = {half: _numbers(tensors, rf"{half}_blocks\.(\d+)\..+") for half in ("input", "output")}
    count = len(set(numbers["input"]))
    for half, found in numbers.items():
        if set(found) != set(range(count)):
            raise ValueError(f"{where}: {half}_blocks are {sorted(set(found))}; expected 0 to {count - 1}")
    # The first resolution on the way up ends with the first entry that holds a second residual block, which doubles.
    doubling = _numbers(tensors, r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")
    a_level = 1 + min(doubling, default=count - 1)
    if a_level < 2 or count % a_level or len(doubling) != count // a_level - 1:
        raise ValueError(f"{where}: {count} output_blocks, of which {sorted(doubling)} double, make no ADM")
    return count, a_level - 1


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> list[int]:
    found = (re.fullmatch(pattern, name) for name in tensors)
    return [int(one[1]) for one in found if one]


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{where}: {name} is missing; expected a tensor of {dimensions} dimensions")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{where}: {name} has shape {shape}, expected {dimensions} dimensions")
    return shape
