"""What one of two processes does in test_machines.py: `python two_processes.py FOLDER`, with LOCAL_RANK set.

The tasks bring their noise and times with the data, so that one process and two train on exactly the same numbers.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from pantarhei.data import TensorSource
from pantarhei.flow import Flow
from pantarhei.networks import MLP, MLPConfig, UNet, UNetConfig
from pantarhei.training import FlowTask, Optimization, Task, Trained, Update, held, train

QUIET = {"progress": False, "tensorboard": False, "log_every": 1, "accelerator": "cpu"}
PLAIN = Optimization(optimizer="sgd", lr=0.5, clip=None)


def given(count, *shape):
    """Data with noise and times."""
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(count, *shape, generator=generator) for name in ("x0", "x1")}
    return TensorSource({**draws, "t": torch.rand(count, generator=generator)}, "given")


def points(dtype=torch.float32):
    torch.manual_seed(0)
    data = {name: value.to(dtype) for name, value in given(96, 2).tensors.items()}
    return FlowTask(Flow(MLP(MLPConfig(width=16)).to(dtype), shape=(2,)), data=data, optimization=PLAIN)


def exact_points():
    """In float64, where the difference of two weights has the digits of the gradient."""
    return points(torch.float64)


def images():
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels=1, width=8, blocks=1))
    flow = Flow(network, shape=(1, 8, 8))
    data, held_out = given(64, 1, 8, 8), given(16, 1, 8, 8)
    return FlowTask(flow, data=data, held_out=held_out, optimization=Optimization(lr=1e-3), average=0.9)


class Weighted(Task):
    """A mean over a number of valid elements that differs from process to process."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(2, 1)
        self.data = {**given(96, 2).tensors, "mask": (torch.arange(96) % 7 < 3).float()}
        self.groups = {"only": Trained(("network",), PLAIN)}

    def updates(self, batch, generator):
        mask = batch["mask"]
        loss = (self.network(batch["x1"])[:, 0] * mask).square().sum() / mask.sum().clamp_min(1)
        yield Update(loss, "only", weight=mask.sum())


class Rivals(Task):
    """Two networks, two optimisers, two updates an iteration: a generator against a critic."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 2))
        self.critic = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Linear(16, 1))
        self.data = given(96, 2)
        settings = Optimization(lr=5e-3, betas=(0.5, 0.9))
        self.groups = {"critic": Trained(("critic",), settings), "maker": Trained(("maker",), settings)}

    def updates(self, batch, generator):
        fake = self.maker(batch["x0"])
        real_score, fake_score = self.critic(batch["x1"]), self.critic(fake.detach())
        yield Update((1 - real_score).relu().mean() + (1 + fake_score).relu().mean(), "critic")
        with held(self.critic) as critic:
            score = critic(fake)
        yield Update(-score.mean(), "maker")


def parameters(network):
    """All parameters, gathered where they are sharded."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in network.state_dict().items()
    }


def whole(task):
    """Every trained network and average of a task."""
    return {path: parameters(task.get_submodule(path)) for path in [*trained(task), *task.averages]}


def trained(task):
    return [path for group in task.groups.values() for path in group.paths]


CASES = {
    "gradient": (exact_points, {"iterations": 1}),
    "accumulated": (points, {"iterations": 3, "accumulate": 2}),
    "weighted": (Weighted, {"iterations": 3, "accumulate": 2}),
    "rivals": (Rivals, {"iterations": 5}),
}


def one_case(name, folder, **machines):
    """Train a case; returns its weights."""
    make, options = CASES[name]
    task = make()
    train(task, folder, batch=32, **QUIET, **options, **machines)
    return whole(task)


def image_run(folder, iterations, **options):
    """Train the small U-Net, with validation and pictures on the way."""
    task = images()
    train(task, folder, iterations=iterations, batch=16, checkpoint_every=2, preview_every=3, **QUIET, **options)
    return whole(task)


def main(folder):
    """All cases under DDP; the image run under DDP and FSDP2, the latter also in two parts."""
    found = {name: one_case(name, folder / name, devices=2) for name in CASES}
    found["ddp"] = image_run(folder / "ddp", 5, devices=2, strategy="ddp")
    found["fsdp"] = image_run(folder / "fsdp", 5, devices=2, strategy="fsdp")
    image_run(folder / "fsdp-parts", 2, devices=2, strategy="fsdp")
    found["fsdp-parts"] = image_run(folder / "fsdp-parts", 5, devices=2, strategy="fsdp", resume=True)
    torch.save(found, folder / f"found.{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
