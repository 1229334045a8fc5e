"""An iteration of consistency trajectory models: its cost in forwards of the network, and its memory.

With k teacher steps an iteration has 2 k evaluations of the teacher, and of the student's network: a jump, two of the
average to the data end and one of the student to compare with, a denoising estimate, and the gradients of three of them.
That is 2 k + 10 forwards where a gradient costs as much as two, and one with respect to the input alone as much as one.

1. Time: iterations (both losses with adaptive weights, gradients, RAdam, moving average) against 2 k + 10 forwards.
2. Memory: bytes that are saved for gradients in an iteration of k steps, over those of one step: none are the teacher's.
"""

from __future__ import annotations

import resource

import torch
from torch import Tensor, nn

from harness import Bound, Measure, Peer, Record, compare, seconds, use_threads
from pantarhei.flow import Flow
from pantarhei.networks import UNet, UNetConfig
from pantarhei.straighten import JumpTimes, TrajectoryTask, jump_times, trajectory_task

SHAPE, BATCH = (3, 32, 32), 16
NETWORK = UNetConfig(channels=3, width=32, multipliers=(1, 2, 2, 2), blocks=(1, 2, 2, 2))
SPANS = (1, 4, 17)


def run(quick: bool = False) -> list[Record]:
    """A record of time and one of memory for each number of teacher steps."""
    use_threads(1)
    rounds = 2 if quick else 9
    return [record for k in SPANS for record in (_time(k, rounds), _memory(k))]


def _time(k: int, rounds: int) -> Record:
    teacher = _teacher()
    steps = _Steps(teacher, k)
    x, t = torch.randn(BATCH, *SHAPE), torch.full((BATCH,), 0.1)

    def forwards() -> None:
        with torch.no_grad():
            for _ in range(2 * k + 10):
                teacher.network(x, t)

    return compare(
        "trajectory",
        f"time, {k} teacher steps",
        seconds(steps.step),
        seconds(forwards),
        peer=Peer(f"{2 * k + 10} forwards of the network", torch.__version__),
        work=f"one iteration on 3x32x32, batch {BATCH}, U-Net of width {NETWORK.width}, {k} Heun steps of the teacher",
        counted="seconds",
        unit="s",
        rounds=rounds,
        warmup=2,
        bound=Bound("at most", 1.15),
    )


def _memory(k: int) -> Record:
    teacher = _teacher()
    _Steps(teacher, k).step()
    peak = _peak()
    return compare(
        "trajectory",
        f"memory, {k} teacher steps",
        _saved(_Steps(teacher, k)),
        _saved(_Steps(teacher, 1)),
        peer=Peer("an iteration with one teacher step", torch.__version__),
        work=f"one iteration, {k} teacher steps, as above; largest memory of the process so far {peak / 2**20:.0f} MiB",
        counted="bytes saved for gradients",
        unit="B",
        rounds=2,
        warmup=1,
        bound=Bound("at most", 1.01),
    )


def _peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Steps:
    """Training iterations by hand: updates, optimiser, average."""

    def __init__(self, teacher: Flow, k: int):
        law = jump_times(teacher, 18)
        fixed = _Always(law.grid, k)
        task = trajectory_task(teacher, torch.randn(64, *SHAPE), times=fixed)
        assert isinstance(task, TrajectoryTask)
        self.task = task
        self.optimizer = torch.optim.RAdam(task.flow.network.parameters(), lr=1e-4)
        self.generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        batch = {"x1": self.task.data.fetch(torch.arange(BATCH))["x1"]}
        for update in self.task.updates(batch, self.generator):
            self.optimizer.zero_grad(set_to_none=True)
            update.loss.backward()
            self.optimizer.step()
        assert self.task.average is not None
        self.task.average.update(self.task.flow.network)


class _Always(JumpTimes):
    """Always k steps of the teacher."""

    def __init__(self, grid: tuple[float, ...], k: int):
        super().__init__(grid)
        object.__setattr__(self, "k", k)

    def _spans(self, rows: int, generator: object, shared: object, device: torch.device | str) -> Tensor:
        return torch.full((rows,), self.k, dtype=torch.long, device=device)  # type: ignore[attr-defined]


def _saved(steps: _Steps) -> Measure:
    """Bytes of the tensors that autograd keeps during one iteration."""

    def measure() -> float:
        total = 0

        def keep(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            steps.step()
        return float(total)

    return measure


def _teacher() -> Flow:
    torch.manual_seed(0)
    network: nn.Module = UNet(NETWORK)
    for parameter in network.parameters():  # layers that start at zero would pass no gradient
        nn.init.normal_(parameter, std=0.02)
    return Flow(network.eval(), path="edm", predicts="edm", shape=SHAPE)
