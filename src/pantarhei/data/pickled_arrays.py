"""NumPy arrays of a pickle, recorded while it is read and built afterwards from checked parts.

A pickle makes an array in two steps: an empty one, then its state (shape, dtype, raw bytes). NumPy's own second step
believes the state, dtype flags included, which a forged pickle can use to have bytes taken for pointers. Here the
state is kept as it came, and ``numpy.frombuffer`` and ``numpy.dtype`` build from it, which check what they get.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

# kind letter and byte size, with an optional byte order; 'b1' is bool
_PLAIN = re.compile(r"[<>=|]?(?:b1|[iufc]\d+|[SUV]\d+|O\d*|\?)")


class DtypeRecord:
    """Stands for a ``numpy.dtype`` while a pickle is read."""

    __slots__ = ("code", "state")

    def __init__(self, code: str | bytes, align: Any = False, copy: Any = True) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not _PLAIN.fullmatch(text):
            raise ValueError(f"the dtype {code!r} is not a plain one")
        self.code = text
        self.state: tuple[Any, ...] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def dtype(self) -> np.dtype[Any]:
        """Build the dtype from its code, byte order, fields and sub-array; flags and alignment are not believed."""
        kind = self.code.lstrip("<>=|")
        if kind.startswith("O"):
            return np.dtype(object)
        if self.state is None:
            return np.dtype(self.code)
        _, order, subarray, names, fields, size = self.state[:6]
        if subarray is not None:
            base, shape = subarray
            return np.dtype((base.dtype(), shape))
        if names:
            parts = [fields[name] for name in names]
            return np.dtype(
                {
                    "names": [_text(name) for name in names],
                    "formats": [part[0].dtype() for part in parts],
                    "offsets": [part[1] for part in parts],
                    "itemsize": size,
                }
            )
        if _text(order) not in ("<", ">", "=", "|"):
            raise ValueError(f"the byte order {order!r} is none")
        return np.dtype(_text(order) + kind)


class ArrayRecord:
    """Stands for a ``numpy.ndarray`` while a pickle is read."""

    __slots__ = ("axes", "state")

    def __init__(self, state: tuple[Any, ...] | None = None, axes: Sequence[int] | None = None) -> None:
        self.state = state  # version, shape, dtype record, Fortran order, content
        self.axes = axes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


def scalar(dtype: DtypeRecord, raw: bytes | str) -> Any:
    """Build a NumPy scalar (``numpy.core.multiarray.scalar``)."""
    return np.frombuffer(_raw(raw), dtype.dtype())[0]


def array_from_buffer(
    raw: bytes | bytearray, dtype: DtypeRecord, shape: Sequence[int], order: str, axes: Sequence[int] | None = None
) -> ArrayRecord:
    """Record an array of pickle protocol 5 (``numpy.core.numeric._frombuffer``)."""
    # A record again, not an array: a pickle may go on to set the state of whatever it made.
    return ArrayRecord((1, shape, dtype, order == "F", raw), axes if order == "K" else None)


def build(tree: Any) -> Any:
    """Replace the records in a tree of plain containers by the arrays and dtypes that they stand for."""
    return _Builder().visit(tree)


class _Builder:
    def __init__(self) -> None:
        # The original stays in the entry: were it freed, another object could get its id.
        self._done: dict[int, tuple[Any, Any]] = {}

    def visit(self, node: Any) -> Any:
        if not isinstance(node, (list, tuple, dict, set, frozenset, DtypeRecord, ArrayRecord)):
            return node
        if id(node) in self._done:
            return self._done[id(node)][1]
        if isinstance(node, (list, dict, set)):
            self._done[id(node)] = (node, node)  # before their content: these may contain themselves
            self._refill(node)
            return node
        if isinstance(node, ArrayRecord):
            return self._array(node)
        if isinstance(node, DtypeRecord):
            result: Any = node.dtype()
        else:
            result = type(node)(self.visit(entry) for entry in node)
        self._done[id(node)] = (node, result)
        return result

    def _refill(self, node: Any) -> None:
        if isinstance(node, list):
            node[:] = [self.visit(entry) for entry in node]
        elif isinstance(node, dict):
            pairs = [(self.visit(key), self.visit(value)) for key, value in node.items()]
            node.clear()
            node.update(pairs)
        else:
            entries = [self.visit(entry) for entry in node]
            node.clear()
            node.update(entries)

    def _array(self, record: ArrayRecord) -> np.ndarray:
        if record.state is None:
            raise ValueError("an array without content")
        _, shape, dtype, fortran, content = record.state
        order: Literal["C", "F"] = "F" if fortran else "C"
        if isinstance(content, list):
            array = np.empty(len(content), dtype=object).reshape(shape, order=order)
            self._done[id(record)] = (record, array)
            flat = array.reshape(-1, order=order)
            for index, entry in enumerate(content):
                flat[index] = self.visit(entry)
            return array
        array = _filled(_raw(content), dtype.dtype(), tuple(shape), order)
        if record.axes is not None:
            array = array.transpose(record.axes)
        self._done[id(record)] = (record, array)
        return array


def _filled(
    raw: bytes | bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]
) -> np.ndarray:
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} with {len(raw)} bytes of content")
    if not raw:
        if dtype.hasobject:
            raise ValueError("an array of objects without its objects")
        return np.zeros(shape, dtype)
    return np.frombuffer(bytearray(raw), dtype).reshape(shape, order=order)


def _raw(content: bytes | bytearray | str) -> bytes | bytearray:
    # Python 2 wrote array content as an 8-bit string, which the encoding "latin1" turns into text byte by byte.
    return content.encode("latin1") if isinstance(content, str) else content


def _text(name: str | bytes) -> str:
    return name.decode("latin1") if isinstance(name, bytes) else name
