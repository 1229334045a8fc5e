"""Rectified flow++, rectified diffusion and its phases: exact starts, losses, times, low rank, mixed pairs, refusals."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pantarhei as pr
from pantarhei import networks
from pantarhei.data.shards import ShardStore
from pantarhei.data.sources import TensorSource
from pantarhei.flow import Condition, Flow, PseudoHuber, on_path, squared
from pantarhei.flow.paths import EDM, Numbered, build_path
from pantarhei.flow.times import Uniform
from pantarhei.networks.lora import add_lora, merge_lora, size_of
from pantarhei.straighten import (
    LowRank,
    MixedPairs,
    PhasedObjective,
    Phases,
    PlainNoiseLoss,
    Solver,
    huber_transition,
    invert_data,
    make_pairs,
    phased_task,
    plus_plus_task,
    rectified_diffusion_task,
    reflow_task,
)
from pantarhei.straighten.phased import draw_within
from pantarhei.straighten.rectified_diffusion import StateAnchor, own_times
from pantarhei.straighten.students import linear_student
from straighten.exact_flows import FirstOrder, arrival, first_order_flow, goal, noise, small_mlp

QUIET = {"progress": False, "tensorboard": False}
FAST = Solver("ddim", 4)
SD = Numbered("scaled-linear")
WAYS = ("ddim", "edm")


def random_flow(path, predicts, dtype=torch.float64, **options):
    return Flow(small_mlp(dtype=dtype), path=path, predicts=predicts, shape=(2,), **options)


def pairs_of(flow, folder, count=48):
    return make_pairs(flow, count, folder, solver=FAST)


def rows_of(task, batch, t):
    """The loss of each row at given times, and what it is made of."""
    batch = {**batch, "t": t}
    draw = task.objective.draw(task.flow, batch, torch.Generator().manual_seed(0))
    return draw, dict(task.objective.rows(task.flow, batch, torch.Generator().manual_seed(0)))


# The start


@pytest.mark.parametrize(
    ("path", "predicts"),
    [("edm", "edm"), ("vp", "noise"), (SD, "noise"), (SD, "v"), ("cosine", "velocity"), ("sub-vp", "data")],
)
def test_before_training_the_student_is_the_teacher(tmp_path, path, predicts):
    # DDIM's steps commute with a change of path, so few and large ones agree to rounding.
    flow = random_flow(path, predicts)
    student = plus_plus_task(flow, pairs_of(flow, tmp_path), any_teacher=True).flow
    assert student.path.spec()["name"] == "linear"
    assert student.provenance.rectified == 1
    low, high = flow.interval
    times = torch.linspace(low, high, 9, dtype=torch.float64)
    alpha, sigma = flow.path.alpha(times), flow.path.sigma(times)
    moved = (alpha / (alpha + sigma)).clamp(*student.interval).tolist()
    x0 = noise(16)
    here = flow.transport(sigma[0] * x0, times.tolist(), steps=tuple(times.tolist()), method="ddim").xs
    # Where no data are left both start from pure noise; an EDM teacher's first state has one part in 81 of no data at all.
    start = sigma[0] * x0 / (alpha[0] + sigma[0])
    there = student.transport(start, moved, steps=tuple(moved), method="euler").xs
    for at, (x, y) in enumerate(zip(here, there, strict=True)):
        assert torch.allclose(x / (alpha + sigma)[at], y, rtol=1e-6, atol=1e-6 * float(y.detach().abs().max()))


def test_an_edm_student_starts_at_pure_noise_without_extrapolating(tmp_path):
    flow = random_flow("edm", "edm")
    student = plus_plus_task(flow, pairs_of(flow, tmp_path), any_teacher=True).flow
    assert student.interval == (0.0, 1.0)
    t = torch.tensor([0.0, 1e-4, 1 / 81, 0.02, 0.5, 1.0], dtype=torch.float64)
    labels = student.prediction.inputs(student.path, noise(6), t)[1]
    noisiest = math.log(80) / 4
    assert torch.allclose(labels[:3], torch.full((3,), noisiest, dtype=torch.float64), atol=1e-9)
    assert float(labels[3]) == pytest.approx(math.log(49) / 4)
    assert labels.isfinite().all()
    # The same ODE: from pure noise instead of sigma = 80 its samples move by about one part in 80 of nothing.
    x0 = noise(64, seed=1)
    fine = flow.sample(x0=x0, steps=100, method="edm", final="clean")
    assert float((student.sample(x0=x0, steps=200, method="heun", grid="cosine") - fine).abs().max()) < 5e-3
    # And its velocity is regular at both ends.
    for end in (0.0, 1.0):
        assert student.velocity(x0, torch.tensor(end, dtype=torch.float64)).isfinite().all()


# Rectified flow++: the loss


class Constant(nn.Module):
    """The same output everywhere; the parameter is that it can be trained."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, t):
        return self.value.expand_as(x)


