"""Pictures, figures, tables and pages: everything a person looks at after a run."""

from pantarhei.report.figures import (
    bars_with_intervals,
    curves,
    heat_map,
    scatter_2d,
    trajectories_2d,
    trajectory_strip,
)
from pantarhei.report.formatting import format_cell, format_interval, format_number
from pantarhei.report.page import Page
from pantarhei.report.pictures import image_grid, save_image_grid
from pantarhei.report.tables import Table
from pantarhei.report.vector_fields import vector_fields

__all__ = [
    "Page",
    "Table",
    "bars_with_intervals",
    "curves",
    "format_cell",
    "format_interval",
    "format_number",
    "heat_map",
    "image_grid",
    "save_image_grid",
    "scatter_2d",
    "trajectories_2d",
    "trajectory_strip",
    "vector_fields",
]
