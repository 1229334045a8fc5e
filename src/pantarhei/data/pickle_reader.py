"""The restricted reader under all foreign pickles: it runs nothing, and no small file makes it take much memory.

A pickle is a program: it names functions and says what to call them with. Here those names are answered from a fixed table
of constructors for plain data; nothing is ever imported on a pickle's behalf. NumPy's own constructors stay out of its reach
too, because a forged array state can make them read memory that is not theirs: arrays are recorded by stand-ins and built by
``numpy.frombuffer`` when the whole pickle has been read (see `pickled_arrays`).
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable
from struct import unpack
from typing import Any, ClassVar

from pantarhei.data.pickle_limits import Allowance, Refused, shown
from pantarhei.data.pickled_arrays import ArrayRecord, DtypeRecord, array_from_buffer, scalar


class Constructor:
    """A constructor under the name that a pickle knows it by: it can be called, and nothing else."""

    __slots__ = ("call",)
    call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "call", call)

    def __call__(self, *arguments: Any) -> Any:
        """What it makes of them."""
        return self.call(*arguments)

    # The BUILD opcode sets attributes; without this a pickle could put other constructors in this place.
    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state is set on a constructor")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(name)


class Cursor:
    """A file over bytes or a mapped file: it never asks for more than there is, and half a line is no line."""

    def __init__(self, source: bytes | mmap.mmap) -> None:
        self.source, self.at = source, 0

    def read(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.source) - self.at:
            raise EOFError("it ends too early")
        self.at += count
        return self.source[self.at - count : self.at]

    def readline(self) -> bytes:
        """The next line, with its end."""
        end = self.source.find(b"\n", self.at)
        if end < 0:
            raise EOFError("it ends too early")
        return self.read(end + 1 - self.at)


class Reader(pickle._Unpickler):
    """One pickle of plain data, and of what further answers allow.

    The C twin of this class would take 16 bytes for every number below the largest that a pickle gives an entry.

    Args:
        file: it is read up to the end of the pickle.
        where: how messages call it.
        allowance: what may be copied and hashed.
        encoding: how 8-bit strings of Python 2 are read.
        more: answers names before the table here does, given as (module, name); None for those that it does not know. What
            it answers with must be inert, whatever a pickle calls it with or sets on it.
        outside: answers persistent ids.
        kinds: what messages say is read.
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: Cursor,
        where: str,
        allowance: Allowance,
        *,
        encoding: str = "latin1",
        more: Callable[[str, str], Any] | None = None,
        outside: Callable[[Any], Any] | None = None,
        kinds: str = "plain Python data and NumPy arrays",
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._where, self._more, self._outside, self._kinds = where, more, outside, kinds
        self.allowance = allowance

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name."""
        known = self._more(module, name) if self._more is not None else None
        known = _NAMES.get((module, name)) if known is None else known
        if known is None:
            asked = f"{module[:80]}.{name[:80]}"
            asked = asked if asked.isprintable() else repr(asked)
            raise Refused(f"refused: the pickle asks to run {asked} ({self._where}); only {self._kinds} are read")
        return known

    def persistent_load(self, pid: Any) -> Any:
        """The stand-in for an object outside of the pickle."""
        if self._outside is None:
            raise Refused(
                f"refused: the pickle asks for an outside object, {shown(pid)} ({self._where}); only {self._kinds} are read"
            )
        return self._outside(pid)

    def _bytearray(self) -> None:
        (count,) = unpack("<Q", self.read(8))
        self.stack.append(bytearray(self.read(count)))  # the original fills an array of the announced length first

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        self.allowance.weigh(tuple(arguments))
        super()._instantiate(kind, arguments)  # type: ignore[misc]

    dispatch[pickle.BYTEARRAY8[0]] = _bytearray


def _weighed(opcode: bytes, part: Callable[[list[Any]], Any]) -> Callable[[Any], None]:
    """An opcode that copies or hashes a part of the stack, and counts it before."""
    run: Any = pickle._Unpickler.dispatch[opcode[0]]

    def weigh_and_run(reader: Reader) -> None:
        for value in part(reader.stack):
            if type(value) is not str:  # which is hashed but once
                reader.allowance.weigh(value)
        run(reader)

    return weigh_and_run


for _opcode, _part in (
    (pickle.REDUCE, lambda stack: [stack[-1]]),  # the arguments of a call
    (pickle.SETITEM, lambda stack: stack[-2:-1]),  # keys
    (pickle.SETITEMS, lambda stack: stack[::2]),
    (pickle.DICT, lambda stack: stack[::2]),
    (pickle.ADDITEMS, lambda stack: stack),  # entries of sets
    (pickle.FROZENSET, lambda stack: stack),
):
    Reader.dispatch[_opcode[0]] = _weighed(_opcode, _part)


def _encode(text: str, codec: str = "latin1") -> bytes:
    # Protocols 0-2 write bytes as text with this codec; the others (zlib, ...) have no place in data.
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the codec {shown(codec)}")
    return text.encode("latin1")


def _bytes(content: bytes = b"") -> bytes:
    # bytes(n) would allocate n bytes at a pickle's word; content only.
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("bytes from something else than bytes")
    return content


def _bytearray(content: str | bytes = b"", codec: str = "latin1") -> bytearray:
    return bytearray(_encode(content, codec) if isinstance(content, str) else _bytes(content))


_NDARRAY = Constructor(ArrayRecord)


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> ArrayRecord:
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("an array of another class than numpy.ndarray")
    return ArrayRecord()


_BUILTINS = {
    "set": Constructor(set),
    "frozenset": Constructor(frozenset),
    "complex": Constructor(complex),
    "bytes": Constructor(_bytes),
    "bytearray": Constructor(_bytearray),
}
_MULTIARRAY = {"_reconstruct": Constructor(_reconstruct), "scalar": Constructor(scalar)}
_NAMES: dict[tuple[str, str], Constructor] = {
    # Plain dicts keep their order too, and have no attributes that a pickle could set.
    ("collections", "OrderedDict"): Constructor(dict),
    ("_codecs", "encode"): Constructor(_encode),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): Constructor(DtypeRecord),
    **{(module, name): call for module in ("builtins", "__builtin__") for name, call in _BUILTINS.items()},
    # NumPy 2 moved numpy.core to numpy._core; files carry either name.
    **{(f"numpy.{core}.multiarray", name): call for core in ("core", "_core") for name, call in _MULTIARRAY.items()},
    **{(f"numpy.{core}.numeric", "_frombuffer"): Constructor(array_from_buffer) for core in ("core", "_core")},
}
