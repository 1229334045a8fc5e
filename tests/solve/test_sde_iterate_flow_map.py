"""Stochastic equations against exact laws, discrete rollouts, and flow maps with their gradients."""

import math

import pytest
import torch

from pantarhei.solve import flow_map, iterate, sde


@pytest.mark.parametrize("method", ["euler_maruyama", "heun"])
def test_ornstein_uhlenbeck_reaches_its_exact_moments(method):
    x0 = torch.full((40_000, 1), 2.0, dtype=torch.float64)
    end = sde(
        lambda x, t: -x,
        math.sqrt(2),
        x0,
        (0.0, 1.0),
        steps=100,
        method=method,
        generator=torch.Generator().manual_seed(0),
    ).x
    assert end.mean().item() == pytest.approx(2 * math.exp(-1), abs=0.02)
    assert end.var().item() == pytest.approx(1 - math.exp(-2), rel=0.03)


def test_heun_is_of_second_weak_order_for_additive_noise_and_euler_of_first():
    # The mean obeys the noise-free scheme for a linear drift, so zero noise shows the order without sampling error.
    x0 = torch.ones(1, 1, dtype=torch.float64)
    for method, order in (("euler_maruyama", 1), ("heun", 2)):
        errors = [
            abs(sde(lambda x, t: -x, 0.0, x0, (0.0, 1.0), steps=n, method=method).x.item() - math.exp(-1))
            for n in (20, 40)
        ]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_given_noise_is_used_and_draws_are_reproducible():
    x0 = torch.zeros(3, 2)
    noise = torch.randn(10, 3, 2, generator=torch.Generator().manual_seed(1))
    given = sde(lambda x, t: 0 * x, lambda t: 2.0, x0, (0.0, 1.0), steps=10, noise=noise).x
    assert torch.allclose(given, 2 * math.sqrt(0.1) * noise.sum(dim=0), atol=1e-5)
    runs = [sde(lambda x, t: -x, 1.0, x0, steps=5, generator=torch.Generator().manual_seed(7)).x for _ in range(2)]
    assert torch.equal(*runs)


def test_backward_time_and_state_dependent_noise():
    # Time runs down: dX = -(v) dtau keeps the variance of a stationary backward equation.
    x0 = torch.randn(40_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    end = sde(lambda x, t: x, math.sqrt(2), x0, (1.0, 0.0), steps=200, generator=torch.Generator().manual_seed(3)).x
    assert end.var().item() == pytest.approx(1, rel=0.03)
    # Geometric Brownian motion, Ito: the mean stays for zero drift.
    start = torch.ones(40_000, 1, dtype=torch.float64)
    end = sde(lambda x, t: 0 * x, lambda x, t: 0.5 * x, start, steps=100, generator=torch.Generator().manual_seed(4)).x
    assert end.mean().item() == pytest.approx(1, abs=0.01)
    assert end.log().var().item() == pytest.approx(0.25, rel=0.05)


def test_sde_refuses_bad_input():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="method"):
        sde(lambda x, t: x, 1.0, x, method="milstein")
    with pytest.raises(ValueError, match="one draw a step"):
        sde(lambda x, t: x, 1.0, x, steps=3, noise=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="nodes"):
        sde(lambda x, t: x, 1.0, x, (0.0, 0.3, 1.0), steps=2)


def test_iterate_keeps_what_was_asked():
    rollout = iterate(lambda x, c: x * c, torch.ones(2), 5, condition=2.0, every=2)
    assert rollout.kept == (0, 2, 4, 5)
    assert rollout.xs[:, 0].tolist() == [1, 4, 16, 32]
    seen = []
    assert iterate(lambda x: x + 1, torch.zeros(1), 3, every=0, observe=lambda x, n: seen.append(n)).kept == (0, 3)
    assert seen == [0, 1, 2, 3]
    with pytest.raises(FloatingPointError, match="after step 2"):
        iterate(lambda x: x * 1e30, torch.ones(1), 5)
    with pytest.raises(ValueError, match="steps"):
        iterate(lambda x: x, torch.zeros(1), 0)


def shear(x, t):
    """A steady strain with rotation: the map and its gradient are a matrix exponential."""
    a = torch.tensor([[0.3, -1.2], [0.8, -0.3]], dtype=x.dtype)
    return x @ a.T


def grid_2d(n=9):
    axis = torch.linspace(-1, 1, n, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, 2 * axis, indexing="ij"), dim=-1)


@pytest.mark.parametrize("gradient", ["jvp", "grid"])
@pytest.mark.parametrize("t1", [1.3, -0.7])
def test_the_gradient_of_a_linear_flow_map_is_the_matrix_exponential(gradient, t1):
    a = torch.tensor([[0.3, -1.2], [0.8, -0.3]], dtype=torch.float64)
    result = flow_map(shear, grid_2d(), 0.0, t1, gradient=gradient, rtol=1e-9, atol=1e-10)
    truth = torch.linalg.matrix_exp(a * t1)
    assert torch.allclose(result.gradient, truth.expand_as(result.gradient), atol=1e-6)
    assert torch.allclose(result.x1, grid_2d() @ truth.T, atol=1e-7)
    assert result.interval == (0.0, t1)
    if gradient == "grid":
        assert result.spacing == pytest.approx((0.25, 0.5))


def test_the_two_gradients_agree_on_a_nonlinear_flow():
    def pendulum(x, t):
        return torch.stack([x[:, 1], -torch.sin(x[:, 0])], dim=1)

    axis = torch.linspace(-0.02, 0.02, 5, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(axis + 1, axis, indexing="ij"), dim=-1)
    exact = flow_map(pendulum, points, 0.0, 3.0, gradient="jvp")
    grid = flow_map(pendulum, points, 0.0, 3.0, gradient="grid")
    assert torch.allclose(exact.gradient[1:-1, 1:-1], grid.gradient[1:-1, 1:-1], rtol=2e-3, atol=1e-3)
    # An incompressible flow keeps areas.
    assert torch.allclose(torch.linalg.det(exact.gradient), torch.ones(5, 5, dtype=torch.float64), atol=1e-5)


def test_flow_map_refuses_what_is_no_grid():
    with pytest.raises(ValueError, match="grid"):
        flow_map(shear, torch.randn(10, 2), 0.0, 1.0, gradient="grid")
    with pytest.raises(ValueError, match="evenly"):
        flow_map(shear, torch.randn(4, 4, 2), 0.0, 1.0, gradient="grid")
    with pytest.raises(ValueError, match="spacing"):
        flow_map(shear, grid_2d(), 0.0, 1.0, gradient="grid", spacing=(1.0, 1.0))
