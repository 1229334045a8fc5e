"""What a comparison measures: rows of scores, judged on samples of the same noise, and their table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data import Source
from pantarhei.data.seeds import generator as seeded
from pantarhei.files import read_json, write_json
from pantarhei.flow import Flow
from pantarhei.flow.numbered import Conditions, numbered_conditions, numbered_source, path_noise
from pantarhei.metrics import Interval
from pantarhei.recipes.evaluation import Reference, features_of
from pantarhei.report import Table, save_image_grid
from pantarhei.report.formatting import format_cell
from pantarhei.straighten import Solver


@dataclass(frozen=True)
class Row:
    """One arm at one number of evaluations.

    Attributes:
        arm, sampler: what it is.
        asked: number of evaluations that it was allowed.
        evaluations: that it took, for a sample: rows that the network saw, two where there is guidance.
        frechet: distance to the training data in the extractor's features, with its 95 % interval.
        recall: share of the data within reach of the samples.
        gap: mean squared distance per element to the teacher's own samples of the same noise.
        minutes: that the method used (0 without training).
    """

    arm: str
    sampler: str
    asked: int
    evaluations: int
    frechet: Interval
    recall: float
    gap: float
    minutes: float


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they are read with.

    Attributes:
        rows: of every arm.
        teacher: Frechet distance of the teacher's own samples, with `teacher_evaluations`.
        floor: that of held-out data.
        extractor: whose features.
        about: budget, teacher, and how many pairs there were.
    """

    rows: tuple[Row, ...]
    teacher: Interval
    teacher_evaluations: int
    floor: float
    extractor: str
    about: dict[str, Any]

    def table(self) -> Table:
        """For people: one row a method and sampler, one column a number of evaluations."""
        asked = sorted({r.asked for r in self.rows})
        rows: list[tuple[Any, ...]] = []
        for arm, sampler in dict.fromkeys((r.arm, r.sampler) for r in self.rows):
            own = {r.asked: r for r in self.rows if (r.arm, r.sampler) == (arm, sampler)}
            minutes = next(iter(own.values())).minutes
            cells = [own[n].frechet if n in own else "-" for n in asked]
            rows.append((arm, sampler, *cells, f"{minutes:.1f}" if minutes else "-"))
        columns = ("method", "sampler", *(f"{n} NFE" for n in asked), "minutes")
        doubled = "" if self.about["guidance"] == 1.0 else ", with the teacher's guidance twice as many"
        caption = (
            f"Frechet distance (less is better) of {self.about['count']:,} samples from the same noise in every cell. "
            f"Features: {self.extractor}. Brackets: 95 % subsampling interval. Budget of a trained method: "
            f"{self.about['budget_minutes']:g} minutes with its {self.about['pairs']:,} pairs, whose making each is charged "
            f"for. NFE: network evaluations a sample (of Heun's method one less{doubled}). The teacher's own "
            f"{self.teacher_evaluations} reach {format_cell(self.teacher)}, held-out data {self.floor:.3g}."
        )
        return Table(columns, rows, caption)

    def details(self) -> Table:
        """Every row with all that was measured."""
        rows = [(r.arm, r.sampler, r.evaluations, r.frechet, r.recall, r.gap) for r in self.rows]
        columns = ("method", "sampler", "NFE", "Frechet distance", "recall", "gap to teacher")
        caption = "Gap: mean squared distance per element to the teacher's own sample of the same noise."
        return Table(columns, rows, caption)

    def best(self) -> dict[int, Row]:
        """The row of least Frechet distance for each number of evaluations that was asked for."""
        asked = dict.fromkeys(r.asked for r in self.rows)
        return {n: min((r for r in self.rows if r.asked == n), key=lambda r: r.frechet.value) for n in asked}


class Judge:
    """Scores samples of the same noise, and keeps each score as a file."""

    def __init__(
        self,
        teacher: Flow,
        reference: Reference,
        solver: Solver,
        count: int,
        seed: int,
        conditions: Conditions | Source | None,
        batch: int,
    ):
        self.teacher, self.reference, self.solver = teacher, reference, solver
        self.count, self.seed, self.batch = count, seed, batch
        self.named = numbered_conditions(teacher, seed, conditions)
        self.wanted = self.sample(teacher, {**solver.options()})
        calls = [0]
        handle = teacher.network.register_forward_hook(
            lambda _, seen, __: calls.__setitem__(0, calls[0] + len(seen[0]))
        )
        few = self.named(range(1))
        x0 = numbered_source(teacher, seed, range(1), few)
        teacher.sample(x0=x0, condition=few or None, decode=False, **solver.options())
        handle.remove()
        self.teacher_evaluations = calls[0]
        self.teacher_score = self.score(self.wanted)[0]

    def sample(self, flow: Flow, options: dict[str, Any]) -> Tensor:
        """Samples of every number, in the flow's space."""
        parts = []
        for first in range(0, self.count, self.batch):
            numbers = range(first, min(first + self.batch, self.count))
            condition = self.named(numbers)
            x0 = numbered_source(self.teacher, self.seed, numbers, condition).to(flow.device)
            if flow.draws_noise(**options):
                options = {**options, "noise": path_noise(self.seed, numbers)}
            parts.append(flow.sample(x0=x0, condition=condition or None, decode=False, **options).float().cpu())
        return torch.cat(parts)

    def score(self, x: Tensor) -> tuple[Interval, float]:
        """Frechet distance and recall of samples."""
        features = features_of(self.reference.extractor, self._decoded(x))
        found = metrics.evaluate_sets(
            self.reference.train_features, features, resamples=50, generator=seeded(self.seed, 70)
        )
        return found.frechet, found.recall

    def _decoded(self, x: Tensor) -> Tensor:
        if self.teacher.codec is None:
            return x
        device = self.teacher.device
        return torch.cat([self.teacher.decode(part.to(device)).float().cpu() for part in x.split(self.batch)])

    def row(
        self,
        arm: str,
        sampler: str,
        asked: int,
        flow: Flow,
        options: dict[str, Any],
        minutes: float,
        out: Path,
        evaluations: int | None = None,
    ) -> Row:
        """One row, kept in `out`/rows."""
        path = out / "rows" / f"{file_name(f'{arm} {sampler} {asked}')}.json"
        if path.is_file():
            kept = read_json(path)
            return Row(**{**kept, "frechet": Interval(*kept["frechet"])})
        x = self.sample(flow, options)
        frechet, recall = self.score(x)
        gap = float((x - self.wanted).double().square().mean())
        found = Row(arm, sampler, asked, evaluations or asked, frechet, recall, gap, minutes)
        if (x.ndim == 4 and x.shape[1] in (1, 3)) or self.teacher.codec is not None:
            save_image_grid(self._decoded(x[:32]), path.with_suffix(".png"))
        write_json(path, {**asdict(found), "frechet": list(frechet)})
        return found


def file_name(text: str) -> str:
    """Words joined by dashes."""
    return "-".join("".join(c if c.isalnum() or c == "+" else " " for c in text.lower()).split())