def test_the_loss_of_the_paper(tmp_path):
    flow = Flow(Constant(0.25), shape=(2,))
    pairs = pairs_of(flow, tmp_path)
    batch = {name: value[:5] for name, value in pairs.tensors().items()}
    t = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0])
    wrong = {**batch, "x1": batch["x1"] + torch.linspace(0.1, 2.0, 5)[:, None]}
    huber = PseudoHuber(0.1)

    def expected(x0, x1):
        v, target = torch.full_like(x1, 0.25), x1 - x0
        x_t = torch.lerp(x0, x1, t[:, None])
        c = 0.1 * 2
        h = (((v - target).square().sum(1) + c**2).sqrt() - c) / 2
        data = (x_t + (1 - t[:, None]) * v - x1).square().mean(1)
        return h, data

    h, data = expected(wrong["x0"], wrong["x1"])
    f = plus_plus_task(flow, pairs, metric=huber, perceptual=squared)
    _, rows = rows_of(f, wrong, t)
    assert torch.allclose(rows["velocity"], t * h, atol=1e-6)
    assert torch.allclose(rows["perceptual"], data / (1 - t).clamp_min(1e-5), atol=1e-6)
    e = plus_plus_task(flow, pairs, metric=huber, perceptual=squared, divided=False)
    assert torch.allclose(rows_of(e, wrong, t)[1]["perceptual"], data, atol=1e-6)
    alone = plus_plus_task(flow, pairs, metric=huber)
    assert torch.allclose(rows_of(alone, wrong, t)[1]["velocity"], h, atol=1e-6)
    assert alone.objective.times.spec() == {"name": "u-shaped", "a": 4.0}
    notes = f.flow.provenance.notes
    assert notes["velocity_metric"] == "pseudo-Huber, c = 0.1 D"
    assert notes["perceptual_metric"] == "squared"
    # The teacher's own pairs leave no error: this flow is straight.
    assert float(rows_of(f, batch, t)[1]["velocity"].max()) < 1e-6


def test_where_the_huber_loss_turns(tmp_path):
    flow = Flow(Constant(0.0), shape=(2,))
    pairs = pairs_of(flow, tmp_path)  # x1 = x0: the velocity is 0
    student = Flow(Constant(0.3), shape=(2,))
    assert huber_transition(student, pairs, PseudoHuber(0.1)) == pytest.approx(0.3 * math.sqrt(2) / (2 * 0.1), rel=1e-4)
    assert huber_transition(student, pairs, PseudoHuber(0.1, elementwise=True)) == pytest.approx(3.0, rel=1e-4)


# Rectified diffusion: losses, anchors, schedules, times


def test_each_loss_compares_what_it_says(tmp_path):
    flow = random_flow(SD, "noise")
    pairs = pairs_of(flow, tmp_path)
    batch = {name: value[:6].double() for name, value in pairs.tensors().items()}
    t = SD.time_of(torch.tensor([999, 700, 400, 200, 50, 0], dtype=torch.float64))
    alpha, sigma = SD.alpha(t)[:, None], SD.sigma(t)[:, None]
    x_t = alpha * batch["x1"] + sigma * batch["x0"]
    eps = flow.network(x_t, t)
    data = (x_t - sigma * eps) / alpha
    expected = {
        "data-huber": (((data - batch["x1"]).square() + 1e-6).sqrt() - 1e-3).mean(1),
        "noise-mse": (eps - batch["x0"]).square().mean(1),
        "native": (eps - batch["x0"]).square().mean(1),
    }
    speed = SD.at(t, x_t)
    off = speed.alpha_dot * (data - batch["x1"]) + speed.sigma_dot * (eps - batch["x0"])
    expected["velocity"] = off.square().mean(1)
    for name, rows in expected.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name == "noise-mse" else "error", PlainNoiseLoss)
            task = rectified_diffusion_task(flow, pairs, loss=name, any_teacher=True)
        _, found = rows_of(task, batch, t)
        assert torch.allclose(next(iter(found.values())), rows, rtol=1e-6), name
        assert task.flow.provenance.notes["loss"] == name
        assert task.flow.path == flow.path
        assert task.flow.prediction == flow.prediction
    with pytest.warns(PlainNoiseLoss, match="data-huber"):
        rectified_diffusion_task(flow, pairs, loss="noise-mse", any_teacher=True)


