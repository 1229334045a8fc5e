"""Pairs, their diagnostics, reflow and straightness."""

import math

import pytest
import torch
from torch import nn

import pantarhei as pr
from pantarhei.data.shards import ShardStore
from pantarhei.flow import Flow, GaussianMixture, MixtureField
from pantarhei.flow.numbered import numbered_samples
from pantarhei.networks import MLP, MLPConfig
from pantarhei.straighten import Solver, inspect_pairs, make_pairs, reflow_task, straightness

QUIET = {"progress": False, "tensorboard": False}


def ring():
    angles = torch.arange(8) * math.pi / 4
    means = torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(torch.ones(8), means, torch.full((8,), 0.02))


def teacher():
    return Flow(MixtureField(ring()), shape=(2,))


def shards(folder):
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_pairs_depend_on_seed_and_number_only(tmp_path):
    options = {"solver": Solver("heun", 6), "shard_size": 16}
    make_pairs(teacher(), 50, tmp_path / "a", batch=50, **options)
    whole = shards(tmp_path / "a")
    assert len(whole) == 4
    for rank in (1, 0):
        make_pairs(teacher(), 50, tmp_path / "b", batch=16, rank=rank, world=2, **options)
    store = ShardStore(tmp_path / "b")
    assert torch.allclose(store.tensors()["x1"], ShardStore(tmp_path / "a").tensors()["x1"], atol=1e-5)
    assert torch.equal(store.tensors()["x0"], ShardStore(tmp_path / "a").tensors()["x0"])
    # A killed job: a finished shard is kept as it is, the missing one comes out the same.
    store.path(1).unlink()
    stamp = store.path(0).stat().st_mtime_ns
    make_pairs(teacher(), 50, tmp_path / "b", batch=16, **options)
    assert store.path(0).stat().st_mtime_ns == stamp
    assert not ShardStore(tmp_path / "b").missing()
    with pytest.raises(ValueError, match="another seed"):
        make_pairs(teacher(), 50, tmp_path / "b", seed=1, **options)


def test_the_header_says_how_pairs_were_made_and_labels_are_drawn_evenly(tmp_path):
    flow = Flow(MLP(MLPConfig(width=8, classes=4)), shape=(2,), null={"label": 4})
    store = make_pairs(flow, 400, tmp_path, solver=Solver("euler", 2, guidance=1.5), teacher="runs/a")
    header = store.header
    assert (header["method"], header["steps"], header["guidance"], header["teacher"]) == ("euler", 2, 1.5, "runs/a")
    assert header["conditions"] == ["label"]
    assert len(header["teacher_weights"]) == 16
    counts = store.tensors()["label"].bincount()
    assert len(counts) == 4
    assert counts.min() > 60


def test_inspection_finds_swapped_ends_and_coarse_solvers(tmp_path):
    flow = teacher()
    store = make_pairs(flow, 600, tmp_path / "good", solver=Solver("heun", 40))
    good = inspect_pairs(store, flow)
    assert not good.swapped
    assert not good.warnings
    assert good.solver_error < 0.02
    coarse = inspect_pairs(make_pairs(flow, 600, tmp_path / "coarse", solver=Solver("euler", 3)), flow)
    assert coarse.solver_error > 0.05
    assert "more steps" in coarse.warnings[0]
    swapped = ShardStore.create(tmp_path / "swapped", 600, {**store.header, "name": "s"}, shard_size=1024)
    pairs = store.tensors()
    swapped.write(0, {"x0": pairs["x1"], "x1": pairs["x0"]})
    assert inspect_pairs(swapped).swapped


