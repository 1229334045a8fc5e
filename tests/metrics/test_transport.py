import builtins

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance

from pantarhei.metrics import energy_distance, sliced_wasserstein, wasserstein

sizes = st.integers(1, 12)


def draw(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(n=sizes, m=sizes, seed=st.integers(0, 1000))
def test_on_the_line_all_sizes_agree_with_scipy(n, m, seed):
    a, b = draw(n, 1, seed), draw(m, 1, seed + 1) + 0.5
    expected = wasserstein_distance(a[:, 0].numpy(), b[:, 0].numpy())
    assert sliced_wasserstein(a, b, p=1, projections=2) == pytest.approx(expected)
    assert wasserstein(a, b, p=1) == pytest.approx(expected)
    assert energy_distance(a, b) == pytest.approx(scipy_energy(a[:, 0].numpy(), b[:, 0].numpy()) ** 2, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=sizes, m=sizes, p=st.sampled_from([1.0, 2.0, 3.0]), seed=st.integers(0, 1000))
def test_on_the_line_sliced_and_exact_agree(n, m, p, seed):
    a, b = draw(n, 1, seed), draw(m, 1, seed + 1)
    assert sliced_wasserstein(a, b, p=p, projections=1) == pytest.approx(wasserstein(a, b, p), rel=1e-6)


def test_a_translation_costs_its_length():
    x, shift = draw(40, 5, 0), torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    assert wasserstein(x, x + shift, p=2) == pytest.approx(5)
    sliced = sliced_wasserstein(x, x + shift, projections=20_000, generator=torch.Generator().manual_seed(0))
    assert sliced == pytest.approx(5 / 5**0.5, rel=0.01)


def test_repeating_points_changes_nothing():
    a, b = draw(6, 3, 0), draw(4, 3, 1)
    for measure in (lambda x, y: wasserstein(x, y, 2), energy_distance):
        assert measure(a.repeat(2, 1), b.repeat(3, 1)) == pytest.approx(measure(a, b), rel=1e-6)


def test_equal_sets_are_at_distance_zero():
    x = draw(50, 40, 0)
    assert wasserstein(x, x[torch.randperm(50)]) == 0
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert energy_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)


def test_unbiased_energy_distance_is_centred_for_equal_laws():
    values = torch.tensor(
        [energy_distance(draw(20, 3, 2 * s), draw(30, 3, 2 * s + 1), unbiased=True) for s in range(300)]
    )
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    assert (values < 0).any()


def test_directions_come_from_the_generator():
    a, b = draw(30, 4, 0), draw(30, 4, 1) * 2
    first, again, other = (sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert first == again != other


def test_without_pot_different_sizes_say_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def no_pot(name, *args, **kwargs):
        if name == "ot":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pot)
    assert wasserstein(draw(4, 2, 0), draw(4, 2, 1)) > 0
    with pytest.raises(ImportError, match=r"pip install .*\[ot\]"):
        wasserstein(draw(4, 2, 0), draw(5, 2, 1))


def test_bad_input_is_refused():
    x = draw(5, 2, 0)
    with pytest.raises(ValueError, match="p must"):
        wasserstein(x, x, p=0.5)
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(x, x, projections=0)
    with pytest.raises(ValueError, match="at least 2"):
        energy_distance(x[:1], x, unbiased=True)
