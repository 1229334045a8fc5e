"""Models of jumps: exact on Gaussians, fields at s = t, gamma-sampling, guidance, what is kept, what is refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pantarhei as pr
from flow.exact_jumps import GaussianJumps, data_law, exact_model, random_times
from pantarhei.flow import Condition, Flow, FlowMatching, Guidance, Provenance, TrajectoryModel, on_path
from pantarhei.flow.grids import solver_grid
from pantarhei.flow.heads import CTM, Consistency, MeanVelocity, build_head
from pantarhei.flow.jumps import Move, gamma_moves, renoised, two_jumps
from pantarhei.flow.numbered import join, numbered_samples
from pantarhei.flow.paths import EDM, Linear, build_path
from pantarhei.networks import MLP, MLPConfig
from pantarhei.straighten import trajectory_task

PATHS = [
    ("linear", "velocity"),
    ("linear", "data"),
    ("edm", "edm"),
    ("ve", "noise"),
    ("vp", "noise"),
    ("vp", "score"),
    ("cosine", "v"),
    ("sub-vp", "data"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, dimension=2, seed=0):
    return torch.randn(count, dimension, generator=seeded(seed), dtype=torch.float64)


def small(path="linear", predicts="velocity", head="ctm", classes=0, dtype=torch.float64, seed=0, **options):
    """A model around an untrained network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP(MLPConfig(width=16, layers=2, classes=classes, second_time=head != "consistency")).to(dtype)
    null = {"label": classes} if classes else None
    return TrajectoryModel(network, path=path, predicts=predicts, head=head, shape=(2,), null=null, **options)


def states(model, t, count=None, seed=1):
    """Exact states of the Gaussian at times (B,)."""
    network = model.network
    mean, deviation = network.law(t)
    return mean + deviation * noise(count or len(t), seed=seed)


# Jumps


@pytest.mark.parametrize(("path", "predicts"), PATHS)
def test_jumps_of_an_exact_network_are_exact_and_compose(path, predicts):
    model = exact_model(path, predicts)
    t, u, s = random_times(model.interval, 40)
    x = states(model, t)
    goal = model.network.goal(x, t, s)
    assert torch.allclose(model.jump(x, t, s), goal, rtol=1e-6, atol=1e-7)
    halfway = model.jump(x, t, u)
    assert torch.allclose(model.jump(halfway, u, s), goal, rtol=1e-6, atol=1e-7)
    assert torch.equal(model.jump(x, t, t), x)
    # From the first time to the last, as numbers.
    low, high = model.interval
    rows = torch.full((40,), low, dtype=torch.float64)
    start = states(model, rows)
    end = model.network.goal(start, rows, torch.full_like(rows, high))
    assert torch.allclose(model.jump(start, low, high), end, rtol=1e-6, atol=1e-7)


def test_mean_velocities_of_an_exact_network_compose_too():
    model = exact_model(head="mean-velocity")
    t, u, s = random_times(model.interval, 40)
    x = states(model, t)
    assert torch.allclose(model.jump(model.jump(x, t, u), u, s), model.network.goal(x, t, s), rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), at=st.floats(0, 1))
def test_a_jump_nowhere_gives_the_state_back(seed, at):
    heads = [("linear", "velocity", "ctm"), ("linear", "velocity", "mean-velocity"), ("vp", "noise", "ctm")]
    heads += [("edm", "edm", CTM(outer)) for outer in ("euler", "variance", "mixed")]
    for path, predicts, head in heads:
        model = small(path, predicts, head, seed=seed % 3)
        low, high = model.interval
        t = low + at * (high - low)
        x = 3 * noise(5, seed=seed)
        assert torch.equal(model.jump(x, t, t), x)
    for scaling in ("jump", "boundary"):
        model = small("edm", {"name": "edm", "sigma_data": 0.7}, Consistency(scaling))
        assert torch.allclose(model.jump(x, 1.0, 1.0), x, rtol=1e-14, atol=0)


