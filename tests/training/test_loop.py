"""The loop: accumulation, several optimisers, averages, resume, guards."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.data import TensorSource
from pantarhei.flow import Flow
from pantarhei.networks import MLP, MLPConfig
from pantarhei.training import (
    Average,
    FlowTask,
    Optimization,
    Run,
    Task,
    Trained,
    TrainingDiverged,
    Update,
    held,
    train,
)

QUIET = {"progress": False, "tensorboard": False, "log_every": 5}


def points(n=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator) * 0.2 + torch.tensor([1.0, -0.5])
    return TensorSource({"x1": x}, "points")


def flow_task(seed=0, **options):
    torch.manual_seed(seed)
    flow = Flow(MLP(MLPConfig(width=16, layers=2)), shape=(2,))
    return FlowTask(flow, data=points(), **{"optimization": Optimization(lr=5e-3), **options})


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.flow.network.parameters()])


def test_training_lowers_the_loss_and_leaves_a_readable_run(tmp_path):
    task = flow_task(held_out=points(seed=1))
    result = train(task, tmp_path / "run", iterations=120, batch=64, checkpoint_every=40, preview_every=60, **QUIET)
    lines = Run.open(tmp_path / "run").metrics()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert result.reason == "finished"
    assert result.iteration == 120
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["00000080", "00000120"]
    assert (tmp_path / "run/samples/00000120.png").stat().st_size > 1000
    assert any("validation" in line for line in lines)
    assert isinstance(task.flow.network, MLP)  # plain again
    x = task.result().sample(500, steps=20, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(x.mean(0), torch.tensor([1.0, -0.5]), atol=0.15)


def test_a_resumed_run_is_bit_identical(tmp_path):
    whole, first, second = flow_task(), flow_task(), flow_task(seed=99)
    options = {"batch": 48, "seed": 3, **QUIET}
    train(whole, tmp_path / "whole", iterations=30, **options)
    train(first, tmp_path / "parts", iterations=17, **options)
    with (tmp_path / "parts/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 25, "loss": 1.0}\n{"iter')  # what a killed run may leave behind
    train(second, tmp_path / "parts", iterations=30, resume=True, **options)
    assert torch.equal(weights(whole), weights(second))
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.average.state_dict().values(), second.average.state_dict().values(), strict=True)
    )
    logged = [line["iteration"] for line in Run.open(tmp_path / "parts").metrics()]
    assert logged == [5, 10, 15, 17, 20, 25, 30]  # the interrupted run logged its last iteration


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    class Given(FlowTask):
        """Noise and times come with the data, so that splitting the batch changes nothing else."""

    generator = torch.Generator().manual_seed(0)
    data = {k: torch.randn(96, 2, generator=generator) for k in ("x1", "x0")} | {
        "t": torch.rand(96, generator=generator)
    }
    found = []
    for parts in (1, 3, 5):
        torch.manual_seed(0)
        flow = Flow(MLP(MLPConfig(width=16)), shape=(2,))
        task = Given(flow, data=data, optimization=Optimization(optimizer="sgd", lr=0.1, clip=None))
        train(task, tmp_path / str(parts), iterations=4, batch=30, accumulate=parts, **QUIET)
        found.append(weights(task))
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert torch.allclose(found[0], found[2], rtol=1e-5, atol=1e-6)


class Weighted(Task):
    """A loss that is a mean over a number of valid elements, different in each micro-batch."""

    def __init__(self, data):
        super().__init__()
        self.network, self.data = nn.Linear(2, 1, bias=False), data
        self.groups = {"only": Trained(("network",), Optimization(optimizer="sgd", lr=0.1, clip=None))}

    def updates(self, batch, generator):
        mask = batch["mask"]
        loss = (self.network(batch["x1"])[:, 0] * mask).square().sum() / mask.sum().clamp_min(1)
        yield Update(loss, "only", weight=mask.sum())


def test_weighted_updates_normalise_over_micro_batches(tmp_path):
    data = {"x1": torch.randn(40, 2), "mask": (torch.arange(40) % 7 < 3).float()}
    found = []
    for parts in (1, 4):
        torch.manual_seed(0)
        task = Weighted(data)
        train(task, tmp_path / str(parts), iterations=3, batch=20, accumulate=parts, **QUIET)
        found.append(task.network.weight.detach())
    assert torch.allclose(*found, rtol=1e-5)


class Adversarial(Task):
    """A GAN-like toy: two optimisers, two updates an iteration, the second of which sees the first one's step."""

    def __init__(self, data):
        super().__init__()
        self.generator_net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
        self.data = data
        settings = Optimization(lr=5e-3, betas=(0.5, 0.9))
        self.groups = {"critic": Trained(("critic",), settings), "generator": Trained(("generator_net",), settings)}
        self.seen = []

    def updates(self, batch, generator):
        noise = torch.randn(batch["x1"].shape, generator=generator)
        before = self.critic[0].weight.detach().clone() if isinstance(self.critic, nn.Sequential) else None
        fake = self.generator_net(noise)
        real_score, fake_score = self.critic(batch["x1"]), self.critic(fake.detach())
        yield Update(
            F.relu(1 - real_score).mean() + F.relu(1 + fake_score).mean(), "critic", {"margin": real_score.mean()}
        )
        del before
        with held(self.critic) as critic:
            score = critic(fake)
            assert all(not p.requires_grad for p in critic.parameters())
        yield Update(-score.mean() + 0.1 * fake.mean(0).sub(batch["x1"].mean(0)).square().sum(), "generator")


