"""Training of trajectory models: what is compared, where gradients go, weights, phases, resume; MeanFlow's identity."""

import copy
import math

import pytest
import torch
from torch import nn

import pantarhei as pr
from flow.exact_jumps import GaussianJumps, data_law, exact_model, random_times
from pantarhei import networks
from pantarhei.flow import Condition, Flow, FlowMatching, Provenance, PseudoHuber, TrajectoryModel, squared
from pantarhei.flow.couplings import Independent
from pantarhei.flow.heads import CTM, Consistency
from pantarhei.flow.objectives import draw_pairs
from pantarhei.networks import MLP, MLPConfig
from pantarhei.networks.discriminators import make_discriminator
from pantarhei.networks.lora import size_of
from pantarhei.networks.second_time import with_second_time
from pantarhei.straighten import Adversarial, LowRank, MeanFlow, TrajectoryMatching, TrajectoryTask, trajectory_task
from pantarhei.straighten.adversarial import discriminator_loss, generator_loss
from pantarhei.straighten.jump_times import JumpTimes, jump_times
from pantarhei.straighten.trajectory_students import KINDS, trajectory_student
from straighten.exact_flows import first_order_flow, goal, small_mlp

QUIET = {"progress": False, "tensorboard": False}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, seed=0, dtype=torch.float64):
    return torch.randn(count, 2, generator=seeded(seed), dtype=dtype)


