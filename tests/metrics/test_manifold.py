import pytest
import torch

from pantarhei.metrics import density_coverage, precision_recall
from pantarhei.metrics.distances import distance_blocks, kth_neighbour_distances


def draw(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(real, fake, k):
    def radii(x):
        return torch.cdist(x, x).sort(1).values[:, k]

    distances = torch.cdist(real, fake)
    in_real, in_fake = distances <= radii(real)[:, None], distances <= radii(fake)
    precision, recall = in_real.any(0).double().mean(), in_fake.any(1).double().mean()
    density, coverage = in_real.double().sum() / k / len(fake), in_real.any(1).double().mean()
    return [float(x) for x in (precision, recall, density, coverage)]


@pytest.mark.parametrize("width", [2, 40])  # exact differences, and the matrix product
def test_agrees_with_the_definition(width):
    real, fake = draw(70, width, 0), 0.8 * draw(50, width, 1) + 0.3
    expected = brute_force(real, fake, 4)
    got = [*precision_recall(real, fake, k=4), *density_coverage(real, fake, k=4)]
    assert got == pytest.approx(expected)


def test_a_few_points_of_a_ring_have_precision_but_hardly_recall():
    angle = torch.linspace(0, 6.283, 100)[:-1]
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    collapsed = ring[:5] * 1.0001
    precision, recall = precision_recall(ring, collapsed)
    assert precision == 1
    assert recall < 0.15
    assert density_coverage(ring, collapsed).coverage < 0.2


def test_equal_and_disjoint_sets():
    x = draw(50, 3, 0)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    assert density_coverage(x, x + 100) == (0, 0)


def test_equal_laws_have_density_one_and_the_coverage_of_the_paper():
    density, coverage = density_coverage(draw(1500, 4, 0), draw(1500, 4, 1), k=5)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.015)


def test_blocks_do_not_change_the_result():
    a, b = draw(33, 5, 0), draw(21, 5, 1)
    whole = torch.cat([d for _, d in distance_blocks(a, b)])
    parts = [(rows, d) for rows, d in distance_blocks(a, b, block=21 * 4)]
    assert len(parts) == 9
    torch.testing.assert_close(torch.cat([d for _, d in parts]), whole)
    torch.testing.assert_close(kth_neighbour_distances(a, 3, block=33 * 4), kth_neighbour_distances(a, 3))


def test_the_product_form_survives_a_far_origin():
    a, b = draw(20, 64, 0), draw(20, 64, 1)
    near, far = (torch.cat([d for _, d in distance_blocks(a + s, b + s)]) for s in (0, 1e4))
    torch.testing.assert_close(far, near, rtol=1e-9, atol=0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="real has 3 row"):
        precision_recall(draw(3, 2, 0), draw(9, 2, 0), k=3)
    with pytest.raises(ValueError, match="k must be"):
        density_coverage(draw(9, 2, 0), draw(9, 2, 0), k=0)
    with pytest.raises(ValueError, match="columns"):
        precision_recall(draw(9, 2, 0), draw(9, 3, 0))