def test_two_optimisers_take_turns(tmp_path):
    torch.manual_seed(0)
    task = Adversarial(points(512))
    train(task, tmp_path / "run", iterations=300, batch=64, **QUIET)
    fake = task.generator_net(torch.randn(2000, 2)).detach()
    assert torch.allclose(fake.mean(0), torch.tensor([1.0, -0.5]), atol=0.25)
    last = Run.open(tmp_path / "run").metrics()[-1]
    assert {"critic/loss", "critic/margin", "generator/loss"} <= last.keys()
    assert all(p.requires_grad for p in task.critic.parameters())


class SelfTaught(Task):
    """A student that is pulled towards its own average's output at an input that depends on the student."""

    def __init__(self, through_input):
        super().__init__()
        self.student, self.data = nn.Linear(2, 2), points()
        self.teacher = Average(self.student, decay=0.5, warmup=False)
        self.groups = {"student": Trained(("student",), Optimization(optimizer="sgd", lr=0.05, clip=None))}
        self.averages = {"teacher": "student"}
        self.through_input, self.gradients = through_input, []

    def updates(self, batch, generator):
        inner = self.student(batch["x1"])
        outer = self.teacher(inner if self.through_input else inner.detach())
        loss = (outer - 1).square().mean()
        yield Update(loss, "student") if self.through_input else Update(loss + 0 * inner.sum(), "student")


def test_an_average_is_a_network_that_gradients_pass_through(tmp_path):
    moved = []
    for through_input in (True, False):
        torch.manual_seed(0)
        task = SelfTaught(through_input)
        start = task.student.weight.detach().clone()
        train(task, tmp_path / str(through_input), iterations=1, batch=32, **QUIET)
        moved.append(float((task.student.weight.detach() - start).abs().max()))
        expected = 0.5 * start + 0.5 * task.student.weight.detach()
        assert torch.allclose(task.teacher.network.weight, expected)
        assert not task.teacher.network.weight.requires_grad
    assert moved[0] > 1e-4
    assert moved[1] == 0


