"""The quickstart's page: sample grids, quality against steps, trajectories, losses, nearest training digits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pantarhei.flow import Flow
from pantarhei.flow.numbered import numbered_source
from pantarhei.metrics import nearest_neighbours
from pantarhei.recipes.evaluation import Reference
from pantarhei.report import Page, image_grid
from pantarhei.report import figures as draw
from pantarhei.training import Run

if TYPE_CHECKING:
    from pantarhei.recipes.quickstart import Quickstart

STEPS = (1, 2, 4, 8, 50)


def write_page(result: Quickstart, teacher: Flow, student: Flow, reference: Reference, out: Path, seed: int) -> None:
    """Write `report.html` and `samples.png` (before and after, by steps)."""
    grids = _grids(teacher, student, seed)
    overview = overview_figure(grids)
    overview.savefig(out / "samples.png", dpi=110)
    before, after = result.before, result.after
    gain = before.rows[0].frechet.value / after.rows[0].frechet.value
    page = Page(
        "Quickstart: one step instead of fifty",
        "A flow trained on handwritten digits, before and after one round of reflow. "
        "All grids start from the same noise and labels.",
    )
    page.facts(
        {
            "Frechet distance, 1 step": f"{before.rows[0].frechet.value:.3g}, then {after.rows[0].frechet.value:.3g}",
            "gain at 1 step": f"{gain:.1f}x",
            "Frechet distance, 50 steps before": before.rows[-1].frechet.value,
            "straightness S / E|Z1 - Z0|^2": f"{result.straightness_before.normalised:.3g}, "
            f"then {result.straightness_after.normalised:.3g}",
            "seed": seed,
        }
    )
    page.heading("Samples")
    page.figure(overview, "Columns: numbers of Euler steps. Top: before. Bottom: after straightening.")
    page.heading("Quality against steps").table(result.table())
    page.figure(_quality_figure(result), "Frechet distance to the training digits; lower is better.")
    page.heading("Trajectories").text(
        "A sample on its way from noise to digit. After straightening the path is nearly a line at constant speed: "
        "half-way it is half noise and half digit, and the first velocity points at the end."
    )
    for name, flow in (("Before", teacher), ("After", student)):
        page.heading(name, level=3).figure(_strip(flow, seed), f"{name}: times from 0 (noise) to 1 (digit).")
    page.figure(_straightness_figure(result), "How far the velocity is from the straight line's; 0 is straight.")
    page.heading("Training").figure(_loss_figure(out), "Training loss, averaged over 50 iterations.")
    page.heading("Are these copies?").text(
        "Each pair of rows: one-step samples after straightening, and under each the nearest training digit. A model "
        "that had learned its training set by heart would show the same pictures twice."
    )
    compared = _with_neighbours(grids[1][0], reference.train)
    page.images(compared, "One-step samples over their nearest training digits.", columns=16)
    page.heading("Do it yourself").code(
        f"pantarhei sample {out}/2-rectified-flow --count 64 --steps 1 --label 7 --out samples\n"
        f"pantarhei evaluate {out}/2-rectified-flow --steps 1 2 4\n"
        "pantarhei train rectified-flow --data YOUR_FOLDER --out runs/mine\n"
        "pantarhei straighten reflow runs/mine --pairs 20000 --out runs/mine-fast"
    )
    page.save(result.report)


def _grids(teacher: Flow, student: Flow, seed: int) -> list[list[Tensor]]:
    """[before, after] x steps: 32 samples each, from the same noise and labels."""
    x0, label = numbered_source(teacher, seed + 3, range(32)), torch.arange(32) % 10
    return [[flow.sample(x0=x0, condition=label, steps=k).cpu() for k in STEPS] for flow in (teacher, student)]


def overview_figure(grids: list[list[Tensor]]) -> Any:
    """Sample grids: rows before and after, columns by number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9.4), layout="constrained")
    axes = figure.subplots(2, len(STEPS))
    for row, name in enumerate(("before", "after one reflow")):
        for column, steps in enumerate(STEPS):
            axis = axes[row][column]
            axis.imshow(image_grid(grids[row][column], columns=4, scale=5), cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"{steps} step" + ("s" if steps > 1 else ""))
            if column == 0:
                axis.set_ylabel(name)
    return figure


def _quality_figure(result: Quickstart) -> Any:
    series: dict[str, Any] = {
        name: ([r.steps for r in part.rows], [r.frechet for r in part.rows])
        for name, part in (("before", result.before), ("after one reflow", result.after))
    }
    series["held-out digits (floor)"] = ([STEPS[0], STEPS[-1]], [result.before.floor] * 2)
    return draw.curves(series, xlabel="Euler steps", ylabel="Frechet distance", log_x=True, log_y=True)


def _strip(flow: Flow, seed: int) -> Any:
    times = [i / 10 for i in range(11)]
    x0, label = numbered_source(flow, seed + 3, range(4)), torch.arange(4) + 3
    with torch.no_grad():
        states = flow.transport(x0, times, steps=100, method="euler", condition=label).xs
    return draw.trajectory_strip(states.cpu(), times=times)


def _straightness_figure(result: Quickstart) -> Any:
    series = {
        name: (list(s.times), [v / s.costs["|d|^2"] for v in s.over_time])
        for name, s in (("before", result.straightness_before), ("after", result.straightness_after))
    }
    return draw.curves(series, xlabel="t", ylabel="E|(Z1 - Z0) - v|^2 / E|Z1 - Z0|^2", log_y=True, markers=False)


def _loss_figure(out: Path) -> Any:
    series = {}
    for name, folder in (("flow matching", "1-rectified-flow"), ("reflow", "2-rectified-flow")):
        lines = [line for line in Run.open(out / folder).metrics() if "loss" in line]
        series[name] = ([line["iteration"] for line in lines], [line["loss"] for line in lines])
    return draw.curves(series, xlabel="iteration", ylabel="loss", log_y=True)


def _with_neighbours(samples: Tensor, train: Tensor) -> Tensor:
    """Rows of 16: samples, their neighbours, samples, their neighbours."""
    _, index = nearest_neighbours(samples, train)
    near = train[index[:, 0]]
    return torch.cat([samples[:16], near[:16], samples[16:], near[16:]])


def percent(value: float | None) -> str:
    """As text; "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"
