"""What the driver costs per fixed step, on a field that costs almost nothing.

Counted: (time of a solve - time of as many bare calls of the field as the solve makes) / steps. Both sides make the same
number of evaluations in the same dtype and report the state at the end only. torchdiffeq's rk4 is the 3/8 rule and ours
the classical one: four evaluations each. A step count that is a power of two keeps the peer's grid free of rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness import Bound, Measure, Record, compare, fastest, line, peer, save, use_threads
from pantarhei.solve import ode
from pantarhei.solve.methods import MethodName
from peers import torchdiffeq_odeint

BATCH, DIMENSION, STEPS = 64, 64, 128
METHODS: dict[MethodName, tuple[str, int]] = {
    "euler": ("euler", 1),
    "midpoint": ("midpoint", 2),
    "heun": ("heun2", 2),
    "rk4": ("rk4", 4),
}
BOUND = Bound("at most", 0.5)


@torch.no_grad()
def run(quick: bool = False) -> list[Record]:
    """One record a method."""
    use_threads(1)
    return [_method(ours, theirs, evaluations, 20 if quick else 400) for ours, (theirs, evaluations) in METHODS.items()]


def _method(name: MethodName, peer_name: str, evaluations: int, rounds: int) -> Record:
    odeint = torchdiffeq_odeint()
    x = torch.randn(BATCH, DIMENSION, generator=torch.Generator().manual_seed(0))
    ends, grid = torch.tensor([0.0, 1.0]), torch.linspace(0.0, 1.0, STEPS + 1)

    def ours_field(x: Tensor, t: Tensor) -> Tensor:
        return t - x

    def peer_field(t: Tensor, x: Tensor) -> Tensor:
        return t - x

    def ours() -> Tensor:
        return ode(ours_field, x, (0.0, 1.0), method=name, steps=STEPS).x

    # Three ways to ask the peer for the same steps; it is compared at its fastest.
    ways: dict[str, Callable[[], Any]] = {
        "step_size": lambda: odeint(peer_field, x, ends, method=peer_name, options={"step_size": 1 / STEPS}),
        "grid as t": lambda: odeint(peer_field, x, grid, method=peer_name),
        "grid_constructor": lambda: odeint(
            peer_field, x, ends, method=peer_name, options={"grid_constructor": lambda f, y, t: grid}
        ),
    }
    _check_same_work(name, peer_name, evaluations, x, ends)
    t, calls = torch.tensor(0.5), STEPS * evaluations

    def ours_bare() -> None:
        for _ in range(calls):
            ours_field(x, t)

    def peer_bare() -> None:
        for _ in range(calls):
            peer_field(t, x)

    measures = {way: _overhead(solve, peer_bare) for way, solve in ways.items()}
    way = fastest(measures, max(5, rounds // 10))
    return compare(
        "solve_overhead",
        name,
        _overhead(ours, ours_bare),
        measures[way],
        peer=peer("torchdiffeq"),
        work=f"{name} against {peer_name} (asked by {way}), {STEPS} steps, {evaluations} evaluations a step, "
        f"x' = t - x, ({BATCH}, {DIMENSION}) float32, no gradients",
        counted="driver overhead per step",
        unit="us",
        rounds=rounds,
        bound=BOUND,
        details={"peer_way": way},
    )


def _overhead(solve: Callable[[], Any], bare: Callable[[], None]) -> Measure:
    """Microseconds a step beyond the bare field calls, which are timed right beside the solve."""

    def measure() -> float:
        start = time.perf_counter()
        solve()
        middle = time.perf_counter()
        bare()
        return (2 * middle - start - time.perf_counter()) / STEPS * 1e6

    return measure


def _check_same_work(name: MethodName, peer_name: str, evaluations: int, x: Tensor, ends: Tensor) -> None:
    """Both sides make the same number of evaluations and reach the solution x(1) = (x + 1) / e."""
    odeint, calls = torchdiffeq_odeint(), [0, 0]

    def ours_field(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return t - x

    def peer_field(t: Tensor, x: Tensor) -> Tensor:
        calls[1] += 1
        return t - x

    reached = (
        ode(ours_field, x, (0.0, 1.0), method=name, steps=STEPS).x,
        odeint(peer_field, x, ends, method=peer_name, options={"step_size": 1 / STEPS})[-1],
    )
    if calls != [STEPS * evaluations] * 2:
        raise RuntimeError(f"{name}: {STEPS * evaluations} evaluations were expected of each side, got {calls}")
    exact = (x + 1) * torch.exp(-ends[1])
    errors = [float((y - exact).abs().max()) for y in reached]
    if max(errors) > 2e-2 or (evaluations > 1 and max(errors) > 1e-4):
        raise RuntimeError(f"{name}: the solutions are off by {errors}")


if __name__ == "__main__":
    records = run()
    save(records)
    print(*map(line, records), sep="\n")
