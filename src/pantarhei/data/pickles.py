"""Reading other people's pickles and weight files without running what is in them.

A pickle is a program: it names functions and says what to call them with. `restricted_load` answers those names from a
fixed table of constructors for plain data; nothing is ever imported on a pickle's behalf. NumPy's own constructors stay
out of its reach too, because a forged array state can make them read memory that is not theirs: arrays are recorded by
stand-ins and built by ``numpy.frombuffer`` when the whole pickle has been read (see `pickled_arrays`).
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pantarhei.data.pickled_arrays import ArrayRecord, DtypeRecord, array_from_buffer, build, scalar

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def restricted_load(
    source: bytes | str | Path,
    *,
    encoding: Literal["latin1", "bytes", "utf-8"] = "latin1",
    name: str | None = None,
    more: Callable[[str, str], Any] | None = None,
) -> Any:
    """Read a pickle that holds plain data only.

    Numbers, strings, bytes, None, lists, tuples, sets, dicts (ordered ones become plain ones) and NumPy arrays, scalars
    and dtypes are built. Every other name in the pickle is refused, and nothing of it is imported or called.

    Args:
        source: path of the file, or its bytes.
        encoding: how 8-bit strings of Python 2 are read: ``"latin1"`` as text (every file loads), ``"bytes"`` as they
            are, ``"utf-8"`` as text. Arrays come out the same.
        name: how errors call the source; its path if left out.
        more: answers further names, given as (module, name); None for those that it does not know. What it answers with
            must be inert, whatever a pickle calls it with or sets on it (see `pickled_modules`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the pickle asks for anything else than plain data (the message names it), or it is truncated or
            damaged.
    """
    if isinstance(source, bytes):
        data, where = source, name or "the given bytes"
    else:
        data, where = _read(Path(source)), name or str(source)
    try:
        return build(_Reader(io.BytesIO(data), where, encoding, more).load())
    except _Refused as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"cannot read {where}: its containers are nested too deeply") from None
    except Exception as error:  # a damaged pickle can fail in any of the opcodes
        raise ValueError(
            f"cannot read {where}: a truncated or damaged pickle, or none at all ({_first_line(error)})"
        ) from None


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read a weight file onto the CPU without running code from it.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` as PyTorch writes them (read with
            ``torch.load(weights_only=True)``).

    Returns:
        What the file holds: a dict of tensors by name for safetensors; for PyTorch files the saved dict, whose entries
        may be dicts again (``state_dict``, ``optimizer``) or numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a truncated or damaged file, a file that holds code, or no dict.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        known = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise ValueError(f"{path} has the suffix {path.suffix or '(none)'!r}; weight files end in one of {known}")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return _load_torch(path)


class _Refused(Exception):
    pass


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


class _Reader(pickle.Unpickler):
    def __init__(
        self, file: io.BytesIO, where: str, encoding: str, more: Callable[[str, str], Any] | None = None
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._where, self._more = where, more

    def find_class(self, module: str, name: str) -> Any:
        known = _NAMES.get((module, name))
        if known is None and self._more is not None:
            known = self._more(module, name)
        if known is None:
            kinds = "plain Python data and NumPy arrays" + (", tensors and networks" if self._more else "")
            raise _Refused(f"refused: the pickle asks to run {module}.{name} ({self._where}); only {kinds} are read")
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(
            f"refused: the pickle asks for the outside object {pid!r} ({self._where}); "
            "only plain Python data and NumPy arrays are read"
        )


def _encode(text: str, codec: str = "latin1") -> bytes:
    # Protocols 0-2 write bytes as text with this codec; the others (zlib, ...) have no place in data.
    if codec not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in the codec {codec!r}")
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


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"no pickle file {path}")
    return path.read_bytes()


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: truncated or no safetensors file ({_first_line(error)})") from None


def _load_torch(path: Path) -> dict[str, Any]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage with whatever its zip, tar and pickle readers raise
        raise ValueError(_torch_reason(path, error)) from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; a dict of weights by name is wanted")
    return loaded


def _torch_reason(path: Path, error: Exception) -> str:
    if "TorchScript" in str(error):
        return f"refused: {path} is a TorchScript program; save its state_dict() instead"
    asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    if asked and _asks_in_full(path, asked[1]):
        return f"refused: {path} asks to run {asked[1]}; only tensors and plain data are read"
    if isinstance(error, pickle.UnpicklingError):
        # torch stops at the opcodes of newer pickle protocols before it sees what they ask for.
        try:
            restricted_load(path)
        except ValueError as second:
            if str(second).startswith("refused"):
                return str(second)
        return f"cannot read {path}: truncated, damaged or no weight file"
    return f"cannot read {path}: truncated, damaged or no weight file ({_first_line(error)})"


def _asks_in_full(path: Path, name: str) -> bool:
    # A file of torch's old format (pickles one after another, no zip) that is cut within a name asks for half of it.
    module, _, last = name.rpartition(".")
    return zipfile.is_zipfile(path) or f"{module}\n{last}\n".encode() in path.read_bytes()


def _first_line(error: Exception) -> str:
    text = str(error).split("\n")[0].split(". ")[0]
    return text if " " in text else type(error).__name__
