"""Conditions: named tensors that reach the network as keyword arguments, with the values that mean "none"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Null = Tensor | float | int


class Condition(Mapping[str, Tensor]):
    """A batch of conditions: labels, vectors, fields, images, token sequences alike.

    Args:
        values: named tensors of equal first dimension B.
        nulls: for the names that can be dropped, the value of one row that stands for "no condition" (a number or a
            tensor of the row's shape), such as the index after the last class.

    Used as `network(x, t, **condition)`.
    """

    def __init__(self, values: Mapping[str, Tensor], nulls: Mapping[str, Null] | None = None):
        self._values = dict(values)
        self._nulls = dict(nulls or {})
        sizes = {name: value.shape[0] if value.ndim else None for name, value in self._values.items()}
        if len(set(sizes.values())) > 1 or None in sizes.values():
            raise ValueError(f"condition: every value needs the same number of rows, got {sizes}")

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Condition({', '.join(f'{k}: {tuple(v.shape)}' for k, v in self._values.items())})"

    @property
    def rows(self) -> int:
        """Number of rows B (0 for an empty condition)."""
        return next((v.shape[0] for v in self._values.values()), 0)

    @property
    def nulls(self) -> dict[str, Null]:
        """The null values."""
        return dict(self._nulls)

    def null(self) -> Condition:
        """The same rows with every value that has a null replaced by it (see `drop`)."""
        return self.drop(torch.ones(self.rows, dtype=torch.bool))

    def drop(self, mask: Tensor) -> Condition:
        """Replace by null the rows where `mask` (B,) is true; names without a null value (a mask, a past frame) stay.

        Raises:
            ValueError: if no name has a null value.
        """
        if self._values and not any(name in self._nulls for name in self._values):
            first = next(iter(self._values))
            raise ValueError(f"condition: {', '.join(self)} without null value; give null={{'{first}': ...}}")

        def dropped(name: str, value: Tensor) -> Tensor:
            if name not in self._nulls:
                return value
            null = torch.as_tensor(self._nulls[name], dtype=value.dtype, device=value.device)
            rows = mask.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
            return torch.where(rows, null.expand_as(value), value)

        return Condition({name: dropped(name, value) for name, value in self._values.items()}, self._nulls)

    def index(self, rows: Tensor | slice) -> Condition:
        """Some of the rows."""
        return Condition({name: value[rows] for name, value in self._values.items()}, self._nulls)

    def cat(self, other: Condition) -> Condition:
        """The rows of both."""
        if set(self) != set(other):
            raise ValueError(f"condition: cannot join {sorted(self)} with {sorted(other)}")
        return Condition({name: torch.cat([self[name], other[name]]) for name in self}, self._nulls)

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """Move to a device (integer values keep their dtype)."""
        return Condition({name: value.to(*args, **kwargs) for name, value in self._values.items()}, self._nulls)


def as_condition(
    value: Condition | Mapping[str, Tensor] | Tensor | None,
    nulls: Mapping[str, Null],
    rows: int | None = None,
    device: torch.device | None = None,
) -> Condition | None:
    """Coerce what users pass as `condition=` into a `Condition`, on a device where one is given.

    A bare tensor stands for the only declared condition (the key of `nulls`, or `label` for integers and `condition`
    for floats where none is declared); a single row is repeated `rows` times.

    Raises:
        ValueError: for a wrong number of rows, or a bare tensor where several conditions are declared.
        TypeError: for anything else.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        if len(nulls) > 1:
            raise ValueError(f"condition: this flow has several conditions, {', '.join(nulls)}; pass a dict")
        name = next(iter(nulls), "condition" if value.is_floating_point() else "label")
        value = {name: value.reshape(1) if value.ndim == 0 else value}
    if not isinstance(value, Mapping):
        raise TypeError(f"condition: a tensor, a dict of tensors or a Condition is needed, got {type(value).__name__}")
    condition = value if isinstance(value, Condition) else Condition(value, nulls)
    if rows is not None and condition.rows != rows:
        if condition.rows != 1:
            raise ValueError(f"condition: {rows} rows are needed, one a sample, got {condition.rows}")
        condition = Condition({k: v.expand(rows, *v.shape[1:]) for k, v in condition.items()}, condition.nulls)
    return condition if device is None else condition.to(device)
