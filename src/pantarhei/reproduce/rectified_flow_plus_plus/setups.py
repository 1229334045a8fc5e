"""Teachers, their pairs and their students on the ring and on digits, made once a seed and shared by the experiments."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei import metrics
from pantarhei.data.seeds import generator as seeded
from pantarhei.data.seeds import mix
from pantarhei.flow import LPIPS, Flow, FlowMatching, PseudoHuber, squared
from pantarhei.flow.times import LogitNormal, Uniform, UShaped
from pantarhei.networks import UNet, UNetConfig
from pantarhei.recipes.data import DataConfig
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow.points import RING, toy
from pantarhei.reproduce.training import run, small_mlp
from pantarhei.straighten import PairSource, Solver, invert_data, make_pairs, plus_plus_task, reflow_task
from pantarhei.training import FlowTask, Optimization

Data = Literal["ring", "digits"]
DATA: tuple[Data, ...] = ("ring", "digits")


@dataclass(frozen=True)
class Sizes:
    """What is spent on one kind of data.

    Attributes:
        shape: of a sample.
        deviation: of the data, for EDM's preconditioning.
        teacher, student: iterations.
        batch: of both.
        pairs: of a round.
        test: fresh noises on which students are compared with their teacher.
        scratch_lr, start_lr: of students with random weights and with their teacher's, from scans on other seeds.
        average: decay of the averaged weights.
    """

    shape: tuple[int, ...]
    deviation: float
    teacher: int
    student: int
    batch: int
    pairs: int
    test: int
    scratch_lr: float
    start_lr: float
    average: float


SIZES: dict[Data, Sizes] = {
    "ring": Sizes((2,), 1.43, 2000, 2000, 256, 10_000, 2000, 3.2e-2, 3.2e-2, 0.99),
    "digits": Sizes((1, 8, 8), 0.75, 2000, 800, 64, 4096, 2000, 8e-3, 4e-3, 0.995),
}
# The published samplers of pairs: 18 points of EDM's grid, 35 evaluations.
SOLVER = Solver("edm", 17)
STRAIGHT = Solver("heun", 20)  # for pairs of a flow that is nearly straight already
FINE: dict[str, Any] = {"method": "edm", "steps": 40}
SURROGATE_SIDE, SURROGATE_DIVISOR = 16, 8


@dataclass(frozen=True)
class Setup:
    """A teacher, its pairs, and fresh noise with what the teacher makes of it.

    Attributes:
        data: which.
        sizes: what was spent.
        teacher: an EDM-preconditioned flow on EDM's path, of averaged weights.
        pairs: its pairs.
        train, held_out: real data.
        x0, goal: fresh noise and the teacher's finely solved samples of it.
        settings: seed and size.
        folder: where the pairs are.
    """

    data: Data
    sizes: Sizes
    teacher: Flow
    pairs: PairSource
    train: Any
    held_out: Tensor
    x0: Tensor
    goal: Tensor
    settings: Settings
    folder: tempfile.TemporaryDirectory[str]

    def error(self, flow: Flow, steps: int = 1, method: str = "euler") -> float:
        """Mean squared distance per element to the finely solved teacher's samples of the same noise."""
        return float((flow.sample(x0=self.x0, steps=steps, method=method) - self.goal).square().mean())


def setup(data: Data, settings: Settings) -> Setup:
    """The teacher of a seed and all that belongs to it."""
    return _setup(data, settings.seed, settings.quick)


@lru_cache(maxsize=16)
def _setup(data: Data, seed: int, quick: bool) -> Setup:
    settings, sizes = Settings(seed, quick), SIZES[data]
    train, held_out = _real(data, settings)
    flow = Flow(
        fresh_network(data, seed),
        path="edm",
        predicts={"name": "edm", "sigma_data": sizes.deviation},
        shape=sizes.shape,
    )
    # EDM's training law, ln(sigma) ~ N(-1.2, 1.2^2), on its path's own times, roughly; a little nearer to the noise.
    objective = FlowMatching(times=LogitNormal(0.5, 1.0))
    task = FlowTask(flow, objective, train, optimization=adam(2e-3), average=sizes.average)
    teacher = run(task, seed, settings.size(sizes.teacher), sizes.batch)
    folder = tempfile.TemporaryDirectory()
    pairs = make_pairs(teacher, settings.size(sizes.pairs), f"{folder.name}/pairs", seed=seed, solver=SOLVER)
    x0 = torch.randn(settings.size(sizes.test), *sizes.shape, generator=seeded(seed, 1, 90))
    goal = teacher.sample(x0=x0, **FINE)
    return Setup(data, sizes, teacher, pairs, train, held_out, x0, goal, settings, folder)


