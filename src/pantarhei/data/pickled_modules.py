"""Network snapshots that were pickled as whole objects, read without running what is in them.

NVIDIA's research code (StyleGAN2-ADA, EDM) pickles modules of its own classes so that they unpickle anywhere: each becomes a
call of `torch_utils.persistence._reconstruct_persistent_obj` on a dict of the class name, the source text of its module,
which that function would execute, and the attributes of the object. Here that name, those of PyTorch's modules and those of
its tensors are answered by inert records, and every other name is refused. Tensors are built when the whole pickle has been
read, from parts that have been checked; source text is thrown away unread.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.pickled_arrays import build
from pantarhei.data.pickles import Constructor, restricted_load

_TORCH_MODULE = re.compile(r"torch\.nn\.modules\.[a-z_0-9]+")


class ModuleRecord:
    """What a snapshot holds of an object: the name of its class, and its attributes.

    Attributes:
        class_name: name of its class, without the module.
        state: its attributes by name; plain data, NumPy arrays, tensors and other records.
    """

    __slots__ = ("class_name", "state")

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    # The BUILD opcode would set attributes; the state came with the call.
    def __setstate__(self, state: Any) -> None:
        raise ValueError("a state is set on a finished object")

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What it was made with, by position."""
        found = self.state.get("_init_args", ())
        return tuple(found) if isinstance(found, (tuple, list)) else ()

    @property
    def keywords(self) -> dict[str, Any]:
        """What it was made with, by name."""
        found = self.state.get("_init_kwargs", {})
        return dict(found) if isinstance(found, Mapping) else {}

    def part(self, name: str) -> ModuleRecord | None:
        """A submodule by its name; None where there is none."""
        found = _table(self, "_modules").get(name)
        return found if isinstance(found, ModuleRecord) else None

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the module and its submodules, named as in its state dict.

        Raises:
            ValueError: what should hold tensors or modules holds something else.
        """
        return dict(_named_tensors(self, "", set()))


def read_modules(source: bytes | str | Path, *, name: str | None = None) -> Any:
    """Read a pickle of plain data, NumPy arrays, PyTorch tensors and modules.

    Objects of NVIDIA's persistent classes and modules of `torch.nn` come out as `ModuleRecord`, tensors on the CPU.

    Args:
        source: path of the file, or its bytes.
        name: how errors call the source; its path if left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the pickle asks for any other name (the message says which), a tensor reaches beyond its storage, or the
            file is truncated or damaged.
    """
    where = name or ("the given bytes" if isinstance(source, bytes) else str(source))
    answers = _Answers()
    tree = restricted_load(source, name=name, more=answers)
    try:
        for record in answers.records:
            record.state = build(record.state)
        return _Finisher().visit(tree)
    except RecursionError:
        raise ValueError(f"cannot read {where}: its containers are nested too deeply") from None
    except Exception as error:  # torch reports a damaged storage with whatever its readers raise
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"cannot read {where}: a damaged snapshot ({reason})") from None


class _StorageRecord:
    """Numbers as `torch.save` wrote them."""

    __slots__ = ("content",)

    def __init__(self, content: bytes) -> None:
        if not isinstance(content, bytes):
            raise ValueError("a storage from something else than bytes")
        self.content = content

    __setstate__ = ModuleRecord.__setstate__

    def numbers(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            storage = torch.load(io.BytesIO(self.content), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise ValueError(f"a {type(storage).__name__} in the place of a storage")
            return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())


class _TensorRecord:
    """A view of a storage."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, *unused: Any) -> None:
        if not isinstance(storage, _StorageRecord):
            raise ValueError("a tensor without a storage")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    __setstate__ = ModuleRecord.__setstate__

    def tensor(self) -> Tensor:
        numbers = self.storage.numbers()
        count, shape, stride = numbers.numel(), _naturals(self.shape), _naturals(self.stride)
        (offset,) = _naturals((self.offset,))
        size = math.prod(shape)
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if size else 0
        # More numbers than there are would be one of them many times over: no network has that.
        if size > count or (size and last >= count):
            raise ValueError(f"a tensor of shape {shape}, stride {stride} and offset {offset} in {count} numbers")
        return numbers.as_strided(shape, stride, offset if size else 0).clone(memory_format=torch.contiguous_format)


def _naturals(numbers: Any) -> tuple[int, ...]:
    if not isinstance(numbers, (tuple, list)) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor with the sizes or strides {numbers!r}")
    return tuple(numbers)


def _parameter(data: Any, *unused: Any) -> _TensorRecord:
    if not isinstance(data, _TensorRecord):
        raise ValueError("a parameter that is no tensor")
    return data


