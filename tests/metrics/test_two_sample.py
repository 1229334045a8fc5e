import pytest
import torch

from pantarhei.metrics import c2st, energy_distance, permutation_test


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_c2st_is_a_half_for_one_law_and_one_for_two():
    a, b = torch.randn(300, 2, generator=seeded(0)), torch.randn(300, 2, generator=seeded(1))
    same = c2st(a, b, folds=3, generator=seeded(2))
    assert same == pytest.approx(0.5, abs=0.1)
    assert c2st(a, b + 8, folds=3, generator=seeded(2)) > 0.99


def test_c2st_guesses_half_also_for_sets_of_different_size():
    a, b = torch.randn(400, 2, generator=seeded(0)), torch.randn(100, 2, generator=seeded(1))
    assert c2st(a, b, folds=2, generator=seeded(3)) == pytest.approx(0.5, abs=0.15)


def test_c2st_is_reproducible():
    a, b = torch.randn(60, 2, generator=seeded(0)), torch.randn(60, 2, generator=seeded(1)) + 1
    assert c2st(a, b, folds=2, generator=seeded(5)) == c2st(a, b, folds=2, generator=seeded(5))


def test_p_values_are_uniform_for_one_law_and_small_for_two():
    def p_value(shift, seed):
        g = seeded(seed)
        a, b = torch.randn(15, 2, generator=g), torch.randn(20, 2, generator=g) + shift
        return permutation_test(energy_distance, a, b, permutations=39, generator=g)

    null = torch.tensor([p_value(0.0, seed) for seed in range(60)])
    assert null.mean() == pytest.approx(0.5, abs=0.15)
    assert (null <= 0.1).float().mean() < 0.25
    assert p_value(3.0, 0) == pytest.approx(1 / 40)


def test_bad_input_is_refused():
    x = torch.zeros(9, 2)
    with pytest.raises(ValueError, match="folds"):
        c2st(x, x, folds=1)
    with pytest.raises(ValueError, match="row"):
        c2st(x, x, folds=5)
    with pytest.raises(ValueError, match="permutations"):
        permutation_test(energy_distance, x, x, permutations=0)
