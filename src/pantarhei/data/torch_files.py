"""PyTorch's weight files, read without its own loader.

`torch.load(weights_only=True)` runs no code, but takes a file's word for sizes: the format before 1.6 hands out memory that
nothing was written to, `torch.Tensor(n)` may be called from any file, and a tensor of stride 0 has as many numbers as it
says. Here every number of a tensor comes from a byte of the file, and what a file names is answered by inert records.

Both formats hold a pickle whose tensors refer to storages by keys. Since 1.6 it is `data.pkl` in a zip archive, with the
storages uncompressed beside it; before, four pickles (a magic number, a version, the machine, the content), then the list
of keys, then a storage after the other, each with its count.
"""

from __future__ import annotations

import argparse
import math
import mmap
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.pickle_limits import Allowance, Refused, naturals, one_line, shown
from pantarhei.data.pickle_reader import Constructor, Cursor, Reader
from pantarhei.data.pickled_arrays import Builder

KINDS = "plain data, NumPy arrays, tensors and networks"
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_AGAIN = "open it with PyTorch where you trust it, and save it again with torch.save"
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
_LOCAL_HEADER = 30  # bytes before the name in front of each entry of a zip archive


def read_torch(path: str | Path) -> Any:
    """What a file of `torch.save` holds: plain data, NumPy arrays, and tensors on the CPU.

    Tensors of one storage share memory, as they did. Parameters come back as tensors; ordered dicts, and counters, as dicts.

    Args:
        path: the file, of any format since PyTorch 0.1.10.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it asks for anything else (the message names it), is truncated or damaged, a tensor has more numbers
            than its storage, or it would take many times its size in memory.
    """
    path = Path(path)
    with one_line(str(path), "truncated, damaged or no weight file"):
        if not path.stat().st_size:
            raise EOFError("it is empty")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as source:
            allowance = Allowance(len(source))
            zipped = source[:4] == b"PK\x03\x04"
            tree = (
                _read_zip(path, source, allowance) if zipped else read_old(source, str(path), allowance, tensor_answers)
            )
            return Builder(allowance).visit(tree)


class StorageRecord:
    """Numbers of one type in a row, which lie in the file.

    Attributes:
        dtype, count: which, and how many.
        source, start: where they lie; None where the file does not hold them.
    """

    __slots__ = ("_numbers", "count", "dtype", "source", "start")

    def __init__(self, dtype: torch.dtype, count: int) -> None:
        self.dtype, self.count = dtype, count
        self.source: bytes | mmap.mmap | None = None
        self.start = 0
        self._numbers: Tensor | None = None

    # The BUILD opcode would set attributes.
    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state is set on a finished object")

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * self.dtype.itemsize

    def place(self, source: bytes | mmap.mmap, start: int) -> None:
        """Say where the numbers lie."""
        if start + self.size > len(source):
            raise EOFError("it ends too early")
        self.source, self.start = source, start

    def numbers(self, allowance: Allowance) -> Tensor:
        """They, flat."""
        if self._numbers is None:
            if self.source is None:
                raise ValueError("a tensor whose numbers are not in the file")
            allowance.take(self.size)
            raw = torch.empty(self.size, dtype=torch.uint8)
            if self.size:
                raw.numpy()[:] = np.frombuffer(self.source, np.uint8, self.size, self.start)
            self._numbers = raw.view(self.dtype)
        return self._numbers


