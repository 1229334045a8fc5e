"""Figures of curves, points, paths and bars; each function returns a matplotlib `Figure`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pantarhei.metrics import Interval
from pantarhei.report.style import COLOURS, FAINT, INK, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers = Tensor | Sequence[float]


def curves(
    series: Mapping[str, tuple[Numbers, Numbers | Sequence[Interval]]],
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    markers: bool | None = None,
    size: tuple[float, float] = (6.4, 3.8),
) -> Figure:
    """Lines, one a name; a y of `Interval`s is drawn with a band.

    Args:
        series: name -> (x, y), both of one length.
        xlabel: what x is, with its unit.
        ylabel: what y is, with its unit.
        title: over the figure.
        log_x: logarithmic x; few values, such as numbers of steps, are then all labelled.
        log_y: logarithmic y.
        markers: dots at the points; None shows them for up to 25 points.
        size: width and height in inches.

    Returns:
        The figure.

    Raises:
        ValueError: no series, or x and y of different length.
    """
    _need("series", series)
    with styled():
        figure, (axes,) = new_figure(*size)
        ticks: set[float] = set()
        for number, ((name, (x, y)), colour) in enumerate(zip(series.items(), _colours(len(series)), strict=True)):
            x_values = _numbers(x)
            if len(x_values) != len(y):
                raise ValueError(f"series[{name!r}] has {len(x_values)} x and {len(y)} y; both must have one length")
            middle, low, high = _with_ends(y)
            dots = len(x_values) <= 25 if markers is None else markers
            line = ("-", "--", ":")[number // len(COLOURS) % 3]  # colours come again, dashed
            axes.plot(x_values, middle, line, color=colour, marker="o" if dots else None, label=name)
            if low != high:
                axes.fill_between(x_values, low, high, color=colour, alpha=0.16, linewidth=0)
            ticks.update(x_values)
        if log_x:
            axes.set_xscale("log")
            if len(ticks) <= 12:
                axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
                axes.minorticks_off()
        if log_y:
            _log_y(axes)
        _label(axes, xlabel, ylabel, title)
        if len(series) > 1:
            axes.legend()
    return figure


def heat_map(
    values: Tensor,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log: bool = False,
) -> Figure:
    """A table of numbers as colours, with the numbers in it; NaN stays blank.

    Args:
        values: (R, C).
        rows: labels of the rows, from the top.
        columns: labels of the columns.
        xlabel, ylabel: what columns and rows are.
        title: over the figure.
        log: colours by the logarithm.

    Raises:
        ValueError: labels that are not as many as rows and columns.
    """
    if values.ndim != 2 or values.shape != (len(rows), len(columns)):
        raise ValueError(f"values: expected shape {(len(rows), len(columns))} by the labels, got {tuple(values.shape)}")
    numbers = values.detach().double().cpu()
    shown = numbers.clamp_min(1e-12).log10() if log else numbers
    with styled():
        figure, (axes,) = new_figure(0.62 * len(columns) + 1.8, 0.45 * len(rows) + 1.4)
        axes.imshow(shown.numpy(), cmap="Blues", aspect="auto")
        known = shown[~shown.isnan()]
        middle = float((known.min() + known.max()) / 2) if known.numel() else 0.0
        for i in range(len(rows)):
            for j in range(len(columns)):
                if not bool(numbers[i, j].isnan()):
                    colour = "white" if float(shown[i, j]) > middle else INK
                    text = f"{float(numbers[i, j]):.2g}"
                    axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(False)
        _label(axes, xlabel, ylabel, title)
    return figure


def scatter_2d(
    sets: Mapping[str, Tensor],
    *,
    columns: int | None = None,
    limits: tuple[float, float] | None = None,
    most: int = 5000,
    panel: float = 2.6,
) -> Figure:
    """Point clouds side by side on equal axes.

    Args:
        sets: name -> points, (N, 2).
        columns: panels a row; None puts up to five in one.
        limits: of both axes; None takes the range of all sets.
        most: points shown of a set: the first ones.
        panel: side of a panel in inches.

    Returns:
        The figure.

    Raises:
        ValueError: no sets, or one of another shape.
    """
    _need("sets", sets)
    points = {name: _points(f"sets[{name!r}]", value, 2)[:most] for name, value in sets.items()}
    columns = min(5, len(points)) if columns is None else columns
    rows = -(-len(points) // columns)
    low, high = limits or _range(torch.cat(list(points.values())))
    with styled():
        figure, panels = new_figure(panel * columns, panel * rows + 0.25 * rows, rows, columns)
        for axes in panels[len(points) :]:
            axes.remove()
        for axes, (name, some) in zip(panels, points.items(), strict=False):
            # Many points want small, pale dots, so that density shows.
            dot = max(2.0, min(14.0, 6000 / max(1, len(some))))
            axes.scatter(some[:, 0].tolist(), some[:, 1].tolist(), s=dot, color=COLOURS[0], alpha=0.55, linewidths=0)
            _square(axes, low, high)
            axes.set_title(name)
    return figure


def trajectories_2d(
    paths: Tensor,
    *,
    title: str = "",
    background: Tensor | None = None,
    limits: tuple[float, float] | None = None,
    most: int = 300,
    size: float = 4.6,
) -> Figure:
    """Paths of points in the plane, from hollow starts to filled ends.

    Args:
        paths: (T, N, 2), T >= 2, times in order.
        title: over the figure.
        background: points to show behind the paths, such as data, (M, 2).
        limits: of both axes; None takes the range of what is shown.
        most: paths shown: the first ones.
        size: side in inches.

    Returns:
        The figure.

    Raises:
        ValueError: another shape.
    """
    from matplotlib.collections import LineCollection

    paths = _points("paths", paths, 3)[:, :most]
    if len(paths) < 2:
        raise ValueError(f"paths must have at least 2 times (T, N, 2), got {tuple(paths.shape)}")
    behind = _points("background", background, 2) if background is not None else paths.new_zeros(0, 2)
    low, high = limits or _range(torch.cat([paths.reshape(-1, 2), behind]))
    with styled():
        figure, (axes,) = new_figure(size, size)
        if len(behind):
            axes.scatter(behind[:, 0].tolist(), behind[:, 1].tolist(), s=3, color="#c3cad1", alpha=0.6, linewidths=0)
        lines = LineCollection(paths.movedim(1, 0).tolist(), colors=FAINT, linewidths=0.8, alpha=0.45)
        axes.add_collection(lines)
        for (x, y), face, edge, label in (
            (paths[0].T.tolist(), "white", COLOURS[0], "start"),
            (paths[-1].T.tolist(), COLOURS[1], COLOURS[1], "end"),
        ):
            axes.scatter(x, y, s=14, facecolors=face, edgecolors=edge, linewidths=0.9, label=label, zorder=3)
        _square(axes, low, high)
        axes.set_title(title)
        axes.legend(loc="upper right", handletextpad=0.2, borderaxespad=0.1)
    return figure


def trajectory_strip(
    states: Tensor,
    *,
    times: Sequence[float] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
    cell: float = 0.75,
) -> Figure:
    """Images on their way: rows are samples, columns are times.

    Args:
        states: (T, N, C, H, W) in [-1, 1] with 1, 3 or 4 channels; pixels that are not finite are magenta.
        times: of the columns, written above them.
        labels: of the rows, written beside them.
        title: over the figure.
        cell: width of an image in inches.

    Returns:
        The figure.

    Raises:
        TypeError: `states` is no floating-point tensor.
        ValueError: another shape, or labels of another number.
    """
    from pantarhei.report.pictures import image_grid

    if not isinstance(states, Tensor) or states.ndim != 5:
        raise ValueError(
            f"states must have shape (T, N, C, H, W), got {getattr(states, 'shape', type(states).__name__)}"
        )
    steps, count, _, height, width = states.shape
    for name, given, want in (("times", times, steps), ("labels", labels, count)):
        if given is not None and len(given) != want:
            raise ValueError(f"{name} has {len(given)} entries, states has {want}")
    grid = image_grid(states.transpose(0, 1).flatten(0, 1), columns=steps, padding=1, scale=1)
    with styled():
        extra = 0.3 * bool(title) + 0.3 * (times is not None)
        figure, (axes,) = new_figure(cell * steps + 0.5 * bool(labels), cell * count * height / width + extra)
        axes.imshow(grid, interpolation="nearest")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        middles_x = [1 + (width + 1) * i + (width - 1) / 2 for i in range(steps)]
        middles_y = [1 + (height + 1) * i + (height - 1) / 2 for i in range(count)]
        axes.set_xticks(middles_x if times is not None else [], [f"t = {t:.3g}" for t in times or ()])
        axes.set_yticks(middles_y if labels is not None else [], labels or ())
        axes.set_title(title, pad=9)
    return figure


def bars_with_intervals(
    series: Mapping[str, float | Interval] | Mapping[str, Mapping[str, float | Interval]],
    *,
    ylabel: str = "",
    title: str = "",
    log_y: bool = False,
    reference: tuple[str, float] | None = None,
    size: tuple[float, float] = (6.4, 3.8),
) -> Figure:
    """Bars with whiskers where a value is an `Interval`.

    Args:
        series: label -> value; or, for groups of bars, name -> {label -> value}.
        ylabel: what the bars measure, with its unit.
        title: over the figure.
        log_y: logarithmic y.
        reference: name and height of a dashed line, such as the floor that held-out data have.
        size: width and height in inches.

    Returns:
        The figure.

    Raises:
        ValueError: no bars.
    """
    _need("series", series)
    grouped = all(isinstance(value, Mapping) for value in series.values())
    groups: Mapping[str, Mapping[str, Any]] = series if grouped else {"": series}  # type: ignore[assignment]
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    _need("series", labels)
    wide = 0.72 / len(groups)
    with styled():
        figure, (axes,) = new_figure(*size)
        for number, ((name, group), colour) in enumerate(zip(groups.items(), _colours(len(groups)), strict=True)):
            places = [labels.index(label) + (number - (len(groups) - 1) / 2) * wide for label in group]
            heights = _with_ends(group.values())[0]
            axes.bar(places, heights, 0.9 * wide, color=colour, alpha=0.85, label=name)
            for place, value in zip(places, group.values(), strict=True):
                if isinstance(value, Interval):
                    ends = [[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]]
                    axes.errorbar(place, value.value, ends, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3)
        if reference is not None:
            axes.axhline(reference[1], color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2, label=reference[0])
        if log_y:
            _log_y(axes)
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(False, axis="x")
        _label(axes, "", ylabel, title)
        if grouped or reference is not None:
            axes.legend()
    return figure


def _need(name: str, value: Any) -> None:
    if not len(value):
        raise ValueError(f"{name} is empty, there must be something to draw")


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _numbers(values: Numbers) -> list[float]:
    return [float(value) for value in values]


def _with_ends(values: Iterable[Any]) -> tuple[list[float], list[float], list[float]]:
    triples = [tuple(v) if isinstance(v, Interval) else (float(v),) * 3 for v in values]
    middle, low, high = (list(column) for column in zip(*triples, strict=True))
    return middle, low, high


def _points(name: str, value: Tensor, dimensions: int) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != dimensions or value.shape[-1] != 2:
        want = "(T, N, 2)" if dimensions == 3 else "(N, 2)"
        raise ValueError(f"{name} must have shape {want}, got {getattr(value, 'shape', type(value).__name__)}")
    return value.detach().double().cpu() if value.device.type != "mps" else value.detach().cpu().double()


def _range(points: Tensor) -> tuple[float, float]:
    """Common limits of both axes with a margin; a few runaway points do not count, nor do those not finite."""
    finite = points[torch.isfinite(points).all(1)].flatten()
    if len(finite) == 0:
        return -1.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    # 2^24 entries are the most that quantile takes.
    inner_low, inner_high = finite[: 2**24].quantile(torch.tensor([0.005, 0.995], dtype=finite.dtype)).tolist()
    if high - low > 2 * (inner_high - inner_low) > 0:
        low, high = inner_low, inner_high
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _square(axes: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _log_y(axes: Axes) -> None:
    """Logarithmic y with ticks that can be read off: 0.5, 1, 2, 5, 10 instead of powers of ten only."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if decades < 3.5 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _label(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
