"""Which jumps a trajectory model is trained on: times t < u <= s on a grid, drawn row by row."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pantarhei.flow import Flow
from pantarhei.flow.affine import AffinePath
from pantarhei.flow.grids import Grid, GridName, make_grid
from pantarhei.naming import unknown

Span = Literal["soft", "local", "global"]


class JumpDraw(NamedTuple):
    """Drawn jumps.

    Attributes:
        nodes: (k + 1, B), the times of the teacher's steps: from t, the first row, to u, the last. A row with fewer steps
            stays at its last time.
        s: (B,), where the jumps land.
    """

    nodes: Tensor
    s: Tensor

    @property
    def t(self) -> Tensor:
        """Where the jumps start, (B,)."""
        return self.nodes[0]

    @property
    def u(self) -> Tensor:
        """Where the teacher hands over, (B,)."""
        return self.nodes[-1]


@dataclass(frozen=True)
class JumpTimes:
    """The law of t, u and s.

    Attributes:
        grid: N >= 2 rising times, from the noisiest to the data end.
        span: how far the teacher goes: "local" one interval of the grid, "soft" k of them, "global" all the way (u = s).
        longest: the largest k; by default N - 1.
        favour_long: draw k with a probability proportional to k, else uniformly.
        per_row: draw a k for each row, as the paper has it; else one for the whole batch (and all machines), as its code
            does, so that no row waits for another.
        to_end: jumps land at the end only (consistency models).
        normal: mean and deviation of ln(sigma / alpha) at t, where nodes are not equally likely (2310.14189, section 3.5).
        levels: sigma / alpha at the nodes, which `normal` needs.
    """

    grid: Grid
    span: Span = "soft"
    longest: int | None = None
    favour_long: bool = True
    per_row: bool = False
    to_end: bool = False
    normal: tuple[float, float] | None = None
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.grid) < 2 or any(b <= a for a, b in pairwise(self.grid)):
            raise ValueError(f"grid: two or more rising times are needed, got {self.grid}")
        if self.span not in ("soft", "local", "global"):
            raise ValueError(unknown("span", self.span, ["soft", "local", "global"]))
        if self.longest is not None and not 1 <= self.longest < len(self.grid):
            raise ValueError(f"longest: must lie in [1, {len(self.grid) - 1}] on this grid, got {self.longest}")
        if self.normal is not None and not self.normal[1] > 0:
            raise ValueError(f"normal: a mean and a positive deviation are needed, got {self.normal}")
        if self.normal is not None and len(self.levels) != len(self.grid):
            raise ValueError("levels: a normal law of the level needs that of each node")

    def spec(self) -> dict[str, Any]:
        """The law as data."""
        kept = asdict(self)
        return {"points": len(self.grid), **{k: v for k, v in kept.items() if k not in ("grid", "levels", "normal")}}

    def draw(
        self,
        rows: int,
        generator: torch.Generator | None = None,
        shared: torch.Generator | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> JumpDraw:
        """Draw jumps for a batch.

        Args:
            rows: B.
            generator: draws what differs between rows.
            shared: draws k where it is one for the batch; the same on every machine.
            device, dtype: of the times.
        """
        last = len(self.grid) - 1
        k = self._spans(rows, generator, shared if shared is not None else generator, device)
        first = self._first(rows, k, generator, device)
        handed = first + k
        if self.to_end:
            landing = torch.full_like(handed, last)
        elif self.span == "global":
            landing = handed
        else:
            room = (last - handed + 1).double()
            landing = handed + (torch.rand(rows, generator=generator, device=device, dtype=torch.float64) * room).long()
            landing = landing.clamp(max=last)
        return self.at(first, k, landing, dtype)

    def at(self, first: Tensor, k: Tensor, landing: Tensor, dtype: torch.dtype = torch.float32) -> JumpDraw:
        """The jumps of given nodes: from `first`, handed over after `k` intervals, to `landing`, each (B,)."""
        times = torch.tensor(self.grid, dtype=dtype, device=first.device)
        steps = torch.arange(int(k.max()) + 1, device=first.device)[:, None]
        return JumpDraw(times[first + torch.minimum(steps, k)], times[landing])

    def _spans(
        self,
        rows: int,
        generator: torch.Generator | None,
        shared: torch.Generator | None,
        device: torch.device | str,
    ) -> Tensor:
        """k of each row."""
        if self.span == "local":
            return torch.ones(rows, dtype=torch.long, device=device)
        longest = self.longest or len(self.grid) - 1
        weights = torch.arange(1, longest + 1, dtype=torch.float64, device=device)
        weights = weights if self.favour_long else torch.ones_like(weights)
        if self.per_row:
            return 1 + torch.multinomial(weights, rows, replacement=True, generator=generator)
        return (1 + torch.multinomial(weights, 1, generator=shared)).expand(rows)

    def _first(self, rows: int, k: Tensor, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """Node of t in [0, N - 1 - k]."""
        count = len(self.grid) - k
        if self.normal is None:
            drawn = torch.rand(rows, generator=generator, device=device, dtype=torch.float64) * count
            return drawn.long().minimum(count - 1)
        mean, deviation = self.normal
        edges = (torch.tensor(self.levels, dtype=torch.float64).log() - mean) / (deviation * math.sqrt(2))
        weights = (torch.erf(edges[:-1]) - torch.erf(edges[1:])).to(device)
        allowed = torch.arange(len(weights), device=device) < count[:, None]
        return torch.multinomial(weights * allowed + 1e-12 * allowed, 1, generator=generator)[:, 0]


def jump_times(
    flow: Flow,
    count: int = 18,
    *,
    grid: GridName = "edm",
    span: Span = "soft",
    longest: int | None = None,
    favour_long: bool = True,
    per_row: bool = False,
    to_end: bool = False,
    normal: tuple[float, float] | None = None,
) -> JumpTimes:
    """The law on a flow's own grid.

    Args:
        flow: on an affine path.
        count: N, number of times; 18 and 40 in the paper.
        grid: their spacing, EDM's by default.
        span, longest, favour_long, per_row, to_end, normal: see `JumpTimes`.

    Raises:
        ValueError: fewer than 2 times, or settings that do not fit them.
    """
    if count < 2:
        raise ValueError(f"grid: at least 2 times are needed, got {count}")
    nodes = make_grid(count - 1, flow.interval, kind=grid, path=flow.path)
    levels = tuple(noise_levels(flow.path, nodes)) if normal is not None else ()
    return JumpTimes(nodes, span, longest, favour_long, per_row, to_end, normal=normal, levels=levels)


def noise_levels(path: AffinePath, times: Grid) -> list[float]:
    """sigma / alpha at some times, kept between EDM's smallest level and 1e4."""
    at = torch.tensor(times, dtype=torch.float64)
    return (path.sigma(at) / path.alpha(at).clamp_min(1e-30)).clamp(1e-6, 1e4).tolist()


