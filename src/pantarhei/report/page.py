"""A report as one HTML file that needs nothing else: styles inside, pictures inside, no network, no script."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from pantarhei.files import write_atomically
from pantarhei.metrics import Interval
from pantarhei.report.formatting import format_cell
from pantarhei.report.pictures import image_grid, png_bytes
from pantarhei.report.tables import Table
from pantarhei.report.theme import CSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


class Page:
    """A page that grows from top to bottom; every method returns the page, so calls chain.

    All texts are escaped: what looks like HTML is shown as it was written.

    Args:
        title: heading of the page and of its browser tab.
        subtitle: one or two sentences under it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []

    def heading(self, text: str, level: int = 2) -> Self:
        """Begin a section; those of level 2 are listed at the top of the page.

        Args:
            text: the heading.
            level: 2 for a section, 3 inside one.

        Returns:
            The page.

        Raises:
            ValueError: another level.
        """
        if level not in (2, 3):
            raise ValueError(f"level must be 2 or 3, got {level!r}")
        anchor = f"{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-') or 'section'}-{len(self._parts)}"
        if level == 2:
            self._sections.append((anchor, text))
        return self._add(f'<h{level} id="{anchor}">{html.escape(text)}</h{level}>')

    def text(self, text: str) -> Self:
        """Add paragraphs; a blank line begins a new one.

        Args:
            text: plain text.

        Returns:
            The page.
        """
        paragraphs = (part for part in re.split(r"\n\s*\n", text.strip()) if part)
        return self._add("\n".join(f"<p>{html.escape(part)}</p>" for part in paragraphs))

    def code(self, text: str) -> Self:
        """Add a command or a piece of code as it stands.

        Args:
            text: its lines.

        Returns:
            The page.
        """
        return self._add(f"<pre><code>{html.escape(text.strip())}</code></pre>")

    def facts(self, values: Mapping[str, Any]) -> Self:
        """Add a row of key figures in large type.

        Args:
            values: what it is -> the figure, anything that a table's cell may be.

        Returns:
            The page.
        """
        tiles = []
        for name, value in values.items():
            figure, ends, rest = html.escape(format_cell(value)).partition(" [")
            # The ends of an interval stand small behind the value.
            small = f"<small>{ends}{rest}</small>" if isinstance(value, Interval) and ends else ends + rest
            tiles.append(f"<div><dt>{html.escape(name)}</dt><dd>{figure}{small}</dd></div>")
        return self._add(f'<dl class="facts">{"".join(tiles)}</dl>')

    def table(self, table: Table) -> Self:
        """Add a table; on narrow screens it scrolls by itself.

        Args:
            table: the table with its caption.

        Returns:
            The page.
        """
        # The caption stands outside of what scrolls, so that it wraps on narrow screens.
        caption = html.escape(table.caption)
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        bare = dataclasses.replace(table, caption="").html()
        region = f'<div class="scroll" tabindex="0" role="region" aria-label="{caption or "Table"}">{bare}</div>'
        return self._add(f"<figure>{region}{below}</figure>")

    def figure(self, figure: Figure | Image, caption: str = "", alt: str | None = None) -> Self:
        """Add a figure or a picture.

        Args:
            figure: a matplotlib figure (drawn at twice its size for sharp screens) or a PIL image.
            caption: shown below it.
            alt: said by screen readers instead of the picture; the caption if None.

        Returns:
            The page.

        Raises:
            TypeError: something else.
        """
        return self._add(_figure_element(figure, caption, alt))

    def figures(self, row: Mapping[str, Figure | Image | Tensor]) -> Self:
        """Add pictures side by side (below each other on narrow screens), such as before and after.

        Args:
            row: caption -> matplotlib figure, PIL image, or images (N, C, H, W) in [-1, 1] to lay out in a grid.

        Returns:
            The page.

        Raises:
            TypeError: something else.
            ValueError: images of another shape.
        """
        pictures = {name: image_grid(value) if isinstance(value, Tensor) else value for name, value in row.items()}
        elements = (_figure_element(picture, name, None) for name, picture in pictures.items())
        return self._add(f'<div class="row">{"".join(elements)}</div>')

    def images(
        self,
        images: Tensor,
        caption: str = "",
        alt: str | None = None,
        columns: int | None = None,
        scale: int | None = None,
    ) -> Self:
        """Add images as a grid.

        Args:
            images: (N, C, H, W) in [-1, 1].
            caption: shown below the grid.
            alt: said by screen readers instead; the caption if None.
            columns: as for `image_grid`.
            scale: as for `image_grid`.

        Returns:
            The page.

        Raises:
            TypeError: `images` is no floating-point tensor.
            ValueError: another shape, or a number out of range.
        """
        return self.figure(image_grid(images, columns, scale=scale), caption, alt or caption or f"{len(images)} images")

    def html(self) -> str:
        """The whole page.

        Returns:
            An HTML document.
        """
        title = html.escape(self.title)
        subtitle = f"<p>{html.escape(self.subtitle)}</p>" if self.subtitle else ""
        links = "".join(f'<a href="#{anchor}">{html.escape(text)}</a>' for anchor, text in self._sections)
        navigation = f'<nav aria-label="Sections">{links}</nav>' if len(self._sections) > 1 else ""
        return "\n".join(
            [
                "<!doctype html>",
                '<html lang="en">',
                '<head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{title}</title>",
                f"<style>{CSS}</style></head>",
                f"<body><header><div><h1>{title}</h1>{subtitle}{navigation}</div></header>",
                "<main>",
                *self._parts,
                "</main>",
                "<footer>Made by PantaRhei. This file is complete in itself: it loads nothing.</footer>",
                "</body></html>",
                "",
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page; an older file is replaced at once, never left half written.

        Args:
            path: the file; parent folders are made.

        Returns:
            The path.

        Raises:
            ValueError: the path is a folder.
        """
        return write_atomically(path, self.html().encode())

    def _add(self, part: str) -> Self:
        self._parts.append(part)
        return self


def _figure_element(picture: Figure | Image, caption: str, alt: str | None) -> str:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, format="png", dpi=2 * picture.get_dpi())
        width = round(picture.get_figwidth() * picture.get_dpi())
        content, pixels = buffer.getvalue(), ""
    elif isinstance(picture, Image):
        content, width, pixels = png_bytes(picture), picture.width, ' class="pixels"'
    else:
        raise TypeError(f"figure must be a matplotlib Figure or a PIL image, got {type(picture).__name__}")
    source = base64.b64encode(content).decode()
    description = html.escape(caption if alt is None else alt)
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    image = f'<img{pixels} src="data:image/png;base64,{source}" width="{width}" alt="{description}">'
    return f'<figure><div class="frame">{image}</div>{below}</figure>'
