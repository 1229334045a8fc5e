"""Gradients through 128 Euler steps of a perceptron, with respect to the state and all weights: time and memory.

Both sides make the same steps on the same grid, and the same loss. torchdiffeq's `odeint_adjoint` (with the grid as its
output times, where it restarts) solves the continuous adjoint; ours is that ("adjoint") or the exact gradient of the steps
("checkpoint"). The error of each against exact backpropagation stands with the time. Memory is the peak of allocations
beyond parameters and their gradients, followed tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from harness import Bound, Measure, Record, compare, peer, seconds, use_threads
from pantarhei import solve

STEPS, DIMENSION = 128, 64
SIZES = {"3 x 256, batch 64": (256, 64, {"checkpoint": 0.75, "adjoint": 0.7}),
         "3 x 1024, batch 256": (1024, 256, {"checkpoint": 1.0, "adjoint": 1.0})}  # fmt: skip


class Perceptron(nn.Module):
    """A velocity from (x, t)."""

    def __init__(self, width: int):
        super().__init__()
        widths = [DIMENSION + 1, width, width, width]
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, DIMENSION))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt."""
        return self.layers(torch.cat([x, t.expand(len(x), 1)], dim=1))


def run(quick: bool = False) -> list[Record]:
    """Time and memory of two ways and two sizes, and memory against the number of steps."""
    use_threads(1)
    records = []
    for name, (width, batch, bounds) in SIZES.items():
        rounds = 2 if quick else 11 if width < 1000 else 5
        task = _Task(width, batch)
        for through, bound in bounds.items():
            records.append(task.time(name, through, bound, rounds))
        if width < 1000:
            records += [task.memory(name, through) for through in bounds]
            records.append(task.roots())
    return records


class _Task:
    """One network, one state, one loss."""

    def __init__(self, width: int, batch: int):
        torch.manual_seed(0)
        self.network, self.x, self.w = Perceptron(width), torch.randn(batch, DIMENSION), torch.randn(batch, DIMENSION)
        self.parameters = list(self.network.parameters())
        self.exact = self.flat(self.ours("backprop"))

    def loss(self, x: Tensor) -> Tensor:
        """Of the end."""
        return (self.w * x).mean() + x.square().mean()

    def ours(self, through: str, steps: int = STEPS, **options: Any) -> list[Tensor]:
        """Gradients of state and weights."""
        x = self.x.clone().requires_grad_(True)
        how: dict[str, Any] = {"method": "euler", "steps": steps, "through": through, "parameters": self.network}
        end = solve.differentiable(self.network, x, **how, **options)
        return list(torch.autograd.grad(self.loss(end), [x, *self.parameters]))

    def theirs(self) -> list[Tensor]:
        """The same by torchdiffeq."""
        from torchdiffeq import odeint_adjoint

        peer("torchdiffeq")
        x = self.x.clone().requires_grad_(True)
        grid = torch.linspace(0, 1, STEPS + 1)
        end = odeint_adjoint(lambda t, x: self.network(x, t), x, grid, method="euler",
                             adjoint_params=tuple(self.parameters))[-1]  # fmt: skip
        return list(torch.autograd.grad(self.loss(end), [x, *self.parameters]))

    def flat(self, grads: list[Tensor]) -> Tensor:
        """As one vector."""
        return torch.cat([g.flatten() for g in grads])

    def errors(self, through: str) -> dict[str, float]:
        """Relative error against exact backpropagation."""
        return {
            name: float((self.flat(found) - self.exact).norm() / self.exact.norm())
            for name, found in (("error_ours", self.ours(through)), ("error_theirs", self.theirs()))
        }

    def time(self, name: str, through: str, bound: float, rounds: int) -> Record:
        """Seconds a gradient."""
        work = f"gradient of state and weights through {STEPS} Euler steps, perceptron {name}, {DIMENSION} dimensions"
        sides = seconds(lambda: self.ours(through)), seconds(self.theirs)
        how: dict[str, Any] = {"counted": "seconds", "unit": "s", "rounds": rounds, "details": self.errors(through)}
        return _record(f"{through}, {name}", sides, "torchdiffeq", work, bound, **how)

    def memory(self, name: str, through: str) -> Record:
        """Peak beyond parameters and gradients."""
        work = f"the same; peak of allocations beyond parameters and gradients, {STEPS} steps"
        sides = self._peak(lambda: self.ours(through)), self._peak(self.theirs)
        return _record(f"memory, {through}, {name}", sides, "torchdiffeq", work, 0.5)

    def roots(self) -> Record:
        """Peak with square-root segments: 16 times the steps, over as many as here."""
        work = (
            f"checkpoint with square-root segments, {16 * STEPS} steps against {STEPS}; 4 times the states are stored"
        )
        few, many = (
            self._peak(lambda steps=steps: self.ours("checkpoint", steps, every="sqrt"))  # type: ignore[misc]
            for steps in (STEPS, 16 * STEPS)
        )
        return _record("memory, every='sqrt', 16 times the steps", (many, few), "torch", work, 4.0)

    def _peak(self, work: Callable[[], list[Tensor]]) -> Callable[[], float]:
        gradients = sum(p.nbytes for p in self.parameters)

        def measured() -> float:
            with solve.PeakMemory() as memory:
                work()
            return float(memory.peak - gradients)

        return measured


def _record(case: str, sides: tuple[Measure, Measure], other: str, work: str, bound: float, **how: Any) -> Record:
    """A comparison; of bytes, which one round tells, unless it says otherwise."""
    how = {"counted": "bytes", "unit": "B", "rounds": 1, "warmup": 1 if not how else 2, **how}
    return compare("gradients", case, *sides, peer=peer(other), work=work, bound=Bound("at most", bound), **how)
