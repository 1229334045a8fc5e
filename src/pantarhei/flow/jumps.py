"""How jumps of a trajectory model follow each other: where each lands, and how much noise comes after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.solve.sde import draw_at
from pantarhei.solve.state import CountedField, State
from pantarhei.solve.steps import StepResult


class Move(NamedTuple):
    """A jump to the time `to`, and noise that leads back to the time `back` <= `to`."""

    to: float
    back: float


def gamma_moves(path: AffinePath, times: Sequence[float], gamma: float = 0.0) -> list[Move]:
    """The moves of gamma-sampling (Kim et al. 2310.02279, section 3.4) over a grid of times.

    With rho = sigma / alpha and e its value at the last time, the jump towards t' lands at the time whose rho is
    sqrt(1 - gamma^2) (rho(t') - e) + e, and noise leads back to t'. After the last jump there is none.

    Args:
        path: an affine path.
        times: from the first time to the last, rising.
        gamma: share of noise in [0, 1].

    Raises:
        ValueError: a gamma out of range, or times that do not rise.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: must lie in [0, 1], got {gamma}")
    if len(times) < 2 or any(b <= a for a, b in pairwise(times)):
        raise ValueError(f"steps: two or more rising times are needed, got {tuple(times)}")
    nodes = torch.tensor(list(times)[1:], dtype=torch.float64)
    rho = path.sigma(nodes) / path.alpha(nodes)
    landing = math.sqrt(1 - gamma**2) * (rho - rho[-1]) + rho[-1]
    to = path.time_at(1 / landing.clamp_min(1e-12)).clamp(max=float(nodes[-1]))
    if gamma == 0:
        to = nodes
    elif gamma == 1:
        to = nodes[-1:].expand_as(nodes)
    moves = [Move(max(a, b), b) for a, b in zip(to.tolist(), nodes.tolist(), strict=True)]
    return [*moves[:-1], Move(moves[-1].back, moves[-1].back)]


def two_jumps(times: Sequence[float], to: int, back: int) -> list[Move]:
    """Two jumps over a grid of times: to its node number `to`, by noise back to its node `back` <= `to`, and to its end.

    The published samples of ImageNet take nodes 36 and 20 of 40.

    Raises:
        ValueError: nodes that are not of the grid, or not in this order.
    """
    if not 0 <= back <= to < len(times) or to == 0:
        raise ValueError(f"to, back: 0 <= back <= to < {len(times)} and to > 0 are needed, got {to} and {back}")
    return [Move(times[to], times[back]), Move(times[-1], times[-1])]


def renoised(path: AffinePath, x: Tensor, move: Move, noise: Tensor) -> Tensor:
    """The state at `move.back` from the one at `move.to`: alpha' (x / alpha + sqrt(rho'^2 - rho^2) noise).

    Args:
        path: an affine path.
        x: states (B, ...) at `move.to`.
        move: whose noise is added.
        noise: standard normal, like x.
    """
    at = torch.tensor([move.to, move.back], dtype=torch.float64)
    (alpha, back), (sigma, level) = path.alpha(at).tolist(), path.sigma(at).tolist()
    if back == 0:
        return level * noise  # back to pure noise
    deviation = math.sqrt(max((level / back) ** 2 - (sigma / alpha) ** 2, 0.0))
    return back / alpha * x + back * deviation * noise


@dataclass(frozen=True)
class Jumping:
    """Moves as steps of `solve.differentiable`, which are numbered where an equation has times.

    The field takes a state and the number of a move and gives where it lands.

    Attributes:
        path: an affine path.
        moves: where each jump lands, and the noise after it.
        noise: a number that all noise follows from; a function of a move's number and the state; or None for torch's own
            generator.
    """

    path: AffinePath
    moves: tuple[Move, ...]
    noise: int | Callable[[int, Tensor], Tensor] | None = None

    name = "jump"
    order = 1
    adaptive = False
    one_way = True

    def start(self, field: CountedField, x: State, t: Any, dt: Any, slope: State | None = None) -> None:
        """Nothing is remembered."""

    def __call__(self, field: CountedField, x: State, t: Any, dt: Any, memory: None) -> StepResult:
        """One jump, and the noise after it."""
        move, x = self.moves[int(t)], field(x, t)
        if move.back < move.to:
            draw = self.noise(int(t), x) if callable(self.noise) else draw_at(self.noise, float(t), x)
            x = renoised(self.path, x, move, draw)
        return StepResult(x, None, None, ())

    def interpolate(self, theta: Any, x: State, result: StepResult, dt: Any, field: CountedField, t: Any) -> State:
        """There is nothing between two moves.

        Raises:
            ValueError: always.
        """
        raise ValueError("times: there is nothing between two jumps")
