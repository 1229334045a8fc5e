"""Steps that know the path, and flows on other paths: exact solutions, orders, agreements."""

import pytest
import torch

from pantarhei.flow import Flow, GaussianMixture, MixtureField, denoising_steps, on_path, paths
from pantarhei.flow.predictions import build_prediction


class Exact(torch.nn.Module):
    """The exact velocity, as any prediction."""

    def __init__(self, field, path, predicts):
        super().__init__()
        self.field, self.path, self.prediction = field, path, build_prediction(predicts)

    def forward(self, x, t):
        ends = build_prediction("velocity").ends(self.path, x, t, self.field(x, t))
        return self.prediction.target(self.path, ends.noise, ends.data, t)


def mixture_flow(path="linear", predicts="noise"):
    """A flow whose network is exact: two Gaussians in the plane."""
    path = paths.build_path(path)
    mixture = GaussianMixture(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64),
        torch.tensor([0.09, 0.09], dtype=torch.float64),
    )
    return Flow(Exact(MixtureField(mixture, path=path), path, predicts), path=path, predicts=predicts, shape=(2,))


def noise(count=64, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ORIGINS = ["vp", "sub-vp", "cosine", "ve", "edm", {"name": "numbered", "schedule": "linear"}]


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
@pytest.mark.parametrize("predicts", ["noise", "data", "v"])
def test_a_flow_on_another_path_leads_the_same_draw_to_the_same_data(origin, predicts):
    flow = mixture_flow(origin, predicts)
    moved = on_path(flow)
    assert moved.path == paths.Linear()
    z = noise()
    options = {"steps": 400, "method": "rk4", "grid": "logsnr", "final": "state"}
    there, here = moved.sample(x0=z, **options), flow.sample(x0=z, **options)
    # States at the last times differ by the scale alone.
    t = torch.tensor(flow.interval[1], dtype=torch.float64)
    scale = flow.path.alpha(t) + flow.path.sigma(t)
    assert torch.allclose(there * scale, here, atol=2e-4)


@pytest.mark.parametrize("origin", ORIGINS, ids=str)
def test_estimates_are_the_same_on_both_paths(origin):
    flow = mixture_flow(origin)
    moved = on_path(flow)
    low, high = moved.interval
    for share in (0.02, 0.3, 0.7, 0.98):
        t = torch.tensor(low + share * (high - low), dtype=torch.float64)
        own, scale = paths.change_path(flow.path, moved.path, t)
        x = noise(8)
        assert torch.allclose(moved.denoise(x, t), flow.denoise(scale * x, own), atol=1e-9)
        assert torch.allclose(moved.noise(x, t), flow.noise(scale * x, own), atol=1e-9)


def test_a_flow_moved_there_and_back_is_itself():
    flow = mixture_flow("vp")
    back = on_path(on_path(flow), flow.path)
    assert back.prediction == flow.prediction
    assert back.path == flow.path
    assert back.interval == pytest.approx(flow.interval)


def test_the_spec_of_a_moved_flow_rebuilds_it():
    moved = on_path(mixture_flow("numbered"))
    again = Flow.from_spec(moved.spec(), moved.network)
    assert again.prediction == moved.prediction
    x, t = noise(4), torch.tensor(0.4, dtype=torch.float64)
    assert torch.equal(again.velocity(x, t), moved.velocity(x, t))


def test_v_of_diffusion_models_is_determined_at_every_time():
    path = paths.Numbered(zero_snr=True)
    assert build_prediction("v").interval(path) == (0.0, 1.0)
    assert build_prediction("noise").interval(path)[0] > 0


@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("edm", 2), ("dpm-solver", 2), ("heun-euler", 2)])
@pytest.mark.parametrize("path", ["linear", "vp", "cosine"])
def test_path_methods_converge_to_the_exact_solution(method, order, path):
    flow = mixture_flow(path, "noise")
    z, times = noise(), (0.05, 0.95)
    exact = flow.transport(z, times, steps=800, method="rk4").x
    errors = [
        float((flow.transport(z, times, steps=n, method=method, grid="logsnr").x - exact).square().mean().sqrt())
        for n in (64, 128)
    ]
    assert errors[0] / errors[1] > 2 ** (order - 0.35)


