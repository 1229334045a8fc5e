"""Fair comparisons with a named peer: alternating runs, medians, ratios, records.

One round measures both sides, one right after the other, and the next round begins with the other side: what disturbs a
shared machine falls on both. The ratio is that of the two medians; its interval comes from resampling the rounds.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "benchmarks.json"
Measure = Callable[[], float]


@dataclass(frozen=True)
class Peer:
    """Who we are compared with."""

    name: str
    version: str


@dataclass(frozen=True)
class Bound:
    """What the ratio ours / peer has to keep."""

    kind: Literal["at most", "at least"]
    value: float

    def holds(self, ratio: float) -> bool:
        """Whether a ratio keeps the bound."""
        return ratio <= self.value if self.kind == "at most" else ratio >= self.value


@dataclass(frozen=True)
class Figures:
    """What one side measured: median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Record:
    """One comparison as it is stored.

    Attributes:
        benchmark, case: the file and the row of the table.
        peer: name and version.
        work: what both sides did (shapes, accuracy, settings).
        counted: what was measured, in which unit.
        ours, theirs: the figures.
        ratio: median of ours / median of theirs, with its 95 % interval.
        bound, holds: what was promised, and whether the ratio keeps it.
        rounds: alternating runs.
        environment: torch, threads, CPU model and so on.
        details: whatever else belongs to the case (errors reached, parameter counts).
    """

    benchmark: str
    case: str
    peer: Peer
    work: str
    counted: str
    unit: str
    ours: Figures
    theirs: Figures
    ratio: float
    interval: tuple[float, float]
    bound: Bound | None
    holds: bool | None
    rounds: int
    environment: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


def peer(distribution: str) -> Peer:
    """The installed version of a peer.

    Raises:
        ImportError: if it is not installed; the message names the command.
    """
    try:
        return Peer(distribution, importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"{distribution} is not installed: pip install --no-deps -r benchmarks/requirements.txt (or `make bench`)"
        ) from None


def compare(
    benchmark: str,
    case: str,
    ours: Measure,
    theirs: Measure,
    *,
    peer: Peer,
    work: str,
    counted: str,
    unit: str,
    rounds: int,
    warmup: int = 2,
    bound: Bound | None = None,
    details: dict[str, Any] | None = None,
) -> Record:
    """Measure both sides in alternation.

    Args:
        benchmark, case, work, counted, unit: words for the record.
        ours, theirs: do the work once and return the figure (seconds, rows, samples a second); see `seconds`.
        peer: who `theirs` is.
        rounds: measured rounds; 1 is enough for counts that do not vary.
        warmup: rounds before that are thrown away.
        bound: what the ratio ours / theirs has to keep.
        details: kept with the record.
    """
    sides = (ours, theirs)
    figures: tuple[list[float], list[float]] = ([], [])
    collecting = gc.isenabled()
    try:
        for number in range(-warmup, rounds):
            gc.collect(0)
            gc.disable()
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                value = sides[side]()
                if number >= 0:
                    figures[side].append(value)
            gc.enable()
    finally:
        (gc.enable if collecting else gc.disable)()
    ratio = statistics.median(figures[0]) / statistics.median(figures[1])
    return Record(
        benchmark,
        case,
        peer,
        work,
        counted,
        unit,
        _figures(figures[0]),
        _figures(figures[1]),
        ratio,
        _interval(*figures),
        bound,
        None if bound is None else bound.holds(ratio),
        rounds,
        environment(),
        details or {},
    )


def seconds(work: Callable[[], Any]) -> Measure:
    """A measure: wall-clock seconds of one call."""

    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def fastest(variants: dict[str, Measure], rounds: int) -> str:
    """The variant with the smallest median, measured in turns: the peer is taken at its best setting."""
    figures: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            figures[name].append(measure())
    return min(figures, key=lambda name: statistics.median(figures[name]))


def environment() -> dict[str, Any]:
    """Where a figure comes from."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "date": time.strftime("%Y-%m-%d"),
    }


def use_threads(count: int = 1) -> None:
    """Set the threads of the arithmetic on purpose: one, unless a benchmark says otherwise."""
    torch.set_num_threads(count)


def save(records: Sequence[Record], path: Path = RESULTS) -> list[dict[str, Any]]:
    """Put records into the results file, in place of earlier ones of the same benchmarks; returns all of them."""
    new = [asdict(record) for record in records]
    fresh = {record["benchmark"] for record in new}
    old = json.loads(path.read_text()) if path.exists() else []
    merged = sorted([r for r in old if r["benchmark"] not in fresh] + new, key=lambda r: r["benchmark"])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(merged, indent=2) + "\n")
    temporary.replace(path)
    return merged


def line(record: Record) -> str:
    """A record for the terminal."""
    promise = "" if record.bound is None else f", {record.bound.kind} {record.bound.value:g}: {_yes(record.holds)}"
    return (
        f"{record.benchmark} / {record.case}: {_number(record.ours.median)} against "
        f"{_number(record.theirs.median)} {record.unit} ({record.peer.name} {record.peer.version}), "
        f"ratio {record.ratio:.3f} [{record.interval[0]:.3f}, {record.interval[1]:.3f}]{promise}"
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Stored records as a Markdown table."""
    lines = [
        "| benchmark | case | counted | ours | peer | ratio (95 %) | bound | holds |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for r in records:
        bound = "" if r["bound"] is None else f"{r['bound']['kind']} {r['bound']['value']:g}"
        lines.append(
            f"| {r['benchmark']} | {r['case']} | {r['counted']} ({r['unit']}) | {_number(r['ours']['median'])} "
            f"| {_number(r['theirs']['median'])} ({r['peer']['name']} {r['peer']['version']}) "
            f"| {r['ratio']:.3f} ({r['interval'][0]:.3f} to {r['interval'][1]:.3f}) | {bound} | {_yes(r['holds'])} |"
        )
    return "\n".join(lines)


def _figures(values: list[float]) -> Figures:
    if len(values) == 1:
        return Figures(values[0], values[0], values[0])
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Figures(middle, lower, upper)


def _interval(ours: list[float], theirs: list[float], resamples: int = 500) -> tuple[float, float]:
    """95 % interval of the ratio of medians: rounds are drawn again in pairs."""
    draw = random.Random(0)
    pairs = list(zip(ours, theirs, strict=True))
    ratios = []
    for _ in range(resamples):
        again = draw.choices(pairs, k=len(pairs))
        ratios.append(statistics.median(a for a, _ in again) / statistics.median(b for _, b in again))
    ratios.sort()
    return ratios[int(0.025 * resamples)], ratios[int(0.975 * resamples) - 1]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(part.partition(":")[::2] for part in info.read_text().split("\n\n")[0].splitlines())
        named = {key.strip(): value.strip() for key, value in fields.items()}
        if "model name" in named:
            # Virtual machines often hide the model's name; its numbers tell generations apart.
            return f"{named['model name']} (family {named.get('cpu family')}, model {named.get('model')})"
    return platform.processor() or platform.machine()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _yes(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "**no**"
