"""Which network of EDM a state dict belongs to, read off its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pantarhei.networks import ADMConfig, SongUNetConfig
from pantarhei.networks.songunet import DDPMPP, FACES

PUBLISHED: tuple[SongUNetConfig | ADMConfig, ...] = (
    *(SongUNetConfig(), SongUNetConfig(classes=10), FACES, DDPMPP, replace(DDPMPP, classes=10), ADMConfig()),
    # Consistency trajectory models of CIFAR-10 have no place for augmentation.
    *(replace(DDPMPP, classes=classes, augment_dim=0, second_time=True) for classes in (0, 10)),
)
UNTOLD = ("dropout", "label_dropout", "fourier_scale")  # settings that leave no trace in the weights
_NAME = re.compile(r"(enc|dec)\.(\d+)x(\d+)_([a-z_]+)(\d*)\.(.+)")


def infer_config(tensors: Mapping[str, Tensor], where: str, **settings: Any) -> SongUNetConfig | ADMConfig:
    """The network that a state dict belongs to.

    Args:
        tensors: the state dict, without the prefix `model.`.
        where: the file, for messages.
        settings: `dropout`, `label_dropout`, `fourier_scale`, which leave no trace in it. By default those of the published
            configuration of this structure, else none.

    Raises:
        ValueError: this is no network of EDM, or sizes contradict each other.
    """
    layers: dict[tuple[str, int], set[str]] = {}
    for name in tensors:
        found = _NAME.fullmatch(name)
        if found:
            half, side, _, layer, number, _ = found.groups()
            layers.setdefault((half, int(side)), set()).add(f"{layer}{number}")
    sides = sorted({side for half, side in layers if half == "enc"}, reverse=True)
    if not sides or f"enc.{sides[0]}x{sides[0]}_conv.weight" not in tensors:
        raise ValueError(f"{where}: expected weights named enc.<side>x<side>_conv.weight, got other names")
    foreign = sorted({name for found in layers.values() for name in found} & {"aux_down", "aux_skip", "aux_up"})
    if foreign:
        raise ValueError(
            f"{where}: {foreign[0]} belongs to the 'skip' encoder or decoder, which none of EDM's published files has"
        )
    size = sides[0]
    adm = "out_conv.weight" in tensors
    first, channels = _shape(tensors, f"enc.{size}x{size}_conv.weight", 4, where)[:2]
    embedded, features = _shape(tensors, "map_layer0.weight", 2, where)
    width = features if adm else first
    counts = {side: len([name for name in layers["enc", side] if name.startswith("block")]) for side in sides}
    if len(set(counts.values())) > 1:
        raise ValueError(f"{where}: {counts} blocks by side; expected the same number at every resolution")
    outputs = [_shape(tensors, f"enc.{side}x{side}_block0.conv0.weight", 4, where)[0] for side in sides]
    for number in outputs:
        if number % width:
            raise ValueError(f"{where}: {number} feature channels are no multiple of the width {width}")
    found_settings: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "width": width,
        "multipliers": tuple(number // width for number in outputs),
        "blocks": counts[size],
        "attention": tuple(side for side in sides if f"enc.{side}x{side}_block0.qkv.weight" in tensors),
        "embedding_multiplier": embedded // width,
        "classes": _width(tensors, "map_label.weight", where),
        "augment_dim": _width(tensors, "map_augment.weight", where),
        "second_time": "map_layer0_s.weight" in tensors,
    }
    if not adm:
        found_settings |= {
            "embedding": "fourier" if "map_noise.freqs" in tensors else "positional",
            "encoder": "residual" if any("aux_residual" in layers["enc", side] for side in sides) else "standard",
            "noise_multiplier": features // width,
        }
        taps = _taps(tensors, where)
        found_settings |= {"filter": taps} if taps else {}
    kind: Any = ADMConfig if adm else SongUNetConfig
    try:
        bare = kind(**found_settings, dropout=0.0)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    published = next((c for c in PUBLISHED if type(c) is kind and replace(c, dropout=0.0) == bare), bare)
    settings = {name: value for name, value in settings.items() if hasattr(bare, name)}
    return replace(bare, **{"dropout": published.dropout, **settings})


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, where: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{where}: {name} is missing; expected a tensor of {dimensions} dimensions")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or 0 in shape:
        raise ValueError(f"{where}: {name} has shape {shape}, expected {dimensions} dimensions")
    return shape


def _width(tensors: Mapping[str, Tensor], name: str, where: str) -> int:
    return _shape(tensors, name, 2, where)[1] if name in tensors else 0


def _taps(tensors: Mapping[str, Tensor], where: str) -> tuple[float, ...] | None:
    """The filter of a kernel in the file, with 1 as its outer taps; None for a network of one resolution."""
    name = next((name for name in tensors if name.endswith(".resample_filter")), None)
    if name is None:
        return None
    _, _, rows, columns = _shape(tensors, name, 4, where)
    line = tensors[name][0, 0].double().sum(dim=0)
    if rows != columns or not bool((line.isfinite() & (line != 0)).all()):
        raise ValueError(f"{where}: {name} is no product of one row of taps with itself")
    taps = tuple(round(float(value), 2) for value in line / line[0])
    return tuple(int(tap) if tap == int(tap) else tap for tap in taps)