def network_of(classes=0, second_time=True, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(MLPConfig(width=16, layers=2, classes=classes, second_time=second_time)).to(dtype)


def model_of(path="edm", predicts="edm", head="ctm", seed=0, **options):
    second_time = head == "ctm" or isinstance(head, CTM)
    return TrajectoryModel(
        network_of(second_time=second_time, seed=seed), path=path, predicts=predicts, head=head, shape=(2,), **options
    )


def averaged(model, seed=5):
    """A model around frozen weights near the model's own."""
    network, generator = copy.deepcopy(model.network).requires_grad_(False).eval(), seeded(seed)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.like(network)


def teacher_of(path="edm", predicts="edm", classes=0, dtype=torch.float64, **options):
    network = network_of(classes, second_time=False, seed=7, dtype=dtype)
    null = {"label": classes} if classes else None
    return Flow(network, path=path, predicts=predicts, shape=(2,), null=null, **options)


def situation(path="edm", predicts="edm", rows=12, count=8, **settings):
    """A student, its average, a teacher, drawn jumps, noise and data."""
    student = model_of(path, predicts)
    draw = jump_times(student, count, **settings).draw(rows, seeded(1), dtype=torch.float64)
    return student, averaged(student), teacher_of(path, predicts), draw, noise(rows, 2), 0.5 * noise(rows, 3)


# Matching: the states that are compared


@pytest.mark.parametrize(
    ("path", "predicts"), [("edm", "edm"), ("linear", "velocity"), ("vp", "noise"), ("cosine", "v")]
)
def test_the_teacher_carries_every_row_along_nodes_of_its_own(path, predicts):
    student, average, teacher, draw, x0, x1 = situation(path, predicts, per_row=True)
    x = student.path.sample(x0, x1, None, draw.t)[0]
    found = TrajectoryMatching(teacher=teacher).at_u(average, draw, x, x0, x1, None)
    for row in range(len(x)):
        nodes = list(dict.fromkeys(draw.nodes[:, row].tolist()))
        with torch.no_grad():
            alone = teacher.transport(x[row : row + 1], nodes, steps=nodes, method="edm").x
        assert torch.allclose(found[row], alone[0], rtol=1e-9, atol=1e-12)


def test_a_guided_teacher():
    teacher = teacher_of(classes=3)
    label = Condition({"label": torch.tensor([0, 1, 2, 1])}, {"label": 3})
    draw = jump_times(teacher, 6).at(torch.tensor([0] * 4), torch.tensor([3] * 4), torch.tensor([5] * 4), torch.float64)
    x = 80 * noise(4)
    matching = TrajectoryMatching(teacher=teacher, guidance=2.0)
    found = matching.at_u(model_of(), draw, x, noise(4), noise(4), label)
    nodes = draw.nodes[:, 0].tolist()
    with torch.no_grad():
        alone = teacher.transport(x, nodes, steps=nodes, method="edm", guidance=2.0, condition=label).x
    assert torch.allclose(found, alone, rtol=1e-9)


def test_every_waypoint_is_on_the_trajectory_of_an_exact_model():
    exact = exact_model("edm", "edm")
    draw = jump_times(exact, 8).draw(10, seeded(), dtype=torch.float64)
    x0, x1 = noise(10), data_law().sample(10, seeded(1))
    x = exact.path.sample(x0, x1, None, draw.t)[0]
    at_u = exact.network.goal(x, draw.t, draw.u)
    for waypoint in ("self", "self-steps"):
        matching = TrajectoryMatching(waypoint=waypoint)
        assert torch.allclose(matching.at_u(exact, draw, x, x0, x1, None), at_u, rtol=1e-6)
        compared = matching.compare(exact, exact, draw, x0, x1)
        end = exact.network.goal(x, draw.t, torch.ones_like(draw.t))
        assert torch.allclose(compared.landing, exact.network.goal(x, draw.t, draw.s), rtol=1e-6)
        assert torch.allclose(compared.estimate, end, rtol=1e-5, atol=1e-6)
        assert torch.allclose(compared.target, end, rtol=1e-5, atol=1e-6)
        assert float(matching.loss(exact, draw, compared).max()) < 1e-9
    # A finer grid brings the teacher's steps there, too.
    fine = jump_times(exact, 200).at(*(torch.full((10,), n) for n in (20, 150, 199)), torch.float64)
    x = exact.path.sample(x0, x1, None, fine.t)[0]
    found = TrajectoryMatching(teacher=exact).at_u(exact, fine, x, x0, x1, None)
    assert torch.allclose(found, exact.network.goal(x, fine.t, fine.u), rtol=1e-3, atol=1e-3)
    # Consistency training takes the pair's own line.
    found = TrajectoryMatching(waypoint="data").at_u(exact, draw, x, x0, x1, None)
    assert torch.equal(found, exact.path.sample(x0, x1, None, draw.u)[0])


def test_self_steps_differ_from_one_jump():
    student, average, _, _, x0, x1 = situation()
    draw = jump_times(student, 8).at(*(torch.full((12,), n) for n in (1, 3, 6)), torch.float64)
    x = student.path.sample(x0, x1, None, draw.t)[0]
    one, steps = (
        TrajectoryMatching(waypoint=waypoint).at_u(average, draw, x, x0, x1, None)
        for waypoint in ("self", "self-steps")
    )
    assert torch.equal(one, average.jump(x, draw.t, draw.u))
    for t, s in zip(draw.nodes[:-1], draw.nodes[1:], strict=True):
        x = average.jump(x, t, s)
    assert torch.equal(steps, x)
    assert not torch.allclose(one, steps)


@pytest.mark.parametrize("follower", ["student", "average"])
def test_who_follows(follower):
    student, average, teacher, draw, x0, x1 = situation()
    matching = TrajectoryMatching(teacher=teacher, follower=follower)
    compared = matching.compare(student, average, draw, x0, x1)
    x = student.path.sample(x0, x1, None, draw.t)[0]
    who = student if follower == "student" else average
    following = who.jump(matching.at_u(average, draw, x, x0, x1, None), draw.u, draw.s)
    assert torch.equal(compared.target, average.jump(following, draw.s, 1.0).detach())
    assert torch.equal(compared.estimate, average.jump(student.jump(x, draw.t, draw.s), draw.s, 1.0))
    assert not compared.target.requires_grad


# Matching: gradients


@pytest.mark.parametrize("metric", [squared, PseudoHuber(0.1, root=True)])
def test_the_gradient_goes_through_the_jump_of_the_average(metric):
    student, average, teacher, draw, x0, x1 = situation(rows=6)
    matching = TrajectoryMatching(teacher=teacher, metric=metric)
    compared = matching.compare(student, average, draw, x0, x1)
    parameters = list(student.network.parameters())
    slopes = torch.autograd.grad(matching.loss(student, draw, compared).mean(), parameters)
    assert all(float(slope.abs().max()) > 0 for slope in slopes)
    generator = seeded(4)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def moved(h):
        other = student.like(copy.deepcopy(student.network))
        with torch.no_grad():
            for parameter, towards in zip(other.network.parameters(), direction, strict=True):
                parameter += h * towards
            estimate = matching.compare(other, average, draw, x0, x1).estimate
            return float(metric(estimate, compared.target).mean())  # the target is a constant

    numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6
    along = sum(float((slope * towards).sum()) for slope, towards in zip(slopes, direction, strict=True))
    assert along == pytest.approx(numeric, rel=1e-5)


def test_average_and_teacher_get_no_gradient():
    student, average, teacher, draw, x0, x1 = situation()
    matching = TrajectoryMatching(teacher=teacher)
    compared = matching.compare(student, average, draw, x0, x1)
    matching.loss(student, draw, compared).sum().backward()
    assert all(p.requires_grad and p.grad is None for p in teacher.network.parameters())
    assert all(p.grad is None for p in average.network.parameters())
    assert all(p.grad is not None for p in student.network.parameters())


@pytest.mark.parametrize("waypoint", ["teacher", "self-steps"])
def test_nothing_is_kept_of_the_way_to_u(waypoint):
    student, average, teacher, _, x0, x1 = situation()
    matching = TrajectoryMatching(waypoint, teacher if waypoint == "teacher" else None)
    kept = []
    for k in (1, 6):
        saved = []
        draw = jump_times(student, 8).at(*(torch.full((12,), n) for n in (0, k, 7)), torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: (saved.append(x.numel()), x)[1], lambda x: x
        ):
            compared = matching.compare(student, average, draw, x0, x1)
        kept.append((len(saved), sum(saved)))
        assert compared.estimate.requires_grad
    assert kept[0] == kept[1]
    assert kept[0][0] > 0


# Matching: special cases, weights, dropout


class ToTheEnd(nn.Module):
    """A network of (x, t) from one of (x, t, s): always to the end, whose label is given."""

    def __init__(self, inner, label):
        super().__init__()
        self.inner, self.label = inner, label

    def forward(self, x, t):
        return self.inner(x, t, s=torch.full_like(t, self.label))


@pytest.mark.parametrize("follower", ["student", "average"])
def test_one_interval_and_on_to_the_end_is_consistency_distillation(follower):
    student, average, teacher, draw, x0, x1 = situation(span="local", to_end=True)
    label = float(student.prediction.inputs(student.path, x0, torch.ones(12, dtype=torch.float64))[1][0])
    cm, target_cm = (
        TrajectoryModel(ToTheEnd(m.network, label), path="edm", predicts="edm", head="consistency", shape=(2,))
        for m in (student, average)
    )
    matching = TrajectoryMatching(teacher=teacher, follower=follower)
    rows = matching.loss(cm, draw, matching.compare(cm, target_cm, draw, x0, x1))
    # Its own formula: a step of the teacher, and both ends by the networks alone.
    x = cm.path.sample(x0, x1, None, draw.t)[0]
    with torch.no_grad():
        earlier = matching.at_u(target_cm, draw, x, x0, x1, None)
        target = (cm if follower == "student" else target_cm).jump(earlier, draw.u, 1.0)
    assert torch.equal(rows, squared(cm.jump(x, draw.t, 1.0), target))
    # And what ctm computes with this law of times, where its average jumps from the end to the end.
    assert torch.equal(rows, matching.loss(student, draw, matching.compare(student, average, draw, x0, x1)))


def test_the_loss_of_consistency_distillation_written_out():
    head = Consistency("boundary")
    cm, teacher = model_of(head=head), teacher_of()
    average = averaged(cm)
    draw = jump_times(cm, 18, span="local", to_end=True).draw(10, seeded(), dtype=torch.float64)
    x0, x1 = noise(10), 0.5 * noise(10, 1)
    matching = TrajectoryMatching(teacher=teacher, follower="average")
    found = matching.loss(cm, draw, matching.compare(cm, average, draw, x0, x1))

    def f(network, x, sigma):
        sd, e = 0.5, 0.002
        skip, out = sd**2 / ((sigma - e) ** 2 + sd**2), (sigma - e) * sd / torch.sqrt(sigma**2 + sd**2)
        return skip * x + out * network(x / torch.sqrt(sigma**2 + sd**2), torch.log(sigma[:, 0]) / 4)

    def slope(x, sigma):
        sd = 0.5
        raw = teacher.network(x / torch.sqrt(sigma**2 + sd**2), torch.log(sigma[:, 0]) / 4)
        denoised = sd**2 / (sigma**2 + sd**2) * x + sigma * sd / torch.sqrt(sigma**2 + sd**2) * raw
        return (x - denoised) / sigma

    far, near = (cm.path.sigma(time)[:, None] for time in (draw.t, draw.u))
    x = x1 + far * x0
    first = slope(x, far)
    guess = x + (near - far) * first
    stepped = x + (near - far) * (first + slope(guess, near)) / 2
    expected = (f(cm.network, x, far) - f(average.network, stepped, near)).square().mean(1)
    assert torch.allclose(found, expected, rtol=1e-8)


def test_weights_of_rows():
    student, average, teacher, draw, x0, x1 = situation()
    t, u, s = (student.path.sigma(time) for time in (draw.t, draw.u, draw.s))
    expected = {
        "uniform": torch.ones_like(t),
        "snr": 1 / t**2,
        "snr+1": 1 / t**2 + 1,
        "karras": 1 / t**2 + 4,
        "truncated-snr": (1 / t**2).clamp_min(1),
        "root": t**0.5,
        "length": 1 / (1 - s / t),
        "interval": 1 / (t - u),
    }
    plain = TrajectoryMatching(teacher=teacher)
    compared = plain.compare(student, average, draw, x0, x1)
    for name, weight in expected.items():
        found = TrajectoryMatching(teacher=teacher, weight=name).loss(student, draw, compared)
        assert torch.allclose(found, weight * squared(compared.estimate, compared.target), rtol=1e-9), name
    # At the data end of the linear path there is no noise at all, and weights stay finite.
    linear = model_of("linear", "velocity")
    last = JumpTimes((0.0, 0.5, 1.0)).at(
        torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([2, 2]), torch.float64
    )
    for name in expected:
        weights = TrajectoryMatching(teacher=teacher_of("linear", "velocity"), weight=name).row_weights(linear, last)
        assert bool(weights.isfinite().all()), name


class Forgetful(nn.Module):
    """A network with dropout."""

    def __init__(self):
        super().__init__()
        self.inner, self.dropout = network_of(), nn.Dropout(0.5)

    def forward(self, x, t, s=None):
        return self.inner(self.dropout(x), t, s=s)


def test_both_jumps_of_the_student_drop_the_same_features():
    student = TrajectoryModel(Forgetful(), path="edm", predicts="edm", shape=(2,)).train()
    average = averaged(student)
    # Jumps over nothing from the pair's own line: both sides see the same inputs.
    here = torch.arange(6)
    draw = jump_times(student, 8).at(here, torch.zeros(6, dtype=torch.long), torch.full((6,), 7), torch.float64)
    assert torch.equal(draw.t, draw.u)
    x0, x1 = noise(6), noise(6, 1)
    shared, own = (TrajectoryMatching("data", shared_dropout=both) for both in (True, False))
    for seed in range(3):
        torch.manual_seed(seed)
        compared = shared.compare(student, average, draw, x0, x1)
        after = torch.get_rng_state()
        assert torch.equal(compared.estimate, compared.target)
        # The stream goes on as if only one jump had been made.
        torch.manual_seed(seed)
        x = student.path.sample(x0, x1, None, draw.t)[0]
        assert torch.equal(student.land(x, draw.t, draw.s), compared.landing)
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(seed)
        apart = own.compare(student, average, draw, x0, x1)
        assert torch.equal(apart.landing, compared.landing)
        assert not torch.equal(apart.estimate, apart.target)
    # In evaluation mode nothing is drawn.
    student.eval()
    before = torch.get_rng_state()
    assert torch.equal(*shared.compare(student, average, draw, x0, x1)[:2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "teacher: is needed for the waypoint 'teacher'"),
        (
            {"waypoint": "self", "teacher": teacher_of()},
            "teacher: is needed for the waypoint 'teacher', and for no other",
        ),
        ({"waypoint": "there"}, "waypoint: "),
        ({"waypoint": "data", "follower": "nobody"}, "follower: "),
        ({"waypoint": "data", "weight": "heavy"}, "weight: "),
    ],
)
def test_refused_matching(settings, said):
    with pytest.raises(ValueError, match=said):
        TrajectoryMatching(**settings)


