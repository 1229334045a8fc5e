"""EDM's stochastic sampler: without churn it is Heun's, with it the law stays right, and noise comes where it should."""

import itertools
import math

import pytest
import torch
from torch import nn

from flow.exact_jumps import GaussianJumps, exact_model
from pantarhei.flow import Churn, Flow, Provenance, churned_sample

LEVELS = [(80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) * i / 17) ** 7 for i in range(18)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(count, seed=0):
    return torch.randn(count, 2, generator=seeded(seed), dtype=torch.float64)


class Seen(nn.Module):
    """Keeps the noise levels that a network is asked at."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.levels = inner, []

    def forward(self, x, t, **named):
        self.levels.append(float(torch.exp(4 * t[0])))
        return self.inner(x, t, **named)


def watched():
    return Flow(Seen(GaussianJumps("edm", "edm")), path="edm", predicts="edm", shape=(2,))


@pytest.mark.parametrize("path", ["edm", "linear", "vp"])
def test_without_churn_it_is_heuns_method(path):
    model = exact_model(path, {"edm": "edm", "vp": "noise", "linear": "velocity"}[path])
    x0 = noise(30)
    for steps in (1, 6):
        found = churned_sample(model, x0, churn=Churn(0.0), steps=steps, generator=seeded())
        plain = model.sample(
            x0=x0, steps=steps, method="edm", grid="edm", final="denoise" if path != "linear" else "state"
        )
        assert torch.allclose(found, plain, rtol=1e-12, atol=1e-12)
    # Where no level is between the limits there is none either.
    none = churned_sample(model, x0, churn=Churn(40.0, 1e3, 2e3), steps=6, generator=seeded())
    assert torch.equal(none, found)


@pytest.mark.parametrize("path", ["edm", "linear", "cosine"])
def test_the_law_of_an_exact_flow_survives_the_churn(path):
    model = exact_model(path, {"edm": "edm", "linear": "velocity", "cosine": "v"}[path])
    found = churned_sample(model, noise(8000), churn=Churn(30.0, inflation=1.0), steps=160, generator=seeded(1))
    network = model.network
    assert torch.allclose(found.mean(0), network.mean, atol=0.03)
    assert torch.allclose(found.std(0), network.deviation, rtol=0.03)
    # Noise that is too large widens it.
    wide = churned_sample(model, noise(8000), churn=Churn(30.0, inflation=1.3), steps=160, generator=seeded(1))
    assert bool((wide.std(0) > 1.02 * found.std(0)).all())


def test_levels_rise_by_the_factor_of_the_paper():
    flow = watched()
    churned_sample(flow, noise(2), churn=Churn(10.0, 0.05, 50.0), steps=17, generator=seeded())
    gain = 10 / 18
    assert gain > math.sqrt(2) - 1  # and is cut
    expected = []
    for here, following in itertools.pairwise(LEVELS):
        expected += [here * math.sqrt(2) if 0.05 <= here <= 50 else here, following]
    assert flow.network.levels == pytest.approx([*expected, LEVELS[-1]], rel=1e-5)
    flow = watched()
    churned_sample(flow, noise(2), churn=Churn(2.0, 0.0, 100.0), steps=17, generator=seeded())
    # Never beyond the noisiest level that the network knows.
    assert flow.network.levels[0] == pytest.approx(80, rel=1e-6)
    assert flow.network.levels[2] == pytest.approx(min(LEVELS[1] * (1 + 2 / 18), 80), rel=1e-6)


class NoData(nn.Module):
    """F for the data estimate 0: states change with their level alone."""

    def forward(self, x, t):
        sigma = torch.exp(4 * t)[:, None]
        return -0.5 * x / sigma


def test_the_added_noise_makes_up_the_difference_of_levels():
    flow, drawn, x0 = Flow(NoData(), path="edm", predicts="edm", shape=(2,)), noise(3, seed=2), noise(3)
    seen = []

    def look(number, x):
        seen.append(x)
        return drawn

    grid = (0.0, 0.5, 0.7, 1.0)
    end = churned_sample(flow, x0, churn=Churn(0.8, 0.0, 80.0, inflation=1.1), steps=grid, noise=look)
    assert torch.allclose(end, torch.zeros_like(end), atol=1e-12)  # denoised
    _, second, third = flow.path.sigma(torch.tensor(grid[:3], dtype=torch.float64))
    assert torch.allclose(seen[0], 80 * x0)  # the first level is the largest there is
    assert torch.allclose(seen[1], second * x0, rtol=1e-9)
    raised = 1.2 * second
    noisy = seen[1] + 1.1 * torch.sqrt(raised**2 - second**2) * drawn
    assert torch.allclose(seen[2], noisy * third / raised, rtol=1e-9)


def test_noise_is_drawn_once_a_step_or_given():
    model, x0 = exact_model("edm", "edm"), noise(4)
    drawn = [churned_sample(model, x0, steps=5, generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    generator = seeded(1)
    stock = [torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(5)]
    asked = []

    def given(number, x):
        asked.append(number)
        return stock[number]

    assert torch.equal(churned_sample(model, x0, steps=5, noise=given), drawn[0])
    assert asked == [0, 1, 2, 3, 4]


def test_guidance_and_conditions():
    model, x0 = exact_model("edm", "edm", null={"label": 0}), noise(2000)
    label = torch.ones(2000, dtype=torch.long)
    plain = churned_sample(model, x0, condition=label, generator=seeded())
    assert torch.allclose(plain.mean(0), model.network.mean + 1, atol=0.1)
    far = churned_sample(model, x0, condition=label, guidance=3.0, generator=seeded())
    assert torch.allclose(far.mean(0), model.network.mean + 3, atol=0.2)


def test_what_is_refused():
    rectified = exact_model("edm", "edm", provenance=Provenance(rectified=1))
    with pytest.raises(ValueError, match="rectified 1x"):
        churned_sample(rectified, noise(2))
    with pytest.raises(ValueError, match="not their velocity"):
        churned_sample(exact_model("edm", "edm", "consistency"), noise(2))
    for wrong in ({"amount": -1.0}, {"inflation": 0.0}, {"least": 2.0, "largest": 1.0}, {"least": -1.0}):
        with pytest.raises(ValueError, match="churn: amount >= 0"):
            Churn(**wrong)
    with pytest.raises(ValueError, match="steps: "):
        churned_sample(exact_model("edm", "edm"), noise(2), steps=0)
    with pytest.raises(ValueError, match=r"steps: the grid must begin at the first time, 0, got 0\.5"):
        churned_sample(exact_model("edm", "edm"), noise(2), steps=(0.5, 1.0))
