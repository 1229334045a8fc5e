import pytest
import torch

from pantarhei.metrics import memorisation_report, nearest_neighbours


def draw(n, *shape, seed):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [3, 64])
def test_neighbours_are_those_of_the_full_matrix(width):
    a, b = draw(17, width, seed=0), draw(30, width, seed=1)
    distance, index = nearest_neighbours(a, b, k=4)
    expected = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(1)
    torch.testing.assert_close(distance, expected.values[:, :4])
    assert torch.equal(index, expected.indices[:, :4])


def test_a_copy_is_at_distance_exactly_zero():
    train = draw(40, 3, 16, 16, seed=0) + 5
    distance, index = nearest_neighbours(train[[7, 3]], train)
    assert distance.flatten().tolist() == [0, 0]
    assert index.flatten().tolist() == [7, 3]


def test_copies_are_reported_and_fresh_draws_are_not():
    train, held_out = draw(300, 1, 4, 4, seed=0), draw(200, 1, 4, 4, seed=1)
    copied = memorisation_report(train[:50] + 1e-3, train, held_out)
    assert copied.copies
    assert copied.closer == 1
    assert copied.samples_median < copied.held_out_low
    same = memorisation_report(held_out, train, held_out)
    assert not same.copies
    assert same.closer == pytest.approx(0.01, abs=0.01)
    assert same.samples_median == same.held_out_median
    far = memorisation_report(held_out * 3, train, held_out)
    assert not far.copies
    assert far.closer == 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="reference has 2 row"):
        nearest_neighbours(torch.zeros(4, 2), torch.zeros(2, 2), k=3)
    with pytest.raises(ValueError, match="samples has 4 columns and train has 3"):
        memorisation_report(torch.zeros(4, 4), torch.zeros(4, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="held_out has NaN"):
        memorisation_report(torch.zeros(4, 3), torch.zeros(4, 3), torch.full((4, 3), float("nan")))
    with pytest.raises(ValueError, match=r"queries .*shape"):
        nearest_neighbours(torch.zeros(4), torch.zeros(4, 1))
