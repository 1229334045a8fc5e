"""Recipes of stochastic interpolants and of forecasts: what follows from what is left out, and what is refused."""

import numpy as np
import pytest
import torch

import pantarhei as pr
from pantarhei.flow import Interpolant, Interpolation, Present
from pantarhei.flow.gammas import Brownian, NoLatent, SineSquared
from pantarhei.networks import Pair
from pantarhei.recipes import forecasting
from pantarhei.recipes.backbones import NetworkConfig
from pantarhei.recipes.data import DataConfig
from pantarhei.recipes.forecasting import ForecastConfig, forecast, score_forecasts, scores_table
from pantarhei.recipes.registry import recipe_in
from pantarhei.recipes.stochastic_interpolants import StochasticInterpolantsConfig, build_task

TINY = NetworkConfig(width=16, blocks=(1,))
MOONS = DataConfig(data="two_moons")


def recipe(**options):
    return StochasticInterpolantsConfig(data=MOONS, network=TINY, **options)


def test_what_follows_from_the_source_and_the_path():
    assert isinstance(recipe().interpolant(), pr.paths.Linear)
    assert recipe().fields() == "velocity"
    bridge = recipe(source="circles")
    assert bridge.interpolant() == Interpolant(pr.paths.Linear(), Brownian())
    assert bridge.fields() == "velocity+latent"
    assert recipe(source="circles", gamma="none").fields() == "velocity"
    assert isinstance(recipe(source="circles", gamma="none").interpolant().gamma, NoLatent)
    assert recipe(path="mirror").fields() == "latent"
    assert recipe(path="encoding-decoding").interpolant().gamma == SineSquared()
    assert recipe(gamma="brownian", gamma_scale=0.5).interpolant().gamma == Brownian(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "mirror", "source": "circles"}, "mirror"),
        ({"observe": "inpainting", "source": "circles"}, "observe"),
        ({"gamma": "quadratic", "gamma_scale": 2.0}, "gamma_scale"),
        ({"path": "mirror", "gamma": "none"}, "needs a latent"),
        ({"path": "trigonometric", "gamma": "brownian", "gamma_scale": 9.0}, "must not exceed 1"),
        ({"observe": "inpainting"}, "is for images"),
        ({"source": "circles", "predicts": "latent"}, "mirror path only"),
        ({"source": "digits"}, "have shape"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_task(recipe(**options), seed=0)


@pytest.mark.parametrize("networks", ["one", "two"])
def test_tasks_of_a_bridge(networks):
    task, augment = build_task(recipe(source="circles", networks=networks), seed=3)
    again, _ = build_task(recipe(source="circles", networks=networks), seed=3)
    assert augment is None
    assert isinstance(task.objective, Interpolation)
    assert isinstance(task.flow.network, Pair) == (networks == "two")
    for a, b in zip(task.flow.network.parameters(), again.flow.network.parameters(), strict=True):
        assert torch.equal(a, b)
    batch = {"x1": torch.randn(8, 2)}
    loss, log = task.objective(task.flow, batch, torch.Generator().manual_seed(0))
    assert set(log) == {"loss", "velocity", "latent"}
    assert loss.requires_grad


def test_inpainting_takes_labels_and_what_is_seen():
    config = StochasticInterpolantsConfig(observe="inpainting", network=NetworkConfig(width=16, blocks=(1, 1)))
    task, _ = build_task(config, seed=0)
    assert task.flow.conditions == ("label", "context")
    batch = task.data.fetch(torch.arange(4))
    loss, _ = task.objective(task.flow, batch, torch.Generator().manual_seed(0))
    assert loss.isfinite()
    held_out = config.open()[1].fetch(torch.arange(3))
    condition = {name: held_out[name] for name in task.flow.conditions}
    x = task.flow.sample(3, condition=condition, steps=2, epsilon=0.1)
    assert x.shape == (3, 1, 8, 8)


def test_recipes_are_read_back_from_their_runs():
    config = recipe(source="circles", predicts="velocity+score", networks="two")
    assert recipe_in({"system": "stochastic-interpolants", "recipe": config.spec()}) == config
    forecasts = ForecastConfig(kind="regressor", lag=2)
    assert recipe_in({"system": "forecasting", "recipe": forecasts.spec()}) == forecasts
    with pytest.raises(ValueError, match="system: unknown"):
        recipe_in({"system": "stochastic-interpolant", "recipe": config.spec()})


# Forecasts


@pytest.fixture
def walk(tmp_path):
    """Random walks with a drift: x_(n+1) = 0.9 x_n + noise."""
    draws = torch.Generator().manual_seed(0)
    x = [torch.randn(64, 2, generator=draws)]
    for _ in range(19):
        x.append(0.9 * x[-1] + 0.4 * torch.randn(64, 2, generator=draws))
    path = tmp_path / "walk.npy"
    np.save(path, torch.stack(x, dim=1).numpy())
    return str(path)


def test_series_are_standardised_and_split_by_trajectory(walk):
    config = ForecastConfig(data=DataConfig(data=walk, held_out=0.25), network=TINY)
    train, test, mean, scale = config.open_series()
    assert train.shape == (48, 20, 2)
    assert test.shape == (16, 20, 2)
    assert float(train.mean()) == pytest.approx(0.0, abs=1e-5)
    assert torch.allclose(train.flatten(0, 1).std(dim=0), torch.ones(2), atol=1e-5)
    original = torch.from_numpy(np.load(walk))
    everything = torch.cat([train, test]) * scale + mean
    assert torch.allclose(everything.sum(), original.sum(), rtol=1e-3, atol=0.5)
    assert len(config.open()[0]) == 48 * 19
    assert len(ForecastConfig(data=DataConfig(data=walk), lag=4).open()[0]) == 51 * 16


def test_a_bridge_beats_persistence_and_the_mean_on_a_random_walk(walk, tmp_path):
    flows = {}
    for kind in ("bridge", "regressor"):
        network = NetworkConfig(width=64, blocks=(2,))
        config = ForecastConfig(data=DataConfig(data=walk), kind=kind, network=network, lr=3e-3, average=0.9)
        task = forecasting.build_task(config, seed=0)
        pr.train(task, tmp_path / kind, iterations=400, batch=128, progress=False, tensorboard=False)
        flows[kind] = task.result()
    _, test, _, _ = config.open_series()
    scores = score_forecasts(flows, test, leads=(1, 2), cases=128, members=16, steps=20)
    found = {(s.name, s.lead): s for s in scores}
    for lead in (1, 2):
        for other in ("persistence", "regressor"):
            assert found["bridge", lead].crps < found[other, lead].crps
            assert found["bridge", lead].energy < found[other, lead].energy
    # The regressor is asked at t = 0, where it was trained, and once.
    regressor = flows["regressor"]
    condition = {"vector": test[:5, 0]}
    asked = regressor.output(test[:5, 0], torch.zeros(()), condition)
    assert torch.allclose(forecast(regressor, test[:5, 0], members=1)[0, 0], asked, atol=1e-6)
    assert found["bridge", 1].spread == pytest.approx(1.0, abs=0.2)
    assert "bridge" in scores_table(scores).text()
    with pytest.raises(ValueError, match="leads"):
        score_forecasts(flows, test, leads=(20,))
    draws = torch.Generator().manual_seed(0)
    ensemble = forecast(flows["bridge"], test[:5, 0], members=3, leads=2, steps=4, generator=draws)
    assert ensemble.shape == (2, 3, 5, 2)
    # A bridge of one point has no ODE, and is sampled as its own SDE by default.
    with pytest.raises(ValueError, match="give 'vector'"):
        flows["bridge"].sample(2)


def test_what_cannot_be_forecast_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'double_well'"):
        ForecastConfig(data=DataConfig(data="double_wel")).open_series()
    with pytest.raises(FileNotFoundError, match="no file"):
        ForecastConfig(data=DataConfig(data=str(tmp_path / "none.npy"))).open_series()
    np.save(tmp_path / "bad.npy", np.full((3, 4, 2), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="NaN"):
        ForecastConfig(data=DataConfig(data=str(tmp_path / "bad.npy"))).open_series()
    np.save(tmp_path / "still.npy", np.ones((3, 4, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="never changes"):
        ForecastConfig(data=DataConfig(data=str(tmp_path / "still.npy"))).open_series()
    with pytest.raises(ValueError, match="noise"):
        ForecastConfig(noise=0.0)
    with pytest.raises(ValueError, match="source"):
        ForecastConfig(source="two_moons")
    assert Present().spec()["name"] == "present"
