"""Time laws: densities integrate to one and match their samplers; grids shift once."""

import math
from itertools import pairwise

import pytest
import torch

from pantarhei.flow.grids import make_grid
from pantarhei.flow.paths import EDM, Linear
from pantarhei.flow.times import Beta, CosMap, LogitNormal, Mode, Shifted, Uniform, UShaped, build_time_law

LAWS = [
    Uniform(),
    Uniform(0.2, 0.7),
    LogitNormal(0.5, 1.2),
    Mode(1.29),
    Mode(-0.8),
    CosMap(),
    UShaped(4.0),
    Beta(2.0, 0.8),
]
LAWS += [Shifted(Uniform(), 3.0), Shifted(LogitNormal(), 0.5)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_density_is_the_derivative_of_the_distribution(law):
    u = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    t = law.quantile(u)
    assert bool((t.diff() > 0).all())
    h = 1e-6
    slope = (law.quantile(u + h) - law.quantile(u - h)) / (2 * h)
    assert torch.allclose(law.pdf(t) * slope, torch.ones_like(u), rtol=1e-4)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("stratified", [False, True])
def test_samples_follow_the_law(law, stratified):
    n = 40_000
    t = law.sample(n, torch.Generator().manual_seed(0), stratified=stratified, dtype=torch.float64).sort().values
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    quantiles = law.quantile(u[::400])
    found = torch.searchsorted(t, quantiles.contiguous()).double() / n
    assert float((found - u[::400]).abs().max()) < (1e-4 if stratified else 0.012)  # Kolmogorov-Smirnov, p ~ 1e-5
    assert float(t.min()) >= 0
    assert float(t.max()) <= 1


def test_symmetric_laws_and_a_mirrored_one():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for law in (Mode(1.29), CosMap(), UShaped(4.0)):
        assert torch.allclose(law.pdf(t), law.pdf(1 - t))
    assert torch.allclose(LogitNormal(-0.4, 0.9).pdf(t), LogitNormal(0.4, 0.9).pdf(1 - t))
    assert float(UShaped(4.0).pdf(torch.tensor(0.0))) == pytest.approx(2 / math.tanh(2))


def test_laws_rebuild_and_refuse():
    for law in LAWS:
        assert build_time_law(law.spec()) == law
    for bad in (
        lambda: Uniform(0.5, 0.5),
        lambda: Mode(1.8),
        lambda: LogitNormal(0, 0),
        lambda: UShaped(0),
        lambda: Beta(-1),
    ):
        with pytest.raises(ValueError, match=r"(low, high|scale|std|a): "):
            bad()
    with pytest.raises(ValueError, match="known"):
        build_time_law("lognormal")


def test_the_shift_is_applied_once():
    # shift 3, 4 steps, as noise levels: 1, .9, .75, .5, 0.
    grid = make_grid(4, shift=3.0)
    assert [1 - t for t in grid] == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("kind", ["uniform", "quadratic", "cosine", "logsnr", "karras", lambda u: u**3])
def test_grids_rise_from_end_to_end(kind):
    grid = make_grid(9, (0.1, 0.95), kind=kind, path=Linear())
    assert grid[0] == 0.1
    assert grid[-1] == 0.95
    assert all(b > a for a, b in pairwise(grid))


def test_edm_time_is_the_karras_grid():
    path, n = EDM(), 18
    t = torch.tensor(make_grid(n - 1), dtype=torch.float64)
    i = torch.arange(n, dtype=torch.float64)
    karras = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(path.sigma(t), karras)


def test_grids_refuse():
    for options, message in (
        ({"steps": 0}, "steps"),
        ({"kind": "log"}, "grid"),
        ({"shift": 0.0}, "shift"),
        ({"kind": "karras"}, "path"),
    ):
        with pytest.raises(ValueError, match=message):
            make_grid(**{"steps": 3, **options})