class TensorRecord:
    """A view of a storage."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(
        self,
        storage: Any,
        offset: Any,
        shape: Any,
        stride: Any,
        requires_grad: Any = False,
        hooks: Any = None,
        metadata: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(storage, StorageRecord):
            raise ValueError("a tensor without a storage")
        if metadata:
            raise ValueError("a conjugate or negative view; save its content")
        self.storage, self.offset, self.shape, self.stride, self.dtype = storage, offset, shape, stride, dtype

    __setstate__ = StorageRecord.__setstate__

    def built(self, builder: Builder) -> Tensor:
        """The tensor, on the CPU and contiguous."""
        shape, stride = (naturals(numbers, "sizes or strides") for numbers in (self.shape, self.stride))
        (offset,) = naturals((self.offset,), "sizes or strides")
        numbers = self.storage.numbers(builder.allowance)
        numbers = numbers if self.dtype is None else numbers.view(self.dtype)
        count, size = numbers.numel(), math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if size else 0
        # More numbers than there are would be one of them many times over: no network has that.
        if size > count or (size and last >= count):
            raise ValueError(f"a tensor of shape {shape}, stride {stride} and offset {offset} in {count} numbers")
        builder.allowance.take(size * numbers.itemsize)
        return numbers.as_strided(shape, stride, offset if size else 0).contiguous()


class MappingRecord(dict[Any, Any]):
    """A dict of another class; of its attributes (such as versions of layers in a state dict) nothing is kept."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Pass over it."""

    def built(self, builder: Builder) -> dict[Any, Any]:
        """A plain dict."""
        plain: dict[Any, Any] = {}
        builder.keep(self, plain)
        plain.update((builder.visit(key), builder.visit(value)) for key, value in self.items())
        return plain


class _ParameterRecord:
    """A parameter as before PyTorch 0.4: its data, then a state that is about gradients."""

    __slots__ = ("data",)
    data: TensorRecord

    def __new__(cls, data: Any = None, *unused: Any) -> _ParameterRecord:
        made = super().__new__(cls)
        made.data = rebuild_parameter(data)
        return made

    def __setstate__(self, state: Any) -> None:
        """Pass over it."""

    def built(self, builder: Builder) -> Any:
        """Its tensor."""
        return builder.visit(self.data)


