"""A flow's analysis as a page: straightness, costs, the balance, marginals, trajectories, and the rounds before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.files import write_json
from pantarhei.flow import Flow
from pantarhei.report import Page, Table
from pantarhei.report import figures as draw
from pantarhei.straighten import Balance, MarginalCheck, Straightness, balance, check_marginals, straightness


@dataclass(frozen=True)
class Coupled:
    """A flow with draws of the coupling that it was trained on.

    Attributes:
        name: of the run.
        flow: the flow.
        x0, x1: pairs, (N, *shape).
        conditions: of the pairs, by name.
    """

    name: str
    flow: Flow
    x0: Tensor
    x1: Tensor
    conditions: dict[str, Tensor]


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Attributes:
        rounds: name and balance of each flow, the first one first.
        marginals: of the last flow.
        straightness: of the last flow.
        pairs: how many pairs were looked at.
        seed: of the draws.
    """

    rounds: tuple[tuple[str, Balance], ...]
    marginals: tuple[MarginalCheck, ...]
    straightness: Straightness
    pairs: int
    seed: int

    def rounds_table(self) -> Table:
        """The balance of every round, and the running sum that bounds how straight the best one is."""
        rows, total = [], 0.0
        for name, b in self.rounds:
            total += b.crossing + b.straightness
            share = b.straightness / b.rectified
            rows.append((name, b.given, b.rectified, b.straightness, share, b.crossing, b.remainder, total))
        columns = ("flow", "E|X1-X0|^2", "E|Z1-Z0|^2", "S", "S / E|Z1-Z0|^2", "V", "remainder", "sum of V + S")
        first = self.rounds[0][1].given
        caption = (
            "E|X1-X0|^2 = E|Z1-Z0|^2 + S + V, with S the curvature of the trajectories and V the crossing variance, that "
            "is the training loss; the remainder is relative, and 0 for a perfectly trained flow. The running sum stays "
            f"below E|X1-X0|^2 of the first coupling ({first:.4g}), so that V + S falls at least like 1 / rounds."
        )
        return Table(columns, rows, caption)

    def costs_table(self) -> Table:
        """Convex costs of the last flow's coupling before and after."""
        last = self.rounds[-1][1]
        rows = [(n, v, last.costs_rectified[n], last.costs_rectified[n] / v) for n, v in last.costs_given.items()]
        caption = "Means over pairs; one rectification raises no convex cost of the displacement d."
        return Table(("cost", "coupling it was trained on", "its own coupling", "ratio"), rows, caption)

    def marginals_table(self) -> Table:
        """The test of every time."""
        rows = [(f"{c.time:g}", c.distance, f"{c.p_value:.3f}") for c in self.marginals]
        caption = "Energy distance between Z_t and X_t, and the chance of a larger one if their laws were equal."
        return Table(("t", "energy distance", "p"), rows, caption)

    def data(self) -> dict[str, Any]:
        """For `analysis.json`."""
        return asdict(self)


def analyse(rounds: Sequence[Coupled], *, steps: int = 100, seed: int = 0, permutations: int = 99) -> Analysis:
    """Analyse a flow and the rounds before it.

    Args:
        rounds: flows on the linear path, the first round first.
        steps: Heun steps of every solve, at least 50.
        seed: of the permutation test.
        permutations: of the test.

    Raises:
        ValueError: no flow, or one that is not on the linear path.
    """
    if not rounds:
        raise ValueError("rounds: at least one flow is needed")
    found = tuple(
        (each.name, balance(each.flow, each.x0, each.x1, condition=each.conditions or None, steps=steps))
        for each in rounds
    )
    last = rounds[-1]
    half = len(last.x0) // 2
    marginals = check_marginals(
        last.flow,
        last.x0[:half],
        last.x1[:half],
        last.x0[half:],
        condition={name: value[half:] for name, value in last.conditions.items()} or None,
        steps=steps,
        permutations=permutations,
        generator=seeded(seed, 43),
    )
    straight = straightness(last.flow, last.x0[:512], condition=_first(last.conditions, 512), steps=steps)
    return Analysis(found, marginals, straight, len(last.x0), seed)


def write_analysis(result: Analysis, last: Coupled, out: Path) -> Path:
    """Write `analysis.json`, `trajectories.png` and `analysis.html`; returns the page."""
    write_json(out / "analysis.json", result.data())
    page = Page(f"How straight is {last.name}?", "Straightness, transport costs, balance, marginals and trajectories.")
    page.facts(
        {
            "S": result.straightness.value,
            "S / E|Z1 - Z0|^2": result.straightness.normalised,
            "rectified": f"{last.flow.provenance.rectified}x",
            "pairs looked at": result.pairs,
            "seed": result.seed,
        }
    )
    picture = trajectories(last)
    if picture is not None:
        picture.savefig(out / "trajectories.png", dpi=110)
        page.heading("Trajectories").figure(picture, "From source (t = 0) to data (t = 1).")
    page.heading("Balance").table(result.rounds_table())
    page.heading("Convex costs").table(result.costs_table())
    page.heading("Marginals").table(result.marginals_table())
    over = (result.straightness.times, result.straightness.over_time)
    curve = draw.curves({last.name: over}, xlabel="t", ylabel="E |(Z1 - Z0) - dZ_t/dt|^2")
    page.heading("Where it bends").figure(curve, "The integrand of S over time; 0 is straight at constant speed.")
    return page.save(out / "analysis.html")


def trajectories(coupled: Coupled, *, count: int = 200) -> Any:
    """Paths in the plane, or images on their way; None for other data."""
    flow = coupled.flow
    low, high = flow.interval
    image = len(flow.shape or ()) == 3
    if not image and flow.shape != (2,):
        return None
    pieces = 8 if image else 50
    times = [low + (high - low) * i / pieces for i in range(pieces + 1)]
    grid = sorted({*times, *(low + (high - low) * i / 48 for i in range(1, 48))})
    rows = 8 if image else count
    condition = _first(coupled.conditions, rows)
    with torch.no_grad():
        states = flow.transport(
            coupled.x0[:rows], times, steps=tuple(grid), method="heun", condition=condition
        ).xs.cpu()
    if image:
        return draw.trajectory_strip(states, times=times)
    return draw.trajectories_2d(states, background=coupled.x1[:2000].cpu())


def _first(conditions: dict[str, Tensor], rows: int) -> dict[str, Tensor] | None:
    return {name: value[:rows] for name, value in conditions.items()} or None
