"""Network snapshots that were pickled as whole objects, read without running what is in them.

NVIDIA's research code (StyleGAN2-ADA, EDM) pickles modules of its own classes so that they unpickle anywhere: each becomes a
call of `torch_utils.persistence._reconstruct_persistent_obj` on a dict of the class name, the source text of its module,
which that function would execute, and the attributes of the object. Here that name, those of PyTorch's modules and those of
its tensors are answered by inert records, and every other name is refused. Tensors are built when the whole pickle has been
read, from parts that have been checked; source text is thrown away unread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pantarhei.data.pickle_limits import Allowance, one_line
from pantarhei.data.pickle_reader import Constructor, Cursor, Reader
from pantarhei.data.pickled_arrays import Builder
from pantarhei.data.pickles import read_file
from pantarhei.data.torch_files import KINDS, MappingRecord, StorageRecord, read_old, tensor_answers

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

    def built(self, builder: Builder) -> ModuleRecord:
        """Itself, with its attributes finished."""
        builder.keep(self, self)
        self.state = builder.visit(self.state)
        return self

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
    data = source if isinstance(source, bytes) else read_file(source)
    where = name or ("the given bytes" if isinstance(source, bytes) else str(source))
    allowance = Allowance(len(data))
    with one_line(where, "a truncated or damaged snapshot"):
        answers = _Answers(where, allowance)
        tree = Reader(Cursor(data), where, allowance, more=answers, kinds=KINDS).load()
        return Builder(allowance).visit(tree)


class _EasyDict(MappingRecord):
    """A dict whose keys could be read as attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if state:
            raise ValueError("a state is set on a dict")


class _TorchModule(ModuleRecord):
    """A module of torch.nn: made empty, then given its attributes."""

    __slots__ = ()

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


class _Answers:
    """Inert answers to the names in a snapshot."""

    def __init__(self, where: str, allowance: Allowance) -> None:
        self._where, self._allowance = where, allowance
        self._types: dict[str, type[_TorchModule]] = {}
        self._names: dict[tuple[str, str], Any] = {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): Constructor(_persistent),
            ("torch.storage", "_load_from_bytes"): Constructor(self._storage),
            ("dnnlib.util", "EasyDict"): _EasyDict,
            ("dnnlib", "EasyDict"): _EasyDict,
        }

    def __call__(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        if _TORCH_MODULE.fullmatch(module) and name.isidentifier():
            if name not in self._types:
                self._types[name] = type(name, (_TorchModule,), {"__slots__": ()})
            return self._types[name]
        return tensor_answers(module, name)

    def _storage(self, content: Any) -> StorageRecord:
        # A storage in a plain pickle is a file of its own, in the format before PyTorch 1.6.
        if not isinstance(content, bytes):
            raise ValueError("a storage from something else than bytes")
        record = read_old(content, self._where, self._allowance, tensor_answers)
        if not isinstance(record, StorageRecord):
            raise ValueError(f"a {type(record).__name__} in the place of a storage")
        return record


def _persistent(meta: Any) -> ModuleRecord:
    name = meta.get("class_name") if isinstance(meta, dict) else None
    if not isinstance(name, str) or not isinstance(meta["state"], dict) or meta.get("type") != "class":
        raise ValueError("a persistent object without class name and state")
    if not name.isidentifier():
        raise ValueError("a persistent object whose class has no name")
    return ModuleRecord(name, meta["state"])


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
