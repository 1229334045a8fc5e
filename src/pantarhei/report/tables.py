"""One table, written for terminals, Markdown files and pages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pantarhei.report.formatting import format_cell, is_numeric

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns.

    Args:
        columns: the heads.
        rows: one sequence of cells a row; a cell is anything that `format_cell` writes (numbers, intervals, texts,
            None).
        caption: what the table shows; tables of measures name the features and the counts here.

    Raises:
        ValueError: no columns, or a row of another length than `columns`.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("columns must name at least one column, got none")
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"rows[{number}] has {len(row)} cells, the table has {len(self.columns)} columns")

    def cells(self) -> list[list[str]]:
        """The cells as they are written, without the heads.

        Returns:
            One list a row.
        """
        return [[format_cell(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold figures (and nothing but figures and gaps); these are aligned to the right.

        Returns:
            One truth value a column.
        """
        columns = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns))]
        return [bool(column) and all(map(is_numeric, column)) for column in columns]

    def text(self) -> str:
        """The table in plain characters, for logs.

        Returns:
            Lines joined by newlines, none at the end.
        """
        lines = [list(map(str, self.columns)), *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        right = self.numeric()

        def line(cells: Sequence[str]) -> str:
            padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
            return "  ".join(padded).rstrip()

        rule = "  ".join("─" * width for width in widths)
        head = [self.caption] if self.caption else []
        return "\n".join([*head, line(lines[0]), rule, *map(line, lines[1:])])

    def markdown(self) -> str:
        """The table in GitHub's Markdown; the caption follows in italics.

        Returns:
            Lines joined by newlines, none at the end.
        """

        def line(cells: Sequence[str]) -> str:
            escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
            return f"| {' | '.join(escaped)} |"

        rule = line(["---:" if right else "---" for right in self.numeric()])
        tail = ["", f"*{self.caption}*"] if self.caption else []
        return "\n".join([line(list(map(str, self.columns))), rule, *map(line, self.cells()), *tail])

    def html(self) -> str:
        """The table as HTML with every text escaped; figures carry the class "number".

        Returns:
            A ``<table>`` element.
        """
        right = self.numeric()

        def line(tag: str, cells: Sequence[str]) -> str:
            scope = ' scope="col"' if tag == "th" else ""
            kinds = [' class="number"' if number else "" for number in right]
            parts = [
                f"<{tag}{scope}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True)
            ]
            return f"<tr>{''.join(parts)}</tr>"

        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        body = "\n".join(line("td", row) for row in self.cells())
        head = line("th", list(map(str, self.columns)))
        return f"<table>{caption}<thead>{head}</thead><tbody>\n{body}\n</tbody></table>"

    def rich(self) -> rich.table.Table:
        """The table for a rich console.

        Returns:
            A `rich.table.Table`; its cells are plain, so brackets of intervals are no markup.
        """
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, title=Text(self.caption) if self.caption else None, title_justify="left")
        for column, right in zip(self.columns, self.numeric(), strict=True):
            table.add_column(Text(str(column)), justify="right" if right else "left", no_wrap=right)
        for row in self.cells():
            table.add_row(*map(Text, row))
        return table
