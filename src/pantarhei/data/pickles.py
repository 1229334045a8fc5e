"""Reading other people's pickles and weight files without running what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pantarhei.data.pickle_limits import Allowance, one_line, reason
from pantarhei.data.pickle_reader import Cursor, Reader
from pantarhei.data.pickled_arrays import Builder
from pantarhei.data.torch_files import read_torch

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def restricted_load(
    source: bytes | str | Path,
    *,
    encoding: Literal["latin1", "bytes", "utf-8"] = "latin1",
    name: str | None = None,
) -> Any:
    """Read a pickle that holds plain data only.

    Numbers, strings, bytes, None, lists, tuples, sets, dicts (ordered ones become plain ones) and NumPy arrays, scalars
    and dtypes are built. Every other name in the pickle is refused, and nothing of it is imported or called.

    Args:
        source: path of the file, or its bytes.
        encoding: how 8-bit strings of Python 2 are read: ``"latin1"`` as text (every file loads), ``"bytes"`` as they
            are, ``"utf-8"`` as text. Arrays come out the same.
        name: how errors call the source; its path if left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the pickle asks for anything else than plain data (the message names it), it is truncated or
            damaged, or would take many times its size in memory.
    """
    data = source if isinstance(source, bytes) else read_file(source)
    where = name or ("the given bytes" if isinstance(source, bytes) else str(source))
    allowance = Allowance(len(data))
    with one_line(where, "a truncated or damaged pickle, or none at all"):
        return Builder(allowance).visit(Reader(Cursor(data), where, allowance, encoding=encoding).load())


def read_file(path: str | Path) -> bytes:
    """The bytes of a pickle.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no pickle file {path}")
    return Path(path).read_bytes()


def load_weights(path: str | Path) -> dict[str, Any]:
    """Read a weight file onto the CPU without running code from it.

    Args:
        path: ``.safetensors``, or ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` as PyTorch writes them (see `read_torch`).

    Returns:
        What the file holds: a dict of tensors by name for safetensors; for PyTorch files the saved dict, whose entries
        may be dicts again (``state_dict``, ``optimizer``) or numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another suffix, a truncated or damaged file, a file that holds code, a tensor with more numbers than
            the file has for it, or no dict.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        known = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise ValueError(f"{path} has the suffix {path.suffix or '(none)'!r}; weight files end in one of {known}")
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    loaded = read_torch(path)
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; a dict of weights by name is wanted")
    return loaded


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: truncated or no safetensors file ({reason(error)})") from None