class _Mapping(dict[Any, Any]):
    """A dict whose keys could be read as attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if state:
            raise ValueError("a state is set on a dict")


class _TorchModule(ModuleRecord):
    """A module of torch.nn: made empty, then given its attributes."""

    __slots__ = ()
    records: list[ModuleRecord]

    def __new__(cls) -> _TorchModule:
        made = super().__new__(cls)
        made.class_name, made.state = cls.__name__, {}
        return made

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or self.state:
            raise ValueError(f"the state of a {self.class_name} is no dict, or is set twice")
        self.state = state
        self.records.append(self)


class _Answers:
    """Inert answers to the names in a snapshot."""

    def __init__(self) -> None:
        self.records: list[ModuleRecord] = []
        self._types: dict[str, type[_TorchModule]] = {}
        self._names: dict[tuple[str, str], Any] = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): Constructor(self._persistent),
            ("torch.storage", "_load_from_bytes"): Constructor(_StorageRecord),
            ("torch._utils", "_rebuild_tensor_v2"): Constructor(_TensorRecord),
            ("torch._utils", "_rebuild_parameter"): Constructor(_parameter),
            ("torch", "Size"): Constructor(tuple),
            ("torch", "device"): Constructor(_device),
            ("dnnlib.util", "EasyDict"): _Mapping,
            ("dnnlib", "EasyDict"): _Mapping,
        }

    def __call__(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        if module == "torch":
            # Looked up in what is there: asking torch itself for a name may import something.
            found = vars(torch).get(name)
            return found if isinstance(found, torch.dtype) else None
        if _TORCH_MODULE.fullmatch(module) and name.isidentifier():
            if name not in self._types:
                self._types[name] = type(name, (_TorchModule,), {"__slots__": (), "records": self.records})
            return self._types[name]
        return None

    def _persistent(self, meta: Any) -> ModuleRecord:
        name = meta.get("class_name") if isinstance(meta, dict) else None
        if not isinstance(name, str) or not isinstance(meta["state"], dict) or meta.get("type") != "class":
            raise ValueError("a persistent object without class name and state")
        self.records.append(ModuleRecord(name, meta["state"]))
        return self.records[-1]


def _device(*arguments: Any) -> str:
    return ":".join(map(str, arguments))


class _Finisher:
    """Replaces the records of tensors in a tree by the tensors, in place."""

    def __init__(self) -> None:
        # The original stays in the entry: were it freed, another object could get its id.
        self._done: dict[int, tuple[Any, Any]] = {}

    def visit(self, node: Any) -> Any:
        if not isinstance(node, (list, tuple, dict, ModuleRecord, _TensorRecord)):
            return node
        if id(node) in self._done:
            return self._done[id(node)][1]
        if isinstance(node, (list, dict, ModuleRecord)):
            self._done[id(node)] = (node, node)  # before their content: these may contain themselves
        if isinstance(node, list):
            node[:] = [self.visit(entry) for entry in node]
        elif isinstance(node, dict):
            for key, value in list(node.items()):
                node[key] = self.visit(value)
        elif isinstance(node, ModuleRecord):
            self.visit(node.state)
        else:
            result = node.tensor() if isinstance(node, _TensorRecord) else tuple(self.visit(entry) for entry in node)
            self._done[id(node)] = (node, result)
            return result
        return node


def _table(record: ModuleRecord, name: str) -> Mapping[str, Any]:
    found = record.state.get(name)
    if not isinstance(found, Mapping):
        raise ValueError(f"the {record.class_name} in this snapshot is no module: it has no {name}")
    return found


def _named_tensors(record: ModuleRecord, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    # Twice the same module would be twice the names, and so on without end.
    if id(record) in seen:
        raise ValueError(f"the {record.class_name} {prefix.rstrip('.')} in this snapshot stands in two places")
    seen.add(id(record))
    passing = record.state.get("_non_persistent_buffers_set", ())
    for kind in ("_parameters", "_buffers"):
        for name, value in _table(record, kind).items():
            if value is None or (kind == "_buffers" and name in passing):
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"{prefix}{name} in this snapshot is a {type(value).__name__}; expected a tensor")
            yield f"{prefix}{name}", value
    for name, value in _table(record, "_modules").items():
        if value is not None:
            if not isinstance(value, ModuleRecord):
                raise ValueError(f"{prefix}{name} in this snapshot is a {type(value).__name__}; expected a module")
            yield from _named_tensors(value, f"{prefix}{name}.", seen)