# The task: the loss and its weights


def points(count=256, dtype=torch.float64):
    return data_law().sample(count, seeded(9)).to(dtype)


def ctm_task(dtype=torch.float64, **options):
    settings = {"kind": "ctm", "times": 6, "metric": squared, **options}
    return trajectory_task(teacher_of(dtype=dtype), points(dtype=dtype), **settings)


def grown(task, seed=1):
    """Away from its start, where the branch of s is zero."""
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in task.flow.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return task


def by_hand(task, batch, seed):
    """The terms of the loss with plain graphs: matching, denoising, adversarial."""
    generator, model = seeded(seed), task.model
    average = model.like(task.average.network)
    _, x0, x1, condition = draw_pairs(model, batch, Independent(), None, generator)
    draw = task.times().draw(len(x1), generator, task.shared, dtype=torch.float64)
    compared = task.matching.compare(model, average, draw, x0, x1, condition)
    terms = [task.matching.loss(model, draw, compared).mean()]
    if task.denoising is not None:
        terms.append(task.denoising(model, batch, generator)[0])
    if task.adversarial is not None:
        terms.append(generator_loss(task.discriminator(compared.estimate)))
    return terms, compared, x1


def slopes_of(loss, network, retain=True):
    found = torch.autograd.grad(loss, list(network.parameters()), retain_graph=retain, allow_unused=True)
    return torch.cat([slope.flatten() for slope in found if slope is not None])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("adversarial", [False, True])