def _real(data: Data, settings: Settings) -> tuple[Any, Tensor]:
    if data == "ring":
        points = toy(RING, settings.size(10_000), settings.seed, 2)
        return points, toy(RING, settings.size(2000), settings.seed, 4)
    train, held_out = DataConfig("digits").open()
    return train, held_out.fetch(torch.arange(len(held_out)))["x1"]


def fresh_network(data: Data, seed: int) -> nn.Module:
    """A network with weights drawn from `seed`: a perceptron of 3 x 128, or a U-Net of 96,000 parameters."""
    if data == "ring":
        return small_mlp(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 91))
        return UNet(UNetConfig(channels=1, width=16, multipliers=(1, 2), blocks=1))


def adam(lr: float) -> Optimization:
    """The optimiser of every training here."""
    return Optimization(lr=lr, decay="cosine", warmup=50)


@dataclass(frozen=True)
class Arm:
    """One configuration of the paper's chain.

    Attributes:
        what: in words.
        scratch: random weights, and the network predicts the velocity; else the teacher's weights, seen as a flow.
        u_shaped: U-shaped times (a = 4), else uniform ones.
        huber: pseudo-Huber, else squared error.
        perceptual: with the perceptual term.
        divided: that term divided by 1 - t.
    """

    what: str
    scratch: bool = False
    u_shaped: bool = True
    huber: bool = True
    perceptual: bool = False
    divided: bool = False


ARMS = {
    "A": Arm("vanilla: uniform times, squared error, random weights", True, False, False),
    "A_u": Arm("vanilla with U-shaped times", True, True, False),
    "B": Arm("+ teacher's weights", False, False, False),
    "C": Arm("+ U-shaped times", huber=False),
    "D": Arm("+ pseudo-Huber"),
    "E": Arm("+ perceptual term (surrogate)", perceptual=True),
    "F": Arm("perceptual term / (1 - t)", perceptual=True, divided=True),
}


def student(data: Data, name: str, settings: Settings, length: float = 1.0) -> Flow:
    """The trained student of an arm, on the linear path.

    Args:
        data: of which teacher.
        name: of `ARMS`.
        settings: seed and size.
        length: iterations, as a multiple of the usual number.
    """
    return _student(data, name, settings.seed, settings.quick, length)


@lru_cache(maxsize=128)
def _student(data: Data, name: str, seed: int, quick: bool, length: float) -> Flow:
    made = setup(data, Settings(seed, quick))
    return run(
        task_of(made, ARMS[name]), seed, made.settings.size(round(length * made.sizes.student)), made.sizes.batch
    )


def task_of(made: Setup, arm: Arm, optimization: Optimization | None = None) -> FlowTask:
    """An arm's task on a teacher's pairs."""
    sizes, seed = made.sizes, made.settings.seed
    times = UShaped(4.0) if arm.u_shaped else Uniform()
    common: dict[str, Any] = {"times": times, "average": sizes.average}
    if arm.scratch:
        common["optimization"] = optimization or adam(sizes.scratch_lr)
        blank = Flow(fresh_network(made.data, seed + 1000), shape=sizes.shape)
        return reflow_task(blank, made.pairs, any_teacher=True, **common)
    return plus_plus_task(
        made.teacher,
        made.pairs,
        metric=PseudoHuber() if arm.huber else squared,
        perceptual=surrogate(seed) if arm.perceptual else None,
        divided=arm.divided,
        optimization=optimization or adam(sizes.start_lr),
        **common,
    )


def surrogate(seed: int) -> LPIPS:
    """LPIPS' arithmetic on random features: no LPIPS, and never called so."""
    return LPIPS.surrogate(seed, size=SURROGATE_SIDE, divisor=SURROGATE_DIVISOR)


def inverted(made: Setup) -> PairSource:
    """Real training data with the noise that the teacher inverts them to."""
    return invert_data(made.teacher, made.train, f"{made.folder.name}/inverted", solver=SOLVER)


class Judge:
    """Frechet distance to held-out digits in the space of the leading principal components of the training digits."""

    def __init__(self, made: Setup, components: int = 32):
        train = made.train.fetch(torch.arange(len(made.train)))["x1"].flatten(1)
        self._mean = train.mean(0)
        self._basis = torch.linalg.svd(train - self._mean, full_matrices=False)[2][:components].T
        self._held_out = metrics.moments(self._features(made.held_out))
        self.floor = metrics.frechet_distance(self._features(train), self._held_out)

    def __call__(self, x: Tensor) -> float:
        """The distance of samples (N, 1, 8, 8)."""
        return metrics.frechet_distance(self._features(x), self._held_out)

    def _features(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - self._mean) @ self._basis


def data_distance(made: Setup, x: Tensor) -> float:
    """2-Wasserstein distance of points to fresh data (ring), Frechet distance in principal components (digits)."""
    if made.data == "ring":
        return metrics.wasserstein(x[:1000], made.held_out[:1000])
    return Judge(made)(x)
