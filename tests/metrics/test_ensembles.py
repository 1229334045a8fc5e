import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pantarhei.metrics import crps, energy_score, ensembles, rank_histogram, spread_skill


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(members, truth, fair):
    """The definition, pair by pair: (M, D), (D,) -> Euclidean score of the case."""
    count = len(members)
    within = sum(float((a - b).norm()) for a in members for b in members)
    pairs = count * (count - 1) if fair and count > 1 else count**2
    return sum(float((a - truth).norm()) for a in members) / count - within / (2 * pairs)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 7), n=st.integers(1, 4), d=st.integers(1, 3), fair=st.booleans(), seed=st.integers(0, 999))
def test_scores_are_their_definitions(m, n, d, fair, seed):
    members, truth = draw(m, n, d, seed=seed), draw(n, d, seed=seed + 1)
    members[-1] = members[0]  # equal members are no trouble
    expected = [score(members[:, i], truth[i], fair) for i in range(n)]
    assert energy_score(members, truth, fair=fair).tolist() == pytest.approx(expected)
    single = [sum(score(members[:, i, k, None], truth[i, k, None], fair) for k in range(d)) / d for i in range(n)]
    assert crps(members, truth, fair=fair).tolist() == pytest.approx(single)


def test_one_member_is_a_deterministic_forecast():
    forecast, truth = draw(5, 2, 3), draw(5, 2, 3, seed=1)
    for fair in (True, False):
        assert torch.allclose(energy_score(forecast[None], truth, fair=fair), (forecast - truth).flatten(1).norm(dim=1))
        assert torch.allclose(crps(forecast[None], truth, fair=fair), (forecast - truth).abs().mean((1, 2)))


def test_the_fair_scores_of_a_small_ensemble_are_those_of_its_law():
    # CRPS of N(0, 1) at y: y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi) (Gneiting & Raftery 2007, section 4.2).
    y = 0.7
    phi, below = math.exp(-y * y / 2) / math.sqrt(2 * math.pi), (1 + math.erf(y / math.sqrt(2))) / 2
    exact = y * (2 * below - 1) + 2 * phi - 1 / math.sqrt(math.pi)
    cases = 40_000
    members, truth = draw(3, cases, 1), torch.full((cases, 1), y, dtype=torch.float64)
    for measure in (crps, energy_score):
        values = measure(members, truth)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(cases)
        # the unfair one adds the missing half of the mean distance, E|X - X'| = 2 / sqrt(pi), over M
        assert float(measure(members, truth, fair=False).mean()) == pytest.approx(
            exact + 1 / math.sqrt(math.pi) / 3, abs=0.01
        )


def test_the_true_law_scores_best_and_only_the_energy_score_sees_dependence():
    cases = 4000
    shared = draw(9, cases, 1).expand(-1, -1, 2)
    truth, honest, apart = shared[0], shared[1:], draw(8, cases, 2, seed=1)
    for measure in (crps, energy_score):
        best = float(measure(honest, truth).mean())
        for other in (honest * 0.5, honest * 2, honest + 1, honest.mean(0, keepdim=True)):
            assert best < float(measure(other, truth).mean()) - 0.01
    assert float(energy_score(honest, truth).mean()) < float(energy_score(apart, truth).mean()) - 0.01
    assert float(crps(honest, truth).mean()) == pytest.approx(float(crps(apart, truth).mean()), abs=0.02)


def test_cases_are_scored_alike_in_blocks_of_any_size(monkeypatch):
    members, truth = draw(4, 23, 2, 3), draw(23, 2, 3, seed=1)
    whole = [energy_score(members, truth), crps(members, truth), rank_histogram(members, truth)]
    ratio = spread_skill(members, truth)
    monkeypatch.setattr(ensembles, "_BLOCK", 50)
    blocks = [energy_score(members, truth), crps(members, truth), rank_histogram(members, truth)]
    for one, other in zip(whole, blocks, strict=True):
        assert torch.allclose(one, other)
    assert spread_skill(members, truth) == pytest.approx(ratio)


