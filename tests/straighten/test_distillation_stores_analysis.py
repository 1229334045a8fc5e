"""Distillation to k steps, pairs from other places, refusals of wrong pairs, balance and marginals."""

import math

import numpy as np
import pytest
import torch

import pantarhei as pr
from pantarhei.data.shards import ShardStore
from pantarhei.flow import EmpiricalField, Flow, GaussianMixture, GradientPyramid, MixtureField
from pantarhei.flow.numbered import join, numbered_samples
from pantarhei.networks import MLP, MLPConfig, UNet, UNetConfig
from pantarhei.straighten import (
    ArrayPairs,
    OnlinePairs,
    Solver,
    balance,
    check_marginals,
    check_pairs,
    distil,
    distillation_task,
    make_pairs,
    open_pairs,
    reflow,
    reflow_task,
    write_array_pairs,
)

QUIET = {"progress": False, "tensorboard": False}


def modes():
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    return GaussianMixture(torch.ones(2), means, torch.full((2,), 0.05))


def exact():
    return Flow(MixtureField(modes()), shape=(2,))


def learner(seed=0, **options):
    torch.manual_seed(seed)
    return Flow(
        MLP(MLPConfig(width=32, **options)), shape=(2,), null={"label": options["classes"]} if options else None
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_distilled_steps_beat_the_teachers(steps, tmp_path):
    flow = exact()
    pairs = make_pairs(flow, 4000, tmp_path / "pairs", solver=Solver("heun", 40))
    torch.manual_seed(0)
    options = {"optimization": pr.Optimization(lr=3e-3, decay="cosine"), "average": 0.99}
    task = distillation_task(flow, pairs, steps=steps, start=MLP(MLPConfig(width=64)), **options)
    pr.train(task, tmp_path / "run", iterations=500, batch=256, **QUIET)
    held = make_pairs(flow, 1000, tmp_path / "held", seed=1, solver=Solver("heun", 40)).tensors()

    def error(flow):
        return float((flow.sample(x0=held["x0"], steps=steps) - held["x1"]).square().mean())

    assert error(task.result()) < 0.35 * error(flow)


def test_a_distilled_flow_says_what_it_is(tmp_path):
    flow = learner()
    pairs = make_pairs(flow, 64, tmp_path / "pairs", solver=Solver("euler", 2))
    result = distil(flow, pairs=pairs.folder, to=tmp_path / "run", steps=2, eps=1e-3, iterations=2, batch=32, **QUIET)
    assert result.provenance.notes["steps"] == 2
    made = distil(flow, pairs=64, to=tmp_path / "made", solver=Solver("euler", 2), iterations=2, batch=32, **QUIET)
    assert made.provenance.notes["pairs"] == 64
    assert result.interval == (1e-3, 1.0)
    with pytest.raises(ValueError, match="distilled"):
        result.score(torch.zeros(1, 2), torch.tensor(0.5))
    with pytest.raises(ValueError, match="linear path"):
        distillation_task(Flow(flow.network, path="vp", shape=(2,)), pairs)


def test_times_of_distillation_and_its_perceptual_term(tmp_path):
    torch.manual_seed(0)
    flow = Flow(UNet(UNetConfig(channels=1, width=8, multipliers=(1,))), shape=(1, 8, 8))
    pairs = make_pairs(flow, 32, tmp_path / "pairs", solver=Solver("euler", 2))
    task = distillation_task(flow, pairs, steps=4, eps=1e-3)
    draw = task.objective.draw(task.flow, pairs.tensors(), torch.Generator().manual_seed(0))
    expected = 1e-3 + (1 - 1e-3) * torch.arange(4) / 4
    assert all(bool((expected - t).abs().min() < 1e-6) for t in draw.t)
    task = distillation_task(flow, pairs, metric=GradientPyramid(), squared_too=True)
    _, log = task.objective(task.flow, pairs.tensors(), torch.Generator().manual_seed(0))
    assert set(log) == {"loss", "metric", "squared"}
    # At t = 0 the data prediction is x0 + v(x0, 0): the output of the one step itself.
    x0, x1 = pairs.tensors()["x0"], pairs.tensors()["x1"]
    assert log["metric"] == pytest.approx(
        float(GradientPyramid()(task.flow.sample(x0=x0, steps=1), x1).mean()), rel=1e-4
    )
    assert "surrogate" in task.flow.provenance.notes["distillation_metric"]


def test_the_reverse_way_is_distilled_to_an_encoder(tmp_path):
    flow = exact()
    pairs = make_pairs(flow, 2000, tmp_path / "pairs", solver=Solver("heun", 40))
    torch.manual_seed(0)
    options = {"optimization": pr.Optimization(lr=3e-3), "average": 0}
    task = distillation_task(flow, pairs, reverse=True, start=MLP(MLPConfig(width=64)), **options)
    pr.train(task, tmp_path / "run", iterations=300, batch=256, **QUIET)
    held = pairs.tensors()

    def error(flow):
        return float((flow.invert(held["x1"], steps=1) - held["x0"]).square().mean())

    assert error(task.flow) < 0.5 * error(flow)


def test_arrays_of_the_reference_code(tmp_path):
    flow = exact()
    store = make_pairs(flow, 100, tmp_path / "store", solver=Solver("heun", 10), shard_size=32)
    write_array_pairs(store, tmp_path / "arrays" / "0")
    write_array_pairs(store, tmp_path / "arrays" / "1")
    pairs = open_pairs(tmp_path / "arrays")
    assert isinstance(pairs, ArrayPairs)
    assert len(pairs) == 200
    rows = torch.tensor([3, 150, 99, 100])
    assert torch.equal(pairs.fetch(rows)["x1"], store.tensors()["x1"][rows % 100])
    check_pairs(pairs, flow)
    np.save(tmp_path / "arrays" / "1" / "z1.npy", np.zeros((7, 2), np.float32))
    with pytest.raises(ValueError, match=r"z1 \(7, 2\)"):
        open_pairs(tmp_path / "arrays")
    path = tmp_path / "arrays" / "1" / "z0.npy"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="truncated"):
        open_pairs(tmp_path / "arrays")
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        open_pairs(tmp_path)