class _Namespace(argparse.Namespace):
    """Settings of a training script: attributes, and no code."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError("the state of a Namespace is no dict of names")
        self.__dict__ = state

    def built(self, builder: Builder) -> argparse.Namespace:
        """With its attributes finished."""
        plain = argparse.Namespace()
        builder.keep(self, plain)
        plain.__dict__.update(builder.visit(dict(self.__dict__)))
        return plain


def rebuild_parameter(data: Any, *unused: Any) -> TensorRecord:
    """The tensor of a parameter."""
    if not isinstance(data, TensorRecord):
        raise ValueError("a parameter that is no tensor")
    return data


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> TensorRecord:
    # Types without a storage of their own lie in bytes.
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor whose type is none")
    return TensorRecord(storage, offset, shape, stride, grad, hooks, metadata, dtype)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, state: Any) -> TensorRecord:
    # A tensor with attributes; these are passed over.
    if function not in _REBUILD.values() or kind not in (_TENSOR, _ParameterRecord):
        raise ValueError("a tensor of another class")
    return function(*arguments)


def _device(*arguments: Any) -> str:
    if not all(isinstance(entry, (str, int)) for entry in arguments):
        raise ValueError("a device of something else than text and numbers")
    return ":".join(map(str, arguments))


def _nothing(*arguments: Any) -> None:
    raise ValueError("a tensor without numbers")


_TENSOR = Constructor(_nothing)
_REBUILD: dict[str, Any] = {
    "_rebuild_tensor": Constructor(TensorRecord),
    "_rebuild_tensor_v2": Constructor(TensorRecord),
    "_rebuild_tensor_v3": Constructor(_rebuild_v3),
    "_rebuild_parameter": Constructor(rebuild_parameter),
    "_rebuild_parameter_with_state": Constructor(rebuild_parameter),
}
_ANSWERS: dict[tuple[str, str], Any] = {
    **{("torch._utils", name): answer for name, answer in _REBUILD.items()},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._tensor", "_rebuild_from_type_v2"): Constructor(_rebuild_from_type),
    ("torch", "Tensor"): _TENSOR,
    ("torch", "Size"): Constructor(tuple),
    ("torch", "device"): Constructor(_device),
    ("torch.nn.parameter", "Parameter"): _ParameterRecord,
    ("collections", "OrderedDict"): MappingRecord,
    ("collections", "Counter"): MappingRecord,
    ("argparse", "Namespace"): _Namespace,
}


def tensor_answers(module: str, name: str) -> Any:
    """Inert answers to the names in a weight file; None for all others."""
    if module == "torch" and (module, name) not in _ANSWERS:
        # Looked up in what is there: asking torch itself for a name may import something.
        found = vars(torch).get(name)
        return found if isinstance(found, torch.dtype) else None
    return _ANSWERS.get((module, name))


class _Storages:
    """Storages by key, as the persistent ids of a pickle ask for them."""

    def __init__(self) -> None:
        self.records: dict[str, StorageRecord] = {}

    def __call__(self, pid: Any) -> StorageRecord:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or not isinstance(pid[2], (str, int)):
            raise ValueError(f"an outside object that is no storage, {shown(pid)}")
        what, dtype, key, _, count = pid[:5]
        if what != "storage" or not isinstance(dtype, torch.dtype) or dtype not in _STORAGES.values():
            raise ValueError(f"an outside object that is no storage, {shown(what)}")
        if len(pid) == 6 and pid[5] is not None:
            raise ValueError(f"a storage within a storage; {_AGAIN}")
        (count,) = naturals((count,), "sizes of storages")
        record = self.records.setdefault(str(key), StorageRecord(dtype, count))
        if (record.dtype, record.count) != (dtype, count):
            raise ValueError(f"a storage of two sizes, {shown(str(key))}")
        return record


def read_old(source: bytes | mmap.mmap, where: str, allowance: Allowance, answers: Callable[[str, str], Any]) -> Any:
    """The content of the format before PyTorch 1.6, with records in the place of tensors and storages.

    Args:
        source: all of the file.
        where: how messages call it.
        allowance: what may be made of it.
        answers: to the names in it.

    Raises:
        ValueError, EOFError, Refused: it is damaged, or asks for anything else.
    """
    if source[257:262] == b"ustar":
        raise Refused(f"refused: {where} has the tar format of PyTorch before 0.1.10; {_AGAIN}")
    cursor, storages = Cursor(source), _Storages()

    def load() -> Any:
        return Reader(cursor, where, allowance, more=answers, outside=storages, kinds=KINDS).load()

    if load() != _MAGIC or load() != _VERSION:
        raise ValueError("it is no file of PyTorch")
    machine = load()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise Refused(f"refused: {where} was written on a big-endian machine; {_AGAIN}")
    tree, keys = load(), load()
    if not isinstance(keys, list) or not all(isinstance(key, (str, int)) for key in keys):
        raise ValueError("its list of storages is none")
    # A storage that is not in the list has no numbers: PyTorch gives it whatever lies in memory.
    names = [str(key) for key in keys]
    if sorted(names) != sorted(storages.records):
        raise ValueError("its list of storages is not that of its tensors")
    for record in map(storages.records.__getitem__, names):
        (count,) = struct.unpack("<q", cursor.read(8))
        if count != record.count:
            raise ValueError(f"a storage of {count} numbers, where {record.count} are announced")
        record.place(source, cursor.at)
        cursor.at += record.size
    return tree


def _read_zip(path: Path, source: mmap.mmap, allowance: Allowance) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    folder = next((found[1] for name in entries if (found := re.fullmatch(r"([^/]+)/data\.pkl", name))), None)
    if folder is None:
        raise ValueError("it is no file of PyTorch: it has no data.pkl")
    if f"{folder}/constants.pkl" in entries:
        raise Refused(f"refused: {path} is a TorchScript program; save its state_dict() instead")

    def start(entry: zipfile.ZipInfo) -> int:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise Refused(f"refused: {path} is compressed, which torch.save does not; {_AGAIN}")
        name, extra = struct.unpack_from("<HH", source, entry.header_offset + _LOCAL_HEADER - 4)
        return entry.header_offset + _LOCAL_HEADER + name + extra

    def content(name: str) -> bytes:
        entry = entries[f"{folder}/{name}"]
        cursor = Cursor(source)
        cursor.at = start(entry)
        return cursor.read(entry.file_size)

    if f"{folder}/byteorder" in entries and content("byteorder") == b"big":
        raise Refused(f"refused: {path} was written on a big-endian machine; {_AGAIN}")
    storages = _Storages()
    cursor = Cursor(content("data.pkl"))
    tree = Reader(cursor, str(path), allowance, more=tensor_answers, outside=storages, kinds=KINDS).load()
    for key, record in storages.records.items():
        stored = entries.get(f"{folder}/data/{key}")
        if stored is None or stored.file_size != record.size:
            raise ValueError(f"the storage {shown(key)} is not in the file, or of another size")
        record.place(source, start(stored))
    return tree
