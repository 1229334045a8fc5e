import pytest
import torch

from pantarhei.metrics import Interval, bootstrap, frechet_distance, mean_and_deviation, spread


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def mean(x):
    return float(x.mean())


@pytest.mark.parametrize("method", ["subsample", "percentile", "basic"])
def test_the_interval_of_a_mean_is_as_wide_as_theory_says(method):
    x = torch.randn(400, generator=seeded(0), dtype=torch.float64)
    value, low, high = bootstrap(mean, x, resamples=1000, method=method, generator=seeded(1))
    assert value == pytest.approx(mean(x))
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * float(x.std()) / 20, rel=0.12)


def test_a_higher_level_is_wider():
    x = torch.randn(100, generator=seeded(0))
    wide, narrow = (bootstrap(mean, x, level=level, generator=seeded(1)) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_halves_do_not_carry_the_bias_of_resampled_distances():
    g = seeded(0)
    real, fake = torch.randn(400, 16, generator=g), torch.randn(200, 16, generator=g)

    def distance(x):
        return frechet_distance(real, x)

    honest = bootstrap(distance, fake, resamples=100, generator=seeded(1))
    assert honest.low < honest.value < honest.high
    biased = bootstrap(distance, fake, resamples=100, method="percentile", generator=seeded(1))
    assert biased.low > biased.value  # what the docstring warns of


def test_several_sets_are_resampled_independently():
    a, b = torch.randn(200, generator=seeded(0)), torch.randn(300, generator=seeded(1)) + 2
    interval = bootstrap(lambda x, y: float(y.mean() - x.mean()), a, b, generator=seeded(2))
    assert interval.low < 2 < interval.high


def test_draws_come_from_the_generator():
    x = torch.randn(50, generator=seeded(0))
    assert bootstrap(mean, x, generator=seeded(3)) == bootstrap(mean, x, generator=seeded(3))


def test_spread_over_seeds():
    assert spread([3.0, 1.0, 2.0]) == Interval(2.0, 1.0, 3.0)
    assert spread([4]) == (4, 4, 4)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([5]) == (5, 0)


def test_bad_input_is_refused():
    x = torch.zeros(10)
    for call, message in [
        (lambda: bootstrap(mean, x, level=1.0), "level"),
        (lambda: bootstrap(mean, x, resamples=0), "resamples"),
        (lambda: bootstrap(mean, x, method="magic"), "subsample"),
        (lambda: bootstrap(mean), "at least one set"),
        (lambda: bootstrap(mean, x[:3]), "at least 4 rows"),
        (lambda: spread([]), "at least one"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
