"""Fitted Schroedinger bridges: both directions keep an exact bridge, two fits approach it, interrupted ones go on."""

import json

import pytest
import torch

import pantarhei as pr
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Fields, GaussianMixture, MixtureField
from pantarhei.flow.gaussian_bridge import GaussianBridge
from pantarhei.networks import MLP, MLPConfig
from pantarhei.straighten.schroedinger import Bridge, bridge_flow
from pantarhei.straighten.schroedinger_imf import Entropic, markovian_fitting
from pantarhei.straighten.schroedinger_maxmin import BentLine, maxmin_bridge
from pantarhei.training import Optimization

EPSILON = 0.5


def gaussian(mean, variance, dtype=torch.float64):
    return GaussianMixture(*(torch.tensor(v, dtype=dtype) for v in ([1.0], [[mean]], [variance])))


SOURCE, TARGET = gaussian(0.0, 1.0), gaussian(1.0, 4.0)
EXACT = GaussianBridge(SOURCE, TARGET, EPSILON)
FAST = {"optimization": Optimization(lr=4e-3, decay="cosine", warmup=10), "average": 0.98, "batch": 128}


def fresh(width=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bridge_flow(MLP(MLPConfig(1, width, 2, fields=2)), EPSILON, source=SOURCE, shape=(1,))


def data(count=20_000):
    return TARGET.sample(count, seeded(1)).float()


def error(drift, exact):
    """Relative L2 error over the exact bridge's marginals."""
    x0, x1 = EXACT.sample(2000, seeded(2))
    wrong = size = 0.0
    for t in (0.1, 0.3, 0.5, 0.7, 0.9):
        z = torch.randn(x0.shape, generator=seeded(3), dtype=torch.float64)
        x = (1 - t) * x0 + t * x1 + (2 * EPSILON * t * (1 - t)) ** 0.5 * z
        moment = torch.tensor(t, dtype=torch.float64)
        wrong += (drift(x, moment) - exact(x, moment)).square().sum().item()
        size += exact(x, moment).square().sum().item()
    return (wrong / size) ** 0.5


def of(method):
    return lambda x, t: method(x.float(), t.float()).detach().double()


def linear_error():
    field = MixtureField(TARGET, SOURCE, fresh().path)
    return error(lambda x, t: field(x, t) + EPSILON * field.score(x, t), EXACT.drift)


def weights(flow):
    return torch.cat([p.flatten() for p in flow.network.parameters()])


def test_both_directions_of_an_exact_bridge_keep_it():
    fields = Fields(names=("drift", "latent"), epsilon=EPSILON)
    bridge = Bridge(pr.Flow(EXACT, path=fresh().path, predicts=fields, source=SOURCE, shape=(1,)))
    assert bridge.epsilon == EPSILON
    x, t = torch.randn(20, 1, dtype=torch.float64), torch.linspace(0.05, 0.95, 20, dtype=torch.float64)
    assert torch.allclose(bridge.drift(x, t), EXACT.drift(x, t))
    assert torch.allclose(bridge.backward_drift(x, t), EXACT.backward_drift(x, t))
    x0, x1 = SOURCE.sample(40_000, seeded(0)), TARGET.sample(40_000, seeded(1))
    for start, end in (
        (x0, bridge.forward(x0, steps=40, generator=seeded(2))),
        (bridge.backward(x1, steps=40, generator=seeded(3)), x1),
    ):
        cross = torch.cov(torch.cat([start, end], dim=1).T)
        assert cross[0, 1] == pytest.approx(float(EXACT.cross), rel=0.03)
        assert cross[0, 0] == pytest.approx(1.0, rel=0.04)
        assert cross[1, 1] == pytest.approx(4.0, rel=0.04)


def test_markovian_fitting_comes_near_the_bridge(tmp_path):
    bridge = markovian_fitting(fresh(), data(), rounds=1, pairs=5000, iterations=200, steps=20, **FAST)
    assert error(of(bridge.drift), EXACT.drift) < 0.25 < 0.6 < linear_error()
    assert error(of(bridge.backward_drift), EXACT.backward_drift) < 0.25
    notes = bridge.flow.provenance.notes
    assert notes["method"] == "iterated Markovian fitting"
    assert (notes["rounds"], notes["epsilon"], notes["first_coupling"]) == (1, EPSILON, "independent")
    bridge.flow.save_pretrained(tmp_path)
    loaded = Bridge(pr.Flow.from_pretrained(tmp_path, source=SOURCE))
    x, t = torch.randn(5, 1), torch.tensor(0.4)
    assert torch.equal(loaded.drift(x, t), bridge.drift(x, t))
    assert loaded.flow.provenance == bridge.flow.provenance


def test_a_killed_fit_goes_on_and_ends_the_same(tmp_path):
    options = {"pairs": 500, "iterations": 10, "steps": 5, **FAST}
    whole = markovian_fitting(fresh(), data(), to=tmp_path / "whole", rounds=2, **options)
    markovian_fitting(fresh(), data(), to=tmp_path / "parts", rounds=1, **options)
    kept = (tmp_path / "parts" / "round-0" / "model.safetensors").stat().st_mtime_ns
    parts = markovian_fitting(fresh(), data(), to=tmp_path / "parts", rounds=2, **options)
    assert torch.equal(weights(parts.flow), weights(whole.flow))
    assert (tmp_path / "parts" / "round-0" / "model.safetensors").stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "parts" / "rounds.json").read_text())["done"] == 3
    with pytest.raises(ValueError, match="holds a fit with seed 0, asked 1"):
        markovian_fitting(fresh(), data(), to=tmp_path / "parts", rounds=2, seed=1, **options)
    with pytest.raises(ValueError, match="holds 3 fits"):
        markovian_fitting(fresh(), data(), to=tmp_path / "parts", rounds=1, **options)


