"""Laws of training times: which jumps are drawn, how often, on which grid, and how the grid grows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from pantarhei.flow import FlowMatching, TrajectoryModel
from pantarhei.flow.paths import EDM
from pantarhei.straighten.denoising_term import DenoisingTimes, denoising_objective
from pantarhei.straighten.jump_times import Curriculum, JumpTimes, jump_times, noise_levels

GRID = tuple(i / 10 for i in range(11))
ROWS = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def model(path="edm", predicts="edm"):
    return TrajectoryModel(nn.Identity(), path=path, predicts=predicts, shape=(2,))


def numbers(times, grid=GRID):
    """Which node each time is; fails for a time between nodes."""
    nodes = torch.tensor(grid, dtype=times.dtype)
    found = torch.searchsorted(nodes, times.contiguous())
    assert torch.equal(nodes[found.clamp(max=len(grid) - 1)], times)
    return found


def as_likely(found, weights):
    """Counts have these probabilities, by a chi-square test that fails once in 10,000 right laws."""
    counts = torch.bincount(found, minlength=len(weights)).double()
    expected = torch.tensor(weights, dtype=torch.float64)
    expected = expected / expected.sum() * counts.sum()
    assert not bool(counts[expected == 0].any())
    kept = expected > 0
    assert counts[kept].sum() == len(found)
    if kept.sum() == 1:
        return
    assert chisquare(counts[kept].numpy(), expected[kept].numpy()).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(2, 30),
    span=st.sampled_from(["soft", "local", "global"]),
    longest=st.none() | st.integers(1, 29),
    favour_long=st.booleans(),
    per_row=st.booleans(),
    to_end=st.booleans(),
    normal=st.sampled_from([None, (-1.1, 2.0)]),
)
def test_jumps_lie_on_the_grid_in_order(seed, nodes, span, longest, favour_long, per_row, to_end, normal):
    law = jump_times(
        model(),
        nodes,
        span=span,
        longest=None if longest is None else min(longest, nodes - 1),
        favour_long=favour_long,
        per_row=per_row,
        to_end=to_end,
        normal=normal,
    )
    draw = law.draw(50, seeded(seed), dtype=torch.float64)
    assert draw.nodes.shape[1:] == draw.t.shape == draw.u.shape == draw.s.shape == (50,)
    assert torch.equal(draw.t, draw.nodes[0])
    assert torch.equal(draw.u, draw.nodes[-1])
    way = numbers(draw.nodes.flatten(), law.grid).reshape(draw.nodes.shape)
    t, u, s = way[0], way[-1], numbers(draw.s, law.grid)
    assert bool((t < u).all())
    assert bool((u <= s).all())
    # The teacher takes one node after another and then waits.
    steps = way.diff(dim=0)
    assert bool(((steps == 1) | ((steps == 0) & (way[:-1] == u))).all())
    k = u - t
    assert int(k.max()) <= (law.longest or nodes - 1)
    assert len(draw.nodes) == int(k.max()) + 1
    if span == "local":
        assert bool((k == 1).all())
    elif not per_row:
        assert bool((k == k[0]).all())
    if to_end:
        assert bool((s == nodes - 1).all())
    elif span == "global":
        assert torch.equal(s, u)


@pytest.mark.parametrize("favour_long", [True, False])
def test_how_far_the_teacher_goes(favour_long):
    weights = [0.0, *(float(k) if favour_long else 1.0 for k in range(1, 8))]
    apart = JumpTimes(GRID, per_row=True, favour_long=favour_long, longest=7).draw(ROWS, seeded(), dtype=torch.float64)
    as_likely(numbers(apart.u) - numbers(apart.t), weights)
    one = JumpTimes(GRID, favour_long=favour_long, longest=7)
    generator = seeded(1)
    drawn = [one.draw(2, generator, dtype=torch.float64) for _ in range(3000)]
    as_likely(torch.tensor([len(draw.nodes) - 1 for draw in drawn]), weights)


def test_where_jumps_start_and_land():
    law = JumpTimes(GRID, longest=4)
    rows = law.draw(ROWS, seeded(2), dtype=torch.float64)
    k = len(rows.nodes) - 1
    first, landing = numbers(rows.t), numbers(rows.s)
    as_likely(first, [1.0] * (11 - k))  # 0 to N - 1 - k
    for node in (0, 10 - k):
        of = landing[first == node]
        as_likely(of, [0.0] * (node + k) + [1.0] * (11 - node - k))


def test_one_span_for_all_machines():
    law = JumpTimes(GRID)
    for seed in range(5):
        a, b = (law.draw(6, seeded(own), seeded(seed)) for own in (10, 11))
        assert len(a.nodes) == len(b.nodes)
        assert not torch.equal(a.t, b.t)
    # Without a generator of their own they share the one there is.
    assert torch.equal(law.draw(6, seeded(3)).nodes, law.draw(6, seeded(3)).nodes)


def test_normal_levels():
    flow = model()
    law = jump_times(flow, 12, normal=(-1.1, 2.0), span="local", to_end=True)
    levels = flow.path.sigma(torch.tensor(law.grid, dtype=torch.float64))
    assert levels.tolist() == pytest.approx(list(law.levels))

    def below(level):
        return 0.5 * (1 + math.erf((math.log(level) + 1.1) / (2.0 * math.sqrt(2))))

    weights = [below(a) - below(b) for a, b in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True)]
    drawn = law.draw(ROWS, seeded(), dtype=torch.float64)
    as_likely(numbers(drawn.t, law.grid), weights)
    # With longer spans only starts that leave room are drawn, in the same proportion.
    soft = jump_times(flow, 12, normal=(-1.1, 2.0), longest=5)
    drawn = soft.draw(ROWS, seeded(1), dtype=torch.float64)
    as_likely(numbers(drawn.t, soft.grid), weights[: 12 - (len(drawn.nodes) - 1)])


@pytest.mark.parametrize(("path", "predicts"), [("edm", "edm"), ("linear", "velocity"), ("vp", "noise"), ("vp", "v")])
def test_the_grid_is_edms_on_every_path(path, predicts):
    flow = model(path, predicts)
    law = jump_times(flow, 18)
    assert len(law.grid) == 18
    assert (law.grid[0], law.grid[-1]) == flow.interval
    levels = noise_levels(flow.path, law.grid)
    first, last = (min(max(noise_levels(flow.path, [end])[0], 0.002), 80.0) for end in flow.interval)
    root = [level ** (1 / 7) for level in (first, last)]
    expected = [(root[0] + (root[1] - root[0]) * i / 17) ** 7 for i in range(1, 17)]
    assert levels[1:-1] == pytest.approx(expected, rel=1e-4)


def test_given_nodes():
    draw = JumpTimes(GRID).at(torch.tensor([0, 5]), torch.tensor([3, 1]), torch.tensor([10, 6]), torch.float64)
    assert draw.nodes.tolist() == [[0.0, 0.5], [0.1, 0.6], [0.2, 0.6], [0.3, 0.6]]
    assert draw.s.tolist() == [1.0, 0.6]


def test_the_last_grid_may_be_one_interval():
    draw = JumpTimes((0.0, 1.0)).draw(5, seeded())
    assert draw.nodes.tolist() == [[0.0] * 5, [1.0] * 5]
    assert draw.s.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: JumpTimes((0.5,)), "grid: two or more rising times"),
        (lambda: JumpTimes((0.0, 0.6, 0.5)), "grid: two or more rising times"),
        (lambda: JumpTimes(GRID, span="hard"), "span: "),
        (lambda: JumpTimes(GRID, longest=11), r"longest: must lie in \[1, 10\]"),
        (lambda: JumpTimes(GRID, longest=0), r"longest: must lie in \[1, 10\]"),
        (lambda: JumpTimes(GRID, normal=(0.0, 1.0)), "levels: a normal law"),
        (lambda: jump_times(model(), 11, normal=(0.0, 0.0)), "normal: "),
        (lambda: jump_times(model(), 1), "grid: at least 2 times"),
        (lambda: Curriculum(model(), "ict", 0), "iterations: must be at least 1"),
    ],
)
def test_refused_laws(make, said):
    with pytest.raises(ValueError, match=said):
        make()


# The denoising term


def test_half_of_the_denoising_times_are_edms_and_half_noisier():
    path = EDM()
    law = DenoisingTimes(path, (0.0, 1.0))
    levels = path.sigma(law.sample(40_000, seeded(), dtype=torch.float64))
    edge = (80 ** (1 / 7) + 0.7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert edge == pytest.approx(0.32, abs=0.01)
    # The share above 0.32: all of one half and the normal law's tail of the other.
    tail = 0.5 * math.erfc((math.log(edge) + 1.2) / (1.2 * math.sqrt(2)))
    assert float((levels > edge).double().mean()) == pytest.approx((1 + tail) / 2, abs=0.01)
    # Below it there is the normal law alone.
    low = levels[levels < edge].log()
    assert float((low < -1.2).double().mean()) == pytest.approx(0.5 / (1 - tail), abs=0.02)
    # Far above there is next to nothing but the grid's: even in the root of the level.
    high = levels[levels > 5.0] ** (1 / 7)
    assert float(high.mean()) == pytest.approx((5 ** (1 / 7) + 80 ** (1 / 7)) / 2, abs=0.01)
    assert float(levels.max()) <= 80.0 + 1e-6
    with pytest.raises(ValueError, match="no closed density"):
        law.pdf(torch.tensor(0.5))


@pytest.mark.parametrize("path", ["linear", "vp", "cosine"])
def test_denoising_times_are_levels_on_every_path(path):
    flow = model(path, "edm")
    law = denoising_objective(flow).times
    assert isinstance(law, DenoisingTimes)
    x1 = torch.zeros(20_000, 2, dtype=torch.float64)
    t = FlowMatching(times=law).draw(flow, {"x1": x1}, seeded(1)).t
    levels = flow.path.sigma(t) / flow.path.alpha(t)
    own = EDM().sigma(DenoisingTimes(EDM(), (0.0, 1.0)).sample(20_000, seeded(2), dtype=torch.float64))
    for share in (0.1, 0.4, 0.6, 0.9):
        assert float(levels.quantile(share)) == pytest.approx(float(own.quantile(share)), rel=0.08)
    # A velocity is learned at all times alike.
    plain = denoising_objective(model("linear", "velocity"))
    assert plain.times.quantile(torch.tensor([0.3])) == torch.tensor([0.3])


# Curricula


@pytest.mark.parametrize(("kind", "first", "last"), [("ict", 11, 1281), ("ct", 2, 151)])
@pytest.mark.parametrize("iterations", [8, 1000])
def test_grids_get_finer_and_never_coarser(kind, first, last, iterations):
    law = Curriculum(model(), kind, iterations)
    counts = [len(law(i).grid) for i in range(iterations)]
    assert counts[0] == first
    assert counts == sorted(counts)
    if kind == "ict":  # every doubling lasts as long
        assert counts[-1] == last
        assert [counts.count(1 + 10 * 2**i) for i in range(8)] == [iterations // 8] * 8
    else:
        # ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 with s0 = 2 and s1 = 150.
        for i in range(0, iterations, max(1, iterations // 7)):
            assert counts[i] == math.ceil(math.sqrt(i / iterations * (151**2 - 4) + 4) - 1) + 1
    assert len(law(iterations).grid) == last
    assert len(law(10 * iterations).grid) == last
    assert law(0) is law(0)
    assert law(0).span == "local"
    assert law(0).to_end
    assert (law(0).normal is not None) == (kind == "ict")


def test_a_curriculum_follows_the_model():
    linear = TrajectoryModel(nn.Identity(), path="linear", predicts="velocity", head="consistency", shape=(2,))
    grid = Curriculum(linear, "ct", 10)(5).grid
    assert (grid[0], grid[-1]) == (0.0, 1.0)
