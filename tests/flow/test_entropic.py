"""Known Schroedinger bridges: their ends, their equations, their limits; Sinkhorn's plan against the closed form."""

import pytest
import torch

import pantarhei as pr
from pantarhei.flow import Fields, GaussianMixture, MixtureField
from pantarhei.flow.entropic import EntropicField, sinkhorn_potentials
from pantarhei.flow.gammas import Brownian
from pantarhei.flow.gaussian_bridge import GaussianBridge
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.paths import Linear

DOUBLE = torch.float64


def gaussian(mean, factor):
    factor = torch.tensor(factor, dtype=DOUBLE)
    return GaussianMixture(torch.ones(1, dtype=DOUBLE), torch.tensor([mean], dtype=DOUBLE), (factor @ factor.T)[None])


SOURCE = gaussian([0.5, -1.0], [[1.0, 0.0], [0.6, 0.7]])
TARGET = gaussian([1.5, 1.0], [[0.8, 0.0], [-0.9, 1.2]])


def moment(t):
    return torch.tensor(t, dtype=DOUBLE)


def points(count=20, seed=0):
    return 1.5 * torch.randn(count, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def nodes(law, count=41, reach=5.5):
    """A rectangle rule in the law's own axes."""
    axis = torch.linspace(-reach, reach, count, dtype=DOUBLE)
    unit = torch.cartesian_prod(axis, axis)
    weights = torch.exp(-0.5 * unit.square().sum(dim=1))
    kept = weights > 1e-6
    return (law.means[0] + unit @ torch.linalg.cholesky(law.covariances[0]).T)[kept], weights[kept]


def test_gaussian_bridge_starts_and_ends_where_it_should():
    bridge = GaussianBridge(SOURCE, TARGET, 0.4)
    for t, law in ((0.0, SOURCE), (1.0, TARGET)):
        assert torch.allclose(bridge.mean(moment(t)), law.means[0])
        assert torch.allclose(bridge.covariance(moment(t)), law.covariances[0])


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_gaussian_marginals_solve_both_fokker_planck_equations(t):
    bridge, t = GaussianBridge(SOURCE, TARGET, 0.4), moment(t)
    covariance = bridge.covariance(t)
    speed = torch.autograd.functional.jacobian(bridge.covariance, t)
    for drift, sign in ((bridge.drift, 1), (bridge.backward_drift, -1)):
        slope = torch.autograd.functional.jacobian(lambda x, f=drift: f(x[None], t)[0], torch.zeros(2, dtype=DOUBLE))
        noise = sign * 2 * bridge.epsilon * torch.eye(2, dtype=DOUBLE)
        assert torch.allclose(slope @ covariance + covariance @ slope.T + noise, speed)
        assert torch.allclose(drift(bridge.mean(t)[None], t)[0], (TARGET.means - SOURCE.means)[0])


def test_gaussian_plan_is_the_entropic_one():
    # Its density is f(x0) g(x1) exp(x0 . x1 / 2 epsilon): the off-diagonal block of the precision is -1 / 2 epsilon.
    bridge = GaussianBridge(SOURCE, TARGET, 0.4)
    upper = torch.cat([bridge.covariance0, bridge.cross], dim=1)
    precision = torch.linalg.inv(torch.cat([upper, torch.cat([bridge.cross.T, bridge.covariance1], dim=1)]))
    assert torch.allclose(precision[:2, 2:], -torch.eye(2, dtype=DOUBLE) / (2 * 0.4))


def test_run_backwards_it_is_the_bridge_between_the_swapped_laws():
    there, back = GaussianBridge(SOURCE, TARGET, 0.4), GaussianBridge(TARGET, SOURCE, 0.4)
    x = points()
    assert torch.allclose(there.backward_drift(x, moment(0.3)), -back.drift(x, moment(0.7)))


def test_limits_of_little_and_much_noise():
    root0, root1 = (torch.linalg.cholesky(law.covariances[0]) for law in (SOURCE, TARGET))
    singular = torch.linalg.svdvals(root0.T @ root1)  # their sum is tr (R S1 R)^1/2, the Bures term
    shift = (TARGET.means - SOURCE.means).square().sum()
    traces = torch.trace(SOURCE.covariances[0] + TARGET.covariances[0])
    assert GaussianBridge(SOURCE, TARGET, 1e-7).cost() == pytest.approx(
        float(shift + traces - 2 * singular.sum()), rel=1e-5
    )
    assert GaussianBridge(SOURCE, TARGET, 1e5).cost() == pytest.approx(float(shift + traces), rel=1e-4)


def test_gaussian_bridge_is_a_network_of_a_flow():
    epsilon = 0.4
    path = Interpolant(Linear(), Brownian(2 * epsilon))
    bridge = GaussianBridge(SOURCE, TARGET, epsilon)
    flow = pr.Flow(
        bridge, path=path, predicts=Fields(names=("drift", "latent"), epsilon=epsilon), source=SOURCE, shape=(2,)
    )
    x, t = points(), torch.linspace(0.1, 0.9, 20, dtype=DOUBLE)
    coupled = MixtureField(TARGET, SOURCE, path, cross=bridge.cross)
    assert torch.allclose(flow.velocity(x, t), coupled(x, t))
    assert torch.allclose(flow.score(x, t), coupled.score(x, t))
    generator = torch.Generator().manual_seed(1)
    x0 = SOURCE.sample(20_000, generator)
    x1 = flow.sample(x0=x0, epsilon="trained", steps=100, generator=generator)
    assert torch.allclose(torch.cov(x1.T), TARGET.covariances[0], atol=0.05)
    assert (x1 - x0).square().sum(dim=1).mean() == pytest.approx(bridge.cost(), rel=0.02)
    a, b = bridge.sample(20_000, generator)
    assert (b - a).square().sum(dim=1).mean() == pytest.approx(bridge.cost(), rel=0.03)


def test_sinkhorn_agrees_with_the_closed_form():
    exact = GaussianBridge(SOURCE, TARGET, 0.5)
    (x0, w0), (x1, w1) = nodes(SOURCE), nodes(TARGET)
    found = sinkhorn_potentials(x0, x1, 0.5, weights0=w0, weights1=w1, tolerance=1e-5)
    assert found.cost() == pytest.approx(exact.cost(), rel=1e-4)
    a, b = exact.sample(50, torch.Generator().manual_seed(0))
    for t in (0.1, 0.5, 0.8):
        x = (1 - t) * a + t * b
        assert torch.allclose(found.forward_field()(x, moment(t)), exact.drift(x, moment(t)), atol=2e-3)
        assert torch.allclose(found.backward_field()(x, moment(t)), exact.backward_drift(x, moment(t)), atol=2e-3)


def test_plan_has_its_marginals_and_its_samples_have_the_plan():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = points(6), points(9, seed=1)
    weights = torch.rand(9, generator=generator) + 0.2
    found = sinkhorn_potentials(x0, x1, 0.3, weights1=weights, tolerance=1e-9)
    plan = found.plan()
    assert torch.allclose(plan.sum(dim=1), torch.full((6,), 1 / 6, dtype=DOUBLE), atol=1e-8)
    assert torch.allclose(plan.sum(dim=0), (weights / weights.sum()).double(), atol=1e-8)
    a, b = found.sample(40_000, generator)
    rows, columns = torch.cdist(a, found.x0).argmin(dim=1), torch.cdist(b, found.x1).argmin(dim=1)
    counts = torch.zeros(6, 9, dtype=DOUBLE).index_put_((rows, columns), moment(1 / 40_000), accumulate=True)
    assert (counts - plan).abs().max() < 0.006
    assert (b - a).square().sum(dim=1).mean() == pytest.approx(found.cost(), rel=0.03)


def test_little_noise_sorts_and_much_noise_forgets():
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(30, 1, generator=generator, dtype=DOUBLE) for _ in range(2))
    best = (x0.sort(dim=0).values - x1.sort(dim=0).values).square().mean()
    near = sinkhorn_potentials(x0, x1, 2e-4, iterations=20_000, tolerance=1e-3)
    assert near.cost() == pytest.approx(float(best), rel=0.02)
    far = sinkhorn_potentials(x0, x1, 1e5)
    assert far.cost() == pytest.approx(float(torch.cdist(x0, x1).square().mean()), rel=1e-4)


