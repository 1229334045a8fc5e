"""States of a differential equation: a tensor, or a tuple of tensors that share their batch dimension."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

State = Any  # Tensor | tuple[Tensor, ...]; spelled out it would force casts on every line of arithmetic
Field = Callable[..., State]
Terms = tuple[tuple[int, float], ...]  # (which slope, its coefficient)
Scalar = float | Tensor  # a step size or a time: one number for all rows, or one a row, shape (B,)


def leaves(x: State) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return (x,) if isinstance(x, Tensor) else tuple(x)


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Apply `function` leaf by leaf; the result has the structure of the first state."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return tuple(function(*parts) for parts in zip(*states, strict=True))


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) to (B, 1, ..., 1) so that it multiplies `like` row by row; a 0-d value is returned as it is."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


def nonzero(coefficients: Sequence[float]) -> Terms:
    """The non-zero coefficients with their positions."""
    return tuple((i, c) for i, c in enumerate(coefficients) if c != 0.0)


def add_terms(x: State, terms: Terms, slopes: Sequence[State], dt: Scalar) -> State:
    """`x + dt * sum_i c_i slopes[i]` over the given (i, c_i): nothing is built where a step costs microseconds."""
    if not isinstance(x, Tensor):
        return tuple(add_terms(leaf, terms, [slope[i] for slope in slopes], dt) for i, leaf in enumerate(x))
    if isinstance(dt, Tensor):
        total = sum((slopes[i] * c for i, c in terms), start=torch.zeros_like(x))
        return x + per_row(dt, x).to(x.dtype) * total
    for i, c in terms:
        x = torch.add(x, slopes[i], alpha=c * dt)
    return x


def add_scaled(x: State, coefficients: Sequence[float], slopes: Sequence[State], dt: Scalar) -> State:
    """`x + dt * sum_i coefficients[i] * slopes[i]`."""
    return add_terms(x, nonzero(coefficients), slopes, dt)


def select_rows(x: Any, rows: Tensor) -> Any:
    """The given rows of a tensor, of a tuple of tensors, or of anything with an `index(rows)` method (a condition)."""
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.index_select(0, rows)
    if isinstance(x, tuple):
        return tuple(select_rows(leaf, rows) for leaf in x)
    return x.index(rows)


def half_types(x: State) -> tuple[torch.dtype, ...]:
    """The types of a state's tensors where one is of less than single precision, else nothing."""
    types = tuple(leaf.dtype for leaf in leaves(x))
    return types if any(torch.promote_types(kind, torch.float32) != kind for kind in types) else ()


def time_dtype(x: State) -> torch.dtype:
    """The precision times are handed to a field in: that of the state, but never below float32."""
    dtype = leaves(x)[0].dtype
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def wide(x: State) -> State:
    """A state in single precision at least: half precision loses the sum of many small steps."""
    return map_state(lambda leaf: leaf.to(torch.promote_types(leaf.dtype, torch.float32)), x)


def in_types(x: State, types: Sequence[torch.dtype]) -> State:
    """A state whose tensors are of the given types."""
    return x.to(types[0]) if isinstance(x, Tensor) else tuple(p.to(kind) for p, kind in zip(x, types, strict=True))


class CountedField:
    """Calls `field(x, t[, condition])` and counts the calls and the rows (batch elements) evaluated.

    `t` arrives as a float or a (B,) tensor and reaches the field as a tensor on the state's device. The field sees states of
    the given types, whatever precision they are summed in.
    """

    def __init__(self, field: Field, condition: Any = None, types: Sequence[torch.dtype] = ()):
        self.field = field
        self.condition = condition
        self.types = tuple(types)
        self.calls = 0
        self.rows = 0
        self._of_times: dict[str, Any] = {}

    def __call__(self, x: State, t: Scalar) -> State:
        """The field at (x, t); counted."""
        first = x if isinstance(x, Tensor) else x[0]
        self.calls += 1
        self.rows += first.shape[0] if first.ndim else 1
        if not self._of_times:  # the same throughout a solve
            self._of_times = {"dtype": time_dtype(x), "device": first.device}
        if isinstance(t, Tensor):
            t = t.to(self._of_times["dtype"])
        else:  # a fill, not torch.tensor: no copy from the host, nothing to wait for on a GPU
            t = torch.scalar_tensor(t, **self._of_times)
        seen = in_types(x, self.types) if self.types else x
        value = self.field(seen, t) if self.condition is None else self.field(seen, t, self.condition)
        if self.calls == 1:
            _check_like(value, x)
        return map_state(lambda part, like: part.to(like.dtype), value, x) if self.types else value

    def for_rows(self, rows: Tensor) -> CountedField:
        """The same field for some rows of the batch; its counts start at zero."""
        return CountedField(self.field, select_rows(self.condition, rows), self.types)


def check_state(x: State) -> None:
    """Raise if `x` is not a floating-point tensor or a non-empty tuple of them."""
    parts: Iterable[Any] = (x,) if isinstance(x, Tensor) else x if isinstance(x, tuple) and x else ()
    if not parts or not all(isinstance(p, Tensor) and p.is_floating_point() for p in parts):
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: a floating-point tensor or a tuple of them is needed, got {kind}")


def _check_like(value: State, x: State) -> None:
    shapes = [tuple(leaf.shape) for leaf in leaves(x)]
    got = [tuple(leaf.shape) for leaf in leaves(value)]
    if got != shapes:
        raise ValueError(
            f"field: its output must have the shape of the state, {_show(shapes)}, got shape {_show(got)} "
            "(does it broadcast t, 0-d or one a row, to the state's dimensions?)"
        )


def _show(shapes: list[tuple[int, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else str(shapes)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order; whatever else they hold is left out."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def with_tensors(tree: Any, tensors: Iterable[Tensor]) -> Any:
    """The same nested structure with other tensors."""
    return _filled(tree, iter(tensors))


def _filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, dict):
        return {name: _filled(part, tensors) for name, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [_filled(part, tensors) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
