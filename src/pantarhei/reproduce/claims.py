"""Claims, the experiments that put them to the test, and what came out: several seeds, each kept as a file."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pantarhei.files import read_json, write_atomically, write_json
from pantarhei.metrics import spread
from pantarhei.naming import unknown
from pantarhei.report import Page, Table

Verdict = Literal["holds", "does not hold", "undecided"]


@dataclass(frozen=True)
class Settings:
    """How an experiment is run.

    Attributes:
        seed: of everything it draws.
        quick: tiny sizes, to see that it runs; the figures mean nothing.
        pictures: where to draw, or None.
    """

    seed: int
    quick: bool = False
    pictures: Path | None = None

    def size(self, count: int) -> int:
        """A number of iterations or points, cut in quick runs."""
        return max(8, count // 50) if self.quick else count


@dataclass(frozen=True)
class Claim:
    """One claim as a bound on one measured figure.

    Attributes:
        text: what is claimed.
        quantity: the figure's key among the experiment's results.
        measured: what the figure is, in words.
        kind, bound: "at most" or "at least", and the value.
        paper: the paper's own figure, on its own data, where it has one.
    """

    text: str
    quantity: str
    measured: str
    kind: Literal["at most", "at least"]
    bound: float
    paper: str = "-"

    def verdict(self, values: Sequence[float]) -> Verdict:
        """It holds if it does for every seed, does not if for none, and is undecided in between."""
        kept = [v <= self.bound if self.kind == "at most" else v >= self.bound for v in values]
        return "holds" if all(kept) else "undecided" if any(kept) else "does not hold"


@dataclass(frozen=True)
class Experiment:
    """One experiment: `run(settings)` gives its figures for one seed, and draws its pictures where asked to.

    Attributes:
        name: short, for files and the command line.
        about: what is done, in a sentence or two.
        run: the experiment.
        claims: what its figures decide.
        seeds: how many seeds it takes.
        pictures: file name -> caption.
    """

    name: str
    about: str
    run: Callable[[Settings], dict[str, float]]
    claims: tuple[Claim, ...]
    seeds: int = 3
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """An experiment's figures, one dict a seed."""

    experiment: Experiment
    seeds: tuple[int, ...]
    figures: tuple[dict[str, float], ...]

    def values(self, key: str) -> list[float]:
        """One figure over the seeds."""
        return [row[key] for row in self.figures]

    def verdicts(self) -> list[tuple[Claim, Verdict]]:
        """Each claim and what became of it."""
        return [(claim, claim.verdict(self.values(claim.quantity))) for claim in self.experiment.claims]


def reproduce(
    experiments: Sequence[Experiment],
    out: str | Path,
    *,
    title: str,
    only: Sequence[str] = (),
    seeds: int | None = None,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Outcome, ...]:
    """Run experiments, each seed kept as a file in `out`/seeds, so that an interrupted run goes on.

    Writes `results.json`, `README.md` (the table of claims) and `report.html`, with pictures of the first seed.

    Args:
        experiments: of one system.
        out: folder.
        title: of the page.
        only: names of the experiments to run; all by default.
        seeds: how many seeds, instead of each experiment's own number.
        quick: tiny sizes.
        say: takes progress lines.

    Raises:
        ValueError: an unknown name.
    """
    out = Path(out)
    names = [e.name for e in experiments]
    for name in only:
        if name not in names:
            raise ValueError(unknown("--only", name, names))
    chosen = [e for e in experiments if not only or e.name in only]
    outcomes = []
    for experiment in chosen:
        numbers = tuple(range(seeds or experiment.seeds))
        rows = []
        for seed in numbers:
            rows.append(_figures(experiment, Settings(seed, quick, out if seed == 0 else None), out, say))
        outcome = Outcome(experiment, numbers, tuple(rows))
        for claim, verdict in outcome.verdicts():
            say(f"  {verdict}: {claim.text} ({claim.measured}: {_spread(outcome.values(claim.quantity))})")
        outcomes.append(outcome)
    write_results(outcomes, out, title, quick)
    return tuple(outcomes)


def write_results(outcomes: Sequence[Outcome], out: Path, title: str, quick: bool) -> None:
    """Write the figures, the table and the page."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    found = {o.experiment.name: {"seeds": o.seeds, "figures": o.figures} for o in outcomes}
    write_json(out / "results.json", {"machine": machine, "quick": quick, "experiments": found})
    warning = "Run with --quick: these figures mean nothing. " if quick else ""
    lines = [
        f"# {title}",
        "",
        f"{warning}torch {machine['torch']}, {machine['threads']} threads, {machine['machine']}.",
        "",
    ]
    lines += [claims_table(outcomes).markdown(), ""]
    page = Page(title, f"{warning}Every claim, what was measured, and whether it holds.")
    page.table(claims_table(outcomes))
    for outcome in outcomes:
        experiment = outcome.experiment
        heading = experiment.name.replace("-", " ").capitalize()
        lines += [f"## {heading}", "", experiment.about, "", figures_table(outcome).markdown(), ""]
        page.heading(heading).text(experiment.about)
        for name, caption in experiment.pictures.items():
            if (out / name).is_file():
                lines += [f"![{caption}]({name})", "", f"*{caption}*", ""]
                page.figure(_image(out / name), caption)
        page.table(figures_table(outcome))
    write_atomically(out / "README.md", "\n".join(lines).encode())
    page.save(out / "report.html")


def claims_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a claim."""
    rows = [
        (
            claim.text,
            claim.paper,
            claim.measured,
            f"{claim.kind} {claim.bound:g}",
            _spread(outcome.values(claim.quantity)),
            len(outcome.seeds),
            verdict,
        )
        for outcome in outcomes
        for claim, verdict in outcome.verdicts()
    ]
    columns = ("claim", "paper", "measured here", "asked", "median [range]", "seeds", "verdict")
    caption = "A claim holds if it does for every seed, does not if for none, and is undecided in between."
    return Table(columns, rows, caption)


def figures_table(outcome: Outcome) -> Table:
    """Every figure of an experiment, one column a seed."""
    keys = list(dict.fromkeys(key for row in outcome.figures for key in row))
    rows = [(key.replace("_", " "), *(f"{row.get(key, float('nan')):.4g}" for row in outcome.figures)) for key in keys]
    return Table(("figure", *(f"seed {seed}" for seed in outcome.seeds)), rows)


def _figures(experiment: Experiment, settings: Settings, out: Path, say: Callable[[str], None]) -> dict[str, float]:
    path = out / "seeds" / f"{experiment.name}-{settings.seed}{'-quick' if settings.quick else ''}.json"
    if path.is_file():
        kept: dict[str, float] = read_json(path)
        say(f"{experiment.name}, seed {settings.seed}: kept from {path}")
        return kept
    if settings.pictures is not None:
        settings.pictures.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    figures = {key: float(value) for key, value in experiment.run(settings).items()}
    figures["seconds"] = round(time.monotonic() - began, 1)
    write_json(path, figures)
    say(f"{experiment.name}, seed {settings.seed}: {figures['seconds']:.0f} s")
    return figures


def _spread(values: Sequence[float]) -> str:
    found = spread(values)
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def _image(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
