"""Name tables: built-in choices by name, saved configurations back to objects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def unknown(what: str, got: str, known: Iterable[str]) -> str:
    """One line that says what was not recognised and what would be right."""
    names = list(known)
    close = difflib.get_close_matches(got, names, n=1)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{what}: unknown {what.split('.')[-1]} {got!r}{guess}; known: {', '.join(names)}"


def build(what: str, table: Mapping[str, type[T]], spec: str | Mapping[str, Any]) -> T:
    """Make an object from its name, or from a mapping of its name and constants.

    Raises:
        ValueError: for an unknown name, or constants that the named type does not take.
    """
    if isinstance(spec, str):
        name, constants = spec, {}
    else:
        name, constants = spec["name"], {k: v for k, v in spec.items() if k != "name"}
    if name not in table:
        raise ValueError(unknown(what, name, table))
    try:
        return table[name](**constants)
    except TypeError as error:
        raise ValueError(f"{what}: {name} does not take these settings: {error}") from None
