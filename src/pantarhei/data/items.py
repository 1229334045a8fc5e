"""Items of foreign data sets, turned into the project's batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_RENAMED = ("x", "image")  # names that other data sets give to what is called x1 here


def item_tensors(item: Any, where: str) -> dict[str, Tensor]:
    """Return one item of a data set as named tensors without batch axis.

    Args:
        item: a tensor or array, a tuple ``(x1,)`` or ``(x1, y)``, or a dict with ``x1``, ``x`` or ``image``.
        where: how errors name the item.

    Raises:
        TypeError: the item has another form, or a part of it is not numeric.
    """
    if isinstance(item, Mapping):
        named = _rename(item, where)
    elif isinstance(item, tuple):
        if len(item) not in (1, 2):
            raise TypeError(f"{where} is a tuple of {len(item)}; give (x1,) or (x1, label), or a dict to name more")
        named = {"x1": item[0]}
        if len(item) == 2:
            second = _tensor(item[1], f"the second entry of {where}")
            whole = second.ndim == 0 and not second.is_floating_point() and not second.is_complex()
            named["label" if whole else "condition"] = second
    else:
        named = {"x1": item}
    tensors = {str(key): _tensor(value, f"{key!r} of {where}") for key, value in named.items()}
    check_data(tensors, where)
    return tensors


def batch_of_items(
    items: Sequence[Mapping[str, Tensor]], numbers: Sequence[int], like: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Stack items into a batch; ``like`` (item 0) tells the keys and shapes that all must have.

    Raises:
        ValueError: an item has other keys or another shape than item 0, or holds NaN or infinity.
    """
    for number, item in zip(numbers, items, strict=True):
        if item.keys() != like.keys():
            raise ValueError(f"item {number} of {name!r} has the keys {sorted(item)}, item 0 has {sorted(like)}")
        for key, value in item.items():
            if value.shape != like[key].shape:
                raise ValueError(
                    f"{key!r} of item {number} of {name!r} has shape {tuple(value.shape)}, "
                    f"that of item 0 {tuple(like[key].shape)}; all items must agree"
                )
    if not items:
        return {key: value.new_empty((0, *value.shape)) for key, value in like.items()}
    batch = {key: torch.stack([item[key] for item in items]) for key in like}
    for key, value in batch.items():
        bad = first_bad_item(value)
        if bad is not None:
            raise ValueError(f"{key!r} of item {numbers[bad[1]]} of {name!r} holds NaN or infinity; drop or repair it")
    return batch


def check_data(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise unless ``tensors`` has an ``x1`` that a flow can move (floating or complex)."""
    if "x1" not in tensors:
        raise ValueError(f"{where} has the keys {sorted(tensors)}; 'x1' (the data) is missing")
    x1 = tensors["x1"]
    if not (x1.is_floating_point() or x1.is_complex()):
        raise TypeError(f"'x1' of {where} holds integers; give floats (pixels p of 0..255 as p / 127.5 - 1)")


def first_bad_item(values: Tensor, chunk: int = 4096) -> tuple[int, int] | None:
    """Count the rows of ``values`` (N, ...) that hold NaN or infinity: (count, first index), or None if all are finite.

    Rows are taken ``chunk`` at a time so that the mask of a large set never lies in memory as a whole.
    """
    if not (values.is_floating_point() or values.is_complex()):
        return None
    count, first = 0, -1
    for start in range(0, len(values), chunk):
        part = values[start : start + chunk]
        bad = ~torch.isfinite(part).reshape(len(part), -1).all(dim=1)
        found = int(bad.sum())
        if found and first < 0:
            first = start + int(bad.nonzero()[0])
        count += found
    return (count, first) if count else None


def _rename(item: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    if "x1" in item:
        return dict(item)
    others = [key for key in _RENAMED if key in item]
    if len(others) != 1:
        keys = sorted(map(str, item))
        raise TypeError(f"{where} is a dict with the keys {keys}; the data must be under 'x1' (or 'x' or 'image')")
    return {("x1" if key == others[0] else key): value for key, value in item.items()}


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    elif isinstance(value, (bool, int, float, complex, np.number, np.bool_)) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "biufc"
    ):
        # A copy in native byte order: torch reads neither foreign byte orders nor negative strides.
        array = np.asarray(value)
        tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    else:
        raise TypeError(
            f"{where} is a {type(value).__name__}; give a tensor, a numpy array or a number "
            "(a transform in the data set can convert it)"
        )
    if tensor.is_complex():
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor.long()
