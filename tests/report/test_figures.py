import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pantarhei.metrics import Interval
from pantarhei.report import bars_with_intervals, curves, scatter_2d, trajectories_2d, trajectory_strip


def drawn(figure):
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))


def test_curves_show_the_numbers_with_bands():
    band = [Interval(v, v - 0.5, v + 0.5) for v in (3.0, 2.0, 1.0)]
    figure = curves({"a": ([1, 2, 50], [1.0, 4.0, 9.0]), "b": (torch.tensor([1, 2, 50]), band)}, log_x=True, log_y=True)
    (axes,) = figure.axes
    first, second = axes.lines
    assert first.get_ydata().tolist() == [1, 4, 9]
    assert second.get_ydata().tolist() == [3, 2, 1]
    assert len(axes.collections) == 1
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "50"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert drawn(figure).std() > 0


def test_scatter_panels_share_their_limits_and_runaway_points_do_not_stretch_them():
    far = torch.cat([points.repeat(20, 1), torch.tensor([[1e6, 0.0], [float("nan"), 0.0]])])
    figure = scatter_2d({"x": points, "y": far, "z": points + 1}, columns=2)
    assert len(figure.axes) == 3
    assert len({axes.get_xlim() + axes.get_ylim() for axes in figure.axes}) == 1
    assert figure.axes[0].get_xlim()[1] < 10
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["x", "y", "z"]
    drawn(figure)


def test_trajectories_go_from_start_to_end():
    paths = torch.stack([points, points + 1, points * 2])
    figure = trajectories_2d(paths, background=points, most=7)
    behind, lines, starts, ends = figure.axes[0].collections
    assert len(behind.get_offsets()) == 50
    assert np.allclose(lines.get_segments(), paths[:, :7].movedim(1, 0))
    assert np.allclose(starts.get_offsets(), paths[0, :7])
    assert np.allclose(ends.get_offsets(), paths[-1, :7])
    drawn(figure)


def test_a_strip_has_samples_in_rows_and_times_in_columns():
    states = torch.full((3, 2, 1, 4, 4), -1.0)
    states[2, 0] = 1  # the last time of the first sample
    figure = trajectory_strip(states, times=[0, 0.5, 1], labels=["a", "b"])
    image = figure.axes[0].images[0].get_array()
    assert image.shape == (2 * 5 + 1, 3 * 5 + 1, 3)
    assert image[2, 13].tolist() == [255] * 3
    assert image[7, 13].tolist() == image[2, 2].tolist() == [0] * 3
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["t = 0", "t = 0.5", "t = 1"]
    drawn(figure)


def test_bars_flat_and_grouped():
    flat = bars_with_intervals({"a": 1.0, "b": Interval(2, 1.5, 2.2)})
    assert [bar.get_height() for bar in flat.axes[0].patches] == [1, 2]
    assert flat.axes[0].get_legend() is None
    grouped = bars_with_intervals({"x": {"1": 3.0, "2": 1.0}, "y": {"2": 2.0}}, reference=("floor", 0.5), log_y=True)
    assert [bar.get_height() for bar in grouped.axes[0].patches] == [3, 1, 2]
    assert {text.get_text() for text in grouped.axes[0].get_legend().get_texts()} == {"x", "y", "floor"}
    drawn(grouped)


def test_the_users_settings_are_left_alone():
    before = dict(matplotlib.rcParams)
    drawn(curves({"a": ([0, 1], [0, 1])}))
    assert dict(matplotlib.rcParams) == before


def test_nothing_heavy_is_imported_before_it_is_needed_and_pyplot_never():
    code = """
import sys
from pantarhei.report import curves
print([name for name in ("matplotlib", "PIL", "rich", "scipy", "sklearn") if name in sys.modules])
curves({"a": ([0], [0])})
print("matplotlib.pyplot" in sys.modules)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split("\n")[:2] == ["[]", "False"]


def test_bad_input_is_refused():
    for call, message in [
        (lambda: curves({}), "series is empty"),
        (lambda: curves({"a": ([1, 2], [1])}), "2 x and 1 y"),
        (lambda: scatter_2d({"a": torch.zeros(4, 3)}), r"\(N, 2\)"),
        (lambda: trajectories_2d(torch.zeros(4, 2)), r"\(T, N, 2\)"),
        (lambda: trajectories_2d(torch.zeros(1, 4, 2)), "at least 2 times"),
        (lambda: trajectory_strip(torch.zeros(4, 1, 8, 8)), r"\(T, N, C, H, W\)"),
        (lambda: trajectory_strip(torch.zeros(2, 4, 1, 8, 8), times=[0.0]), "times has 1"),
        (lambda: bars_with_intervals({}), "empty"),
        (lambda: bars_with_intervals({"a": {}}), "empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