def test_the_anchor_is_the_noise_or_the_state(tmp_path):
    flow = random_flow(SD, "noise")
    pairs = pairs_of(flow, tmp_path)
    batch = {name: value[:4].double() for name, value in pairs.tensors().items()}
    first = torch.zeros(4, dtype=torch.float64)
    alpha, sigma = float(SD.alpha(first[0])), float(SD.sigma(first[0]))
    by_noise, _ = rows_of(rectified_diffusion_task(flow, pairs, any_teacher=True), batch, first)
    assert torch.allclose(by_noise.x_t, alpha * batch["x1"] + sigma * batch["x0"])
    task = rectified_diffusion_task(flow, pairs, anchor="state", any_teacher=True)
    assert isinstance(task.objective.coupling, StateAnchor)
    by_state, _ = rows_of(task, batch, first)
    # It starts where the sampler does, and arrives at x1 all the same.
    assert torch.allclose(by_state.x_t, sigma * batch["x0"], atol=1e-12)
    last, _ = rows_of(task, batch, first + 1)
    a, s = float(SD.alpha(first[0] + 1)), float(SD.sigma(first[0] + 1))
    assert torch.allclose(last.x_t, a * batch["x1"] + s * (batch["x0"] - alpha / sigma * batch["x1"]))
    # Where no data are left at the start the two are one.
    linear = random_flow("linear", "velocity")
    own = rectified_diffusion_task(linear, pairs_of(linear, tmp_path / "l"), anchor="state")
    assert own.objective.coupling.ratio == 0