def test_average_follows_the_published_warm_up():
    network = nn.Linear(1, 1, bias=False)
    average, expected = Average(network, decay=0.97), network.weight.item()
    for n in range(1, 60):
        with torch.no_grad():
            network.weight.fill_(float(n))
        average.update(network)
        decay = min(0.97, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert average.network.weight.item() == pytest.approx(expected, rel=1e-5)


def test_nan_stops_with_the_last_good_checkpoint(tmp_path):
    class Breaks(FlowTask):
        def updates(self, batch, generator):
            for update in super().updates(batch, generator):
                yield Update(update.loss * (float("nan") if self.iteration == 13 else 1.0), update.group)

    torch.manual_seed(0)
    task = Breaks(Flow(MLP(MLPConfig(width=8)), shape=(2,)), data=points())
    with pytest.raises(TrainingDiverged, match="00000010"):
        train(task, tmp_path / "run", iterations=30, batch=16, checkpoint_every=10, **QUIET)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["00000010"]


def test_memory_that_runs_out_splits_the_batch(tmp_path, capsys):
    class Hungry(FlowTask):
        def updates(self, batch, generator):
            if len(batch["x1"]) > 10:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            yield from super().updates(batch, generator)

    task = Hungry(Flow(MLP(MLPConfig(width=8)), shape=(2,)), data=points())
    train(task, tmp_path / "run", iterations=3, batch=32, **QUIET)
    assert "4 micro-batches" in capsys.readouterr().err
    state = json.loads((tmp_path / "run/checkpoints/00000003/state.json").read_text())
    assert state["parts"] == 4


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    task = flow_task()
    threading.Thread(target=lambda: (time.sleep(0.6), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    result = train(task, tmp_path / "run", iterations=100_000, batch=32, **QUIET)
    assert result.reason == "interrupted"
    assert 0 < result.iteration < 100_000
    again = train(flow_task(), tmp_path / "run", iterations=result.iteration + 5, batch=32, resume=True, **QUIET)
    assert again.iteration == result.iteration + 5


def test_schedules():
    warm = Optimization(warmup=10, decay="cosine")
    assert [warm.factor(i, 110) for i in (0, 9, 10, 60, 110)] == pytest.approx([0.1, 1, 1, 0.5, 0])
    assert Optimization(decay="linear").factor(25, 100) == 0.75
    with pytest.raises(ValueError, match="lr"):
        Optimization(lr=0)
    with pytest.raises(ValueError, match="optimizer"):
        Optimization(optimizer="adm").build([nn.Parameter(torch.zeros(1))])


def test_runs_are_protected(tmp_path):
    train(flow_task(), tmp_path / "run", iterations=5, batch=16, **QUIET)
    for options, message in (
        ({}, "already holds a run"),
        ({"resume": True, "iterations": 4}, "already at iteration 5"),
        ({"resume": True, "iterations": 9, "batch": 8}, r"batch \(16, now 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(flow_task(), tmp_path / "run", **{"iterations": 5, "batch": 16, **QUIET, **options})
    again = flow_task()
    assert train(again, tmp_path / "run", resume=True, iterations=5, batch=16, **QUIET).reason == "finished"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        train(flow_task(), tmp_path / "other", iterations=5, **QUIET)
    for bad in ({"iterations": 0}, {"batch": -1}, {"accumulate": 0}, {"precision": "fp8"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            train(flow_task(), tmp_path / "new", **{**QUIET, **bad})
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_cut_in_half_is_named(tmp_path):
    train(flow_task(), tmp_path / "run", iterations=5, batch=16, **QUIET)
    model = tmp_path / "run/checkpoints/00000005/model.safetensors"
    model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        train(flow_task(), tmp_path / "run", iterations=9, batch=16, resume=True, **QUIET)


def test_bf16_channels_last_and_compile_train(tmp_path):
    from pantarhei.networks import UNet, UNetConfig

    torch.manual_seed(0)
    flow = Flow(UNet(UNetConfig(channels=1, width=8, blocks=1)), shape=(1, 8, 8))
    task = FlowTask(flow, data=torch.randn(32, 1, 8, 8), average=0.0)
    train(task, tmp_path / "run", iterations=2, batch=8, precision="bf16", channels_last=True, **QUIET)
    assert next(flow.network.parameters()).dtype == torch.float32