@pytest.mark.parametrize("head", [CTM(), CTM("variance"), CTM("mixed"), MeanVelocity()])
def test_every_head_starts_along_the_velocity(head):
    # d/ds of the jump at s = t is the field that the model has there, whatever the network.
    edm = not isinstance(head, MeanVelocity)
    model = small("edm" if edm else "linear", "edm" if edm else "velocity", head)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x, h = model.path.sigma(t)[:, None] * noise(3), 1e-8
    slope = (model.jump(x, t, t + h) - x) / h
    with torch.no_grad():
        assert torch.allclose(slope, model.velocity(x, t), rtol=1e-4, atol=1e-5)


def test_outer_forms_leave_the_algebra_of_predictions_right():
    for outer in ("variance", "mixed"):
        model = small("edm", "edm", CTM(outer))
        t, x0, x1 = torch.rand(6, generator=seeded(), dtype=torch.float64), noise(6), noise(6, seed=1)
        target = model.prediction.target(model.path, x0, x1, t)
        x = model.path.sample(x0, x1, None, t)[0]
        ends = model.prediction.ends(model.path, x, t, target)
        assert torch.allclose(ends.data, x1, rtol=1e-6, atol=1e-6)
        assert torch.allclose(ends.noise, x0, rtol=1e-6, atol=1e-6)
        # The published form: sqrt(V(s) / V(t)) x + (1 - s / t) g; halved by 1 / (1 + t) and t / (1 + t) when mixed.
        s = t + (1 - t) / 2
        from_, to = model.path.sigma(t)[:, None], model.path.sigma(s)[:, None]
        g = super(type(model.prediction), model.prediction).ends(model.path, x, t, model.raw(x, t, s, None)).data
        keep = torch.sqrt(((to - 0.002) ** 2 + 0.25) / ((from_ - 0.002) ** 2 + 0.25))
        if outer == "mixed":
            keep = keep / (1 + from_) + from_ / (1 + from_) * (to / from_)
        assert torch.allclose(model.jump(x, t, s), keep * x + (1 - to / from_) * g, rtol=1e-9)


def test_on_the_linear_path_both_heads_are_one():
    a, b = small(head="ctm"), small(head="mean-velocity")
    t, _, s = random_times((0, 1), 30)
    x = noise(30)
    assert torch.allclose(a.jump(x, t, s), b.jump(x, t, s), rtol=1e-9)
    assert torch.allclose(b.jump(x, t, s), x + (s - t)[:, None] * b.raw(x, t, s, None), rtol=1e-12)


def test_the_published_scaling_of_consistency_models():
    model = small("edm", "edm", Consistency("boundary"))
    t = torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64)
    x, rho = noise(3), model.path.sigma(t)[:, None]
    out = model.network(x / torch.sqrt(rho**2 + 0.25), torch.log(t.new_tensor(rho[:, 0].tolist())) / 4)
    skip = 0.25 / ((rho - 0.002) ** 2 + 0.25)
    expected = skip * x + (rho - 0.002) * 0.5 / torch.sqrt(rho**2 + 0.25) * out
    assert torch.allclose(model.jump(x, t, 1.0), expected, rtol=1e-8)


def test_a_consistency_model_is_what_ctm_is_at_the_end():
    network = GaussianJumps("vp", "noise")
    ctm = TrajectoryModel(network, path="vp", predicts="noise", shape=(2,))

    class ToTheEnd(nn.Module):
        def forward(self, x, t):
            return network(x, t, torch.full_like(t, ctm.interval[1]))

    cm = TrajectoryModel(ToTheEnd(), path="vp", predicts="noise", head="consistency", shape=(2,))
    t, _, _ = random_times(ctm.interval, 20)
    x = states(ctm, t)
    assert torch.equal(cm.jump(x, t, ctm.interval[1]), ctm.jump(x, t, ctm.interval[1]))


