"""First-order paths, inversion and edits by it, tuned grids: against flows whose trajectories are known."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pantarhei.flow import Flow
from pantarhei.flow.grids import make_grid
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.paths import Cosine, Linear, Numbered, SubVP, build_path
from pantarhei.networks import MLP, MLPConfig
from pantarhei.straighten import (
    decode,
    first_order,
    interpolate,
    invert_quickly,
    reconstruct,
    segment_ends,
    slerp,
    straightness,
    translate,
    tuned_grid,
    tuned_grids,
)
from pantarhei.straighten.editing import Reconstruction, inversion_grid
from pantarhei.straighten.tuned_grids import shortest
from straighten.exact_flows import FirstOrder, first_order_flow, goal, mixture_flow, noise, ring

SD = Numbered("scaled-linear")
PATHS = [Linear(), Cosine(), build_path("vp"), SubVP(), build_path("edm"), SD]


# The first-order path through two states


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, len(PATHS) - 1),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
    seed=st.integers(0, 2**20),
    rows=st.booleans(),
)
def test_two_states_determine_their_ends(which, start, end, seed, rows):
    path = PATHS[which]
    low, high = path.regular
    s, e = (torch.tensor(low + (high - low) * u, dtype=torch.float64) for u in (start, end))
    if abs(start - end) < 0.05:
        return
    if rows:
        s, e = s.expand(4), e.expand(4)
    data, eps = noise(4, 3, seed=seed), noise(4, 3, seed=seed + 1)
    x_s, x_e = (path.sample(eps, data, None, t)[0] for t in (s, e))
    found = segment_ends(path, x_s, s, x_e, e)
    size = float(x_s.abs().max() + x_e.abs().max())
    assert torch.allclose(found.data, data, atol=1e-7 * (1 + size))
    assert torch.allclose(found.noise, eps, atol=1e-7 * (1 + size))
    # Seen from the other side it is the same path.
    back = segment_ends(path, x_e, e, x_s, s)
    assert torch.allclose(back.data, found.data, atol=1e-7 * (1 + size))


@pytest.mark.parametrize("path", [Linear(), Cosine()])
def test_from_pure_noise_to_clean_data_the_states_are_the_ends(path):
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    x_s, x_e = noise(5), noise(5, seed=1)
    found = segment_ends(path, x_s, zero, x_e, one)
    assert torch.allclose(found.noise, x_s)
    assert torch.allclose(found.data, x_e)
    # From pure noise to the middle: the noise is the state, the data follow.
    half = torch.tensor(0.5, dtype=torch.float64)
    middle = path.sample(x_s, x_e, None, half)[0]
    assert torch.allclose(segment_ends(path, x_s, zero, middle, half).data, x_e)
    assert torch.allclose(segment_ends(path, middle, half, x_e, one).noise, x_s)


# How first-order a flow is


def exact_straightness(path, first, last):
    """S / E|x_1 - x_0|^2 of x_t = alpha data + sigma noise, by quadrature."""
    data, eps = first
    low, high = last
    t = torch.linspace(low, high, 4001, dtype=torch.float64)
    alpha, sigma = path.alpha(t)[:, None, None], path.sigma(t)[:, None, None]
    x = alpha * data + sigma * eps
    shift = x[-1] - x[0]
    speed = x.diff(dim=0) / float(t[1] - t[0])
    gap = (shift / (high - low) - speed).square().sum(2).mean()
    return float(gap * (high - low) / shift.square().sum(1).mean())


@pytest.mark.parametrize(
    ("path", "predicts"),
    [
        ("linear", "velocity"),
        ("edm", "edm"),
        ("cosine", "velocity"),
        (SD, "noise"),
        ("vp", "noise"),
    ],
)
def test_a_first_order_flow_measures_zero_on_any_path_but_is_not_straight(path, predicts):
    flow, x0 = first_order_flow(path, predicts), noise(48)
    found = first_order(flow, x0, steps=50)
    assert found.data < 1e-12
    assert found.noise < 1e-12
    assert found.straightness < 1e-12
    # Any number of steps is exact; what is left is what the fine solution errs.
    assert max(found.gaps.values()) < 1e-3
    t = torch.tensor(flow.interval[0], dtype=torch.float64)
    eps = FirstOrder(path)(flow.path.sigma(t) * x0, t.expand(48))
    known = exact_straightness(flow.path, (goal(eps), eps), flow.interval)
    assert found.raw_straightness == pytest.approx(known, rel=0.1, abs=1e-9)
    assert (found.raw_straightness > 0.3) == (path != "linear")


def test_a_curved_flow_does_not():
    flow, x0 = mixture_flow(), noise(200)
    found = first_order(flow, x0, steps=50, gaps=(1, 4, 16))
    assert found.data > 0.05
    assert found.noise > 0.05
    variance = float(flow.sample(x0=x0, steps=100, method="heun").var(dim=0).sum())
    assert found.data_relative == pytest.approx(found.data / variance, rel=1e-3)
    assert found.straightness == pytest.approx(straightness(flow, x0, steps=50).normalised)
    assert found.raw_straightness == pytest.approx(found.straightness, rel=0.05)
    assert found.gaps[1] > 5 * found.gaps[4] > 25 * found.gaps[16] > 0
    # Against given samples the gaps are to those.
    given_samples = flow.sample(x0=x0, steps=4, method="euler")
    assert first_order(flow, x0, steps=50, gaps=(4,), teacher=given_samples).gaps[4] < 1e-12
    # The measure does not depend on the form: the same mixture on EDM's path, which starts at t = 1/81.
    edm = first_order(mixture_flow("edm", "edm"), x0, steps=50)
    assert edm.data == pytest.approx(found.data, rel=0.1)


def test_what_first_order_refuses():
    with pytest.raises(ValueError, match="at least 50 are needed"):
        first_order(first_order_flow(), noise(4), steps=20)
    distilled = first_order_flow().like(FirstOrder("linear", "velocity"), coupling="distilled", notes={"steps": 2})
    with pytest.raises(ValueError, match="distilled to 2 steps"):
        first_order(distilled, noise(4))
    interpolant = Flow(MLP(MLPConfig(width=8)), path=Interpolant(), predicts="velocity", shape=(2,))
    with pytest.raises(ValueError, match="affine"):
        first_order(interpolant, noise(4).float())


# Inversion


@settings(max_examples=50, deadline=None)
@given(weight=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_slerp_stays_on_the_sphere(weight, seed):
    a, b = noise(3, 1, 4, 4, seed=seed), noise(3, 1, 4, 4, seed=seed + 1)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    middle = slerp(a, b, weight)
    assert torch.allclose(middle.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    assert torch.allclose(middle, slerp(b, a, 1 - weight))
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(a, b, 1.0), b)

    # Equal steps of the weight are equal angles.
    def angle(x, y):
        return torch.arccos(torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1), dim=1).clamp(-1, 1))

    assert torch.allclose(angle(a, middle), weight * angle(a, b), atol=1e-6)
    # Weights row by row, and rows in one direction, which have no sphere between them.
    rows = torch.tensor([0.0, 0.5, 1.0])
    assert torch.allclose(slerp(a, b, rows)[1], slerp(a, b, 0.5)[1])
    assert torch.allclose(slerp(a, 3 * a, weight), (1 + 2 * weight) * a)


class Counted(nn.Module):
    """Counts calls, and keeps the times."""

    def __init__(self, network):
        super().__init__()
        self.network, self.times = network, []

    def forward(self, x, t, **conditions):
        self.times.append(float(t[0]))
        return self.network(x, t, **conditions)


@pytest.mark.parametrize(("method", "evaluations"), [("euler", 1), ("euler", 4), ("ddim", 3), ("heun-euler", 5)])
def test_an_inversion_takes_the_evaluations_it_says(method, evaluations):
    flow = first_order_flow()
    flow.network = Counted(flow.network)
    grid = inversion_grid(flow, evaluations, method)
    assert all(b < a for a, b in itertools.pairwise(grid))
    assert (grid[0], grid[-1]) == (1 - 1e-3, 0.0)
    found = invert_quickly(flow, goal(noise(4)), evaluations, method=method, noise=noise(4))
    assert len(flow.network.times) == evaluations
    assert flow.network.times[0] == 1 - 1e-3
    assert min(flow.network.times) > 0  # the velocity at pure noise is never asked for
    assert torch.allclose(found, noise(4), atol=1e-9)
    flow.network.times.clear()
    decode(flow, noise(4), evaluations, method=method)
    assert len(flow.network.times) == evaluations
    assert max(flow.network.times) < 1


def test_evaluations_that_cannot_be():
    with pytest.raises(ValueError, match="evaluations: must be at least 1, got 0"):
        inversion_grid(first_order_flow(), 0)
    with pytest.raises(ValueError, match="takes an odd number, got 4"):
        inversion_grid(first_order_flow(), 4, "heun-euler")


@pytest.mark.parametrize(("path", "predicts"), [("linear", "velocity"), ("vp", "noise"), ("edm", "edm"), (SD, "noise")])
def test_a_first_order_flow_is_inverted_exactly(path, predicts):
    flow = first_order_flow(path, predicts)
    t = torch.tensor(flow.interval[0], dtype=torch.float64)
    start = noise(32)
    eps = FirstOrder(path)(flow.path.sigma(t) * start, t.expand(32))
    method = "euler" if path == "linear" else "ddim"
    # With the item's own noise the mixed state is on its trajectory.
    found = reconstruct(flow, goal(eps), (2, 3), method=method, noise=eps)
    assert torch.allclose(found.x0, start, rtol=1e-6, atol=1e-6)
    assert found.error < 1e-12
    # With any other it errs by one part in a thousand.
    other = reconstruct(flow, goal(eps), (1, 1), method=method, generator=torch.Generator().manual_seed(0))
    assert 0 < other.error < 1e-3


def test_reconstruction_of_a_curved_flow_improves_with_evaluations():
    flow, x = mixture_flow(), ring().sample(200, torch.Generator().manual_seed(0))
    errors = [reconstruct(flow, x, (n, n), noise=noise(200)).error for n in (2, 8, 64)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_the_shell_of_the_noise():
    true = noise(600, 64)
    found = [Reconstruction(true, s * true, true, (1, 1)).shell_distance for s in (1.0, 1.05, 2.0)]
    assert found[0] < 0.07 < found[1] < 0.8
    assert found[2] > 0.99


# Edits


def test_between_two_items():
    flow, first = first_order_flow(), noise(3, seed=1)
    second = 1.2 * torch.stack([-first[:, 1], first[:, 0]], dim=1)  # a right angle away
    generator = torch.Generator().manual_seed(0)
    rows = interpolate(flow, goal(first), goal(second), 5, evaluations=(2, 2), generator=generator)
    assert rows.shape == (3, 5, 2)
    for i in range(5):
        assert torch.allclose(rows[:, i], goal(slerp(first, second, i / 4)), atol=0.02)
    with pytest.raises(ValueError, match="both ends are needed, got 1"):
        interpolate(flow, goal(first), goal(second), 1)
    # The condition of the nearer end holds in between.
    labelled = first_order_flow(classes=10)
    zero, five = torch.zeros(3, dtype=torch.long), torch.full((3,), 5)
    ends = (goal(first, zero), goal(second, five))
    rows = interpolate(labelled, *ends, 4, evaluations=(1, 1), condition=(zero, five))
    for i, label in enumerate((zero, zero, five, five)):
        assert torch.allclose(rows[:, i], goal(slerp(first, second, i / 3), label), atol=0.02)


def draws():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("keep_noise", [True, False])
@pytest.mark.parametrize("path", ["linear", SD])
def test_translation_keeps_the_noise_and_changes_the_condition(path, keep_noise):
    flow = first_order_flow(path, "velocity" if path == "linear" else "noise", classes=10)
    source, target = torch.tensor([0, 1, 2]), torch.tensor([4, 4, 0])
    x = goal(noise(3), source)
    method = "euler" if path == "linear" else "ddim"
    found = translate(
        flow, x, source, target, evaluations=(3, 2), method=method, keep_noise=keep_noise, generator=draws()
    )
    # A schedule that leaves some data in its noisiest state carries a little of the old ones along.
    assert torch.allclose(found, goal(noise(3), target), atol=0.01 if path == "linear" else 0.5)
    same = translate(
        flow, x, source, source, evaluations=(3, 2), method=method, keep_noise=keep_noise, generator=draws()
    )
    assert torch.allclose(same, x, atol=0.01 if path == "linear" else 0.5)
    with pytest.raises(ValueError, match="nothing to translate to"):
        translate(first_order_flow(), x, source, target)


# Tuned grids


@settings(max_examples=60, deadline=None)
@given(count=st.integers(3, 8), data=st.data())
def test_the_cheapest_way_is_found(count, data):
    steps = data.draw(st.integers(1, count - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    cost = torch.full((count, count), float("inf"), dtype=torch.float64)
    rows, columns = torch.triu_indices(count, count, 1)
    cost[rows, columns] = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    times = [i / (count - 1) for i in range(count)]

    def price(way):
        return sum(float(cost[a, b]) for a, b in itertools.pairwise(way))

    ways = [(0, *inner, count - 1) for inner in itertools.combinations(range(1, count - 1), steps - 1)]
    best = min(ways, key=price)
    assert shortest(times, cost, steps) == tuple(times[i] for i in best)


@pytest.mark.parametrize(("path", "predicts"), [("linear", "velocity"), ("edm", "edm")])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_tuned_grid_is_never_worse_than_those_it_is_compared_with(path, predicts, steps):
    flow, x0 = mixture_flow(path, predicts), noise(32)
    low, high = flow.interval
    grid = tuned_grid(flow, steps, x0, nodes=32)
    assert len(grid) == steps + 1
    assert grid[0] == low
    assert grid[-1] == pytest.approx(high)
    assert all(b > a for a, b in itertools.pairwise(grid))
    fine = flow.sample(x0=x0, steps=64, method="edm", final="state")
    others = [make_grid(steps, (low, high), kind=kind, path=flow.path) for kind in ("uniform", "logsnr")]
    errors = [
        float((flow.sample(x0=x0, steps=tuple(nodes), method="ddim", final="state") - fine).square().mean())
        for nodes in (grid, *others)
    ]
    # The fine solution that it was tuned by is a coarser one.
    assert errors[0] <= 1.02 * min(errors[1:]) + 1e-4


def test_the_summed_cost_of_the_grid_that_is_found(monkeypatch):
    kept = []

    def spy(times, cost, steps):
        found = shortest(times, cost, steps)
        kept.append((times, cost, found))
        return found

    monkeypatch.setattr(tuned_grids, "shortest", spy)
    flow = mixture_flow()
    tuned_grid(flow, 4, noise(32), nodes=32)
    generator = torch.Generator().manual_seed(0)
    for times, cost, found in kept:

        def price(nodes, times=times, cost=cost):
            return sum(float(cost[times.index(a), times.index(b)]) for a, b in itertools.pairwise(nodes))

        uniform = [min(times, key=lambda t, i=i: abs(t - i / 4)) for i in range(5)]
        assert price(found) <= price(uniform)
        for _ in range(100):
            inner = sorted((1 + torch.randperm(len(times) - 2, generator=generator)[:3]).tolist())
            assert price(found) <= price([0.0, *(times[i] for i in inner), 1.0]) + 1e-12


def test_a_tuned_grid_samples_better_than_an_even_one():
    flow, x0 = mixture_flow(), noise(500, seed=4)
    grid = tuned_grid(flow, 4, noise(32))
    fine = flow.sample(x0=x0, steps=200, method="heun")
    errors = [float((flow.sample(x0=x0, steps=s, method="euler") - fine).square().mean()) for s in (grid, 4)]
    assert errors[0] < 0.8 * errors[1]
    for steps in (0, 64):
        with pytest.raises(ValueError, match="steps: must lie in 1 to 63"):
            tuned_grid(flow, steps, x0)


def test_a_tuned_grid_of_a_first_order_flow_costs_nothing():
    flow = first_order_flow("linear", "velocity", classes=2)
    label = torch.tensor([0, 1] * 4)
    grid = tuned_grid(flow, 3, noise(8), condition=label, guidance=1.5, nodes=16)
    assert len(grid) == 4