def test_another_schedule_keeps_the_pairs(tmp_path):
    flow = random_flow(SD, "noise")
    pairs = pairs_of(flow, tmp_path)
    task = rectified_diffusion_task(flow, pairs, schedule="linear", any_teacher=True)
    assert task.flow.path == Numbered("linear")
    batch = {name: value[:4].double() for name, value in pairs.tensors().items()}
    draw, _ = rows_of(task, batch, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(draw.x0, batch["x0"])
    # The published numbers: alpha of number 999 is 0.0397 for linear betas, 0.0683 for Stable Diffusion's own.
    assert float(task.flow.path.alpha(torch.tensor(0.0))) == pytest.approx(0.0397, abs=1e-4)
    assert float(flow.path.alpha(torch.tensor(0.0))) == pytest.approx(0.0683, abs=1e-4)
    vp = random_flow("vp", "noise")
    others = pairs_of(vp, tmp_path / "vp")
    with pytest.raises(ValueError, match="only a numbered path"):
        rectified_diffusion_task(vp, others, schedule="linear", any_teacher=True)


def test_numbered_students_are_trained_at_whole_numbers(tmp_path):
    flow = random_flow(Numbered("linear", 0.01, 0.3, count=20), "noise", dtype=torch.float32)
    task = rectified_diffusion_task(flow, pairs_of(flow, tmp_path), any_teacher=True)
    batch = {name: value.repeat(40, 1) for name, value in task.data.fetch(torch.arange(48)).items()}
    numbers = flow.path.number_of(task.objective.draw(flow, batch, torch.Generator().manual_seed(0)).t)
    assert float((numbers - numbers.round()).abs().max()) < 1e-4
    counts = numbers.round().long().bincount(minlength=20)
    assert len(counts) == 20
    assert counts.min() > 0.5 * len(numbers) / 20
    assert counts.max() < 1.5 * len(numbers) / 20
    assert own_times(random_flow("vp", "noise")) == Uniform()


# They learn


def error(flow, teacher, steps=1):
    x0 = noise(500, seed=9).to(flow.dtype)
    found = flow.sample(x0=x0, steps=steps, method="ddim", final="clean")
    return float((found - arrival(teacher, x0)).square().mean())


@pytest.mark.parametrize("method", ["plus-plus", "diffusion", "phased"])
def test_a_fresh_student_of_an_exact_teacher_learns_its_map(tmp_path, method):
    teacher = first_order_flow("edm", "edm") if method == "plus-plus" else first_order_flow(SD, "noise")
    options = {
        "start": small_mlp(3, 32),
        "optimization": pr.Optimization(lr=4e-3, decay="cosine", warmup=20),
        "average": 0.98,
    }
    x0 = noise(2048, seed=1).float()
    if method == "phased":
        task = phased_task(teacher, TensorSource({"x1": goal(x0)}), phases=2, substeps=2, **options)
    else:
        pairs = make_pairs(teacher, 2048, tmp_path / "pairs", solver=Solver("ddim", 1))
        assert torch.allclose(pairs.tensors()["x1"], arrival(teacher, pairs.tensors()["x0"]), atol=1e-4)
        kind = plus_plus_task if method == "plus-plus" else rectified_diffusion_task
        task = kind(teacher, pairs, **options)
    steps = 2 if method == "phased" else 1
    before = error(task.flow, teacher, steps)
    pr.train(task, tmp_path / "run", iterations=200, batch=128, **QUIET)
    assert error(task.result(), teacher, steps) < 0.05 * before
    assert error(task.result(), teacher, steps) < 0.1


# Low rank


@settings(max_examples=15, deadline=None)
@given(rank=st.integers(1, 40), alpha=st.sampled_from([None, 1.0, 8.0]), seed=st.integers(0, 100))
def test_low_rank_additions_change_nothing_at_first_and_merge_exactly(rank, alpha, seed):
    plain, x, t = small_mlp(seed, dtype=torch.float64), noise(7, seed=seed), torch.rand(7, dtype=torch.float64)
    before = plain(x, t)
    network = add_lora(small_mlp(seed, dtype=torch.float64), rank, alpha)
    assert torch.equal(network(x, t), before)
    trained, every = size_of(network)
    layers = [m.weight.shape for m in plain.modules() if isinstance(m, nn.Linear)]
    assert trained == sum(min(rank, *shape) * sum(shape) for shape in layers)
    assert every == trained + sum(p.numel() for p in plain.parameters())
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.requires_grad:
                assert ".0.down" in name or ".0.up" in name
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=p.dtype))
    after = network(x, t)
    assert not torch.allclose(after, before)
    # Its spec builds the same network, and what is merged is a plain one again.
    again = networks.build(networks.spec_of(network)).double()
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t), after)
    merged = merge_lora(network)
    assert torch.allclose(merged(x, t), after, atol=1e-12)
    plain.load_state_dict(merged.state_dict())
    assert torch.allclose(plain(x, t), after, atol=1e-12)
    assert "lora" not in networks.spec_of(merged)
    assert size_of(merged)[0] == size_of(merged)[1]


def test_what_low_rank_refuses():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        add_lora(small_mlp(), 0)
    with pytest.raises(ValueError, match="named like attention"):
        add_lora(small_mlp(), 2, targets=("attention",))
    with pytest.raises(ValueError, match="already; merge them first"):
        add_lora(add_lora(small_mlp(), 2), 2)


def test_a_low_rank_student_trains_its_additions_only_and_is_loaded_again(tmp_path):
    flow = random_flow("edm", "edm", torch.float32)
    pairs = pairs_of(flow, tmp_path / "pairs")
    task = plus_plus_task(flow, pairs, low_rank=LowRank(2, 4.0, ("hidden",)), average=0.5, any_teacher=True)
    x, t = noise(5).float(), torch.rand(5)
    assert torch.equal(task.flow.velocity(x, t), linear_student(flow).velocity(x, t))
    before = {name: value.clone() for name, value in task.flow.network.state_dict().items()}
    pr.train(task, tmp_path / "run", iterations=4, batch=16, **QUIET)
    after = task.flow.network.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all("hidden" in name and "parametrizations.weight.0" in name for name in changed)
    again = pr.load(tmp_path / "run")
    assert again.network.lora == {"rank": 2, "alpha": 4.0, "targets": ["hidden"]}
    assert again.provenance.notes["low_rank"] == 2
    assert torch.equal(again.velocity(x, t), task.result().velocity(x, t))
    # Resumed, it still trains nothing else.
    task = plus_plus_task(flow, pairs, low_rank=LowRank(2, 4.0, ("hidden",)), average=0.5, any_teacher=True)
    pr.train(task, tmp_path / "run", iterations=8, batch=16, resume=True, **QUIET)
    assert all(torch.equal(task.flow.network.state_dict()[name], before[name]) for name in set(before) - changed)