def test_jumps_do_not_depend_on_the_path():
    model = exact_model("edm", "edm")
    moved = on_path(model, "linear")
    assert isinstance(moved, TrajectoryModel)
    t, _, s = random_times((0.1, 0.9), 20)
    (own, scale), (own_s, scale_s) = (pr.flow.paths.change_path(model.path, moved.path, time) for time in (t, s))
    x = states(model, own)
    there = moved.jump(x / scale[:, None], t, s)
    assert torch.allclose(there * scale_s[:, None], model.jump(x, own, own_s), rtol=1e-6)
    with pytest.raises(ValueError, match="mean velocities are of one path"):
        on_path(small(head="mean-velocity"), "cosine")


def test_gradients_flow_through_a_jump():
    model = small("cosine")
    x = noise(3).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: model.jump(x, 0.2, 0.7), (x,))
    model.jump(x, 0.3, 0.3).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


# The field at s = t


class AtTheSameTime(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, x, t, **named):
        return self.inner(x, t, s=t, **named)


@pytest.mark.parametrize(("path", "predicts", "head"), [("linear", "velocity", "ctm"), ("vp", "noise", "ctm")])
def test_at_the_same_time_it_is_the_flow_of_its_network(path, predicts, head):
    model = small(path, predicts, head, classes=3)
    flow = Flow(AtTheSameTime(model.network), path=path, predicts=predicts, shape=(2,), null={"label": 3})
    x, t, label = noise(6), torch.linspace(0.2, 0.8, 6, dtype=torch.float64), torch.arange(6) % 4
    assert model.interval == flow.interval
    for what in ("velocity", "denoise", "noise", "score"):
        assert torch.equal(getattr(model, what)(x, t, label), getattr(flow, what)(x, t, label)), what
    steps = {"steps": 5, "method": "heun", "condition": label}
    assert torch.equal(model.invert(x, **steps), flow.invert(x, **steps))
    assert torch.equal(model.transport(x, (0.2, 0.6), **steps).x, flow.transport(x, (0.2, 0.6), **steps).x)
    assert torch.equal(model.sample(x0=x, **steps), flow.sample(x0=x, **steps))
    likelihood = {"condition": label, "method": "heun", "steps": 4}
    assert torch.equal(model.log_prob(x, **likelihood), flow.log_prob(x, **likelihood))
    sde = {"epsilon": 0.5, "steps": 4, "condition": label, "method": "euler_maruyama"}
    assert torch.equal(model.sample(x0=x, generator=seeded(), **sde), flow.sample(x0=x, generator=seeded(), **sde))
    losses = [FlowMatching()(f, {"x1": x, "label": label}, seeded())[0] for f in (model, flow)]
    assert torch.equal(*losses)


def test_the_density_and_the_score_of_the_exact_model():
    model = exact_model()
    x = data_law().sample(50, seeded())
    found = model.log_prob(x, method="dopri5", rtol=1e-8, atol=1e-8)
    assert torch.allclose(found, data_law().log_prob(x), atol=1e-5)
    t = torch.full((50,), 0.6, dtype=torch.float64)
    x = states(model, t)
    mean, deviation = model.network.law(t)
    assert torch.allclose(model.score(x, t), -(x - mean) / deviation**2, rtol=1e-8)
    # Jumps from the data end are refused, the ODE goes there, and one jump comes back.
    x0 = model.invert(x, steps=200, method="heun")
    assert torch.allclose(model.sample(x0=x0), x, atol=1e-4)


# Refusals


