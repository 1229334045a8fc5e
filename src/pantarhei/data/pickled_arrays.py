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

from pantarhei.data.pickle_limits import Allowance, naturals, shown

# kind letter and byte size, with an optional byte order; 'b1' is bool
_PLAIN = re.compile(r"[<>=|]?(?:b1|[iufc]\d+|[SUV]\d+|O\d*|\?)")

_WRITTEN_OUT = 16  # a tree may share a good deal, but not so much that a message about it fills the memory


class DtypeRecord:
    """Stands for a ``numpy.dtype`` while a pickle is read."""

    __slots__ = ("_dtype", "code", "state")

    def __init__(self, code: str | bytes, align: Any = False, copy: Any = True) -> None:
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not _PLAIN.fullmatch(text):
            raise ValueError(f"the dtype {shown(code)} is not a plain one")
        self.code = text
        self.state: tuple[Any, ...] | None = None
        self._dtype: np.dtype[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state, self._dtype = state, None

    def built(self, builder: Builder) -> np.dtype[Any]:
        """The dtype."""
        return self.dtype()

    def dtype(self) -> np.dtype[Any]:
        """Build the dtype from its code, byte order, fields and sub-array; flags and alignment are not believed."""
        # Once: each of two fields may be of a dtype whose two fields are of a dtype, and so on.
        if self._dtype is None:
            self._dtype = self._make()
        return self._dtype

    def _make(self) -> np.dtype[Any]:
        kind = self.code.lstrip("<>=|")
        if kind.startswith("O"):
            return np.dtype(object)
        if self.state is None:
            return np.dtype(self.code)
        _, order, subarray, names, fields, size = self.state[:6]
        if subarray is not None:
            base, shape = subarray
            return np.dtype((base.dtype(), naturals(shape, "sizes of a sub-array")))
        if names:
            if not all(isinstance(name, (str, bytes)) for name in names):
                raise ValueError("names of fields that are no text")
            parts = [fields[name] for name in names]
            return np.dtype(
                {
                    "names": [_text(name) for name in names],
                    "formats": [part[0].dtype() for part in parts],
                    "offsets": naturals([part[1] for part in parts], "offsets of fields"),
                    "itemsize": naturals((size,), "sizes of a dtype")[0],
                }
            )
        if _text(order) not in ("<", ">", "=", "|"):
            raise ValueError(f"the byte order {shown(order)} is none")
        return np.dtype(_text(order) + kind)


class ArrayRecord:
    """Stands for a ``numpy.ndarray`` while a pickle is read."""

    __slots__ = ("axes", "state")

    def __init__(self, state: tuple[Any, ...] | None = None, axes: Sequence[int] | None = None) -> None:
        self.state = state  # version, shape, dtype record, Fortran order, content
        self.axes = axes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def built(self, builder: Builder) -> np.ndarray:
        """The array."""
        if self.state is None:
            raise ValueError("an array without content")
        _, sizes, dtype, fortran, content = self.state
        shape = naturals(sizes, "sizes of an array")
        order: Literal["C", "F"] = "F" if fortran else "C"
        if isinstance(content, list):
            builder.allowance.take(8 * len(content))
            array = np.empty(len(content), dtype=object).reshape(shape, order=order)
            builder.keep(self, array)
            flat = array.reshape(-1, order=order)
            for index, entry in enumerate(content):
                flat[index] = builder.visit(entry)
            return array
        raw = _raw(content)
        builder.allowance.take(len(raw))
        array = _filled(raw, dtype.dtype(), shape, order)
        return array if self.axes is None else array.transpose(self.axes)


def scalar(dtype: DtypeRecord, raw: bytes | str) -> Any:
    """Build a NumPy scalar (``numpy.core.multiarray.scalar``)."""
    return np.frombuffer(_raw(raw), dtype.dtype())[0]


def array_from_buffer(
    raw: bytes | bytearray, dtype: DtypeRecord, shape: Sequence[int], order: str, axes: Sequence[int] | None = None
) -> ArrayRecord:
    """Record an array of pickle protocol 5 (``numpy.core.numeric._frombuffer``)."""
    # A record again, not an array: a pickle may go on to set the state of whatever it made.
    return ArrayRecord((1, shape, dtype, order == "F", raw), axes if order == "K" else None)


class Builder:
    """Replaces the records in a tree of plain containers by what they stand for, each once.

    A record is an object whose class has a method `built(builder)`. A tree that is far larger than the file once everything
    shared in it is written out, as `repr` and copies do, is refused.

    Args:
        allowance: how much may be made of them.
    """

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self._most, self._weight = _WRITTEN_OUT * allowance.left, 0
        # What a node has become, and how many entries it has when written out. The original stays in the entry: were it
        # freed, another object could get its id.
        self._done: dict[int, tuple[Any, Any, int]] = {}

    def keep(self, node: Any, result: Any, weight: int = 1) -> Any:
        """Note what a node has become; before its content is visited where it may contain itself."""
        self._done[id(node)] = (node, result, weight)
        return result

    def visit(self, node: Any) -> Any:
        """What a node of the tree becomes: containers are refilled in place, records replaced."""
        # Asked of the class: what an object says of itself may come out of the file.
        built = getattr(type(node), "built", None)
        if built is None and not isinstance(node, (list, tuple, dict, set, frozenset)):
            # Short texts are names, which many dicts share.
            self._weigh(len(node) if isinstance(node, (str, bytes)) and len(node) > 64 else 1)
            return node
        if id(node) in self._done:
            self._weigh(self._done[id(node)][2])
            return self._done[id(node)][1]
        before = self._weight
        if built is not None:
            result = built(node, self)
        elif isinstance(node, (list, dict, set)):
            result = self.keep(node, node)
            self._refill(node)
        else:
            result = type(node)(self.visit(entry) for entry in node)
        self._weigh(1)
        return self.keep(node, result, self._weight - before)

    def _weigh(self, entries: int) -> None:
        self._weight += entries
        if self._weight > self._most:
            raise ValueError("its content takes many times the memory of the file")

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


def _filled(
    raw: bytes | bytearray, dtype: np.dtype[Any], shape: tuple[int, ...], order: Literal["C", "F"]
) -> np.ndarray:
    # NumPy would make one byte of each entry without any.
    if len(raw) != math.prod(shape) * dtype.itemsize or not dtype.itemsize:
        raise ValueError(
            f"an array of shape {shape} and {dtype.itemsize} bytes an entry with {len(raw)} bytes of content"
        )
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