def test_the_given_network_is_left_alone():
    flow = fresh()
    before = weights(flow).clone()
    markovian_fitting(flow, data(100), rounds=0, pairs=100, iterations=3, **FAST)
    assert torch.equal(weights(flow), before)


def test_entropic_coupling_has_the_plan_of_the_batch():
    x0, x1 = SOURCE.sample(400, seeded(0)), TARGET.sample(400, seeded(1))
    found = Entropic(EPSILON)({"x0": x0, "x1": x1}, None, None, seeded(2))
    cross = torch.cov(torch.cat([found, x1], dim=1).T)[0, 1]
    assert cross == pytest.approx(float(EXACT.cross), rel=0.15)


def test_bent_line_has_its_ends_and_its_derivative():
    line = BentLine(2, width=8).double()
    x0, x1, t = torch.randn(6, 2).double(), torch.randn(6, 2).double(), torch.linspace(0, 1, 6).double()
    point, rate = line(x0, x1, t)
    assert torch.allclose(point, (1 - t[:, None]) * x0 + t[:, None] * x1)  # it starts straight
    assert torch.allclose(rate, x1 - x0)
    with torch.no_grad():
        line.bend[-1].weight.normal_()
    point, rate = line(x0, x1, t)
    assert torch.allclose(point[0], x0[0])
    assert torch.allclose(point[-1], x1[-1])
    step = 1e-6
    slope = (line(x0, x1, t + step)[0] - line(x0, x1, t - step)[0]) / (2 * step)
    assert torch.allclose(rate, slope, atol=1e-6)


def test_maxmin_comes_near_the_bridge():
    options = {"interpolant_optimization": Optimization(lr=5e-3, decay="cosine"), **FAST}
    bridge = maxmin_bridge(
        fresh(), data(), interpolant=BentLine(1, 16, 1), iterations=400, inner=1, alone=30, **options
    )
    assert error(of(bridge.drift), EXACT.drift) < 0.25 < 0.6 < linear_error()
    assert bridge.flow.provenance.notes["method"] == "max-min over the interpolant"


def test_flows_that_are_no_bridges_are_refused():
    network = MLP(MLPConfig(1, 8, 1, fields=2))
    with pytest.raises(ValueError, match="a bridge needs the path"):
        markovian_fitting(pr.Flow(network, path="linear", shape=(1,)), data(8))
    with pytest.raises(ValueError, match="its drift belongs to epsilon"):
        Bridge(pr.Flow(network, path=fresh().path, predicts=Fields(names=("drift", "latent"), epsilon=0.1)))
    with pytest.raises(ValueError, match="score of this flow is not known"):
        Bridge(pr.Flow(MLP(MLPConfig(1, 8, 1)), path=fresh().path, predicts="velocity"))
    with pytest.raises(ValueError, match="epsilon: must be a positive number"):
        bridge_flow(network, -1.0, shape=(1,))
    with pytest.raises(ValueError, match="start: must be 'independent'"):
        markovian_fitting(fresh(), data(8), start="nearest")
    with pytest.raises(ValueError, match="rounds, pairs, steps"):
        markovian_fitting(fresh(), data(8), rounds=-1)
    with pytest.raises(ValueError, match="predicts its drift"):
        maxmin_bridge(pr.Flow(network, path=fresh().path, predicts="velocity+latent", shape=(1,)), data(8))
    with pytest.raises(ValueError, match="inner, alone"):
        maxmin_bridge(fresh(), data(8), inner=0, iterations=10)
    with pytest.raises(ValueError, match="give a network of your own"):
        maxmin_bridge(bridge_flow(network, 0.5, shape=(1, 4, 4)), torch.zeros(8, 1, 4, 4), iterations=10)
