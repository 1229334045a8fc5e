"""The algebra of affine paths: closed-form derivatives, conversions, changes of path, valid intervals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pantarhei.flow.paths import PATHS, Custom, Linear, build_path, change_path
from pantarhei.flow.predictions import PREDICTIONS, build_prediction, convert

NAMED = [name for name in PATHS if name != "custom"]
ALL = [
    *(build_path(name) for name in NAMED),
    Custom(lambda t: t**2, lambda t: (1 - t) * (1 + t)),
    Linear(sigma_min=1e-2),
]


def draw(seed=0, rows=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.spec()["name"])
def test_derivatives_match_finite_differences(path):
    low, high = path.regular
    t = torch.linspace(low + 0.02, high - 0.02, 40, dtype=torch.float64)
    h = 1e-6
    for value, slope in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        assert torch.allclose(slope(t), numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.spec()["name"])
def test_the_ratio_of_coefficients_rises_and_is_inverted(path):
    low, high = path.regular
    t = torch.linspace(low + 1e-3, high - 1e-3, 50, dtype=torch.float64)
    ratio = path.alpha(t) / path.sigma(t)
    assert bool((ratio.diff() > 0).all())
    assert torch.allclose(path.time_at(ratio), t, atol=1e-6)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.spec()["name"])
@pytest.mark.parametrize("known", PREDICTIONS)
def test_any_prediction_gives_every_other(path, known):
    x0, x1 = draw()
    low, high = build_prediction(known).interval(path)
    determined = build_prediction("score").interval(path)
    low, high = max(low, determined[0]), min(high, determined[1])
    t = torch.linspace(low + 0.03, high - 0.03, len(x0), dtype=torch.float64)
    x, velocity = path.sample(x0, x1, None, t)
    truth = {"velocity": velocity, "data": x1, "noise": x0}
    truth |= {name: build_prediction(name).target(path, x0, x1, t) for name in PREDICTIONS if name not in truth}
    for target, value in truth.items():
        found = convert(path, x, t, truth[known], known, target)
        assert torch.allclose(found, value, rtol=1e-7, atol=1e-7 * float(value.abs().max())), target


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NAMED), st.sampled_from(sorted(PREDICTIONS)), st.floats(0.1, 0.9), st.integers(0, 2**31))
def test_conversions_round_trip(name, target, t, seed):
    path, (x0, x1) = build_path(name), draw(seed, 2)
    time = torch.tensor(t, dtype=torch.float64)
    x, velocity = path.sample(x0, x1, None, time)
    there = convert(path, x, time, velocity, "velocity", target)
    back = convert(path, x, time, there, target, "velocity")
    assert torch.allclose(back, velocity, rtol=1e-6, atol=1e-6 * float(velocity.abs().max()))


@pytest.mark.parametrize("source", NAMED)
@pytest.mark.parametrize("target", NAMED)
def test_a_change_of_path_keeps_both_ends(source, target):
    source, target = build_path(source), build_path(target)
    x0, x1 = draw()
    low, high = target.regular
    t = torch.linspace(low + 0.1, high - 0.1, len(x0), dtype=torch.float64)
    t_source, scale = change_path(source, target, t)
    inside = (t_source > source.regular[0] + 1e-6) & (
        t_source < source.regular[1] - 1e-6
    )  # VP starts at a ratio above 0
    x_target, _ = target.sample(x0, x1, None, t)
    x_source, _ = source.sample(x0, x1, None, t_source)
    assert inside.any()
    assert torch.allclose(x_source[inside], (scale.reshape(-1, 1, 1) * x_target)[inside], rtol=1e-6, atol=1e-8)


def test_conversions_refuse_times_outside_their_interval():
    path, x = Linear(), torch.zeros(1, 2)
    for kind, bad in (("noise", 0.0), ("score", 0.0), ("score", 1.0), ("data", 1.0)):
        with pytest.raises(ValueError, match=kind):
            convert(path, x, torch.tensor(bad), x, kind, "velocity")
    convert(path, x, torch.tensor(1.0), x, "noise", "velocity")
    assert torch.equal(convert(path, x, torch.tensor(0.0), x, "velocity", "data"), x)


def test_edm_preconditioning_is_the_published_one_and_finite_at_both_ends():
    path, edm = Linear(), build_prediction("edm")
    x0, x1 = draw()
    t = torch.linspace(0.05, 0.95, len(x0), dtype=torch.float64)
    x, _ = path.sample(x0, x1, None, t)
    sigma = ((1 - t) / t).reshape(-1, 1, 1)
    state, sd = x / t.reshape(-1, 1, 1), 0.5
    network_input, label = edm.inputs(path, x, t)
    assert torch.allclose(network_input, state / torch.sqrt(sigma**2 + sd**2))
    assert torch.allclose(label, sigma.flatten().log() / 4)
    output = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    denoised = sd**2 / (sigma**2 + sd**2) * state + sigma * sd / torch.sqrt(sigma**2 + sd**2) * output
    assert torch.allclose(edm.ends(path, x, t, output).data, denoised)
    stable = (
        sd * torch.sqrt((1 - t) ** 2 + (sd * t) ** 2).reshape(-1, 1, 1) * output
        - (1 - t - sd**2 * t).reshape(-1, 1, 1) * x
    )
    q2 = ((1 - t) ** 2 + (sd * t) ** 2).reshape(-1, 1, 1)
    assert torch.allclose(edm.velocity(path, x, t, output), stable / q2)
    for end in (0.0, 1.0):
        time = torch.tensor(end, dtype=torch.float64)
        assert bool(edm.velocity(path, x, time, output).isfinite().all())
        assert all(bool(v.isfinite().all()) for v in edm.inputs(path, x, time))


def test_specs_rebuild_and_unknown_names_are_refused():
    for path in ALL:
        if path.spec()["name"] != "custom":
            assert build_path(path.spec()) == path
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        build_path("liner")
    with pytest.raises(ValueError, match="pass path="):
        build_path({"name": "custom"})
    with pytest.raises(ValueError, match="settings"):
        build_path({"name": "vp", "beta": 1})
    with pytest.raises(ValueError, match="sigma_min"):
        build_path({"name": "ve", "sigma_min": 2.0, "sigma_max": 1.0})