def test_balance_of_costs_straightness_and_crossings():
    # E|X1 - X0|^2 = E|Z1 - Z0|^2 + S + V for the exact field of an independent coupling (Liu et al. 2209.03003).
    n, generator = 10_000, torch.Generator().manual_seed(0)
    flow = teacher()
    x0, x1 = torch.randn(n, 2, generator=generator), ring().sample(n, generator)
    independent = float((x1 - x0).square().sum(1).mean())
    measured = straightness(flow, x0, steps=64)
    crossings = 0.0
    for i in range(50):  # V = int E|X1 - X0 - v(X_t, t)|^2 dt, midpoint rule
        t = torch.tensor((i + 0.5) / 50)
        x_t, target = flow.path.sample(x0, x1, None, t)
        crossings += float((target - flow.velocity(x_t, t)).square().sum(1).mean()) / 50
    total = measured.costs["|d|^2"] + measured.value + crossings
    assert total == pytest.approx(independent, rel=0.015)
    # One rectification raises no convex cost.
    difference = (x1 - x0).double()
    for name, cost in pr.straighten.COSTS.items():
        assert measured.costs[name] < float(cost(difference).mean())


def test_a_straight_flow_measures_zero():
    class Shift(nn.Module):
        def forward(self, x, t):
            return torch.ones_like(x)

    flow = Flow(Shift(), shape=(2,))
    found = straightness(flow, torch.randn(10, 2))
    assert found.value == pytest.approx(0, abs=1e-9)
    assert found.costs["|d|"] == pytest.approx(math.sqrt(2))
    with pytest.raises(ValueError, match="at least 50"):
        straightness(flow, torch.randn(10, 2), steps=10)
    with pytest.raises(ValueError, match="linear"):
        straightness(Flow(Shift(), path="vp"), torch.randn(10, 2))


def test_reflow_straightens_and_one_step_becomes_good(tmp_path):
    pairs = make_pairs(teacher(), 6000, tmp_path / "pairs", solver=Solver("heun", 30))
    torch.manual_seed(0)
    # The student of an exact field is a fresh network; its flow is otherwise the teacher's.
    start = MLP(MLPConfig(width=64, layers=3))
    task = reflow_task(
        teacher(), pairs, start=start, optimization=pr.Optimization(lr=3e-3, decay="cosine"), average=0.99
    )
    pr.train(task, tmp_path / "run", iterations=700, batch=256, **QUIET)
    fast = task.result()
    assert fast.provenance.rectified == 1
    x0 = torch.randn(3000, 2, generator=torch.Generator().manual_seed(5))
    truth = ring().sample(3000, torch.Generator().manual_seed(6))

    def distance(flow):
        return pr.metrics.sliced_wasserstein(
            flow.sample(x0=x0, steps=1), truth, generator=torch.Generator().manual_seed(0)
        )

    assert distance(fast) < 0.35 * distance(teacher())
    assert straightness(fast, x0).normalised < 0.1 * straightness(teacher(), x0).normalised


def test_reflow_from_python_end_to_end(tmp_path):
    torch.manual_seed(0)
    flow = Flow(MLP(MLPConfig(width=16, classes=3)), shape=(2,), null={"label": 3})
    fast = pr.straighten.reflow(
        flow, pairs=64, to=tmp_path / "fast", iterations=6, batch=16, solver=Solver("euler", 4), **QUIET
    )
    assert fast.provenance.rectified == 1
    assert fast.provenance.notes["pairs"] == 64
    again = pr.load(tmp_path / "fast")
    label = torch.tensor([0, 1])
    x0 = torch.randn(2, 2)
    assert torch.equal(again.sample(x0=x0, steps=1, condition=label), fast.sample(x0=x0, steps=1, condition=label))
    unfinished = ShardStore.create(tmp_path / "unfinished", 9, {"kind": "pairs", "flow": flow.spec()}, shard_size=3)
    with pytest.raises(ValueError, match="3 of its shards are missing"):
        reflow_task(flow, unfinished)


def test_samples_come_in_numbered_batches():
    flow = teacher()
    whole = next(numbered_samples(flow, range(6), seed=1, batch=6, steps=4))
    parts = list(numbered_samples(flow, range(6), seed=1, batch=4, steps=4))
    assert torch.allclose(torch.cat([p["x1"] for p in parts]), whole["x1"], atol=1e-6)
    with pytest.raises(ValueError, match="conditions="):
        next(numbered_samples(Flow(flow.network, shape=(2,), conditions=("vector",)), range(2), seed=0))