def test_a_shift_far_from_zero_costs_no_digits():
    members, truth = draw(6, 10, 4), draw(10, 4, seed=1)
    far = 2.0**30
    assert torch.allclose(crps(members + far, truth + far), crps(members, truth), atol=1e-6)
    assert torch.allclose(energy_score(members + far, truth + far), energy_score(members, truth), atol=1e-6)


@pytest.mark.parametrize("bins", [None, 3, 4, 15])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_ranks_of_an_honest_ensemble_are_flat_also_with_ties(bins, rounded):
    states = draw(6, 8000, 2)
    states = states.round() if rounded else states
    counts = rank_histogram(states[1:], states[0], bins, generator=torch.Generator().manual_seed(7))
    count = bins or 6
    assert counts.shape == (count,)
    assert counts.sum() == 16_000
    expected = 16_000 / count
    assert float(((counts - expected) ** 2 / expected).sum()) < count - 1 + 5 * math.sqrt(2 * (count - 1))


def test_ranks_count_the_members_below():
    members = torch.tensor([1.0, 2.0, 3.0])[:, None]
    for truth, rank in ((0.0, 0), (1.5, 1), (2.5, 2), (9.0, 3)):
        assert rank_histogram(members, torch.tensor([truth])).tolist() == [int(k == rank) for k in range(4)]
    assert rank_histogram(members, torch.tensor([1.5]), 2).tolist() == [1, 0]
    tied = [rank_histogram(members, torch.tensor([2.0]), generator=torch.Generator().manual_seed(s)) for s in range(20)]
    assert torch.stack(tied).sum(0)[[0, 3]].tolist() == [0, 0]
    assert (torch.stack(tied).sum(0)[1:3] > 0).all()


def test_a_narrow_ensemble_has_a_valley_of_ranks_and_a_small_ratio():
    states = draw(6, 8000, 2)
    counts = rank_histogram(0.3 * states[1:], states[0])
    assert counts[[0, 5]].min() > 3 * counts[1:5].max()
    assert spread_skill(states[1:], states[0]) == pytest.approx(1, abs=0.02)
    # of variance 0.09, so its mean errs by 1 + 0.09 / 5
    expected = math.sqrt(6 / 5 * 0.09 / (1 + 0.09 / 5))
    assert spread_skill(0.3 * states[1:], states[0]) == pytest.approx(expected, rel=0.02)


def test_the_ratio_of_a_perfect_mean_is_infinite():
    assert spread_skill(torch.tensor([[-1.0], [1.0]]), torch.zeros(1)) == math.inf
    assert math.isnan(spread_skill(torch.zeros(2, 1), torch.zeros(1)))


@pytest.mark.parametrize("measure", [crps, energy_score, rank_histogram, spread_skill])
def test_bad_input_is_refused(measure):
    good = torch.zeros(3, 4, 2)
    with pytest.raises(ValueError, match=r"\(M, N, \.\.\.\).*\(3, 4, 2\) and \(4,\)"):
        measure(good, torch.zeros(4))
    with pytest.raises(ValueError, match="a single forecast"):
        measure(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="at least one member"):
        measure(good[:0], torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least one member, case"):
        measure(good[:, :0], torch.zeros(0, 2))
    with pytest.raises(TypeError, match="truth must be a tensor, got list"):
        measure(good, [0.0])
    with pytest.raises(TypeError, match="real numbers"):
        measure(good + 0j, torch.zeros(4, 2))
    bad = good.clone()
    bad[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match="members has NaN or infinite values in 1 of 4 cases"):
        measure(bad, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="truth has NaN or infinite values in 4 of 4 cases"):
        measure(good, torch.full((4, 2), math.inf))


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="bins"):
        rank_histogram(torch.zeros(3, 4), torch.zeros(4), 0)
    with pytest.raises(ValueError, match="at least 2"):
        spread_skill(torch.zeros(1, 4), torch.zeros(4))