def test_refused_jumps():
    model, x = small(), noise(4)
    with pytest.raises(ValueError, match="s: jumps lead towards the data"):
        model.jump(x, 0.5, 0.4)
    with pytest.raises(ValueError, match="s: jumps lead towards the data"):
        model.jump(x, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 0.5, 0.2, 0.5]))
    for t, s in ((-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match=r"determines the velocity on \[0, 1\]"):
            model.jump(x, t, s)
    vp = small("vp", "noise")
    with pytest.raises(ValueError, match="of this path, got t = 1"):
        vp.jump(x, 0.5, 1.0)
    with pytest.raises(ValueError, match="s: a consistency model jumps to the end, s = 1, only"):
        small(head="consistency").jump(x, 0.2, 0.9)


def test_a_consistency_model_has_no_field():
    model, x, t = small("edm", "edm", "consistency"), noise(4), torch.full((4,), 0.5, dtype=torch.float64)
    for what in ("velocity", "denoise", "noise", "score"):
        with pytest.raises(ValueError, match="not their velocity"):
            getattr(model, what)(x, t)
    with pytest.raises(ValueError, match="not their velocity"):
        model.transport(x, (0.2, 0.6))
    with pytest.raises(ValueError, match="not their velocity"):
        model.log_prob(x)
    with pytest.raises(ValueError, match="not their velocity"):
        model.invert(x)
    for options in ({"method": "heun"}, {"epsilon": 0.5}):
        with pytest.raises(ValueError, match="not their velocity"):
            model.sample(2, **options)
    with pytest.raises(ValueError, match="a consistency model always jumps to the end"):
        model.sample(2, steps=3, gamma=0.5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: small("trigonometric"), "jumps are along an affine path"),
        (lambda: small(head=CTM("variance")), "outer: 'variance' needs predicts='edm', got 'velocity'"),
        (
            lambda: small("vp", "noise", Consistency("boundary")),
            "scaling: 'boundary' needs predicts='edm', got 'noise'",
        ),
        (lambda: CTM("euler-variance"), "outer: "),
        (lambda: Consistency("edm"), "scaling: "),
        (lambda: build_head("jump"), "head: "),
        (lambda: small(head={"name": "ctm", "inner": "euler"}), "head: "),
    ],
)
def test_refused_models(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_rectified_model_jumps_but_has_no_score():
    model = small(provenance=Provenance(rectified=1))
    assert model.sample(3, generator=seeded()).shape == (3, 2)
    with pytest.raises(ValueError, match="rectified 1x"):
        model.score(noise(3), torch.tensor(0.5, dtype=torch.float64))


# Moves


@settings(max_examples=30, deadline=None)
@given(gamma=st.floats(0, 1), steps=st.integers(1, 6), path=st.sampled_from(["linear", "edm", "vp", "cosine", "ve"]))
def test_where_the_jumps_of_gamma_sampling_land(gamma, steps, path):
    model = small(path, "velocity")
    times = solver_grid(model.path, steps, model.interval, "edm")
    moves = gamma_moves(model.path, times, gamma)
    assert [move.back for move in moves] == pytest.approx(times[1:], abs=1e-12)
    assert all(move.back <= move.to <= times[-1] for move in moves)
    assert moves[-1] == (times[-1], times[-1])
    to, back = (torch.tensor(value, dtype=torch.float64) for value in zip(*moves, strict=True))
    rho, goal = (model.path.sigma(t) / model.path.alpha(t) for t in (to, back))
    assert torch.allclose(rho, math.sqrt(1 - gamma**2) * (goal - goal[-1]) + goal[-1], rtol=1e-6, atol=1e-9)


def test_no_noise_and_all_of_it():
    times = (0.0, 0.3, 0.6, 1.0)
    assert gamma_moves(Linear(), times, 0.0) == [Move(t, t) for t in times[1:]]
    assert gamma_moves(Linear(), times, 1.0) == [Move(1.0, 0.3), Move(1.0, 0.6), Move(1.0, 1.0)]
    assert gamma_moves(Linear(), (0.0, 1.0), 0.7) == [Move(1.0, 1.0)]
    assert two_jumps(times, 2, 1) == [Move(0.6, 0.3), Move(1.0, 1.0)]
    assert two_jumps(times, 3, 0) == [Move(1.0, 0.0), Move(1.0, 1.0)]
    for gamma in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"gamma: must lie in \[0, 1\]"):
            gamma_moves(Linear(), times, gamma)
    for grid in ((0.0,), (0.0, 0.5, 0.5), (0.5, 0.1)):
        with pytest.raises(ValueError, match="steps: two or more rising times"):
            gamma_moves(Linear(), grid)
    for to, back in ((1, 2), (4, 1), (0, 0), (2, -1)):
        with pytest.raises(ValueError, match="to, back: 0 <= back <= to < 4"):
            two_jumps(times, to, back)