def test_models_of_diffusers_get_adapters_of_peft(tmp_path):
    pytest.importorskip("peft")
    from interop.tiny_pipelines import ddpm

    flow = pr.load(ddpm(tmp_path / "ddpm"))
    pairs = make_pairs(flow, 8, tmp_path / "pairs", solver=Solver("ddim", 2))
    task = rectified_diffusion_task(flow, pairs, low_rank=LowRank(2), any_teacher=True, average=0.5)
    x, t = noise(2, 1, 8, 8).float(), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        assert torch.equal(task.flow.velocity(x, t), flow.velocity(x, t))
        trained = {name for name, p in task.flow.network.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        before = {name: value.clone() for name, value in task.flow.network.state_dict().items()}
        with torch.enable_grad():
            pr.train(task, tmp_path / "run", iterations=2, batch=4, **QUIET)
        after = task.flow.network.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed
        assert all("lora_" in name for name in changed)
        again = pr.load(tmp_path / "run")
        assert again.network.config.adapter["rank"] == 2
        assert torch.allclose(again.velocity(x, t), task.result().velocity(x, t), rtol=1e-5, atol=1e-4)


# Phases


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("path", ["linear", "vp", "edm", SD])
def test_segments_of_an_exact_teacher_are_exact(path, count):
    teacher = first_order_flow(path, "noise" if path != "linear" else "velocity")
    phases = Phases.of(teacher, count)
    assert (phases.count, phases.bounds[0], phases.bounds[-1]) == (count, *teacher.interval)
    objective = PhasedObjective(teacher, phases, substeps=3)
    x1, x0 = goal(noise(24)) + 0.3 * noise(24, seed=5), noise(24, seed=2)
    phase = torch.arange(24) % count
    segment = objective.segment(x1, x0, phase, None)
    at = teacher.path.at(segment.start, x1)
    # A real item is noised to the start of its phase; the teacher then keeps the noise that it sees there.
    assert torch.allclose(segment.x_start, at.alpha * x1 + at.sigma * x0)
    known = FirstOrder(path).forward(segment.x_start, segment.start)
    assert torch.allclose(segment.noise, known, rtol=1e-6, atol=1e-6)
    assert torch.allclose(segment.data, goal(known), rtol=1e-6, atol=1e-6)
    to = teacher.path.at(segment.end, x1)
    assert torch.allclose(segment.x_end, to.alpha * goal(known) + to.sigma * known, rtol=1e-6, atol=1e-6)
    for share in (0.0, 0.4, 1.0):
        t = segment.start + share * (segment.end - segment.start)
        x = objective.at(segment, t)
        here = teacher.path.at(t, x)
        assert torch.allclose(x, here.alpha * segment.data + here.sigma * segment.noise)
        # A student that is the teacher arrives in one step.
        assert torch.allclose(objective.arrival(teacher, segment, x, t, None), segment.x_end, atol=1e-6)
    loss, _ = objective(teacher, {"x1": x1}, torch.Generator().manual_seed(0))
    assert float(loss) < 1e-6


def test_one_phase_is_rectified_diffusion_with_pairs_made_on_the_way():
    # Its noisy end is a noised item, and on the linear path, where no item is left in it, noise alone.
    teacher = first_order_flow("linear", "velocity")
    objective = PhasedObjective(teacher, Phases.of(teacher, 1), substeps=4)
    x1, x0 = noise(9, seed=3), noise(9, seed=4)
    segment = objective.segment(x1, x0, torch.zeros(9, dtype=torch.long), None)
    assert torch.allclose(segment.noise, x0)
    assert torch.allclose(segment.data, goal(x0))


def test_the_teacher_is_guided_in_its_estimates():
    teacher = first_order_flow(SD, "noise", classes=3)
    objective = PhasedObjective(teacher, Phases.of(teacher, 2), substeps=1, guidance=2.5)
    x1, x0, label = noise(6, seed=3), noise(6, seed=4), torch.tensor([0, 1, 2, 0, 1, 2])
    condition = Condition({"label": label}, teacher.null)
    phase = torch.tensor([0, 0, 0, 1, 1, 1])
    segment = objective.segment(x1, x0, phase, condition)
    with_label = teacher.network(segment.x_start, segment.start, label=label)
    without = teacher.network(segment.x_start, segment.start, label=torch.full((6,), 3))
    guided = without + 2.5 * (with_label - without)
    here, to = teacher.path.at(segment.start, x1), teacher.path.at(segment.end, x1)
    data = (segment.x_start - here.sigma * guided) / here.alpha
    assert torch.allclose(segment.x_end, to.alpha * data + to.sigma * guided)


def test_straight_segments_are_chords():
    for path, same in (("linear", True), ("vp", False)):
        teacher = first_order_flow(path, "velocity" if same else "noise")
        phases = Phases.of(teacher, 2)
        curved, straight = (PhasedObjective(teacher, phases, 3, straight=s) for s in (False, True))
        phase = torch.tensor([0, 1] * 4)
        segment = curved.segment(noise(8), noise(8, seed=1), phase, None)
        middle = (segment.start + segment.end) / 2
        chord = (segment.x_start + segment.x_end) / 2
        assert torch.allclose(straight.at(segment, middle), chord)
        assert torch.allclose(curved.at(segment, middle), chord, atol=1e-9) == same
        # What a chord's student predicts is its slope.
        slope = (segment.x_end - segment.x_start) / (segment.end - segment.start)[:, None]
        student = Flow(Given(slope), path=path, shape=(2,))
        assert torch.allclose(straight.arrival(student, segment, chord, middle, None), segment.x_end)


class Given(nn.Module):
    """Rows that are given, whatever is asked."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x, t):
        return self.rows


@settings(max_examples=60, deadline=None)
@given(count=st.sampled_from([20, 50, 1000]), phases=st.integers(1, 10), seed=st.integers(0, 2**20))
def test_times_of_numbered_phases_are_whole_and_inside(count, phases, seed):
    path = Numbered("linear", 1 / count, 10 / count, count=count)
    flow = first_order_flow(path, "noise")
    assert flow.interval == (0.0, 1.0)
    bounds = torch.tensor(Phases.of(flow, phases).bounds)  # float32, as in training
    numbers = path.number_of(bounds.double()).round()
    assert numbers[0] == count - 1
    assert numbers[-1] == 0
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(phases, (400,), generator=generator)
    u = torch.rand(400, generator=generator)
    u[:4] = torch.tensor([0.0, 1 - 2**-24, 0.5, 1e-7])
    t = draw_within(flow, bounds[which], bounds[which + 1], u)
    found = path.number_of(t.double())
    assert float((found - found.round()).abs().max()) < 1e-3
    assert bool((found.round() <= numbers[which]).all())
    assert bool((found.round() > numbers[which + 1]).all())


def test_the_published_phases_and_their_grids():
    flow = first_order_flow(SD, "noise")
    bounds = torch.tensor(Phases.of(flow, 4).bounds, dtype=torch.float64)
    assert SD.number_of(bounds).round().tolist() == [999, 749, 499, 249, 0]
    assert draw_within(flow, bounds[:1], bounds[1:2], torch.zeros(1)).tolist() == [0.0]
    even = Phases.of(flow, 4, "logsnr").bounds
    at = torch.tensor(even[1:-1], dtype=torch.float64)
    steps = (SD.alpha(at) / SD.sigma(at)).log().diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-3)
    with pytest.raises(ValueError, match="phases: must be at least 1, got 0"):
        Phases.of(flow, 0)
    with pytest.raises(ValueError, match="rising times"):
        Phases((0.0, 0.5, 0.5))
    with pytest.raises(ValueError, match="substeps: must be at least 1, got 0"):
        phased_task(flow, noise(8).float(), substeps=0)


@pytest.mark.parametrize(
    "steps",
    [1, 4, 666, 700, 999, 1000],
)
def test_a_numbered_flow_takes_any_number_of_steps(steps):
    flow = first_order_flow(SD, "noise")
    x0 = noise(2)
    found = flow.sample(x0=x0, steps=steps, method="ddim", final="clean")
    assert torch.allclose(found, arrival(flow, x0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        plus_plus_task,
        rectified_diffusion_task,
        reflow_task,
    ],
)
def test_a_student_of_a_phased_flow_has_no_phases(tmp_path, kind):
    phased = phased_task(random_flow(SD, "noise", torch.float32), noise(8).float(), phases=3).result()
    notes = kind(phased, pairs_of(phased, tmp_path), any_teacher=True).flow.provenance.notes
    assert not {"phases", "sampling_steps", "guidance_of_teacher", "steps"} & set(notes)


def test_a_phased_student_knows_its_steps_and_leaves_its_teacher_alone(tmp_path):
    flow = random_flow(SD, "noise", torch.float32)
    task = phased_task(flow, noise(32).float(), phases=3, teacher="someone", average=0.5)
    notes = task.flow.provenance.notes
    assert (notes["sampling_steps"], len(notes["phases"]), notes["guidance_of_teacher"]) == (3, 4, 1.0)
    frozen = {name: value.clone() for name, value in task.teacher.network.state_dict().items()}
    pr.train(task, tmp_path / "run", iterations=3, batch=8, **QUIET)
    assert all(torch.equal(value, frozen[name]) for name, value in task.teacher.network.state_dict().items())
    assert any(not torch.equal(value, frozen[name]) for name, value in task.flow.network.state_dict().items())
    from pantarhei.cli.opening import default_steps

    assert default_steps(pr.load(tmp_path / "run")) == 3


# Inverted real data


def test_real_data_are_inverted_and_mixed(tmp_path):
    teacher = first_order_flow("linear", "velocity")
    made = make_pairs(teacher, 30, tmp_path / "made", solver=Solver("ddim", 2), shard_size=16)
    x0 = noise(20, seed=8).float()
    real = invert_data(teacher, TensorSource({"x1": goal(x0)}), tmp_path / "real", solver=Solver("ddim", 3))
    assert torch.allclose(real.tensors()["x0"], x0, atol=1e-5)
    assert torch.equal(real.tensors()["x1"], goal(x0))
    mixed = MixedPairs(made, real, 0.4)
    assert len(mixed) == 50
    drawn = mixed.fetch(torch.tensor([49, 3, 30, 29, 49]))
    rows = torch.cat([real.fetch(torch.tensor([19]))["x1"], made.fetch(torch.tensor([3]))["x1"]])
    assert torch.equal(drawn["x1"][:2], rows)
    assert torch.equal(drawn["x1"][4], drawn["x1"][0])
    assert torch.equal(drawn["x0"][2:4], torch.cat([real.tensors()["x0"][:1], made.tensors()["x0"][29:]]))
    # A small store is repeated.
    many = MixedPairs(made, real, 0.75)
    assert len(many) == 120
    assert torch.equal(many.fetch(torch.tensor([30, 50, 70]))["x1"], real.tensors(1)["x1"].expand(3, -1))
    assert many.header["real_share"] == 0.75
    assert torch.equal(many.tensors(5)["x1"], made.tensors(5)["x1"])
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            MixedPairs(made, real, share)
    # Both kinds are this teacher's, and are trained on.
    task = plus_plus_task(teacher, mixed, start=small_mlp())
    loss, _ = task.objective(task.flow, task.data.fetch(torch.arange(40)), torch.Generator().manual_seed(0))
    assert loss.isfinite()
    made.path(1).unlink()
    with pytest.raises(ValueError, match="not finished"):
        plus_plus_task(teacher, MixedPairs(ShardStore(tmp_path / "made"), real, 0.4))


class Dies:
    """A source that fails after some fetches, as a killed job does."""

    def __init__(self, x1, after):
        self.x1, self.left, self.name = x1, after, "data"

    def __len__(self):
        return len(self.x1)

    def fetch(self, indices):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return {"x1": self.x1[indices]}

    def describe(self):
        return {"name": self.name}


def test_a_killed_inversion_goes_on(tmp_path):
    teacher, x1 = first_order_flow("linear", "velocity"), goal(noise(40).float())
    options = {"solver": Solver("euler", 2), "shard_size": 10, "batch": 4}
    whole = invert_data(teacher, Dies(x1, 1000), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        invert_data(teacher, Dies(x1, 5), tmp_path / "killed", **options)
    store = ShardStore(tmp_path / "killed")
    assert store.missing() == [1, 2, 3]
    stamp = store.path(0).stat().st_mtime_ns
    invert_data(teacher, Dies(x1, 1000), tmp_path / "killed", rank=1, world=2, **options)
    assert store.missing() == [2]
    again = invert_data(teacher, Dies(x1, 1000), tmp_path / "killed", **options)
    assert store.path(0).stat().st_mtime_ns == stamp
    assert all(torch.equal(again.tensors()[k], v) for k, v in whole.tensors().items())
    with pytest.raises(ValueError, match="another steps"):
        invert_data(teacher, Dies(x1, 9), tmp_path / "killed", **{**options, "solver": Solver("euler", 3)})
    with pytest.raises(ValueError, match="guidance: real data are inverted without guidance, got 2"):
        invert_data(teacher, Dies(x1, 9), tmp_path / "other", solver=Solver("euler", 2, 2.0))


INVERTED = [
    *[
        (path, predicts, method)
        for path, predicts in (("vp", "noise"), ("edm", "edm"), (SD, "noise"))
        for method in WAYS
    ],
    *[("linear", "velocity", method) for method in ("ddim", "heun", "euler")],
    *[("cosine", "velocity", method) for method in WAYS],
    ("linear", "velocity", "edm"),
]


@pytest.mark.parametrize(("path", "predicts", "method"), INVERTED)
def test_what_is_inverted_comes_back(tmp_path, path, predicts, method):
    teacher, x1 = first_order_flow(path, predicts), goal(noise(10).float())
    real = invert_data(teacher, TensorSource({"x1": x1}), tmp_path, solver=Solver(method, 5))
    again = teacher.sample(x0=real.tensors()["x0"], steps=5, method=method, final="state")
    assert torch.allclose(again, x1, atol=2e-3)


def test_what_cannot_be_inverted_is_not_written(tmp_path):
    teacher, data = first_order_flow(), noise(4).float()
    for method in ("dpm-solver", "reinterpolate"):
        with pytest.raises(ValueError, match="runs from noise to data; invert with"):
            invert_data(teacher, Dies(data, 9), tmp_path / method, solver=Solver(method, 2))
    data = noise(12).float()
    data[7] = float("nan")
    with pytest.raises(ValueError, match="shard 1: x0 holds NaN"):
        invert_data(first_order_flow(), Dies(data, 9), tmp_path, solver=Solver("euler", 1), shard_size=6)
    assert ShardStore(tmp_path).missing() == [1]


# Refusals


def test_pairs_and_teachers_that_do_not_fit_are_refused(tmp_path):
    flow = random_flow("vp", "noise", torch.float32)
    pairs = pairs_of(flow, tmp_path / "a")
    other = Flow(small_mlp(5), path="vp", predicts="noise", shape=(2,))
    kinds = (plus_plus_task, rectified_diffusion_task, reflow_task)
    for kind in kinds:
        with pytest.raises(ValueError, match="made by other weights"):
            kind(other, pairs)
        with pytest.raises(ValueError, match="samples of shape"):
            kind(Flow(small_mlp(), shape=(3,)), pairs)
        with pytest.raises(ValueError, match="distilled to 2 steps"):
            kind(flow.like(flow.network, coupling="distilled", notes={"steps": 2}), pairs)
    interpolant = Flow(networks.MLP(networks.MLPConfig(width=8, fields=2)), path="trigonometric", shape=(2,))
    for kind in (plus_plus_task, rectified_diffusion_task):
        with pytest.raises(ValueError, match="latent"):
            kind(interpolant, pairs)
    with pytest.raises(ValueError, match="latent"):
        phased_task(interpolant, noise(4))
    with pytest.raises(ValueError, match="loss: must be data-huber, noise-mse, velocity, native"):
        rectified_diffusion_task(flow, pairs, loss="l2")
    assert on_path(flow).path == build_path("linear")
    assert isinstance(EDM(), type(build_path("edm")))
