import pytest
import torch

from pantarhei.metrics import kernel_distance


def draw(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_the_u_statistic_written_out():
    a, b = draw(5, 3, 0), draw(5, 3, 1) + 1

    def kernel(x, y):
        return (x @ y / 3 + 1) ** 3

    within = [sum(kernel(s[i], s[j]) for i in range(5) for j in range(5) if i != j) / 20 for s in (a, b)]
    between = sum(kernel(x, y) for x in a for y in b) / 25
    result = kernel_distance(a, b)
    assert result.mean == pytest.approx(float(within[0] + within[1] - 2 * between))
    assert result.std == 0


def test_degree_one_measures_the_difference_of_means():
    shift = torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    values = [kernel_distance(draw(400, 4, 2 * s), draw(400, 4, 2 * s + 1) + shift, degree=1).mean for s in range(5)]
    assert sum(values) / 5 == pytest.approx(1.0, abs=0.1)  # |shift|^2 / D


def test_unbiased_for_equal_laws_whatever_the_size():
    for n in (10, 50):
        values = torch.tensor([kernel_distance(draw(n, 4, 2 * s), draw(n, 4, 2 * s + 1)).mean for s in range(200)])
        assert abs(values.mean()) < 4 * values.std() / 200**0.5
        assert (values < 0).any()


def test_subsets_are_reproducible_and_scatter():
    a, b = draw(60, 4, 0), draw(80, 4, 1) * 1.5
    first = kernel_distance(a, b, subset_size=20, subsets=30, generator=torch.Generator().manual_seed(7))
    again = kernel_distance(a, b, subset_size=20, subsets=30, generator=torch.Generator().manual_seed(7))
    assert first == again
    assert first.std > 0
    whole = kernel_distance(a, b[:60]).mean
    assert abs(first.mean - whole) < 3 * first.std


@pytest.mark.parametrize("options", [{"degree": 0}, {"subset_size": 1}, {"subsets": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kernel_distance(draw(5, 2, 0), draw(5, 2, 1), **options)
