"""Short trainings inside experiments: the project's own loop, in a folder that is thrown away."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from pantarhei.flow import Flow
from pantarhei.networks import MLP, MLPConfig
from pantarhei.training import FlowTask, Optimization, Task, train


def small_mlp(seed: int, dimension: int = 2, width: int = 128, layers: int = 3) -> MLP:
    """A perceptron whose weights are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(MLPConfig(dimension, width, layers))


def fit(
    flow: Flow, data: Any, *, seed: int, iterations: int, batch: int = 256, lr: float = 2e-3, **options: Any
) -> Flow:
    """Train a flow with Adam and a cosine schedule; the result has the averaged weights."""
    optimization = Optimization(lr=lr, decay="cosine", warmup=50)
    return run(FlowTask(flow, None, data, optimization=optimization, average=0.99), seed, iterations, batch, **options)


def run(task: FlowTask, seed: int, iterations: int, batch: int = 256, **options: Any) -> Flow:
    """Train a task; the result has the averaged weights."""
    train_quietly(task, seed=seed, iterations=iterations, batch=batch, **options)
    return task.result()


def train_quietly(task: Task, **options: Any) -> None:
    """Train in a folder that is thrown away, without progress lines."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"progress": False, "tensorboard": False, "checkpoint_every": options["iterations"], **options}
        train(task, Path(folder) / "run", **options)
