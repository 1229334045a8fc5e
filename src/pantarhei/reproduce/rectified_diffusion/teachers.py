"""Teachers of the experiments, their pairs, and how near a student's few steps come to where the teacher leads."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data import TOYS, Source, as_source
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow
from pantarhei.flow.paths import VP, AffinePath, Numbered
from pantarhei.networks import UNet, UNetConfig
from pantarhei.recipes.data import DataConfig
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import fit, run, small_mlp
from pantarhei.straighten import PairSource, PlainNoiseLoss, Solver, make_pairs, rectified_diffusion_task
from pantarhei.straighten.first_order import clean_end
from pantarhei.training import Optimization

RING, MOONS, DIGITS = "eight_gaussians", "two_moons", "digits"
Schedule = Literal["sd", "scaled", "score-sde"]
# Stable Diffusion's two schedules leave alpha = 0.040 and 0.068 in the noisiest state, the score SDE's 0.0066.
SCHEDULES: dict[str, AffinePath] = {"sd": Numbered("linear"), "scaled": Numbered("scaled-linear"), "score-sde": VP()}
TEACHER_ITERATIONS = {RING: 3000, MOONS: 3000, DIGITS: 1500}
PAIRS = {RING: 10_000, MOONS: 10_000, DIGITS: 4096}
BATCH = {RING: 256, MOONS: 256, DIGITS: 64}
LR = {RING: 2e-3, MOONS: 2e-3, DIGITS: 1e-3}
TEST = {RING: 2000, MOONS: 2000, DIGITS: 512}


@dataclass
class PairsInMemory:
    """Pairs as tensors."""

    x0: Tensor
    x1: Tensor
    header: dict[str, Any]
    name: str = "pairs in memory"

    @staticmethod
    def of(store: PairSource) -> PairsInMemory:
        """All pairs of a store that is going to be thrown away."""
        tensors = store.tensors()
        return PairsInMemory(tensors["x0"], tensors["x1"], store.header)

    def __len__(self) -> int:
        return len(self.x1)

    def missing(self) -> list[int]:
        """None ever are."""
        return []

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The pairs at `indices`."""
        return {"x0": self.x0[indices], "x1": self.x1[indices]}

    def tensors(self, limit: int | None = None) -> dict[str, Tensor]:
        """The first pairs."""
        return {"x0": self.x0[:limit], "x1": self.x1[:limit]}

    def describe(self) -> dict[str, Any]:
        """The header."""
        return {"name": self.name, **self.header}

    def shuffled(self, seed: int) -> PairsInMemory:
        """The same samples, each with another one's noise."""
        order = torch.randperm(len(self), generator=seeded(seed, 90))
        return PairsInMemory(self.x0[order], self.x1, self.header, "shuffled pairs")


@dataclass(frozen=True)
class Taught:
    """A teacher with all that its students need.

    Attributes:
        kind: name of its data.
        flow: the teacher.
        data: what it was trained on.
        pairs: its pairs.
        x0, ends: noise that no pair has, and where the finely solved teacher carries it.
        truth: fresh data.
        seed, quick: of the run.
    """

    kind: str
    flow: Flow
    data: Source
    pairs: PairsInMemory
    x0: Tensor
    ends: Tensor
    truth: Tensor
    seed: int
    quick: bool

    def error(self, x: Tensor) -> float:
        """Mean squared distance to the teacher's samples of the same noise, in units of their variance."""
        return float((x - self.ends).square().mean() / self.ends.var(dim=0).mean())

    def distance(self, x: Tensor) -> float:
        """Exact 2-Wasserstein distance to fresh data."""
        return metrics.wasserstein(x.flatten(1), self.truth.flatten(1))

    def rectify(self, iterations: int, *, flow: Flow | None = None, pairs: Any = None, **options: Any) -> Flow:
        """A student after so many iterations: of the teacher, or of another flow of the same data."""
        size = Settings(self.seed, self.quick).size
        options = {"optimization": adam(self.kind), "average": 0.99, **options}
        # Pairs of other teachers are meant here, and plain noise losses too.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlainNoiseLoss)
            task = rectified_diffusion_task(flow or self.flow, pairs or self.pairs, any_teacher=True, **options)
        return run(task, self.seed, size(iterations), BATCH[self.kind])


def teach(kind: str, settings: Settings, schedule: Schedule = "sd", predicts: str = "noise") -> Taught:
    """A diffusion model of a toy set or of the digits, trained from scratch; kept for the experiments that share it."""
    return _teach(kind, schedule, predicts, settings.seed, settings.quick)


@lru_cache(maxsize=64)
def _teach(kind: str, schedule: str, predicts: str, seed: int, quick: bool) -> Taught:
    size = Settings(seed, quick).size
    network: Any
    if kind == DIGITS:
        train_set, held_out = DataConfig(DIGITS).open()
        data, truth = unlabelled(train_set), unlabelled(held_out).fetch(torch.arange(len(held_out)))["x1"]
        network, shape = small_unet(seed), tuple(truth.shape[1:])
    else:
        data, truth = as_source(toy(kind, size(10_000), seed, 1)), toy(kind, size(TEST[kind]), seed, 2)
        network, shape = small_mlp(seed), (2,)
    flow = Flow(network, path=SCHEDULES[schedule], predicts=predicts, shape=shape)
    iterations, batch = size(TEACHER_ITERATIONS[kind]), BATCH[kind]
    flow = fit(flow, data, seed=seed, iterations=iterations, batch=batch, lr=LR[kind])
    steps = (12, 24) if kind == DIGITS else (40, 100)
    with tempfile.TemporaryDirectory() as folder:
        store = make_pairs(flow, size(PAIRS[kind]), folder, seed=seed, solver=Solver("edm", steps[0]))
        pairs = PairsInMemory.of(store)
    x0 = torch.randn(size(TEST[kind]), *shape, generator=seeded(seed, 91))
    ends = flow.sample(x0=x0, steps=steps[1], method="edm")
    return Taught(kind, flow, data, pairs, x0, ends, truth, seed, quick)


def few(flow: Flow, x0: Tensor, steps: int) -> Tensor:
    """Samples of so many DDIM steps, as many evaluations, with a clean end; on the linear path these are Euler's."""
    return flow.sample(x0=x0, steps=steps, method="ddim", final=clean_end(flow))


def adam(kind: str) -> Optimization:
    """Every student's optimiser, and its teacher's."""
    return Optimization(lr=LR[kind], decay="cosine", warmup=50)


def toy(kind: str, count: int, seed: int, salt: int) -> Tensor:
    """Points that depend on (seed, salt)."""
    return TOYS[kind](count, seeded(seed, salt, 92))


def unlabelled(source: Source) -> Source:
    """The images alone."""
    return as_source(source.fetch(torch.arange(len(source)))["x1"])


def small_unet(seed: int) -> torch.nn.Module:
    """0.4 million weights for 8 x 8 images, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(UNetConfig(channels=1, width=32, multipliers=(1, 2), blocks=1))