@pytest.mark.parametrize(("path", "predicts"), [("linear", "velocity"), ("edm", "edm"), ("vp", "noise")])
@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_every_state_of_gamma_sampling_has_the_law_of_its_time(path, predicts, gamma):
    model, seen = exact_model(path, predicts), {}

    def look(x, t, number):
        seen[t] = x
        return x

    x0 = noise(20_000)
    if model.interval[0] == 0 and path != "linear":  # the first state has some data in it
        low = torch.zeros(len(x0), dtype=torch.float64)
        x0 = states(model, low, seed=0) / model.first_sigma
    found = model.sample(x0=x0, steps=4, gamma=gamma, generator=seeded(3), control=look)
    assert len(seen) == 4
    for t, x in seen.items():
        mean, deviation = model.network.law(torch.full((1,), t, dtype=torch.float64))
        assert torch.allclose((x - mean).mean(0) / deviation, torch.zeros(2, dtype=torch.float64), atol=0.04)
        assert torch.allclose(x.std(0) / deviation, torch.ones(2, dtype=torch.float64), atol=0.03)
    assert torch.equal(found, list(seen.values())[-1])


def test_noise_after_a_jump_to_pure_noise_forgets_everything():
    drawn = noise(5)
    assert torch.equal(renoised(Linear(), noise(5, seed=1), Move(1.0, 0.0), drawn), drawn)
    # And none is added on the spot.
    assert torch.equal(renoised(EDM(), drawn, Move(0.4, 0.4), noise(5, seed=2)), drawn)


# Sampling


