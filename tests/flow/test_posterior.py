"""Posterior sampling: exact for Gaussian data, the operators, second derivatives through guidance."""

import math

import pytest
import torch

from pantarhei.flow import (
    Blurred,
    Flow,
    GaussianMixture,
    Masked,
    Measurement,
    MeasurementGuidance,
    Sensors,
    differentiable_sample,
    posterior_sample,
)
from pantarhei.flow.closed_form import MixtureField
from pantarhei.flow.paths import build_path
from pantarhei.networks import MLP, MLPConfig

SPREAD = 0.8


def gaussian_flow():
    law = GaussianMixture(
        torch.ones(1).double(), torch.tensor([[0.3, -0.2]]).double(), SPREAD**2 * torch.eye(2).double()[None]
    )
    return Flow(MixtureField(law), shape=(2,))


@pytest.mark.parametrize("spread", [None, SPREAD])
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_the_posterior_of_gaussian_data_is_exact(noise, spread):
    flow, y = gaussian_flow(), torch.tensor([[1.0]]).double()
    measured = Measurement(lambda x: x[:, :1], y, noise, spread)
    x0 = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = posterior_sample(flow, measured, x0=x0, method="heun", steps=60)
    share = SPREAD**2 / (SPREAD**2 + noise**2)
    assert float(x[:, 0].mean()) == pytest.approx(0.3 + share * 0.7, abs=0.02)
    assert float(x[:, 0].std()) == pytest.approx(SPREAD * math.sqrt(1 - share), rel=0.06)
    assert float(x[:, 1].mean()) == pytest.approx(-0.2, abs=0.04)
    assert float(x[:, 1].std()) == pytest.approx(SPREAD, rel=0.04)


@pytest.mark.parametrize("spread", [None, SPREAD])
def test_gradients_pass_through_guidance_twice(spread):
    flow, y = gaussian_flow(), torch.tensor([[1.0]]).double()
    measured = Measurement(lambda x: x[:, :1].sin(), y, 0.3, spread)
    x0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    way = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def run(x0, twice):
        guide = MeasurementGuidance(flow, measured, twice=twice)
        return differentiable_sample(flow, x0, transforms=[guide], steps=8, method="heun").square().sum()

    found = {}
    for twice in (True, False):
        leaf = x0.clone().requires_grad_(True)
        run(leaf, twice).backward()
        found[twice] = float((leaf.grad * way).sum())
    with torch.no_grad():
        difference = float(run(x0 + 1e-6 * way, True) - run(x0 - 1e-6 * way, True)) / 2e-6
    assert found[True] == pytest.approx(difference, rel=1e-6)
    assert abs(found[False] - difference) > 0.01 * abs(difference)


def test_operators():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 16, 16)
    mask[:, :8] = 1
    assert torch.equal(Masked(mask)(x)[:, :, :8], x[:, :, :8])
    assert float(Masked(mask)(x)[:, :, 8:].abs().max()) == 0
    one = torch.zeros(1, 1, 15, 15)
    one[0, 0, 7, 7] = 1
    spot = Blurred(1.5)(one)[0, 0]
    assert float(spot.sum()) == pytest.approx(1, abs=1e-3)
    at = torch.arange(15) - 7.0
    assert float((spot.sum(dim=0) * at**2).sum()) == pytest.approx(1.5**2, rel=0.05)
    places = torch.tensor([[0, 1], [5, 5]])
    assert torch.equal(Sensors(places)(x), torch.stack([x[:, :, 0, 1], x[:, :, 5, 5]], dim=2))


def test_refused_measurements():
    with pytest.raises(ValueError, match="noise and spread must be positive"):
        Measurement(lambda x: x, torch.zeros(1, 2), 0.0)
    measured = Measurement(lambda x: x, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="measurement: the operator gives"):
        measured.mismatch(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"gives \(\) for 4 samples"):
        Measurement(lambda x: x.sum(), torch.zeros(1, 2)).mismatch(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="4 samples, but 3 rows were measured"):
        Measurement(lambda x: x, torch.zeros(3, 2)).mismatch(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="the operator is not differentiable"):
        posterior_sample(gaussian_flow(), Measurement(lambda x: (x > 0).double(), torch.zeros(1, 2)), steps=2)
    assert Measurement(lambda x: x, torch.zeros(1, 2), 0.5).mismatch(torch.ones(4, 2)).tolist() == [4.0] * 4


class Halved:
    """A codec: data are half of the latents."""

    def encode(self, x):
        return 2 * x

    def decode(self, z):
        return z / 2


@pytest.mark.parametrize("path", ["linear", "vp", "cosine"])
def test_every_path_and_gain_a_codec_and_numbers(path):
    # y = 3 x_0 / 2 of latents x, one number a sample, measured with noise of 0.4; two draws of four.
    law = GaussianMixture(
        torch.ones(1).double(), torch.tensor([[0.3, -0.2]]).double(), SPREAD**2 * torch.eye(2).double()[None]
    )
    path = build_path(path)
    flow = Flow(MixtureField(law, path=path), path=path, shape=(2,), codec=Halved(), interval=(0.002, 0.998))
    measured = Measurement(lambda x: 3 * x[:, 0], torch.full((4000,), 1.0).double(), 0.4)
    x0 = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = posterior_sample(flow, measured, x0=x0, method="heun", steps=80)
    gain = 1.5 * SPREAD**2 / (1.5**2 * SPREAD**2 + 0.4**2)
    assert float(2 * x[:, 0].mean()) == pytest.approx(0.3 + gain * (1 - 1.5 * 0.3), abs=0.03)
    assert float(2 * x[:, 0].std()) == pytest.approx(SPREAD * math.sqrt(1 - 1.5 * gain), rel=0.08)
    assert posterior_sample(flow, Measurement(lambda x: x, torch.zeros(5, 2).double()), steps=2).shape == (5, 2)


@pytest.mark.parametrize("through", ["checkpoint", "backprop"])
def test_guided_samples_as_functions_of_weights(through):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(MLPConfig(width=16, layers=2)).double()
        torch.nn.init.normal_(network.outputs.weight, std=0.3)
    flow = Flow(network, shape=(2,))
    guide = MeasurementGuidance(flow, Measurement(lambda x: x[:, :1], torch.ones(1, 1).double(), 0.3))
    x0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bias = network.outputs.bias

    def run():
        how = {"transforms": [guide], "steps": 5, "through": through, "parameters": [bias]}
        return differentiable_sample(flow, x0, **how).square().sum()

    (grad,) = torch.autograd.grad(run(), bias)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * 1e-6
            values.append(float(run()))
            bias[0] -= sign * 1e-6
    assert float(grad[0]) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)
