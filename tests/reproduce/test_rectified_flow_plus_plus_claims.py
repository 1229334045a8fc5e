"""What the experiments of rectified flow++ measure with, on cases whose answer is known."""

import pytest
import torch

from pantarhei.flow import Flow, GaussianMixture, MixtureField
from pantarhei.reproduce import Settings
from pantarhei.reproduce.rectified_flow_plus_plus import EXPERIMENTS, rounds, start


def test_the_exact_denoiser_as_an_edm_network_is_the_exact_flow():
    mixture = start.three_modes(torch.float64)
    flow = Flow(start.MixtureDenoiser(mixture), path="edm", predicts="edm", shape=(2,))
    x, t = torch.randn(50, 2, dtype=torch.float64), torch.rand(50, dtype=torch.float64)
    x = x * flow.path.sigma(t)[:, None] + mixture.sample(50)
    assert torch.allclose(flow.denoise(x, t), MixtureField(mixture, path=flow.path).denoise(x, t), atol=1e-9)


def test_crossing_of_a_deterministic_coupling_is_nothing_and_of_an_independent_one_known():
    normal = GaussianMixture.standard(2)
    flow = Flow(MixtureField(normal), shape=(2,))
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(20_000, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    # Between two unit normals V = int 1 / (t^2 + (1 - t)^2) dt = pi / 2 an element, and E|x1 - x0|^2 = 2.
    assert rounds.crossing(flow, x0, x1) == pytest.approx(torch.pi / 4, rel=0.02)

    class Shift(torch.nn.Module):
        def forward(self, x, t):
            return torch.ones_like(x)

    assert rounds.crossing(Flow(Shift(), shape=(2,)), x0, x0 + 1) == pytest.approx(0.0, abs=1e-12)


def test_marks_of_noise_and_of_a_constant_image():
    square, lag = rounds._marks(torch.ones(1, 1, 4, 4))
    assert float(square) == 16.0
    assert float(lag) == pytest.approx(24 / 32)  # twelve neighbours each way, over twice the square
    noise = torch.randn(5000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    limits = rounds._noise_limits(noise.shape[1:], Settings(0))
    outside = [rounds._outside(mark, limit) for mark, limit in zip(rounds._marks(noise), limits, strict=True)]
    assert float((outside[0] | outside[1]).float().mean()) < 0.004


def test_experiments_measure_what_their_claims_ask_for():
    quick = {"start-exact", "geometry"}
    for experiment in EXPERIMENTS:
        if experiment.name in quick:
            found = experiment.run(Settings(2, quick=True))
            assert {claim.quantity for claim in experiment.claims} <= set(found)