def test_the_gradient_is_that_of_the_whole_loss(adaptive, adversarial):
    judge = make_discriminator((2,), 8).double() if adversarial else None
    play = None if judge is None else Adversarial(judge, weight=0.6)
    task = grown(ctm_task(denoising=0.7, adaptive=adaptive, adversarial=play))
    batch = task.data.fetch(torch.arange(16))
    twin = copy.deepcopy(task)  # spectral norms move with every call
    update = next(task.updates(batch, seeded(3)))
    network = task.flow.network
    found = slopes_of(update.loss, network)
    terms, _, _ = by_hand(twin, batch, 3)
    layer = twin.flow.network.outputs.weight
    norms = [float(torch.autograd.grad(term, layer, retain_graph=True)[0].norm()) for term in terms]
    weights = [1.0, 0.7, 0.6]
    if adaptive:
        weights[1] *= min(norms[0] / (norms[1] + 1e-4), 1e4)
        if adversarial:
            weights[2] *= min(max(norms[0] / (norms[2] + 1e-4), 0.01), 10.0)
    total = sum(weight * term for weight, term in zip(weights, terms, strict=False))
    expected = slopes_of(total, twin.flow.network)
    assert torch.allclose(found, expected, rtol=1e-7, atol=1e-10)
    assert update.loss.item() == pytest.approx(total.item(), rel=1e-9)
    assert float(update.log["loss"]) == pytest.approx(float(terms[0]), rel=1e-9)
    assert float(update.log["denoising"]) == pytest.approx(float(terms[1]), rel=1e-9)
    assert 0.7 * float(update.log["denoising_weight"]) == pytest.approx(weights[1], rel=1e-7)
    if adversarial:
        assert 0.6 * float(update.log["adversarial_weight"]) == pytest.approx(weights[2], rel=1e-7)


def test_a_consistency_model_has_the_matching_term_alone():
    task = grown(trajectory_task(teacher_of(), points(), kind="cd", times=6, metric=squared))
    assert task.denoising is None
    batch = task.data.fetch(torch.arange(16))
    update = next(task.updates(batch, seeded(3)))
    (term,), compared, _ = by_hand(task, batch, 3)
    assert torch.equal(compared.estimate, compared.landing)
    expected = slopes_of(term, task.flow.network)
    assert torch.allclose(slopes_of(update.loss, task.flow.network), expected, rtol=1e-9, atol=1e-14)


def test_the_denoising_term_is_the_flows_own_loss():
    task = ctm_task()
    batch = {"x1": points(32)}
    found, _ = task.denoising(task.model, batch, seeded())
    teacher = teacher_of()  # the student starts as its teacher, whatever s
    expected, _ = FlowMatching(times=task.denoising.times)(teacher, batch, seeded())
    assert torch.equal(found, expected)


# The task: two players


def test_the_discriminator_plays_after_so_many_iterations(tmp_path):
    judge = make_discriminator((2,), 8)
    task = ctm_task(torch.float32, adversarial=Adversarial(judge, after=2))
    batch, before = task.data.fetch(torch.arange(16)), copy.deepcopy(judge.state_dict())
    for task.iteration in (0, 1):
        assert [u.group for u in task.updates(batch, seeded())] == ["network"]
    task.iteration = 2
    updates = task.updates(batch, seeded())
    first = next(updates)
    first.loss.backward()
    assert first.group == "network"
    assert all(p.grad is None and p.requires_grad for p in judge.parameters())
    assert any(p.grad is not None for p in task.flow.network.parameters())
    task.flow.network.zero_grad(set_to_none=True)
    second = next(updates)
    second.loss.backward()
    assert second.group == "discriminator"
    assert all(p.grad is not None for p in judge.parameters())
    assert all(p.grad is None for p in task.flow.network.parameters())
    assert next(updates, None) is None
    # In a run its weights stay as they are until then.
    task = ctm_task(torch.float32, adversarial=Adversarial(copy.deepcopy(judge), after=2))
    task.discriminator.load_state_dict(before)
    lines = []
    log = {"loggers": [lambda i, values: "lr" in values and lines.append(values)], "log_every": 1, **QUIET}
    pr.train(task, tmp_path / "a", iterations=2, batch=16, **log)
    assert all(torch.equal(value, before[name]) for name, value in task.discriminator.state_dict().items())
    pr.train(task, tmp_path / "a", iterations=3, batch=16, resume=True, **log)
    assert not all(torch.equal(p, before[name]) for name, p in task.discriminator.named_parameters())
    assert ["discriminator/discriminator" in line for line in lines] == [False, False, True]
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_the_discriminators_loss():
    judge = make_discriminator((2,), 8).double().eval()
    task = grown(ctm_task(adversarial=Adversarial(judge)))
    judge.eval()
    batch = task.data.fetch(torch.arange(16))
    updates = list(task.updates(batch, seeded(2)))
    _, compared, x1 = by_hand(task, batch, 2)
    expected = discriminator_loss(judge(compared.estimate.detach()), judge(x1))
    assert float(updates[1].loss) == pytest.approx(float(expected), rel=1e-9)
    assert 0 <= float(updates[1].log["accuracy"]) <= 1


