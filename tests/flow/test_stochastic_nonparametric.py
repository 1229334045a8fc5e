"""SDEs keep the flow's marginals; fields read off points agree with closed forms; sources that are data."""

import pytest
import torch

import pantarhei as pr
from pantarhei.data import TensorSource
from pantarhei.flow import EmpiricalField, GaussianMixture, MixtureField, NeighbourField, Stretched, fading
from pantarhei.flow.sources import Absent, Samples
from pantarhei.flow.times import Steps
from pantarhei.solve import ode

TARGET = GaussianMixture(torch.ones(1), torch.full((1, 1), 1.5), torch.tensor([0.16]))


def gaussian_flow(**options):
    return pr.Flow(MixtureField(TARGET).double(), shape=(1,), **options)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, fading(2.0)], ids=["ode", "constant", "fading"])
def test_sde_keeps_mean_and_deviation(epsilon):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(20_000, 1, dtype=torch.float64, generator=generator)
    x = gaussian_flow().sample(x0=x0, epsilon=epsilon, steps=200, generator=generator)
    assert x.mean() == pytest.approx(1.5, abs=0.01)
    assert x.std() == pytest.approx(0.4, abs=0.01)


def test_backward_sde_reaches_the_source():
    generator = torch.Generator().manual_seed(1)
    flow = gaussian_flow()
    x1 = TARGET.sample(20_000, generator).double()
    x0 = pr.flow.transport_sde(flow, x1, (1.0, 0.0), 0.5, steps=200, generator=generator).x
    assert x0.mean() == pytest.approx(0.0, abs=0.02)
    assert x0.std() == pytest.approx(1.0, abs=0.02)
    # Noise was really added: x0 is not the deterministic image of x1.
    assert (x0 - flow.invert(x1, steps=200)).std() > 0.3


def test_sde_is_refused_where_it_would_be_wrong():
    rectified = gaussian_flow(provenance=pr.Provenance(rectified=1))
    with pytest.raises(ValueError, match="rectified 1x"):
        rectified.sample(x0=torch.randn(4, 1).double(), epsilon=0.5)
    with pytest.raises(ValueError, match="not Gaussian"):
        gaussian_flow(source=torch.randn(8, 1).double()).sample(4, epsilon=0.5)
    with pytest.raises(ValueError, match="epsilon"):
        gaussian_flow().sample(x0=torch.randn(4, 1).double(), epsilon=-1.0)


def test_empirical_field_is_the_mixture_of_points():
    points = torch.randn(5, 2, dtype=torch.float64)
    narrow = GaussianMixture(torch.ones(5).double(), points, torch.full((5,), 1e-12).double())
    x, t = torch.randn(6, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    assert torch.allclose(EmpiricalField(points)(x, t), MixtureField(narrow).denoise(x, t), atol=1e-6)
    flow = pr.Flow(EmpiricalField(points), predicts="data", shape=(2,))
    ends = flow.sample(x0=torch.randn(20, 2, dtype=torch.float64), steps=100)
    assert torch.cdist(ends, points).amin(dim=1).max() < 1e-3


def test_neighbour_field_carries_one_set_to_another():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2000, 2, generator=generator)
    x1 = torch.randn(2000, 2, generator=generator) * 0.3 + 2
    flow = pr.Flow(NeighbourField(x0, x1, neighbours=100), predicts="data", shape=(2,))
    x = flow.sample(x0=torch.randn(1000, 2, generator=generator), steps=50)
    assert torch.allclose(x.mean(dim=0), torch.full((2,), 2.0), atol=0.1)
    # One neighbour of itself is the pair's own straight line.
    single = NeighbourField(x0, x1, neighbours=1)
    assert torch.equal(single(0.5 * (x0 + x1)[:50], torch.full((50,), 0.5)), x1[:50])
    with pytest.raises(ValueError, match="pairs"):
        NeighbourField(x0, x1[:5])


def test_steps_law_draws_what_a_sampler_evaluates():
    generator = torch.Generator().manual_seed(0)
    t = Steps(4).sample(1000, generator)
    assert t.unique().tolist() == [0.0, 0.25, 0.5, 0.75]
    assert Steps(4, reverse=True).sample(1000, generator).unique().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert Steps(1).sample(10, generator).tolist() == [0.0] * 10
    with pytest.raises(ValueError, match="no density"):
        Steps(2).pdf(t)
    with pytest.raises(ValueError, match="count"):
        Steps(0)


def test_interval_narrows_sampling_and_training():
    flow = gaussian_flow(interval=(1e-3, 1.0))
    assert flow.interval == (1e-3, 1.0)
    seen = []
    flow.sample(x0=torch.ones(2, 1).double(), steps=2, observe=lambda x, t, i: seen.append((t, float(x[0]))))
    assert seen[0] == (1e-3, 1.0)  # unit noise, as at t = 0
    draw = pr.FlowMatching().draw(flow, {"x1": torch.randn(1000, 1)}, torch.Generator().manual_seed(0))
    assert draw.t.min() >= 1e-3
    assert pr.Flow.from_spec(flow.spec(), flow.network).interval == flow.interval
    assert flow.like(flow.network).interval == flow.interval
    with pytest.raises(ValueError, match="interval"):
        gaussian_flow(interval=(0.5, 1.5))


def test_stretched_euler_is_the_published_grid():
    eps, steps = 1e-3, 7
    flow = gaussian_flow(interval=(eps, 1.0))
    x0 = torch.randn(5, 1, dtype=torch.float64)
    ours = flow.sample(x0=x0, steps=steps, transforms=[Stretched(1 / (1 - eps))])
    published = ode(lambda x, t: flow.velocity(x, eps + (1 - eps) * t), x0, method="euler", steps=steps).x
    assert torch.allclose(ours, published, atol=1e-12)


def test_source_of_samples_and_its_absence():
    generator = torch.Generator().manual_seed(0)
    points = torch.arange(6.0).reshape(3, 2)
    law = Samples(TensorSource({"x1": points}, "three"))
    drawn = law.draw((50, 2), torch.empty(0), None, generator)
    assert set(map(tuple, drawn.tolist())) == set(map(tuple, points.tolist()))
    assert law.spec() == {"name": "samples", "count": 3, "of": "three"}
    flow = pr.Flow(torch.nn.Identity(), shape=(2,), source=points)
    loaded = pr.Flow.from_spec(flow.spec(), flow.network)
    assert isinstance(loaded.source, Absent)
    assert loaded.spec() == flow.spec()
    with pytest.raises(ValueError, match="not saved with it"):
        loaded.draw(2)