def test_a_sample_is_its_jumps():
    model, x0 = small("edm", "edm"), noise(4)
    one = model.sample(x0=x0)
    assert torch.equal(one, model.jump(80.0 * x0, 0.0, 1.0).detach())
    grid = (0.0, 0.35, 0.8, 1.0)
    x = 80.0 * x0
    for t, s in itertools.pairwise(grid):
        x = model.jump(x, t, s)
    for steps in (grid, list(grid)):
        assert torch.equal(model.sample(x0=x0, steps=steps), x.detach())
    assert torch.equal(model.sample(x0=x0, moves=[Move(t, t) for t in grid[1:]]), x.detach())
    assert torch.equal(model.sample(x0=x0, steps=3, grid="uniform"), model.sample(x0=x0, steps=(0, 1 / 3, 2 / 3, 1.0)))
    # EDM's grid is the default on all paths but the linear one: levels from 80 to 0.002.
    assert [move.to for move in small().plan(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    linear = small()
    seen = []
    linear.sample(x0=x0, steps=3, grid="edm", control=lambda x, t, number: (seen.append((t, number)), x)[1])
    levels = [(1 - t) / t for t, _ in seen[:-1]]
    root = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert levels == pytest.approx([(root[0] + (root[1] - root[0]) * i / 3) ** 7 for i in (1, 2)], rel=1e-6)
    assert [number for _, number in seen] == [0, 1, 2]


def test_noise_comes_from_the_generator_or_is_given():
    model, x0 = small(), noise(6)
    drawn = [model.sample(x0=x0, steps=3, gamma=0.5, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    generator = seeded(1)
    stock = [torch.randn(6, 2, generator=generator, dtype=torch.float64) for _ in range(2)]
    asked = []

    def given_noise(number, x):
        asked.append(number)
        return stock[number]

    assert torch.equal(model.sample(x0=x0, steps=3, gamma=0.5, noise=given_noise), drawn[0])
    assert asked == [0, 1]  # none after the last jump
    # Without noise, nothing is drawn.
    before = torch.get_rng_state()
    assert torch.equal(model.sample(x0=x0, steps=3), model.sample(x0=x0, steps=3, gamma=0.0))
    assert torch.equal(before, torch.get_rng_state())
    # Source draws and noise of one generator.
    assert torch.equal(*(model.sample(4, steps=2, gamma=1.0, generator=seeded(5)) for _ in range(2)))


def test_a_consistency_model_is_sampled_with_all_the_noise():
    model, x0 = small("edm", "edm", "consistency"), noise(5)
    assert torch.equal(model.sample(x0=x0), model.jump(80 * x0, 0.0, 1.0).detach())
    found = model.sample(x0=x0, steps=(0.0, 0.4, 1.0), generator=seeded())
    drawn = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    x = renoised(EDM(), model.jump(80 * x0, 0.0, 1.0), Move(1.0, 0.4), drawn)
    assert torch.equal(found, model.jump(x, 0.4, 1.0).detach())
    assert model.draws_noise(steps=2)
    assert not model.draws_noise(gamma=0.0)


@pytest.mark.parametrize("gamma", [None, 0.5])
def test_sample_number_i_does_not_depend_on_the_batch(gamma):
    model = small(dtype=torch.float32)
    assert model.draws_noise(gamma=gamma) == (gamma is not None)
    options = {"seed": 4, "steps": 3, "gamma": gamma}
    whole, parts = (join(numbered_samples(model, range(9), batch=batch, **options)) for batch in (9, 2))
    assert torch.allclose(whole["x1"], parts["x1"], atol=1e-6)


def test_guidance_acts_on_jumps():
    model = exact_model(null={"label": 0})
    x, label = noise(6), torch.tensor([0, 1, 2, -1, 3, 1])
    t, _, s = random_times((0, 1), 6)
    apart = [model.jump(x, t, s, condition) for condition in (label, torch.zeros_like(label))]
    wanted = apart[1] + 2.5 * (apart[0] - apart[1])
    for guidance in (2.5, Guidance(2.5), Guidance(2.5, batched=False)):
        assert torch.allclose(model.jump(x, t, s, label, guidance), wanted, rtol=1e-12)
        assert torch.allclose(
            model.jump(x, 0.3, s.clamp(min=0.3), label, guidance)[0],
            model.jump(x[:1], 0.3, float(s[0].clamp(min=0.3)), label[:1], guidance)[0],
        )
    late = model.jump(x, t, s, label, Guidance(2.5, interval=(0.5, 1.0)))
    assert torch.allclose(late, torch.where((t >= 0.5)[:, None], wanted, apart[0]), rtol=1e-12)
    first = model.jump(x, 0.0, 0.6, label, 2.5)
    found = model.sample(x0=x, steps=(0.0, 0.6, 1.0), condition=label, guidance=2.5)
    assert torch.allclose(found, model.jump(first, 0.6, 1.0, label, 2.5), rtol=1e-12)
    with pytest.raises(ValueError, match="no condition to guide by"):
        model.sample(x0=x, guidance=2.0)


def test_a_control_changes_the_states():
    model, x0 = exact_model(), noise(5)
    known = torch.tensor([True, False])

    def project(x, t, number):
        return torch.where(known, torch.zeros_like(x), x)

    x = model.jump(project(model.jump(x0, 0.0, 0.5), 0.5, 0), 0.5, 1.0)
    assert torch.equal(model.sample(x0=x0, steps=(0.0, 0.5, 1.0), control=project), project(x, 1.0, 1))


def test_other_methods_integrate_the_score():
    model = exact_model("edm", "edm")
    x0 = noise(4000)
    goal = model.network.goal(80 * x0, *(torch.full((4000,), t, dtype=torch.float64) for t in (0.0, 1.0)))
    # EDM's sampler, of second order, ends with a denoising step.
    errors = [float((model.sample(x0=x0, steps=n, method="edm", grid="edm") - goal).abs().max()) for n in (20, 40)]
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.05
    assert torch.allclose(model.sample(x0=x0, method="jump"), goal, rtol=1e-6)
    sde = model.sample(x0=x0, steps=60, epsilon=0.3, method="heun", generator=seeded())
    assert torch.allclose(sde.std(0), goal.std(0), rtol=0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 3, "x0": noise(2)}, "count: 3 samples asked, but x0 has 2 rows"),
        ({}, "count: at least one sample"),
        ({"count": 2, "steps": 0}, "steps: "),
        ({"count": 2, "steps": None}, "steps: jumps have no error control"),
        ({"count": 2, "steps": (0.0, 0.6, 0.4, 1.0)}, "steps: two or more rising times"),
        ({"count": 2, "steps": (0.3, 1.0)}, "steps: "),
        ({"count": 2, "steps": 2, "gamma": 2.0}, r"gamma: must lie in \[0, 1\]"),
        ({"count": 2, "method": "heun", "gamma": 0.5}, "goes with jumps, not with method 'heun'"),
        ({"count": 2, "method": "heun", "moves": [Move(1.0, 1.0)]}, "goes with jumps"),
        ({"count": 2, "final": "denoise"}, "final: the last jump is the sample"),
        ({"count": 2, "transforms": ()}, "transforms: jumps do not take it"),
        ({"count": 2, "moves": [Move(0.5, 0.5), Move(0.2, 0.2)]}, "s: jumps lead towards the data"),
    ],
)
def test_refused_samples(options, said):
    with pytest.raises(ValueError, match=said):
        small().sample(options.pop("count", None), **options)


# What is kept


@pytest.mark.parametrize(
    ("path", "predicts", "head"),
    [
        ("edm", {"name": "edm", "sigma_data": 0.7}, CTM("variance", 0.01)),
        ("edm", "edm", CTM("mixed")),
        ("edm", "edm", Consistency("boundary")),
        ("linear", "velocity", MeanVelocity()),
        ("vp", "noise", CTM()),
    ],
)
def test_a_saved_model_is_the_same_model(tmp_path, path, predicts, head):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLP(MLPConfig(width=8, classes=2, second_time=head.anywhere))
    model = TrajectoryModel(network, path=path, predicts=predicts, head=head, shape=(2,), null={"label": 2})
    again = Flow.from_pretrained(model.save_pretrained(tmp_path / "kept"))
    options = {"x0": noise(4).float(), "condition": torch.tensor([0, 1, 2, 0]), "guidance": 2.0, "steps": 2}
    for other in (again, model.like(model.network), model.like(model.network, teacher="somebody")):
        assert isinstance(other, TrajectoryModel)
        assert (other.head, other.prediction, other.path) == (model.head, model.prediction, model.path)
        assert other.spec() == {**model.spec(), "provenance": other.spec()["provenance"]}
        assert torch.equal(*(m.sample(generator=seeded(), **options) for m in (model, other)))


@pytest.mark.parametrize("kind", ["ctm", "cd", "ict", "meanflow"])
def test_a_run_folder_opens_as_the_model_it_holds(tmp_path, kind):
    flow = Flow(MLP(MLPConfig(width=8)), path="edm", predicts="edm", shape=(2,))
    data = data_law().sample(64, seeded()).float()
    outer = {"outer": "variance"} if kind == "ctm" else {}
    task = trajectory_task(flow, data, kind=kind, times=4, iterations=2, **outer)
    options = {"progress": False, "tensorboard": False, "batch": 16}
    pr.train(task, tmp_path / "run", iterations=2, **options)
    opened, made = pr.load(tmp_path / "run"), task.result()
    assert isinstance(opened, TrajectoryModel)
    assert opened.head == made.head
    assert opened.provenance.notes["method"] == kind
    x0 = noise(6).float()
    assert torch.equal(*(m.sample(x0=x0, steps=2, generator=seeded()) for m in (opened, made)))


def test_condition_rows_are_repeated():
    model = exact_model(null={"label": 0})
    x = noise(3)
    assert torch.equal(model.jump(x, 0.1, 0.8, torch.tensor(2)), model.jump(x, 0.1, 0.8, torch.full((3,), 2)))
    named = Condition({"label": torch.full((3,), 2)}, {"label": 0})
    assert torch.equal(model.jump(x, 0.1, 0.8, named), model.jump(x, 0.1, 0.8, torch.full((3,), 2)))


def test_paths_by_name_and_object():
    assert exact_model(build_path("vp"), "noise").path == build_path("vp")