@pytest.mark.parametrize("method", ["reinterpolate", "reinterpolate-heun"])
def test_reinterpolation_is_one_euler_step_but_no_ode_solver(method):
    flow = mixture_flow("linear", "velocity")
    z = noise()
    assert torch.allclose(flow.sample(x0=z, steps=1, method=method), flow.sample(x0=z, steps=1), atol=1e-12)
    exact = flow.sample(x0=z, steps=400, method="rk4")
    assert float((flow.sample(x0=z, steps=200, method=method) - exact).square().mean()) > 0.01


def test_ddim_on_the_linear_path_is_euler_and_agrees_with_denoising_steps():
    flow = mixture_flow("linear", "velocity")
    z, times = noise(), [i / 7 for i in range(8)]
    euler = flow.sample(x0=z, steps=7, method="euler")
    assert torch.allclose(flow.sample(x0=z, steps=7, method="ddim"), euler)
    other = mixture_flow("vp", "noise")
    low, high = other.interval
    grid = [low + (high - low) * t for t in times]
    first = float(other.path.sigma(torch.tensor(low, dtype=torch.float64)))
    assert torch.allclose(
        other.sample(x0=z, steps=7, method="ddim", final="state"), denoising_steps(other, first * z, grid), atol=1e-8
    )


@pytest.mark.parametrize("path", ["linear", "vp", "cosine"])
@pytest.mark.parametrize("method", ["ddim", "edm", "reinterpolate", "reinterpolate-heun", "dpm-solver"])
def test_first_order_paths_are_solved_exactly_in_any_number_of_steps(path, method):
    """Where noise and data estimates are constant along a path, steps that know the path make no error."""
    path = paths.build_path(path)
    x0, x1 = noise(8), noise(8, 1)

    class Constant(torch.nn.Module):
        def forward(self, x, t):
            return path.sample(x0, x1, None, t)[1]

    flow = Flow(Constant(), path=path, predicts="velocity", shape=(2,))
    times = flow.interval
    start = path.sample(x0, x1, None, torch.tensor(times[0], dtype=torch.float64))[0]
    end = path.sample(x0, x1, None, torch.tensor(times[1], dtype=torch.float64))[0]
    for steps in (1, 3):
        if method.startswith("reinterpolate") and float(path.alpha(torch.tensor(times[0]))) > 0:
            continue  # the kept noise is that of the state, which holds a trace of the data here
        found = flow.transport(start, times, steps=steps, method=method).x
        assert torch.allclose(found, end, atol=1e-6), steps


def test_a_clean_end_costs_no_evaluation_and_leaves_no_noise():
    flow = mixture_flow("numbered", "noise")
    calls = []
    flow.network.register_forward_hook(lambda *_: calls.append(1))
    z = noise(16)
    for steps in (1, 2, 5):
        calls.clear()
        clean = flow.sample(x0=z, steps=steps, method="ddim", final="clean")
        assert len(calls) == steps
    calls.clear()
    noisy = flow.sample(x0=z, steps=5, method="ddim", final="state")
    assert len(calls) == 5
    # The other end is alpha_0 x1 + sigma_0 x0 of the same estimates.
    alpha, sigma = (float(f(torch.tensor(1.0, dtype=torch.float64))) for f in (flow.path.alpha, flow.path.sigma))
    left = (noisy - alpha * clean) / sigma
    assert 0.5 < float(left.std()) < 1.5


def test_reinterpolation_does_not_run_backwards():
    with pytest.raises(ValueError, match="reinterpolation runs from noise to data"):
        mixture_flow("linear", "velocity").invert(noise(2), method="reinterpolate", steps=2)


def test_the_edm_sampler_is_that_of_the_paper():
    """Algorithm 1 of Karras et al. without churn, written out: 18 noise levels and zero, 35 evaluations."""
    flow = mixture_flow("edm", "data")
    z, path = noise(), flow.path
    ramp = torch.arange(18, dtype=torch.float64) / 17
    levels = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    x = 80 * z
    for i, sigma in enumerate(levels):
        after = levels[i + 1] if i < 17 else torch.zeros((), dtype=torch.float64)
        slope = (x - flow.denoise(x, path.time_at(1 / sigma))) / sigma
        new = x + (after - sigma) * slope
        if i < 17:
            there = (new - flow.denoise(new, path.time_at(1 / after))) / after
            new = x + (after - sigma) * (slope + there) / 2
        x = new
    calls = []
    flow.network.register_forward_hook(lambda *_: calls.append(1))
    assert torch.allclose(flow.sample(x0=z, steps=17, method="edm"), x, atol=1e-6)
    assert len(calls) == 35


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match="dpm-solver"):
        mixture_flow().sample(x0=noise(2), method="dpm-solvr")