def test_a_game_that_cannot_be_played():
    judge = make_discriminator((2,))
    for wrong in ({"weight": 0.0}, {"after": -1}, {"limits": (2.0, 1.0)}):
        with pytest.raises(ValueError, match="adversarial: weight > 0"):
            Adversarial(judge, **wrong)
    with pytest.raises(ValueError, match="adversarial: "):
        trajectory_task(teacher_of("linear", "velocity"), points(), kind="meanflow", adversarial=Adversarial(judge))


# The task: runs


def state_of(task):
    return torch.cat([value.double().flatten() for value in task.state_dict().values()])


class Dropping(MLP):
    """One of ours with dropout, whose masks come from the global generator."""

    def __init__(self, config):
        super().__init__(config)
        self.hidden = nn.Sequential(nn.Dropout(0.2), *self.hidden)


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    def made():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Dropping(MLPConfig(width=16, layers=2, second_time=True))
            play = Adversarial(make_discriminator((2,), 8), after=3)
        model = TrajectoryModel(network, path="edm", predicts="edm", shape=(2,))
        matching = TrajectoryMatching(teacher=teacher_of(dtype=torch.float32))
        return TrajectoryTask(
            model,
            matching,
            jump_times(model, 8),
            points(dtype=torch.float32),
            denoising=FlowMatching(),
            adversarial=play,
        )

    options = {"batch": 24, "seed": 3, **QUIET}
    whole, first, second = made(), made(), made()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()  # everything comes from the checkpoint
        second.teacher.load_state_dict(whole.teacher.state_dict())
    pr.train(whole, tmp_path / "whole", iterations=9, **options)
    pr.train(first, tmp_path / "parts", iterations=5, **options)
    pr.train(second, tmp_path / "parts", iterations=9, resume=True, **options)
    assert torch.equal(state_of(whole), state_of(second))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("how", [{"accumulate": 2}, {"precision": "bf16"}])
def test_every_kind_trains_in_parts_and_in_half_precision(tmp_path, kind, how):
    flow, data = (
        teacher_of(dtype=torch.float32, classes=2),
        {"x1": points(64, torch.float32), "label": torch.arange(64) % 2},
    )
    play = None if kind == "meanflow" else Adversarial(make_discriminator((2,), 8))
    task = trajectory_task(flow, data, kind=kind, iterations=3, dropout=0.2, adversarial=play)
    before = copy.deepcopy(task.flow.network.state_dict())
    pr.train(task, tmp_path, iterations=3, batch=16, **QUIET, **how)
    after = task.flow.network.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(value.dtype == torch.float32 for value in after.values())
    assert not torch.equal(after["outputs.weight"], before["outputs.weight"])


def test_micro_batches_have_the_gradient_of_the_batch(tmp_path):
    # Noise comes with the data and all rows make the same jump, so that splitting changes nothing else.
    found = []
    data = {"x1": points(64), "x0": noise(64)}
    for parts in (1, 2):
        model = model_of()
        law = JumpTimes((0.0, 1.0))
        task = TrajectoryTask(
            model,
            TrajectoryMatching(teacher=teacher_of()),
            law,
            data,
            optimization=pr.Optimization(optimizer="sgd", lr=0.1, clip=None),
        )
        pr.train(task, tmp_path / str(parts), iterations=3, batch=32, accumulate=parts, **QUIET)
        found.append(state_of(task))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["ctm", "cd"])
def test_a_fresh_student_learns_where_its_teacher_leads(tmp_path, kind):
    teacher = first_order_flow("edm", "edm")
    x0 = noise(1024, 1).float()
    task = trajectory_task(
        teacher,
        goal(x0),
        kind=kind,
        times=4,
        metric=squared,
        start=small_mlp(3, 32),
        optimization=pr.Optimization(lr=1e-2, decay="cosine"),
        average=0.9,
    )
    before = task.validate()
    pr.train(task, tmp_path / "run", iterations=150, batch=64, **QUIET)
    assert task.validate() < 0.03 * before
    x0 = noise(256, 2).float()
    assert float((task.result().sample(x0=x0) - goal(x0)).square().mean()) < 0.05


def test_the_validation_figure_is_the_distance_to_the_teachers_samples():
    teacher = exact_model("edm", "edm")
    task = TrajectoryTask(exact_model("edm", "edm"), TrajectoryMatching(teacher=teacher), jump_times(teacher), points())
    assert task.validate() < 1e-3  # of 18 steps of the teacher against one exact jump
    alone = TrajectoryTask(exact_model("edm", "edm"), TrajectoryMatching("self"), jump_times(teacher), points())
    assert alone.validate() is None


# The task: teachers and students


@pytest.mark.parametrize(
    ("path", "predicts"), [("edm", "edm"), ("linear", "velocity"), ("vp", "noise"), ("cosine", "v"), ("sub-vp", "data")]
)
def test_before_training_a_jump_is_the_teachers_first_order_step(path, predicts):
    teacher = teacher_of(path, predicts, classes=2)
    student = trajectory_student(teacher, "ctm")
    assert isinstance(student, TrajectoryModel)
    assert student.network is not teacher.network
    t, _, s = random_times(teacher.interval, 5)
    x, label = noise(5), torch.arange(5) % 3
    for row in range(5):
        times = (float(t[row]), float(s[row]))
        one = {"condition": label[row : row + 1]}
        step = teacher.transport(x[row : row + 1], times, steps=1, method="ddim", **one).x
        assert torch.allclose(student.jump(x[row : row + 1], *times, label[row : row + 1]), step, rtol=1e-7, atol=1e-9)
    assert torch.equal(student.velocity(x, t, label), teacher.velocity(x, t, label))


