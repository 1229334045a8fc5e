"""`NCSNpp` weights under the names of the score_sde code (Song et al. 2011.13456), which rectified flow publishes.

There all layers stand in one list, `all_modules.<i>`, in the order in which they are used; nothing else in a file says
what the network looks like, so `infer_config` reads the architecture off the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.networks.ncsnpp import NCSNpp, NCSNppConfig

Kind = Literal["fourier", "plain", "block", "attention", "combine"]
_BLOCK = {
    "norm0": "GroupNorm_0",
    "conv0": "Conv_0",
    "time": "Dense_0",
    "norm1": "GroupNorm_1",
    "conv1": "Conv_1",
    "skip": "Conv_2",
}
_REQUIRED = ("GroupNorm_0.weight", "Conv_0.weight", "Dense_0.weight")


def module_list(config: NCSNppConfig) -> list[tuple[Kind, str]]:
    """What stands at each index of the list: its kind, and the prefix of our names for it."""
    modules: list[tuple[Kind, str]] = [("fourier", "features")] if config.embedding == "fourier" else []
    modules += [("plain", "time0"), ("plain", "time1"), ("plain", "stem")]
    last = len(config.levels) - 1

    def block(prefix: str, attention: bool = False) -> None:
        modules.append(("block", prefix))
        if attention:
            modules.append(("attention", f"{prefix}.attention"))

    for level, (_, attention) in enumerate(config.levels):
        if level:
            block(f"down.{level}.halving")
            if config.input_pyramid:
                modules.append(("combine", f"down.{level}.pyramid"))
        for i in range(config.blocks):
            block(f"down.{level}.blocks.{i}", attention)
    block("middle.0", attention=True)
    block("middle.1")
    for level in reversed(range(last + 1)):
        place = last - level
        # The blocks of a resolution come before the block that doubles to the next one.
        for i in range(config.blocks + 1):
            block(f"up.{place}.blocks.{i}", config.levels[level][1] and i == config.blocks)
        if config.output_pyramid or level == 0:
            modules += [("plain", f"up.{place}.head.norm"), ("plain", f"up.{place}.head.conv")]
        if level:
            block(f"up.{place + 1}.doubling")
    return modules


def to_reference(state: Mapping[str, Tensor], config: NCSNppConfig) -> dict[str, Tensor]:
    """Our weights under the names of the list, in the order in which the reference counts its parameters.

    Raises:
        ValueError: the network has classes or a second time, for which the reference has no place.
    """
    if config.second_time:
        raise ValueError("network: the score_sde layout has no place for the second time of this network")
    if config.classes:
        raise ValueError("network: the score_sde layout has no place for the class embedding of this network")
    out: dict[str, Tensor] = {}
    for theirs, ours, third in _names(config):
        if ours in state:
            value = state[ours] if third is None else state[ours].chunk(3)[third]
            # Their 1x1 maps of attention are matrices from input to output.
            out[theirs] = value[:, :, 0, 0].t().contiguous() if theirs.endswith(".W") and value.ndim == 4 else value
    return out


def from_reference(tensors: Mapping[str, Tensor], config: NCSNppConfig, where: str) -> dict[str, Tensor]:
    """The state dict of an `NCSNpp` from the list's names.

    Args:
        tensors: weights by the names of the list, without any prefix; buffers of the reference are ignored.
        config: what they should fit.
        where: the file, for messages.

    Raises:
        ValueError: a tensor is missing, has another shape, or has no place; the message names it and what was expected.
    """
    with torch.device("meta"):
        own = NCSNpp(config).state_dict()
    expected = {name: tuple(value.shape) for name, value in to_reference(own, config).items()}
    found = {name: tuple(value.shape) for name, value in tensors.items() if name != "sigmas"}
    for name in [*expected, *found]:
        if name not in found:
            raise ValueError(f"{where}: {name} is missing; expected a tensor of shape {expected[name]}")
        if name not in expected:
            raise ValueError(f"{where}: {name} {found[name]} has no place in an NCSN++ of {len(expected)} tensors")
        if found[name] != expected[name]:
            raise ValueError(f"{where}: {name} has shape {found[name]}, expected {expected[name]}")
    parts: dict[str, list[Tensor]] = {}
    for theirs, ours, _ in _names(config):
        if theirs in tensors:
            value = tensors[theirs]
            parts.setdefault(ours, []).append(value.t()[:, :, None, None] if value.ndim < own[ours].ndim else value)
    return {name: (torch.cat(values) if len(values) > 1 else values[0]).contiguous() for name, values in parts.items()}


def _names(config: NCSNppConfig) -> Iterator[tuple[str, str, int | None]]:
    """Their name, ours, and which third of ours it is (query, key, value are one tensor here) or None."""
    for i, (kind, prefix) in enumerate(module_list(config)):
        place = f"all_modules.{i}"
        if kind == "fourier":
            yield f"{place}.W", f"{prefix}.frequencies", None
        elif kind == "attention":
            yield from ((f"{place}.GroupNorm_0.{p}", f"{prefix}.norm.{p}", None) for p in ("weight", "bias"))
            for j, (layer, third) in enumerate([("qkv", 0), ("qkv", 1), ("qkv", 2), ("out", None)]):
                yield f"{place}.NIN_{j}.W", f"{prefix}.{layer}.weight", third
                yield f"{place}.NIN_{j}.b", f"{prefix}.{layer}.bias", third
        else:
            layers = {"block": _BLOCK, "combine": {"": "Conv_0"}, "plain": {"": ""}}[kind]
            for own, layer in layers.items():
                for p in ("weight", "bias"):
                    yield ".".join(filter(None, (place, layer, p))), ".".join(filter(None, (prefix, own, p))), None


def is_reference(names: Mapping[str, Any]) -> bool:
    """Whether names look like the list's."""
    return any(str(name).startswith("all_modules.") for name in names)


