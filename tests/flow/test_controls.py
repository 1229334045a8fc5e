"""Steering samples: Langevin steps keep a law, guidance reaches the posterior, known parts come back, edits."""

import pytest
import torch
from torch import nn

from flow.exact_jumps import data_law, exact_model
from pantarhei.flow import (
    ClassifierGuidance,
    TrajectoryModel,
    coarse_part,
    grey_part,
    known_part,
    langevin,
    redrawn,
    rejection_sample,
)

COUNT = 20_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def states(model, t, count=COUNT):
    """States of the model's law at t."""
    x0 = torch.randn(count, 2, generator=seeded(1), dtype=torch.float64)
    x1 = data_law().sample(count, seeded(2))
    return model.path.sample(x0, x1, None, torch.full((count,), t, dtype=torch.float64))[0]


def image_model():
    class Grey(nn.Module):
        def forward(self, x, t, s=None):
            return torch.zeros_like(x)

    return TrajectoryModel(Grey(), path="linear", predicts="data", head="ctm", shape=(3, 8, 8))


@pytest.mark.parametrize("path", ["linear", "edm"])
def test_langevin_steps_keep_the_law_of_a_time(path):
    model = exact_model(path, "edm" if path == "edm" else "velocity")
    t = 0.5 if path == "linear" else float(model.path.time_at(torch.tensor(1.0)))
    x = states(model, t)
    moved = langevin(model, snr=0.16, steps=20, generator=seeded(3))(x, t, 0)
    assert not torch.equal(moved, x)
    assert torch.allclose(moved.mean(0), x.mean(0), atol=0.03)
    assert torch.allclose(moved.std(0), x.std(0), rtol=0.05)


def test_langevin_steps_of_a_sample_do_not_depend_on_the_others_and_never_burst():
    model = exact_model()
    mean = model.network.law(torch.tensor([0.5], dtype=torch.float64))[0]
    moved = langevin(model, steps=1, generator=seeded())(mean.expand(1000, 2), 0.5, 0)  # where the score vanishes
    assert float((moved - mean).abs().max()) < 1


def test_nearly_clean_states_are_left_alone():
    model = exact_model()
    x = states(model, 1.0, 10)
    assert torch.equal(langevin(model, generator=seeded())(x, 1.0, 0), x)


def observed(model, deviation=0.5, value=1.0):
    """log p(y | x_t) of y = x + noise on the first coordinate, and mean and deviation of the posterior there."""
    own, wide = float(model.network.mean[0]), float(model.network.deviation[0])

    def classifier(x, t):
        at = model.path.at(torch.as_tensor(t, dtype=torch.float64), x[:, :1])
        variance = (at.alpha * wide) ** 2 + at.sigma**2
        data = own + at.alpha * wide**2 / variance * (x[:, :1] - at.alpha * own)
        left = wide**2 - (at.alpha * wide**2) ** 2 / variance
        return (-((value - data) ** 2) / (2 * (deviation**2 + left)))[:, 0]

    share = wide**2 / (wide**2 + deviation**2)
    return classifier, own + share * (value - own), wide * (1 - share) ** 0.5


def test_classifier_guidance_of_the_ode_samples_the_posterior():
    model = exact_model()
    classifier, mean, deviation = observed(model)
    x = model.sample(
        COUNT, generator=seeded(), method="heun", steps=80, transforms=[ClassifierGuidance(classifier, model.path)]
    )
    assert float(x[:, 0].mean()) == pytest.approx(mean, abs=0.02)
    assert float(x[:, 0].std()) == pytest.approx(deviation, rel=0.04)
    assert float(x[:, 1].mean()) == pytest.approx(float(model.network.mean[1]), abs=0.03)


def test_langevin_steps_towards_a_class_move_samples_there():
    model = exact_model("edm", "edm")
    classifier, mean, _ = observed(model)
    free, steered = (
        model.sample(
            2000,
            generator=seeded(),
            steps=12,
            gamma=1.0,
            control=langevin(model, guide, snr=0.3, steps=10, generator=seeded(4)),
        )
        for guide in (None, classifier)
    )
    own = float(model.network.mean[0])
    assert float(free[:, 0].mean()) == pytest.approx(own, abs=0.06)
    assert float(steered[:, 0].mean()) == pytest.approx(mean, abs=0.06)


def test_the_surest_samples_are_kept():
    model = exact_model()
    x = rejection_sample(model, 50, lambda x: x[:, 0], keep=0.25, generator=seeded())
    every = model.sample(200, generator=seeded())
    assert torch.equal(x[:, 0].sort().values, every[:, 0].topk(50).values.sort().values)
    with pytest.raises(ValueError, match="keep: must lie in"):
        rejection_sample(model, 5, lambda x: x[:, 0], keep=0.0)


def test_what_is_known_comes_back():
    model = exact_model()
    data = data_law().sample(500, seeded(5))
    control = known_part(model, data, torch.tensor([True, False]), generator=seeded(6))
    x = model.sample(500, generator=seeded(), steps=4, gamma=0.5, control=control)
    assert torch.allclose(x[:, 0], data[:, 0])
    assert float(x[:, 1].mean()) == pytest.approx(float(model.network.mean[1]), abs=0.2)


@pytest.mark.parametrize("project", [grey_part, coarse_part(4)])
def test_parts_are_orthogonal_projections_and_are_put_back(project):
    x, y = (torch.randn(2, 3, 8, 8, generator=seeded(n), dtype=torch.float64) for n in (0, 1))
    assert torch.allclose(project(project(x)), project(x))
    assert float((project(x) * y).sum()) == pytest.approx(float((x * project(y)).sum()))
    model = image_model()
    control = known_part(model, x, project, generator=seeded())
    found = model.sample(x0=y, steps=3, gamma=0.3, control=control)
    assert torch.allclose(project(found), project(x), atol=1e-9)


def test_sides_that_are_no_multiples():
    with pytest.raises(ValueError, match="known: images with sides that are multiples of 3"):
        coarse_part(3)(torch.zeros(1, 1, 8, 8))


def test_drawn_again_from_the_middle():
    model = exact_model("edm", "edm")
    data = data_law().sample(4000, seeded(5))
    clean, late, early = (float(model.path.time_at(1 / torch.tensor(level))) for level in (0.003, 0.5, 60.0))
    for steps, gamma in ((1, 0.0), (3, 0.5)):
        near = redrawn(model, data, clean, steps, gamma=gamma, generator=seeded(6))
        middle = redrawn(model, data, late, steps, gamma=gamma, generator=seeded(6))
        far = redrawn(model, data, early, steps, gamma=gamma, generator=seeded(6))
        assert float((near - data).abs().max()) < 0.05
        # Whatever the time, the law is that of the data; what is left of each falls.
        shared = [float(torch.corrcoef(torch.stack([x[:, 1], data[:, 1]]))[0, 1]) for x in (near, middle, far)]
        assert shared[0] > 0.99 > shared[1] > 0.4 > 0.1 > abs(shared[2])
        for x in (middle, far):
            assert torch.allclose(x.mean(0), data.mean(0), atol=0.06)
            assert torch.allclose(x.std(0), data.std(0), rtol=0.06)
    with pytest.raises(ValueError, match="start"):
        redrawn(model, data, 2.0)
