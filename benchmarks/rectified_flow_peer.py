"""Rectified flow against the `rectified-flow` package: what a library costs around one and the same network.

Both sides train and sample the same network object with the same optimizer object. Counted: seconds of a training step
(draw a batch, noise and times, loss, gradients, Adam), seconds of 100 Euler steps with the noise drawn, and - with a
network of one parameter - the microseconds of either beyond the network's and the optimizer's own.

The peer is asked the quickest of several ways. Its `get_loss` is given x_0, because what it draws itself it draws
through torch.distributions, and t, because the times it draws itself have a shape that it refuses for images.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness import Bound, Measure, Record, compare, fastest, line, peer, save, use_threads
from pantarhei.flow import Flow, FlowMatching
from pantarhei.networks import MLP, MLPConfig, UNet, UNetConfig
from peers import rectified_flow_modules

STEPS = 100
TIME, OVERHEAD = Bound("at most", 1.02), Bound("at most", 1.0)
Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A network and how often its work is measured.

    Attributes:
        name, network: of the row, and what builds it.
        shape, batch: of the data.
        repeats: training steps and samplings in one measurement.
        rounds: measurements of training and of sampling.
    """

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    repeats: tuple[int, int]
    rounds: tuple[int, int]


class OneParameter(nn.Module):
    """x times its only parameter: all that is left of a step is the library."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Like x; the time is not looked at."""
        return x * self.factor


POINTS = Case("MLP 3x128, 2-D", lambda: MLP(MLPConfig(2, 128, 3)), (2,), 256, (50, 2), (40, 40))
IMAGES = Case(
    "U-Net, 32x32x3",
    lambda: UNet(UNetConfig(channels=3, width=16, multipliers=(1, 2, 2, 2), blocks=(1, 2, 2, 2))),
    (3, 32, 32),
    16,
    (4, 1),
    (30, 15),
)
TRIVIAL = Case("library alone", OneParameter, (2,), 64, (200, 4), (60, 60))


class Both:
    """One network, one optimizer and one data set under both libraries."""

    def __init__(self, case: Case):
        flow_type, sampler_type = rectified_flow_modules()
        torch.manual_seed(0)
        self.case = case
        self.network = case.network()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-4, fused=True)
        self.generator = torch.Generator().manual_seed(0)
        self.data = torch.rand(512, *case.shape) * 2 - 1
        self.flow, self.objective = Flow(self.network, shape=case.shape), FlowMatching()
        self.peer = flow_type(case.shape, self.network)
        # Every state of the trajectory is kept by default; only the last is wanted here.
        self.samplers = {
            "keeping the trajectory": sampler_type(self.peer, num_steps=STEPS),
            "keeping nothing": sampler_type(self.peer, num_steps=STEPS, record_traj_period=2 * STEPS),
        }

    def batch(self) -> Tensor:
        """Rows of the data, the same way on both sides."""
        return self.data[torch.randint(len(self.data), (self.case.batch,), generator=self.generator)]

    def train_ours(self) -> None:
        """One training step with our flow and loss."""
        self._step(self.objective(self.flow, {"x1": self.batch()}, self.generator)[0])

    def train_theirs(self) -> dict[str, Work]:
        """One training step with the peer's loss, in its ways."""
        rows = self.case.batch

        def own_source() -> None:
            x1, t = self.batch(), self.peer.sample_train_time(rows, expand_dim=False)
            self._step(self.peer.get_loss(self.peer.sample_source_distribution(rows), x1, t))

        def plain_noise() -> None:
            x1, t = self.batch(), self.peer.sample_train_time(rows, expand_dim=False)
            self._step(self.peer.get_loss(torch.randn_like(x1), x1, t))

        return {"noise from its source": own_source, "noise from torch": plain_noise}

    def train_bare(self) -> Work:
        """The network's and the optimizer's own part of a step, on ready input."""
        x, t = self.data[: self.case.batch], torch.rand(self.case.batch)
        return lambda: self._step(self.network(x, t).mean())

    def sample_ours(self) -> Tensor:
        """100 Euler steps of ours."""
        return self.flow.sample(self.case.batch, steps=STEPS, generator=self.generator)

    def sample_theirs(self) -> dict[str, Work]:
        """The same with the peer's sampler."""
        return {
            way: partial(sampler.sample_loop, num_samples=self.case.batch) for way, sampler in self.samplers.items()
        }

    def sample_bare(self) -> Work:
        """As many calls of the network on ready input."""
        x, t = self.data[: self.case.batch], torch.rand(self.case.batch)

        @torch.no_grad()
        def work() -> None:
            for _ in range(STEPS):
                self.network(x, t)

        return work

    def check_same_work(self) -> None:
        """Given the same draws, both losses, their gradients and both samples agree."""
        x1, x0, t = self.batch(), torch.randn(self.case.batch, *self.case.shape), torch.rand(self.case.batch)
        losses = [
            self.objective(self.flow, {"x1": x1, "x0": x0, "t": t}, self.generator)[0],
            self.peer.get_loss(x0, x1, t),
        ]
        gradients = [torch.autograd.grad(loss, list(self.network.parameters()), retain_graph=True) for loss in losses]
        sampler = next(iter(self.samplers.values())).sample_loop(x_0=x0)
        samples = (self.flow.sample(x0=x0, steps=STEPS), sampler.x_t)
        for what, (a, b) in {"losses": losses, "samples": samples, **_named(zip(*gradients, strict=True))}.items():
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
                raise RuntimeError(f"{self.case.name}: the {what} of the two sides differ")

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def run(quick: bool = False) -> list[Record]:
    """Time per training step and per sampling with two networks, then the library's own part of both."""
    use_threads(1)
    records = [record for case in (POINTS, IMAGES) for record in _times(case, quick)]
    return records + _overheads(TRIVIAL, quick)