def infer_config(
    tensors: Mapping[str, Tensor], where: str, *, size: int | None = None, **overrides: Any
) -> NCSNppConfig:
    """The architecture that a list of weights belongs to.

    The list does not say the image size, the filter or the division by the time. By default attention is taken to sit at
    side 16 and, where there are pyramids, the filter is (1, 3, 3, 1) and the output is divided: so it is in both published
    configurations.

    Args:
        tensors: weights by the names of the list, without any prefix.
        where: the file, for messages.
        size: side of the images.
        overrides: fields of `NCSNppConfig` that are known better.

    Raises:
        ValueError: this is no NCSN++, or the size must be given.
    """
    strange = [name for name in tensors if not name.split(".")[1:2] or not name.split(".")[1].isdigit()]
    strange = [name for name in strange if name != "sigmas"]
    if strange:
        raise ValueError(f"{where}: expected names all_modules.<number>..., got {strange[0]}")
    shapes = [_shapes(tensors, i) for i in range(_count(tensors))]
    kinds = [_kind(module) for module in shapes]
    blocks = [i for i, kind in enumerate(kinds) if kind == "block"]
    for i, kind in enumerate(kinds):
        if kind is None:
            expected = [f"all_modules.{i}.{name}" for name in _REQUIRED if name not in shapes[i]]
            raise ValueError(
                f"{where}: no layer of an NCSN++ is {sorted(shapes[i])}; expected {', '.join(expected)} too"
            )
    stem = next((m for m in shapes if len(m.get("weight", ())) == 4), None)
    if stem is None or not blocks:
        raise ValueError(f"{where}: an NCSN++ has a 3x3 convolution and residual blocks, this list has none")
    # A block that resamples has a 1x1 skip although its channels stay.
    resampling = [i for i in blocks if "Conv_2.weight" in shapes[i] and _in_out(shapes[i])[0] == _in_out(shapes[i])[1]]
    levels = len(resampling) // 2 + 1
    a_level, remainder = divmod(len(blocks) - 3 * levels, 2 * levels)
    if remainder or a_level < 1:
        raise ValueError(f"{where}: {len(blocks)} blocks, {len(resampling)} of them resampling, make no NCSN++")
    width = stem["weight"][0]
    descent = [i for i in blocks if i not in resampling][: levels * a_level]
    firsts = descent[::a_level]
    attended = [level for level, i in enumerate(firsts) if i + 1 < len(kinds) and kinds[i + 1] == "attention"]
    if size is None:
        if not attended:
            raise ValueError(f"{where}: no attention says how large its images are; give the size")
        size = 16 << attended[0]
    pyramids = {"input_pyramid": "combine" in kinds, "output_pyramid": kinds.count("norm") > 1}
    fourier = kinds[0] == "fourier"
    settings: dict[str, Any] = {
        "size": size,
        "channels": stem["weight"][1],
        "width": width,
        "multipliers": tuple(_in_out(shapes[i])[1] // width for i in firsts),
        "blocks": a_level,
        "attention": tuple(size >> level for level in attended),
        "embedding": "fourier" if fourier else "sinusoid",
        "filter": (1, 3, 3, 1) if any(pyramids.values()) else (1, 1),
        "divide": any(pyramids.values()),
        **pyramids,
        **overrides,
    }
    if settings["divide"] or fourier:
        settings.setdefault("time_floor", 1e-3)
    return NCSNppConfig(**settings)


def trainable(names: Mapping[str, Tensor]) -> list[str]:
    """Names of the reference's trainable parameters, in its order: all but buffers and the random frequencies."""
    return [name for name in names if name != "sigmas" and name != "all_modules.0.W"]


def _count(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("all_modules."))


def _shapes(tensors: Mapping[str, Tensor], index: int) -> dict[str, tuple[int, ...]]:
    prefix = f"all_modules.{index}."
    return {n.removeprefix(prefix): tuple(v.shape) for n, v in tensors.items() if n.startswith(prefix)}


def _kind(module: Mapping[str, tuple[int, ...]]) -> str | None:
    names = set(module)
    tests: dict[str, Callable[[], bool]] = {
        "fourier": lambda: names == {"W"},
        "attention": lambda: "NIN_0.W" in names,
        "block": lambda: names.issuperset(_REQUIRED),
        "combine": lambda: names == {"Conv_0.weight", "Conv_0.bias"},
        "norm": lambda: names == {"weight", "bias"} and len(module["weight"]) == 1,
        "plain": lambda: names == {"weight", "bias"},
    }
    return next((kind for kind, holds in tests.items() if holds()), None)


def _in_out(block: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    outputs, inputs = block["Conv_0.weight"][:2]
    return inputs, outputs
