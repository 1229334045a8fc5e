"""How many rows Dormand-Prince evaluates on a batch whose rows want steps of different size.

x' = -k (x - cos t) with 256 values of k, logarithmically spaced from 1 to 100, from random starts, t in [0, pi], in
float64, with the exact solution known. Both sides get the same rtol = atol and report the same times. Joint control (all
the peer has) steps at the pace of the stiffest row; per-sample control gives each row its own pace.

Counted: rows the field is called with, by a counter inside the field. Both reach some error against the exact solution,
root mean square and maximum over rows, dimensions and times. Where ours is the larger one in either, our tolerance is
tightened until it is not, and those rows count: nothing is adjusted in our favour.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness import Bound, Record, compare, line, peer, save, use_threads
from pantarhei.solve import ode
from peers import torchdiffeq_odeint

ROWS, DIMENSION, END = 256, 4, math.pi
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
BOUND = Bound("at most", 0.67)


@dataclass(frozen=True)
class Solved:
    """Rows and calls of one solve, the errors it reached, and its time."""

    tolerance: float
    rows: int
    calls: int
    rms: float
    largest: float
    seconds: float


class Problem:
    """The batch, its exact solution, and the field with its counters."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = torch.logspace(0, 2, ROWS, dtype=torch.float64)
        self.x0 = torch.randn(ROWS, DIMENSION, generator=generator, dtype=torch.float64)
        self.times = torch.linspace(0.0, END, 9, dtype=torch.float64)
        self.rows = self.calls = 0

    def field(self, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        """-k (x - cos t); t 0-d or one a row."""
        self.rows, self.calls = self.rows + x.shape[0], self.calls + 1
        return -k[:, None] * (x - (torch.cos(t)[:, None] if t.ndim else torch.cos(t)))

    def exact(self) -> Tensor:
        """At all times, (times, rows, dimension)."""
        k, t = self.k[None, :, None], self.times[:, None, None]
        forced = (k**2 * torch.cos(t) + k * torch.sin(t)) / (k**2 + 1)
        return forced + (self.x0[None] - forced[:1]) * torch.exp(-k * t)

    def ours(self, tolerance: float) -> Solved:
        """Per-sample control."""

        def solve() -> Tensor:
            xs: Tensor = ode(
                self.field,
                self.x0,
                self.times,
                method="dopri5",
                rtol=tolerance,
                atol=tolerance,
                control="per_sample",
                condition=self.k,
            ).xs
            return xs

        return self._measured(solve, tolerance)

    def theirs(self, tolerance: float) -> Solved:
        """torchdiffeq's dopri5."""
        odeint = torchdiffeq_odeint()
        return self._measured(
            lambda: odeint(
                lambda t, x: self.field(x, t, self.k),
                self.x0,
                self.times,
                method="dopri5",
                rtol=tolerance,
                atol=tolerance,
            ),
            tolerance,
        )

    def _measured(self, solve: Any, tolerance: float) -> Solved:
        self.rows = self.calls = 0
        start = time.perf_counter()
        xs = solve()
        spent = time.perf_counter() - start
        error = xs - self.exact()
        return Solved(
            tolerance, self.rows, self.calls, float(error.square().mean().sqrt()), float(error.abs().max()), spent
        )


@torch.no_grad()
def run(quick: bool = False) -> list[Record]:
    """One record a tolerance."""
    use_threads(1)
    problem = Problem()
    return [_tolerance(problem, tolerance) for tolerance in (TOLERANCES[2:3] if quick else TOLERANCES)]


def _tolerance(problem: Problem, tolerance: float) -> Record:
    theirs = problem.theirs(tolerance)
    ours = problem.ours(tolerance)
    while ours.rms > theirs.rms or ours.largest > theirs.largest:
        ours = problem.ours(ours.tolerance / 1.25)
    return compare(
        "solve_rows",
        f"tolerance {tolerance:.0e}",
        lambda: float(problem.ours(ours.tolerance).rows),
        lambda: float(problem.theirs(tolerance).rows),
        peer=peer("torchdiffeq"),
        work=f"dopri5, {ROWS} rows of x' = -k (x - cos t), k from 1 to 100, t in [0, pi], float64, "
        f"rtol = atol = {tolerance:.0e}; error reached: ours rms {ours.rms:.1e}, max {ours.largest:.1e} "
        f"(at tolerance {ours.tolerance:.1e}), peer rms {theirs.rms:.1e}, max {theirs.largest:.1e}",
        counted="rows evaluated",
        unit="rows",
        rounds=1,
        warmup=0,
        bound=BOUND,
        details={"ours": vars(ours), "peer": vars(theirs)},
    )


if __name__ == "__main__":
    records = run()
    save(records)
    print(*map(line, records), sep="\n")