def test_online_pairs_are_the_stored_ones(tmp_path):
    flow = learner(classes=3)
    online = OnlinePairs(flow, 1000, seed=4, solver=Solver("euler", 3))
    stored = make_pairs(flow, 40, tmp_path, seed=4, solver=Solver("euler", 3)).tensors()
    made = online.fetch(torch.arange(40))
    assert all(torch.equal(made[k], stored[k]) for k in stored)
    task = reflow_task(flow, online)
    pr.train(task, tmp_path / "run", iterations=2, batch=16, **QUIET)
    assert task.flow.provenance.rectified == 1


def test_several_rounds(tmp_path):
    result = reflow(
        learner(), pairs=64, to=tmp_path, rounds=2, iterations=2, solver=Solver("euler", 2), batch=16, **QUIET
    )
    assert result.provenance.rectified == 2
    assert pr.load(tmp_path / "round-2").provenance.teacher == str(tmp_path / "round-1")
    with pytest.raises(ValueError, match="rounds"):
        reflow(learner(), pairs=64, to=tmp_path, rounds=0)


def test_wrong_pairs_are_refused(tmp_path):
    flow = learner()
    store = make_pairs(flow, 600, tmp_path / "good", solver=Solver("euler", 4))
    check_pairs(store, flow)
    with pytest.raises(ValueError, match="other weights"):
        reflow_task(learner(seed=1), store)
    reflow_task(learner(seed=1), store, any_teacher=True)
    with pytest.raises(ValueError, match=r"shape \(2,\), this flow's are \(3,\)"):
        check_pairs(store, Flow(MLP(MLPConfig(dimension=3)), shape=(3,)))
    with pytest.raises(ValueError, match="this flow on label"):
        check_pairs(store, learner(classes=4))
    swapped = ShardStore.create(tmp_path / "swapped", 600, {**store.header, "name": "s"}, shard_size=1024)
    swapped.write(0, {"x0": store.tensors()["x1"] * 0.2, "x1": store.tensors()["x0"]})
    with pytest.raises(ValueError, match="swapped"):
        distillation_task(flow, swapped)
    other = ShardStore.create(tmp_path / "features", 4, {"kind": "features"})
    with pytest.raises(ValueError, match="holds features"):
        check_pairs(other, flow)
    store.path(0).unlink()
    with pytest.raises(ValueError, match="not finished"):
        check_pairs(store, flow)


def test_balance_holds_for_the_exact_field():
    generator = torch.Generator().manual_seed(0)
    n = 4000
    found = balance(exact(), torch.randn(n, 2, generator=generator), modes().sample(n, generator))
    assert abs(found.remainder) < 0.02
    assert found.straightness > 0.05
    assert found.crossing > found.straightness
    assert all(found.costs_rectified[name] < found.costs_given[name] for name in found.costs_given)
    with pytest.raises(ValueError, match="pairs are needed"):
        balance(exact(), torch.zeros(3, 2), torch.zeros(4, 2))


