import pytest
import torch
from scipy.linalg import sqrtm

from pantarhei.metrics import frechet_distance, moments


def gaussian(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_moments(n, mean, covariance, seed=0):
    """A set whose sample mean and covariance are exactly the given ones."""
    d = len(mean)
    x = gaussian(n, d, seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_moments_are_those_asked_for():
    mean, covariance = torch.tensor([1.0, -2.0]).double(), torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    got_mean, got_covariance = moments(with_moments(50, mean, covariance))
    torch.testing.assert_close(got_mean, mean)
    torch.testing.assert_close(got_covariance, covariance)


def test_commuting_covariances_have_a_closed_form():
    a_std, b_std = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.5, 0.5]).double()
    shift = torch.tensor([1.0, 0.0, -2.0]).double()
    a = with_moments(40, torch.zeros(3).double(), torch.diag(a_std**2), seed=1)
    b = with_moments(60, shift, torch.diag(b_std**2), seed=2)
    expected = shift.square().sum() + (a_std - b_std).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("rows", [200, 6])  # 6 rows of 10 columns: covariances without full rank
def test_agrees_with_the_matrix_square_root_of_scipy(rows):
    a, b = gaussian(rows, 10, 3) @ gaussian(10, 10, 4), gaussian(rows, 10, 5) + 0.3
    (mean_a, cov_a), (mean_b, cov_b) = moments(a), moments(b)
    root = sqrtm((cov_a @ cov_b).numpy() + 1e-12 * torch.eye(10).numpy()).real
    expected = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()) - 2 * float(root.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_is_a_distance():
    a, b = gaussian(30, 8, 0), gaussian(40, 8, 1) * 2
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(moments(a), b) == frechet_distance(a, b) > 0


def test_float32_features_lose_nothing_more_than_their_rounding():
    a, b = gaussian(100, 16, 0) + 50, gaussian(100, 16, 1) + 50
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.full((5, 2), float("nan")), torch.zeros(5, 2), "a has NaN"),
        (torch.zeros(5, 2), torch.zeros(1, 2), "b has 1 row"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "2 columns and b has 3"),
        (torch.zeros(5, 1, 8, 8), torch.zeros(5, 3), "flatten"),
        ((torch.zeros(2), torch.zeros(3, 3)), torch.zeros(5, 2), "mean"),
    ],
)
def test_bad_input_is_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="features"):
        moments([[1.0, 2.0]])
    with pytest.raises(TypeError, match="pair"):
        frechet_distance("features", torch.zeros(3, 2))