def test_what_a_student_keeps_of_its_teacher():
    teacher = teacher_of(classes=2, provenance=Provenance(data="moons", notes={"licence": "mit", "steps": 3}))
    task = trajectory_task(teacher, {"x1": points(8), "label": torch.zeros(8).long()}, guidance=2.0, teacher="somebody")
    kept = task.result().provenance
    assert (kept.data, kept.teacher, kept.rectified) == ("moons", "somebody", 0)
    assert kept.notes["licence"] == "mit"
    assert kept.notes["guidance_of_teacher"] == 2.0
    assert kept.notes["method"] == "ctm"
    assert "steps" not in kept.notes
    assert "sqrt(D)" in kept.notes["metric"]
    assert task.matching.guidance == 2.0
    task.model.score(noise(2), torch.tensor(0.5, dtype=torch.float64), torch.zeros(2).long())  # nothing was paired anew


def test_a_rectified_teacher_needs_its_pairs():
    teacher = teacher_of("linear", "velocity", provenance=Provenance(rectified=1))
    for kind in ("ctm", "cd", "meanflow"):
        with pytest.raises(ValueError, match=r"rectified 1x.*give pairs of it"):
            trajectory_task(teacher, points(), kind=kind)
        task = trajectory_task(teacher, {"x0": noise(8), "x1": points(8)}, kind=kind)
        assert task.result().provenance.rectified == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: trajectory_task(teacher_of(), points(), kind="gan"), "kind: "),
        (lambda: trajectory_task(teacher_of(), points(), kind="cd", without_teacher=True), "without_teacher: "),
        (lambda: trajectory_task(teacher_of(), points(), kind="cd", denoising=0.5), "denoising: goes with 'ctm'"),
        (lambda: trajectory_task(teacher_of(), points(), denoising=-1.0), "denoising: "),
        (lambda: trajectory_task(teacher_of(), points(), times=0), "grid: at least 2 times"),
        (lambda: trajectory_task(teacher_of(), points(), kind="ict", guidance=2.0), "guidance: "),
        (lambda: trajectory_task(teacher_of(), points(), without_teacher=True, guidance=2.0), "guidance: "),
        (lambda: trajectory_task(teacher_of("vp", "noise"), points(), outer="mixed"), "outer: 'mixed' needs"),
        (lambda: trajectory_task(teacher_of(), points(), average=0.0), "average: trajectory models need one"),
        (lambda: trajectory_task(teacher_of(), None), "data: "),
        (
            lambda: TrajectoryTask(
                model_of(head="consistency"),
                TrajectoryMatching("data"),
                jump_times(model_of(), 4, to_end=True),
                points(),
                denoising=FlowMatching(),
            ),
            "denoising: a consistency model has no field",
        ),
        (
            lambda: trajectory_student(teacher_of(provenance=Provenance(coupling="distilled"))),
            "distilled",
        ),
        (lambda: trajectory_student(model_of(head="consistency")), "not their velocity"),
    ],
)
def test_refused_tasks(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_additions_and_the_new_branch_learn_and_nothing_else(tmp_path):
    teacher = teacher_of(dtype=torch.float32)
    task = trajectory_task(teacher, points(64, torch.float32), times=5, low_rank=LowRank(2))
    network = task.flow.network
    old = with_second_time(teacher.network)
    with torch.no_grad():  # before training it is the teacher all the same
        x, t = noise(4).float(), torch.rand(4, generator=seeded())
        assert torch.allclose(network(x, t, s=t), teacher.network(x, t), atol=1e-6)
    branch = {name for name, _ in old.named_parameters()} - {name for name, _ in teacher.network.named_parameters()}
    assert branch
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pr.train(task, tmp_path / "run", iterations=4, batch=16, **QUIET)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    plain = {name.replace("parametrizations.", "").replace(".original", "") for name in moved if ".0." not in name[-9:]}
    assert {name for name in moved if name.endswith((".up", ".down"))}
    for name in plain:
        assert name in branch or name.endswith((".up", ".down")), name
    trained, every = size_of(network)
    assert trained < every
    opened = pr.load(tmp_path / "run")
    assert opened.provenance.notes["low_rank"] == 2
    assert torch.allclose(opened.sample(x0=x), task.result().sample(x0=x), atol=1e-6)


def test_a_student_of_a_student():
    model = model_of()
    again = trajectory_student(model, "consistency")
    assert not again.head.anywhere
    assert networks.spec_of(again.network) == networks.spec_of(model.network)
    task = trajectory_task(model, points(), kind="cd", times=4)
    updates = task.updates(task.data.fetch(torch.arange(8)), seeded())
    assert math.isfinite(float(next(updates).loss))


# Mean velocities


class Watched(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, []

    def forward(self, x, t, s=None, label=None):
        self.calls.append(label)
        return self.inner(x, t, s=s, label=label)


def test_the_exact_mean_velocity_has_no_error():
    exact = exact_model(head="mean-velocity")
    teacher = Flow(GaussianJumps("linear"), shape=(2,))
    batch = {"x1": data_law().sample(200, seeded())}
    for share in (0.0, 0.75, 1.0):
        loss, log = MeanFlow(teacher=teacher, share=share, difference=None)(exact, batch, seeded(1))
        assert float(log["error"]) < 1e-12
        assert float(loss) == pytest.approx(float(log["error"]) * 1e-3**-0.75, rel=1e-3)
    # A pair's own velocity is right on average only.
    _, log = MeanFlow(difference=None)(exact, batch, seeded(1))
    assert float(log["error"]) > 0.1
    # And another network is wrong.
    wrong = TrajectoryModel(network_of(), head="mean-velocity", shape=(2,))
    assert float(MeanFlow(teacher=teacher)(wrong, batch, seeded(1))[1]["error"]) > 0.1


def test_the_target_is_the_derivative_of_the_way():
    """u = v + (s - t) du/dt with the derivative along the flow, by finite differences."""
    model = TrajectoryModel(network_of(seed=3), head="mean-velocity", shape=(2,))
    teacher = teacher_of("linear", "velocity")
    batch = {"x1": points(1)}
    objective = MeanFlow(teacher=teacher, share=1.0, power=0.0, difference=None)
    _, log = objective(model, batch, seeded(4))
    # What it drew, in its order.
    generator = seeded(4)
    x0 = torch.randn(1, 2, generator=generator, dtype=torch.float64)
    pair = [objective.times.sample(1, generator, dtype=torch.float64) for _ in range(2)]
    t, s = torch.minimum(*pair), torch.maximum(*pair)
    with torch.no_grad():
        x = torch.lerp(x0, batch["x1"], t[:, None])
        v, h = teacher.velocity(x, t), 1e-6

        def u(step):
            return model.network(x + step * v, t + step, s=s)

        slope = (u(h) - u(-h)) / (2 * h)
        expected = (u(0.0) - v - (s - t)[:, None] * slope).square().sum()
    assert float(log["error"]) == pytest.approx(float(expected), rel=1e-6)


def test_the_gradient_of_mean_flow_is_that_of_a_constant_target():
    model = TrajectoryModel(network_of(seed=3), head="mean-velocity", shape=(2,))
    teacher = teacher_of("linear", "velocity")
    objective, batch = MeanFlow(teacher=teacher, power=0.0, difference=None), {"x1": points(8)}
    loss, _ = objective(model, batch, seeded(4))
    found = slopes_of(loss, model.network)
    direction, generator = [], seeded(5)
    for parameter in model.network.parameters():
        direction.append(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))

    def moved(h):
        other = model.like(copy.deepcopy(model.network))
        with torch.no_grad():
            for parameter, towards in zip(other.network.parameters(), direction, strict=True):
                parameter += h * towards
        return other

    # With d = u - target the gradient is 2 d du; targets of moved weights differ, so they are taken from the loss itself.
    generator = seeded(4)
    x0 = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    pair = [objective.times.sample(8, generator, dtype=torch.float64) for _ in range(2)]
    t, s = torch.minimum(*pair), torch.maximum(*pair)
    s = torch.where(torch.rand(8, generator=generator) < 0.75, s, t)
    with torch.no_grad():
        x = torch.lerp(x0, batch["x1"], t[:, None])
        v = teacher.velocity(x, t)
        _, slope = torch.func.jvp(lambda x, t: model.network(x, t, s=s), (x, t), (v, torch.ones_like(t)))
        target = v + (s - t)[:, None] * slope
        up, down = (float((moved(h).network(x, t, s=s) - target).square().sum(1).mean()) for h in (1e-6, -1e-6))
    along = float(
        sum(
            (a * b.flatten()).sum() for a, b in zip(found.split([d.numel() for d in direction]), direction, strict=True)
        )
    )
    assert along == pytest.approx((up - down) / 2e-6, rel=1e-5)
    assert (s > t).any()
    assert (s == t).any()


def test_the_weight_of_mean_flow():
    model = TrajectoryModel(network_of(seed=3), head="mean-velocity", shape=(2,))
    batch = {"x1": points(1)}
    for power, constant in ((0.0, 1e-3), (0.75, 1e-3), (1.0, 0.5)):
        loss, log = MeanFlow(power=power, constant=constant)(model, batch, seeded(1))
        error = float(log["error"])
        assert float(loss) == pytest.approx(error / (error + constant) ** power, rel=1e-9)


class ByClass(nn.Module):
    """A mean velocity that depends on the class alone."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.25, 0.0]], dtype=torch.float64))

    def forward(self, x, t, s=None, label=None):
        return self.table[label] + 0 * x


def test_guidance_without_a_teacher():
    model = TrajectoryModel(ByClass(), head="mean-velocity", shape=(2,), null={"label": 2})
    x0, x1, label = noise(6), noise(6, 1), torch.tensor([0, 1, 0, 1, 1, 0])
    batch = {"x0": x0, "x1": x1, "label": label}
    loss, log = MeanFlow(guidance=3.0, power=0.0)(model, batch, seeded())
    table = model.network.table.detach()
    target = 3 * (x1 - x0) - 2 * table[2]
    expected = (table[label] - target).square().sum(1).mean()
    assert float(log["error"]) == pytest.approx(float(expected), rel=1e-9)
    loss.backward()
    grad = model.network.table.grad
    assert torch.equal(grad[2], torch.zeros(2, dtype=torch.float64))  # the target is a constant
    # Rows without a condition learn the plain velocity, as in the authors' code.
    everything = MeanFlow(guidance=3.0, power=0.0, dropout=1.0)(model, batch, seeded())[1]
    assert float(everything["error"]) == pytest.approx(float((table[2] - (x1 - x0)).square().sum(1).mean()), rel=1e-9)


def test_a_guided_teacher_of_mean_velocities():
    teacher = teacher_of("linear", "velocity", classes=2)
    model = TrajectoryModel(network_of(2), head="mean-velocity", shape=(2,), null={"label": 2})
    batch = {"x1": points(5), "label": torch.tensor([0, 1, 0, 1, 1])}
    objective = MeanFlow(teacher=teacher, guidance=2.0, share=0.0, power=0.0)
    _, log = objective(model, batch, seeded(1))
    generator = seeded(1)
    x0 = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    t = torch.minimum(*(objective.times.sample(5, generator, dtype=torch.float64) for _ in range(2)))
    x = torch.lerp(x0, batch["x1"], t[:, None])
    with torch.no_grad():
        v = teacher.field(2.0)(x, t, Condition({"label": batch["label"]}, {"label": 2}))
        error = (model.velocity(x, t, batch["label"]) - v).square().sum(1).mean()
    assert float(log["error"]) == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("name", ["unet", "sit"])
def test_networks_with_attention_have_mean_velocities(tmp_path, name):
    config = {
        "unet": {"name": "unet", "channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 1},
        "sit": {
            "name": "sit",
            "size": 8,
            "channels": 1,
            "patch": 4,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "learn_sigma": False,
        },
    }[name]
    flow = Flow(networks.build(config), shape=(1, 8, 8))
    task = trajectory_task(flow, torch.randn(16, 1, 8, 8, generator=seeded()), kind="meanflow")
    pr.train(task, tmp_path, iterations=2, batch=4, **QUIET)
    assert all(bool(p.isfinite().all()) for p in task.flow.network.parameters())


@pytest.mark.parametrize("reach", [1e-2, 1e-3])
def test_differences_come_near_the_derivative(reach):
    exact, batch = exact_model("linear", "velocity", "mean-velocity"), {"x1": points(64)}
    errors = [
        float(MeanFlow(teacher=exact, share=1.0, power=0.0, difference=step)(exact, batch, seeded(1))[1]["error"])
        for step in (reach, 2 * reach)
    ]
    assert errors[0] < errors[1] < 0.05
    # Neither time leaves the interval, nor comes after s.
    seen = []

    class Looks(nn.Module):
        def forward(self, x, t, s=None):
            seen.append((t, s))
            return exact.network(x, t, s)

    looking = TrajectoryModel(Looks(), path="linear", predicts="velocity", head="mean-velocity", shape=(2,))
    MeanFlow(teacher=exact, difference=0.2)(looking, batch, seeded(1))
    for t, s in seen:
        assert float(t.min()) >= 0
        assert float(t.max()) <= 1
        assert bool((s >= t).all())


def test_refused_mean_flows():
    batch = {"x1": points(4)}
    for model in (model_of("linear", "velocity"), teacher_of("linear", "velocity")):
        with pytest.raises(ValueError, match="trains a TrajectoryModel with head='mean-velocity'"):
            MeanFlow()(model, batch, seeded())
    with pytest.raises(ValueError, match="share: "):
        MeanFlow(share=1.5)
    for wrong in ({"power": -1.0}, {"constant": 0.0}):
        with pytest.raises(ValueError, match="power, constant: "):
            MeanFlow(**wrong)
    with pytest.raises(ValueError, match="difference: "):
        MeanFlow(difference=0.0)


# What is asked, in which mode and how often


class Doubled(nn.Module):
    """A codec that counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def encode(self, x):
        self.calls += 1
        return x / 2

    def decode(self, x):
        return 2 * x


def test_data_are_encoded_once_a_batch():
    codec = Doubled()
    teacher = teacher_of(codec=codec)
    task = trajectory_task(teacher, points(64), kind="ctm", times=6)
    list(task.updates({"x1": points(8)}, seeded()))
    assert codec.calls == 1
    assert task.flow.codec is codec
    assert task.result().codec is codec


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_teacher_and_average_compute_in_the_runs_precision(tmp_path, precision):
    teacher = teacher_of(dtype=torch.float32)
    seen = []
    teacher.network.outputs.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    task = trajectory_task(teacher, points(64, torch.float32), kind="ctm", times=6)
    task.average.network.outputs.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    pr.train(task, tmp_path, iterations=1, batch=8, precision=precision, **QUIET)
    assert (torch.bfloat16 in seen) == (precision == "bf16")  # validation is in full precision


@pytest.mark.parametrize("kind", ["ctm", "meanflow"])
def test_training_leaves_the_teacher_in_evaluation_mode(tmp_path, kind):
    teacher = teacher_of(dtype=torch.float32)
    teacher.eval()
    pr.train(trajectory_task(teacher, points(64, torch.float32), kind=kind), tmp_path, iterations=1, batch=8, **QUIET)
    assert not teacher.network.training


@pytest.mark.parametrize("shows", ["estimate", "jump"])
@pytest.mark.parametrize("own", [False, True])
def test_what_the_discriminator_is_shown(shows, own):
    shown = []

    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            shown.append(x.detach())
            return self.weight * x.square().sum(dim=1, keepdim=True)

    law = jump_times(model_of(), 5, favour_long=False) if own else None
    task = grown(ctm_task(adversarial=Adversarial(Judge(), shows=shows, times=law), adaptive=False))
    network, batch = task.flow.network, task.data.fetch(torch.arange(16))
    if not own:
        _, compared, x1 = by_hand(copy.deepcopy(task), batch, 3)
        if shows == "jump":
            assert not torch.allclose(compared.estimate, x1)
    shown.clear()
    update = next(task.updates(batch, seeded(3)))
    assert torch.allclose(shown[0], compared.estimate) == (shows == "estimate") if not own else len(shown) == 1
    # Its gradient is that of the whole way, by differences of the value.
    alone = copy.deepcopy(task)
    alone.adversarial = None
    rest = next(alone.updates(batch, seeded(3)))
    found = slopes_of(update.loss, network) - slopes_of(rest.loss, alone.flow.network)
    named = [
        p
        for p, g in zip(
            network.parameters(),
            torch.autograd.grad(
                next(task.updates(batch, seeded(3))).loss, list(network.parameters()), allow_unused=True
            ),
            strict=True,
        )
        if g is not None
    ]
    along = torch.randn(sum(p.numel() for p in named), generator=seeded(8), dtype=torch.float64)
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, way in zip(named, along.split([p.numel() for p in named]), strict=True):
                parameter += step * way.view_as(parameter)
        values.append(float(next(task.updates(batch, seeded(3))).log["adversarial"]))
    assert float(found @ along) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_an_unknown_show():
    with pytest.raises(ValueError, match="shows"):
        Adversarial(make_discriminator((2,)), shows="nothing")