class Curriculum:
    """Grids that get finer while a consistency model trains without a teacher.

    "ict" doubles 10 intervals to 1,280 (Song & Dhariwal 2310.14189, section 3.4), "ct" grows from 1 to 150 with the root of
    time (Song et al. 2303.01469, appendix C: N from s0 = 2 to s1 + 1 = 151 times).

    Args:
        flow: whose grids these are.
        kind: "ct" or "ict".
        iterations: training length.
    """

    def __init__(self, flow: Flow, kind: str, iterations: int):
        if iterations < 1:
            raise ValueError(f"iterations: must be at least 1, got {iterations}")
        self._flow, self._kind, self._iterations = flow.like(nn.Identity()), kind, iterations
        self._made: dict[int, JumpTimes] = {}

    def intervals(self, iteration: int) -> int:
        """Intervals of the grid at an iteration, counted from 0."""
        done = min(iteration / self._iterations, 1.0)
        if self._kind == "ict":
            first, last = 10, 1280
            doublings = math.floor(done * (math.log2(last / first) + 1))
            return min(first * 2**doublings, last)
        first, last = 2, 150
        return math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1)

    def spec(self) -> dict[str, Any]:
        """As data; a longer training may go on with it, laid out anew."""
        return {"curriculum": self._kind}

    def __call__(self, iteration: int) -> JumpTimes:
        """The law of jumps at an iteration."""
        count = self.intervals(iteration) + 1
        if count not in self._made:
            self._made[count] = one_interval(self._flow, self._kind, count)
        return self._made[count]


def one_interval(flow: Flow, kind: str, count: int) -> JumpTimes:
    """The law of a consistency model of a kind ("cd", "ct", "ict"): one interval of the grid, and on to the data end."""
    return jump_times(flow, count, normal=(-1.1, 2.0) if kind == "ict" else None, span="local", to_end=True)