def test_field_is_the_gradient_of_the_heat_flow_and_takes_a_time_a_row():
    field = EntropicField(points(7), torch.randn(7, dtype=DOUBLE), 0.3, weights=torch.rand(7) + 0.1)
    x, t = points(5, seed=2).requires_grad_(), torch.linspace(0.0, 0.9, 5, dtype=DOUBLE)
    distance = torch.cdist(x, field.points).square()
    heat = torch.logsumexp(field.log_weights - distance / (4 * 0.3 * (1 - t[:, None])), dim=1)
    (slope,) = torch.autograd.grad(heat.sum(), x)
    assert torch.allclose(field(x, t), 2 * 0.3 * slope)
    assert torch.allclose(field(x, t)[3], field(x[3:4], t[3])[0])


def test_paths_of_the_forward_field_end_in_the_points():
    found = sinkhorn_potentials(points(8), points(5, seed=1), 0.2)
    field = found.forward_field()
    x = found.x0.repeat(20, 1)
    end = pr.solve.sde(field, (2 * 0.2) ** 0.5, x, (0.0, 1.0), steps=400, generator=torch.Generator().manual_seed(0)).x
    assert torch.cdist(end, found.x1).amin(dim=1).max() < 0.2  # the noise of the last step has deviation 0.03


def test_bad_input_is_refused():
    x = points(4)
    with pytest.raises(ValueError, match="epsilon: must be a positive number"):
        sinkhorn_potentials(x, x, 0.0)
    with pytest.raises(ValueError, match="x1: points of dimension 2"):
        sinkhorn_potentials(x, x[:, :1], 0.1)
    with pytest.raises(ValueError, match="weights of x0"):
        sinkhorn_potentials(x, x, 0.1, weights0=torch.zeros(4))
    with pytest.raises(ValueError, match="iterations, tolerance"):
        sinkhorn_potentials(x, x, 0.1, iterations=0)
    with pytest.warns(UserWarning, match="raise iterations or epsilon"):
        sinkhorn_potentials(x, points(4, seed=3), 0.01, iterations=2)
    with pytest.raises(ValueError, match="potential: shape"):
        EntropicField(x, torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match="exists for t < 1"):
        EntropicField(x, torch.zeros(4), 0.1)(x, moment(1.0))
    with pytest.raises(ValueError, match="exists for t > 0"):
        EntropicField(x, torch.zeros(4), 0.1, backward=True)(x, moment(0.0))
    two = GaussianMixture(torch.ones(2), torch.zeros(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match="source: one Gaussian"):
        GaussianBridge(two, TARGET, 0.1)
    with pytest.raises(ValueError, match="dimension 2 like the source"):
        GaussianBridge(SOURCE, GaussianMixture.standard(3), 0.1)
