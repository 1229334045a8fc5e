"""What a foreign file may make of its bytes: no more memory than a few times its size, no message longer than a line.

A pickle of a hundred bytes can name one tuple twice in the next, and that twice again: 2^50 entries in the eyes of `repr`
and `hash`. So what comes out of a file is counted before it is copied or hashed, and is never shown whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TIMES = 8  # arrays and tensors are made of the file's own bytes: read, copied, converted
_BESIDES = 1 << 20  # for small files, whose shared entries may well outweigh them


class Refused(Exception):
    """A file asks for something that is not read; its text is the whole message."""


class Allowance:
    """How much may still be made out of a file, in bytes or entries.

    Args:
        size: of the file, in bytes.

    Attributes:
        left: what is left of it.
    """

    def __init__(self, size: int) -> None:
        self.left = _TIMES * size + _BESIDES

    def take(self, amount: int) -> None:
        """Use some of it.

        Raises:
            ValueError: so much is not left.
        """
        self.left -= amount
        if self.left < 0:
            raise ValueError("its content takes many times the memory of the file")

    def weigh(self, node: Any) -> None:
        """Take what it costs to hash or copy a value: its entries, those of tuples and lists in it too."""
        if isinstance(node, (tuple, list, frozenset)):
            self.take(len(node) + 1)
            for entry in node:
                self.weigh(entry)
        elif isinstance(node, (str, bytes, bytearray, dict, set)):
            self.take(len(node))


def naturals(numbers: Any, what: str) -> tuple[int, ...]:
    """Whole numbers from 0, as of shapes; refuses everything else by its name."""
    if not isinstance(numbers, (tuple, list)) or any(type(n) is not int or not 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{what} that are no natural numbers")
    return tuple(numbers)


def shown(value: Any) -> str:
    """A value for a message: the beginning of a text, else the name of the type."""
    return repr(value[:80]) if isinstance(value, (str, bytes)) else f"a {type(value).__name__}"


@contextmanager
def one_line(where: str, what: str) -> Iterator[None]:
    """Turn whatever a damaged file makes its readers raise into a ValueError of one line.

    Args:
        where: the file.
        what: what it turns out to be, such as "a damaged pickle".
    """
    try:
        yield
    except Refused as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError(f"cannot read {where}: its containers are nested too deeply") from None
    except Exception as error:  # any of the opcodes can fail
        raise ValueError(f"cannot read {where}: {what} ({reason(error)})") from None


def reason(error: Exception) -> str:
    """The first sentence of an error, which may carry any object of the file instead."""
    text = str(error) if isinstance(error, OSError) else error.args[0] if error.args else ""
    text = text.split("\n")[0].split(". ")[0][:200] if isinstance(text, str) else ""
    return text if " " in text else type(error).__name__
