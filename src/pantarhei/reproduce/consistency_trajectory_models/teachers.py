"""Teachers of the experiments, and the students that several of them share."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, MixtureField, TrajectoryModel, squared
from pantarhei.flow.paths import EDM
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import unlabelled
from pantarhei.reproduce.training import fit, run, small_mlp
from pantarhei.straighten import trajectory_task
from pantarhei.straighten.trajectory_students import Kind
from pantarhei.training import Optimization

MODES, RADIUS, SPREAD = 8, 0.7, 0.03
ITERATIONS, BATCH, TEST = 2500, 256, 8000
STEPS = (1, 2, 4, 8, 16)
SIZES = {"small": (64, 3), "middle": (128, 3), "large": (256, 4)}  # width and layers of the perceptron


@dataclass(frozen=True)
class Ring:
    """Eight Gaussians on a circle with their exact flow on EDM's path.

    Attributes:
        law: of the data.
        teacher: its flow, exact but for the solver.
        data: training data (N, 2).
        truth: fresh data.
        x0, ends: noise, and where the finely solved teacher carries it.
        seed, quick: of the run.
    """

    law: GaussianMixture
    teacher: Flow
    data: Tensor
    truth: Tensor
    x0: Tensor
    ends: Tensor
    seed: int
    quick: bool

    def distance(self, x: Tensor) -> float:
        """Sliced 1-Wasserstein distance to fresh data."""
        return metrics.sliced_wasserstein(x, self.truth, p=1, projections=64, generator=seeded(0, 95))

    def error(self, x: Tensor) -> float:
        """Mean squared distance to the teacher's samples of the same noise, over their variance."""
        return float((x - self.ends).square().mean() / self.ends.var(dim=0).mean())


@lru_cache(maxsize=8)
def ring(seed: int, quick: bool) -> Ring:
    """The ring of a seed."""
    size = Settings(seed, quick).size
    angle = torch.arange(MODES) * 2 * math.pi / MODES
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    law = GaussianMixture(torch.ones(MODES), means, torch.full((MODES,), SPREAD**2))
    path = EDM()
    teacher = Flow(MixtureField(law, path=path), path=path, shape=(2,))
    data, truth = (law.sample(size(count), seeded(seed, salt)) for count, salt in ((20_000, 1), (TEST, 2)))
    x0 = torch.randn(size(TEST), 2, generator=seeded(seed, 3))
    ends = teacher.sample(x0=x0, steps=100, method="edm", final="state")
    return Ring(law, teacher, data, truth, x0, ends, seed, quick)


@dataclass(frozen=True)
class Learned:
    """A student, and the seconds that its training took."""

    model: TrajectoryModel
    seconds: float


def learn(
    taught: Ring, kind: Kind = "ctm", *, iterations: int = ITERATIONS, network: str = "middle", **options: Any
) -> Learned:
    """A student of the ring from random weights, with the squared distance at the data end."""
    size = Settings(taught.seed, taught.quick).size
    count = size(iterations)
    width, layers = SIZES[network]
    usual: dict[str, Any] = {"metric": squared, "average": 0.99, "predicts": "edm"}
    usual["optimization"] = Optimization(lr=1e-3, decay="cosine", warmup=50)
    if kind == "ctm":
        usual |= {"denoising": 0.2, "adaptive": False}
    if kind == "meanflow":
        # Differences of small exact problems are worse than the derivative.
        usual |= {
            "predicts": "velocity",
            "difference": None,
        }  # the output is a mean velocity then, without a label that turns fast
    start = small_mlp(taught.seed, width=width, layers=layers)
    task = trajectory_task(
        taught.teacher, taught.data, kind=kind, start=start, iterations=count, **{**usual, **options}
    )
    began = time.monotonic()
    model: Any = run(task, taught.seed, count, BATCH)
    return Learned(model, time.monotonic() - began)


@lru_cache(maxsize=32)
def usual(
    seed: int,
    quick: bool,
    kind: Kind = "ctm",
    network: str = "middle",
    iterations: int = ITERATIONS,
    adaptive: bool = False,
) -> Learned:
    """The student that several experiments look at."""
    options = {"denoising": 1.0, "adaptive": True} if adaptive else {}
    return learn(ring(seed, quick), kind, iterations=iterations, network=network, **options)


def seconds_an_iteration(taught: Ring, kind: Kind, iterations: int = 100) -> float:
    """Of training, measured by itself: what a longer run takes longer."""
    short, long = (learn(taught, kind, iterations=count).seconds for count in (iterations, 3 * iterations))
    size = Settings(taught.seed, taught.quick).size
    return max(long - short, 1e-3) / max(size(3 * iterations) - size(iterations), 1)


def distances(taught: Ring, model: TrajectoryModel, gamma: float | None) -> dict[int, float]:
    """Distance to fresh data for each number of jumps, from the same noise."""
    return {
        steps: taught.distance(model.sample(x0=taught.x0, steps=steps, gamma=gamma, generator=seeded(taught.seed, 96)))
        for steps in STEPS
    }


@dataclass(frozen=True)
class Digits:
    """A denoiser of 8x8 digits in EDM's form, with noise and where it leads.

    Attributes:
        teacher: the trained denoiser.
        data, truth: training and held-out images.
        x0, ends: noise, and where the finely solved teacher carries it.
    """

    teacher: Flow
    data: Any
    truth: Tensor
    x0: Tensor
    ends: Tensor


@lru_cache(maxsize=4)
def digits(seed: int, quick: bool) -> Digits:
    """The teacher of a seed: a U-Net of 0.4 million weights, 1,500 Adam steps of batch 64."""
    from pantarhei.recipes.data import DataConfig
    from pantarhei.reproduce.rectified_diffusion.teachers import small_unet

    size = Settings(seed, quick).size
    train_set, held_out = DataConfig("digits").open()
    truth = unlabelled(held_out).fetch(torch.arange(len(held_out)))["x1"]
    flow = Flow(small_unet(seed), path="edm", predicts="edm", shape=tuple(truth.shape[1:]))
    flow = fit(flow, unlabelled(train_set), seed=seed, iterations=size(1500), batch=64, lr=1e-3)
    x0 = torch.randn(size(1000), *truth.shape[1:], generator=seeded(seed, 91))
    ends = flow.sample(x0=x0, steps=24, method="edm", final="state")
    return Digits(flow, unlabelled(train_set), truth, x0, ends)