def test_marginals_stay_for_the_exact_field_and_not_for_a_wrong_one():
    generator = torch.Generator().manual_seed(0)
    x0, fresh = torch.randn(2, 400, 2, generator=generator)
    x1 = modes().sample(400, generator)
    right = check_marginals(exact(), x0, x1, fresh, permutations=49, generator=generator)
    assert [c.time for c in right] == [0.25, 0.5, 0.75, 1.0]
    assert min(c.p_value for c in right) > 0.01
    still = Flow(EmpiricalField(torch.zeros(1, 2)), predicts="data", shape=(2,))
    wrong = check_marginals(still, x0, x1, fresh, times=(0.75,), permutations=49, generator=generator)
    assert wrong[0].p_value <= 0.02
    assert math.isfinite(wrong[0].distance)


def test_a_student_is_not_judged_on_the_noise_it_learned(tmp_path):
    flow = exact()
    pairs = make_pairs(flow, 50, tmp_path, seed=0, solver=Solver("euler", 2)).tensors()
    samples = join(numbered_samples(flow, range(50), seed=0, steps=2))
    assert torch.cdist(pairs["x0"], samples["x0"]).min() > 1e-4


def test_rounds_draw_anew_and_go_on(tmp_path):
    options = {"pairs": 64, "to": tmp_path, "iterations": 2, "solver": Solver("euler", 2), "batch": 16, **QUIET}
    first = reflow(learner(), rounds=2, **options)
    a, b = (ShardStore(tmp_path / f"round-{i}/pairs").tensors()["x0"] for i in (1, 2))
    assert torch.cdist(a, b).min() > 1e-4
    # As after a kill between the rounds: finished ones are kept, and the next one follows.
    again = reflow(learner(), rounds=3, resume=True, **options)
    assert again.provenance.rectified == 3
    kept = pr.load(tmp_path / "round-2").network.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in first.network.state_dict().items())


def test_a_distilled_flow_is_no_velocity_field(tmp_path):
    flow = learner()
    pairs = make_pairs(flow, 64, tmp_path / "pairs", solver=Solver("euler", 2))
    student = distillation_task(flow, pairs, steps=2).result()
    for use in (
        lambda: student.log_prob(torch.zeros(2, 2)),
        lambda: balance(student, torch.zeros(2, 2), torch.zeros(2, 2)),
        lambda: reflow_task(student, pairs),
        lambda: distillation_task(student, pairs),
    ):
        with pytest.raises(ValueError, match="distilled to 2 steps"):
            use()


def test_swapped_arrays_are_found_by_the_teacher(tmp_path):
    # Standardised data look like noise: only the flow itself can tell.
    target = GaussianMixture(torch.ones(2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.full((2,), 0.01))
    flow = Flow(MixtureField(target), shape=(2,))
    right = make_pairs(flow, 600, tmp_path / "store", solver=Solver("heun", 20))
    write_array_pairs(right, tmp_path / "right")
    check_pairs(open_pairs(tmp_path / "right"), flow)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "right/z0.npy").rename(tmp_path / "wrong/z1.npy")
    (tmp_path / "right/z1.npy").rename(tmp_path / "wrong/z0.npy")
    with pytest.raises(ValueError, match="swapped"):
        check_pairs(open_pairs(tmp_path / "wrong"), flow)
    with pytest.raises(ValueError, match="not made by this flow"):
        check_pairs(ArrayPairs(write_array_pairs(right, tmp_path / "again")), exact())
    with pytest.raises(ValueError, match="data of another set"):
        check_pairs(ArrayPairs(tmp_path / "again", gaussian=False), flow)


def test_some_pairs_are_held_out_and_solved_adaptively(tmp_path):
    flow = learner()
    pairs = make_pairs(flow, 400, tmp_path / "pairs", solver=Solver("dopri5", rtol=1e-4))
    assert (pairs.header["steps"], pairs.header["rtol"]) == (None, 1e-4)
    task = reflow_task(flow, pairs)
    assert (len(task.data), len(task.held_out)) == (380, 20)
    assert math.isfinite(task.validate())


def test_a_gradient_pyramid_wants_images():
    with pytest.raises(ValueError, match="compares images"):
        GradientPyramid()(torch.zeros(3, 2), torch.zeros(3, 2))
