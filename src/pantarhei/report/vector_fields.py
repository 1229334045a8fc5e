"""Vector fields in the plane as arrows over their vorticity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pantarhei.report.style import INK, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_ARROWS = 24  # a side


def vector_fields(
    fields: Mapping[str, Tensor], *, places: Tensor | None = None, columns: int = 8, panel: float = 1.9
) -> Figure:
    """Fields in rows, one name a row; all arrows have one scale, and so have all colours.

    Args:
        fields: name -> fields (N, 2, H, W): components along x (the last axis) and along y.
        places: of sensors, row and column (n, 2); they are marked.
        columns: fields shown of a row: the first ones.
        panel: side of a panel in inches.

    Returns:
        The figure.

    Raises:
        ValueError: no fields, or of another shape.
    """
    if not fields or any(
        value.ndim != 4 or value.shape[1] != 2 or min(value.shape) < 1 or min(value.shape[2:]) < 2
        for value in fields.values()
    ):
        shapes = {name: tuple(value.shape) for name, value in fields.items()}
        raise ValueError(f"fields: (N, 2, H, W) is needed for each name, got {shapes}")
    shown = {name: value[:columns].detach().double().cpu() for name, value in fields.items()}
    curls = {name: _vorticity(value) for name, value in shown.items()}
    most = max(float(value.abs().max()) for value in curls.values()) or 1.0
    fastest = max(float(value.square().sum(dim=1).max()) for value in shown.values()) ** 0.5 or 1.0
    width = max(len(value) for value in shown.values())
    with styled():
        figure, panels = new_figure(panel * width, (panel + 0.15) * len(shown), len(shown), width)
        for row, (name, some) in enumerate(shown.items()):
            every = -(-max(some.shape[2:]) // MOST_ARROWS)
            for column in range(width):
                axes = panels[row * width + column]
                axes.set_axis_off()
                if column >= len(some):
                    continue
                axes.imshow(curls[name][column].numpy(), origin="lower", cmap="RdBu_r", vmin=-most, vmax=most)
                u, v = some[column, :, ::every, ::every].numpy()
                ys, xs = (range(0, side, every) for side in some.shape[2:])
                # An arrow of the fastest place is two places long.
                axes.quiver(
                    xs, ys, u, v, color=INK, scale=fastest / (2 * every), scale_units="xy", angles="xy", width=0.008
                )
                if places is not None:
                    axes.plot(places[:, 1].tolist(), places[:, 0].tolist(), "o", color="#e69f00", markersize=3)
                if column == 0:
                    axes.set_title(name)
    return figure


def _vorticity(field: Tensor) -> Tensor:
    """dv/dx - du/dy in units of the grid, (N, H, W)."""
    (along_x,), (along_y,) = torch.gradient(field[:, 1], dim=2), torch.gradient(field[:, 0], dim=1)
    return along_x - along_y