def _times(case: Case, quick: bool) -> list[Record]:
    both = Both(case)
    both.check_same_work()
    training, sampling = case.repeats
    work = f"batch {case.batch} of shape {case.shape}, float32, one thread, the same network object on both sides"
    return [
        _compare(
            f"{case.name}: training",
            _seconds(both.train_ours, training),
            {way: _seconds(do, training) for way, do in both.train_theirs().items()},
            f"training steps, {work}, the same fused Adam",
            "time of a training step",
            "s",
            2 if quick else case.rounds[0],
            TIME,
        ),
        _compare(
            f"{case.name}: sampling",
            _seconds(both.sample_ours, sampling),
            {way: _seconds(do, sampling) for way, do in both.sample_theirs().items()},
            f"noise and {STEPS} Euler steps, {work}",
            f"time of {STEPS} Euler steps",
            "s",
            2 if quick else case.rounds[1],
            TIME,
        ),
    ]


def _overheads(case: Case, quick: bool) -> list[Record]:
    both = Both(case)
    both.check_same_work()
    training, sampling = case.repeats
    work = f"a network of one parameter, batch {case.batch} of shape {case.shape}, float32, one thread"
    bare_step, bare_calls = both.train_bare(), both.sample_bare()
    return [
        _compare(
            f"{case.name}: training",
            _beyond(both.train_ours, bare_step, training),
            {way: _beyond(do, bare_step, training) for way, do in both.train_theirs().items()},
            f"training steps, {work}, beyond forward, backward and Adam on ready input",
            "overhead of a training step",
            "us",
            5 if quick else case.rounds[0],
            OVERHEAD,
        ),
        _compare(
            f"{case.name}: sampling",
            _beyond(both.sample_ours, bare_calls, sampling, STEPS),
            {way: _beyond(do, bare_calls, sampling, STEPS) for way, do in both.sample_theirs().items()},
            f"noise and {STEPS} Euler steps, {work}, beyond the network's calls",
            "overhead of an Euler step",
            "us",
            5 if quick else case.rounds[1],
            OVERHEAD,
        ),
    ]


def _compare(
    case: str,
    ours: Measure,
    theirs: dict[str, Measure],
    work: str,
    counted: str,
    unit: str,
    rounds: int,
    bound: Bound,
) -> Record:
    way = fastest(theirs, max(2, rounds // 10))
    return compare(
        "rectified_flow_peer",
        case,
        ours,
        theirs[way],
        peer=peer("rectified-flow"),
        work=f"{work}; the peer's way: {way}",
        counted=counted,
        unit=unit,
        rounds=rounds,
        bound=bound,
        details={"peer_way": way},
    )


def _seconds(work: Work, repeats: int) -> Measure:
    """Seconds of one of `repeats` runs of the work."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - start) / repeats

    return measure


def _beyond(work: Work, bare: Work, repeats: int, steps: int = 1) -> Measure:
    """Microseconds of a step of the work beyond the bare part, which is timed right beside it."""
    whole, part = _seconds(work, repeats), _seconds(bare, repeats)
    return lambda: (whole() - part()) / steps * 1e6


def _named(pairs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    return {f"gradients of parameter {i}": pair for i, pair in zip(itertools.count(), pairs)}


if __name__ == "__main__":
    records = run()
    save(records)
    print(*map(line, records), sep="\n")
