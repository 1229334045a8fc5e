"""Stochastic interpolants: coefficients, fields, objectives, exact mixtures, SDEs, likelihoods, control."""

import math
import warnings

import pytest
import torch

import pantarhei as pr
from pantarhei.flow import (
    Fields,
    GaussianMixture,
    Inpainting,
    Interpolant,
    Interpolation,
    MixtureField,
    Present,
    StiffNoise,
    SuperResolution,
    kl_control,
    loss_gap,
    noise_amount,
    path_likelihood,
    transport_sde,
)
from pantarhei.flow import interpolants as si
from pantarhei.flow.gammas import GAMMAS, Brownian, NoLatent, SineSquared, build_gamma
from pantarhei.flow.observations import ObservedSource, build_observation
from pantarhei.networks import MLP, MLPConfig

KIND = torch.float64
SOURCE = GaussianMixture(
    torch.ones(2, dtype=KIND), torch.tensor([[-1.5, 0], [1.5, 0.5]], dtype=KIND), torch.full((2,), 0.3, dtype=KIND)
)
TARGET = GaussianMixture(
    torch.ones(3, dtype=KIND),
    torch.tensor([[-2.0, 1], [0, -1], [2, 0.5]], dtype=KIND),
    torch.full((3,), 0.2, dtype=KIND),
)
INNER = torch.linspace(0.06, 0.93, 7, dtype=KIND)


def exact_flow(predicts="velocity+latent", path=None, **options):
    path = path or si.linear()
    field = MixtureField(TARGET, SOURCE, path, predicts=predicts)
    return pr.Flow(field, path=path, predicts=predicts, source=SOURCE, shape=(2,), **options)


def draws(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = SOURCE.sample(count, generator), TARGET.sample(count, generator)
    return x0, x1, torch.randn(count, 2, generator=generator, dtype=KIND), generator


@pytest.mark.parametrize("name", si.INTERPOLANTS)
def test_coefficients_are_consistent_and_are_saved(name):
    path = si.build_interpolant(name)
    assert si.build_interpolant(path.spec()) == path
    step = 1e-6
    parts = ((path.alpha, path.ends.alpha_dot), (path.sigma, path.ends.sigma_dot))
    for value, slope in (*parts, (path.gamma.value, path.gamma.derivative)):
        assert torch.allclose((value(INNER + step) - value(INNER - step)) / (2 * step), slope(INNER), atol=1e-6)
    assert torch.allclose(path.gamma.value(INNER) * path.gamma.derivative(INNER), path.gamma.product(INNER))


@pytest.mark.parametrize("name", GAMMAS)
def test_gamma_vanishes_at_the_ends_and_its_product_stays_finite(name):
    gamma = build_gamma(name)
    ends = torch.tensor([0.0, 1.0, -0.1, 1.1], dtype=KIND)  # adaptive solvers step past the ends
    assert torch.allclose(gamma.value(ends), torch.zeros(4, dtype=KIND), atol=1e-12)
    assert bool(gamma.product(ends).isfinite().all())
    assert bool((gamma.value(INNER) > 0).all()) == (name != "none")


def test_unit_variance_of_the_trigonometric_path():
    path = si.trigonometric()
    total = path.alpha(INNER) ** 2 + path.sigma(INNER) ** 2 + path.gamma.value(INNER) ** 2
    assert torch.allclose(total, torch.ones(7, dtype=KIND))
    with pytest.raises(ValueError, match="gamma: must not exceed 1"):
        si.trigonometric(Brownian(5.0))


def test_what_a_path_needs_is_asked_for():
    with pytest.raises(ValueError, match="interpolant: unknown"):
        si.build_interpolant("linaer")
    with pytest.raises(ValueError, match="a: must be positive"):
        Brownian(0.0)
    with pytest.raises(ValueError, match="z: this path has a latent"):
        si.linear().sample(torch.zeros(1, 2), torch.zeros(1, 2), None, torch.rand(1))


SETS = ["velocity+latent", "velocity+score", "deterministic+latent", "deterministic+score"]


@pytest.mark.parametrize("predicts", SETS)
@pytest.mark.parametrize(
    "path", [si.linear(), si.trigonometric(), si.encoding_decoding()], ids=lambda p: type(p.ends).__name__
)
def test_all_pairs_of_fields_say_the_same(predicts, path):
    flow, field = exact_flow(predicts, path), MixtureField(TARGET, SOURCE, path)
    x = torch.randn(7, 2, dtype=KIND)
    assert torch.allclose(flow.velocity(x, INNER), field(x, INNER))
    assert torch.allclose(flow.score(x, INNER), field.score(x, INNER))
    assert torch.allclose(flow.latent(x, INNER), field.latent(x, INNER), atol=1e-12)
    c = path.at(INNER, x)
    if isinstance(path.ends, si.EncodingDecoding):
        return  # one of the ends has no weight
    data, source = flow.ends(x, INNER)
    assert torch.allclose(data, field.denoise(x, INNER))
    assert torch.allclose(c.sigma * source + c.alpha * data + c.gamma * field.latent(x, INNER), x)


def test_drift_is_velocity_and_score():
    path, epsilon = si.linear(Brownian(1.0)), 0.5
    field = MixtureField(TARGET, SOURCE, path)
    x = torch.randn(7, 2, dtype=KIND)
    drift = field(x, INNER) + epsilon * field.score(x, INNER)
    fields = Fields(names=("drift", "latent"), epsilon=epsilon)
    output = torch.cat([drift, field.latent(x, INNER)], dim=1)
    assert torch.allclose(fields.velocity(path, x, INNER, output), field(x, INNER))


def test_a_known_start_gives_the_score_from_the_drift_alone():
    # From one point the law of x_t is Gaussian: mean sigma x0 + alpha m, variance alpha^2 v + gamma^2.
    path, x0, m, v = si.foellmer(0.7), torch.tensor([[0.4, -1.0]], dtype=KIND), 2.0, 0.3
    t, x = INNER, torch.randn(7, 2, dtype=KIND)
    c = path.at(t, x)
    variance = c.alpha**2 * v + c.gamma**2
    score = -(x - c.sigma * x0 - c.alpha * m) / variance
    data = m - c.alpha * v * score  # E[x1 | x_t]
    fields = Fields(names=("drift",), epsilon="foellmer", start="vector")
    latent = -c.gamma * score
    drift = c.alpha_dot * data + c.sigma_dot * x0 - 0.7 * t.sqrt()[:, None] * latent
    start = x0.expand(7, 2)
    assert torch.allclose(fields.latent(path, x, t, drift, start), latent)
    velocity = c.alpha_dot * data + c.sigma_dot * x0 + c.gamma_dot * latent
    assert torch.allclose(fields.velocity(path, x, t, drift, start), velocity)


def test_fields_that_do_not_say_enough_are_refused():
    with pytest.raises(ValueError, match="predicts: unknown"):
        Fields(names=("latent", "velocity"))
    with pytest.raises(ValueError, match="mirror path only"):
        pr.Flow(MLP(MLPConfig(2)), path=si.linear(), predicts="latent")
    with pytest.raises(ValueError, match="predicts: unknown predicts 'data'"):
        pr.Flow(MLP(MLPConfig(2)), path=si.linear(), predicts="data")
    alone = pr.Flow(MixtureField(TARGET, SOURCE, si.linear()), path=si.linear(), source=SOURCE, shape=(2,))
    with pytest.raises(ValueError, match="train with predicts='velocity\\+latent'"):
        alone.score(torch.zeros(1, 2, dtype=KIND), INNER[:1])
    with pytest.raises(ValueError, match="2 fields stacked"):
        pr.Flow(MLP(MLPConfig(3)), path=si.linear(), predicts="velocity+latent").velocity(
            torch.zeros(1, 3), torch.rand(1)
        )
    with pytest.raises(ValueError, match="without a latent"):
        pr.Flow(MLP(MLPConfig(2, fields=2)), path=si.linear(NoLatent()), predicts="velocity+latent")
    bare = pr.Flow(MLP(MLPConfig(2)), path=si.linear(NoLatent()))
    with pytest.raises(ValueError, match="score"):
        bare.score(torch.zeros(1, 2), torch.rand(1))


def test_correlated_ends():
    # x1 = x0 + d with d independent: all of the motion is d's.
    start = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=KIND)
    one = torch.ones(1, dtype=KIND)
    source = GaussianMixture(one, torch.zeros(1, 2, dtype=KIND), start[None])
    target = GaussianMixture(one, torch.ones(1, 2, dtype=KIND), start[None] + 0.5 * torch.eye(2, dtype=KIND))
    path = si.linear(Brownian(0.3))
    field = MixtureField(target, source, path, cross=start, predicts="velocity+latent")
    flow = pr.Flow(field, path=path, predicts="velocity+latent", source=source, shape=(2,))
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    x0 = source.sample(count, generator)
    x1 = x0 + 1 + math.sqrt(0.5) * torch.randn(count, 2, generator=generator, dtype=KIND)
    t = torch.full((), 0.4, dtype=KIND)
    x_t, rate = path.sample(x0, x1, torch.randn(count, 2, generator=generator, dtype=KIND), t)
    # The velocity is the regression of the rate on x_t.
    assert (rate - flow.velocity(x_t, t)).mul(x_t[:, :1]).mean().abs() < 0.02
    x = flow.sample(x0=source.sample(count, generator), epsilon=0.3, steps=60, generator=generator)
    assert torch.allclose(x.T.cov(), target.covariances[0], atol=0.03)
    assert torch.allclose(x.mean(dim=0), torch.ones(2, dtype=KIND), atol=0.02)
    with pytest.raises(ValueError, match="cross"):
        MixtureField(TARGET, SOURCE, path, cross=start)


# Objectives


@pytest.mark.parametrize("predicts", SETS)
def test_exact_fields_are_the_minimum(predicts):
    # The quadratic loss of f exceeds that of the exact field by |f - exact|^2 / 2.
    path = si.linear()
    x0, x1, z, generator = draws(40_000)
    t = 0.1 + 0.8 * torch.rand(len(x0), generator=generator, dtype=KIND)
    batch = {"x0": x0, "x1": x1, "z": z, "t": t}

    class Shifted(torch.nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.exact, self.shift = MixtureField(TARGET, SOURCE, path, predicts=predicts), shift

        def forward(self, x, t):
            return self.exact(x, t) + self.shift * torch.cos(x.repeat(1, 2))

    rows = {}
    for shift in (0.0, 0.5):
        flow = pr.Flow(Shifted(shift), path=path, predicts=predicts, source=SOURCE, shape=(2,))
        rows[shift] = dict(Interpolation(antithetic=True).rows(flow, batch, None))
    x_t, _ = path.sample(x0, x1, z, t)
    expected = 0.5 * (0.5 * torch.cos(x_t)).square().mean()
    for name in rows[0.0]:
        gap = rows[0.5][name] - rows[0.0][name]
        assert float(gap.mean()) == pytest.approx(float(expected), abs=4 * float(gap.std()) / 200)


def test_antithetic_pairs_bound_the_variance_near_an_end():
    torch.manual_seed(0)
    flow = pr.Flow(MLP(MLPConfig(2, 32, 2, fields=2)).double(), path=si.linear(), predicts="velocity+score", shape=(2,))
    spread = []
    for paired in (True, False):
        values = []
        for seed in range(30):
            x0, x1, z, _ = draws(64, seed)
            batch = {"x0": x0, "x1": x1, "z": z, "t": torch.full((64,), 1e-4, dtype=KIND)}
            loss, log = Interpolation(antithetic=paired)(flow, batch, None)
            assert set(log) == {"loss", "velocity", "score"}
            flow.network.zero_grad()
            loss.backward()
            values.append(torch.cat([p.grad.flatten() for p in flow.network.parameters()]))
        spread.append(float(torch.stack(values).std(dim=0).norm()))
    assert spread[1] > 10 * spread[0]


def test_the_objective_of_other_paths_is_refused_and_the_right_one_is_the_default():
    flow = pr.Flow(MLP(MLPConfig(2, 16, 2)), path=si.linear(), source=SOURCE, shape=(2,))
    batch = {"x1": torch.randn(8, 2)}
    with pytest.raises(ValueError, match="train with flow"):
        pr.FlowMatching()(flow, batch, None)
    assert isinstance(pr.FlowTask(flow, data=batch["x1"]).objective, Interpolation)


def test_the_objective_trains():
    torch.manual_seed(0)
    network = MLP(MLPConfig(2, 32, 2, fields=2))
    flow = pr.Flow(network, path=si.linear(), predicts="velocity+latent", source=SOURCE, shape=(2,))
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(200):
        loss, _ = Interpolation()(flow, {"x1": TARGET.sample(256, generator).float()}, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < sum(losses[:20])


# Sampling


@pytest.mark.parametrize("amount", [0.0, 0.5, noise_amount("bump", 1.0, si.linear())], ids=["ode", "constant", "bump"])
@pytest.mark.parametrize("method", ["euler_maruyama", "heun"])
def test_the_equations_carry_one_mixture_to_the_other(amount, method):
    flow = exact_flow()
    x0, x1, _, generator = draws(20_000)
    for times, start, end in (((0.0, 1.0), x0, x1), ((1.0, 0.0), x1, x0)):
        x = transport_sde(flow, start, times, amount, steps=60, method=method, generator=generator).x
        assert torch.allclose(x.mean(dim=0), end.mean(dim=0), atol=0.05)
        assert torch.allclose(x.T.cov(), end.T.cov(), atol=0.08)


def test_noise_is_really_added_and_repeats_with_its_seed():
    flow = exact_flow()
    x0 = SOURCE.sample(50, torch.Generator().manual_seed(0))

    def sampled(seed, amount):
        return flow.sample(x0=x0, epsilon=amount, steps=20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sampled(1, 0.5), sampled(1, 0.5))
    assert (sampled(1, 0.5) - sampled(2, 0.5)).std() > 0.1
    assert torch.allclose(sampled(1, 0.0), sampled(2, 0.0))


def test_thin_data_do_not_blow_up_under_the_cap_and_are_warned_of_without():
    thin = GaussianMixture(torch.ones(2), torch.tensor([[-2.0], [2.0]]), torch.full((2,), 1e-4))
    flow = pr.Flow(MixtureField(thin), shape=(1,))
    options = {"epsilon": 2.0, "steps": 50, "generator": torch.Generator().manual_seed(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capped = flow.sample(500, **options)
    assert float((capped.abs() - 2).abs().max()) < 0.1
    with pytest.warns(StiffNoise, match="epsilon dt / gamma\\^2 reaches"):
        wild = flow.sample(500, cap=None, **options)
    assert float(wild.abs().max()) > 100


@pytest.mark.parametrize("last", ["mean", "euler", "heun", "denoise"])
def test_last_steps_and_their_length(last):
    flow = exact_flow()
    seen = []
    x0 = SOURCE.sample(4000, torch.Generator().manual_seed(0))
    x = flow.sample(
        x0=x0,
        epsilon=0.5,
        steps=50,
        last=last,
        last_step=0.04,
        generator=torch.Generator().manual_seed(0),
        observe=lambda x, t, i: seen.append(t),
    )
    assert any(abs(t - 0.96) < 1e-6 for t in seen)
    assert torch.allclose(x.mean(dim=0), TARGET.sample(40_000).mean(dim=0), atol=0.1)
    with pytest.raises(ValueError, match="last_step"):
        flow.sample(x0=x0, epsilon=0.5, steps=50, last_step=1.5)
    with pytest.raises(ValueError, match="last: unknown"):
        flow.sample(x0=x0, epsilon=0.5, last="meen")


def test_one_step_between_clean_ends_is_one_step():
    flow = exact_flow()
    x0 = SOURCE.sample(10, torch.Generator().manual_seed(0))
    euler = flow.sample(x0=x0, steps=1)
    for amount in (0.0, 0.5):
        solution = transport_sde(flow, x0, (0.0, 1.0), amount, steps=1, last="euler")
        assert torch.allclose(solution.x, euler)
        assert solution.evaluations == 1
        assert torch.equal(solution.xs[0], x0)


def test_the_cap_is_that_of_the_step_in_either_precision():
    # Long and short steps in turn: drift and noise must agree about which one they are in.
    grid = [0.0]
    while grid[-1] < 1 - 1e-9:
        grid.append(min(1.0, grid[-1] + (0.019 if len(grid) % 2 else 0.001)))
    grid[-1] = 1.0
    ends = []
    for kind in (torch.float32, torch.float64):
        flow = exact_flow().to(kind)
        x0 = SOURCE.sample(20_000, torch.Generator().manual_seed(0)).to(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StiffNoise)
            x = transport_sde(flow, x0, (0.0, 1.0), 20.0, steps=grid, generator=torch.Generator().manual_seed(1)).x
        ends.append(x.double())
    truth = TARGET.sample(20_000, torch.Generator().manual_seed(2))
    for x in ends:
        assert torch.allclose(x.T.cov(), truth.T.cov(), atol=0.1)
    with pytest.warns(StiffNoise, match="lowered from 20"):
        exact_flow().sample(4, epsilon=20.0, steps=20)


@pytest.mark.parametrize("predicts", ["velocity+latent", "deterministic+latent", "deterministic+score", "latent"])
def test_no_noise_is_left_at_the_end(predicts):
    points = GaussianMixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2,), 1e-8))
    path = si.mirror(4.0) if predicts == "latent" else si.linear()
    field = MixtureField(points, points, path, predicts=predicts)
    flow = pr.Flow(field, path=path, predicts=predicts, source=points, shape=(1,))
    for options in ({"epsilon": 0.5}, {"epsilon": 0.5, "last": "denoise"}):
        x = flow.sample(200, steps=200, generator=torch.Generator().manual_seed(0), **options)
        assert float((x.abs() - 1).abs().max()) < 0.03


def test_denoising_on_the_path_that_forgets():
    assert 0.5 in pr.flow.make_grid(7, path=si.EncodingDecoding())
    flow = exact_flow(path=si.encoding_decoding())
    x = flow.sample(500, epsilon=0.3, steps=40, last="denoise", generator=torch.Generator().manual_seed(0))
    assert bool(x.isfinite().all())
    late = torch.tensor(0.75, dtype=KIND)
    field = MixtureField(TARGET, SOURCE, si.encoding_decoding())
    assert torch.allclose(flow.denoise(x, late), field.denoise(x, late))
    assert bool(flow.noise(x, late).isnan().all())  # nothing is known of x0 any more
    with pytest.raises(ValueError, match="gamma' is infinite"):
        exact_flow().denoise(x, torch.tensor(1.0, dtype=KIND))


def test_denoising_steps_are_ddim_and_reach_the_ode():
    flow = pr.Flow(MixtureField(TARGET), shape=(2,))
    x0 = torch.randn(50, 2, dtype=KIND, generator=torch.Generator().manual_seed(0))
    fine = pr.flow.denoising_steps(flow, x0, [i / 400 for i in range(401)])
    assert torch.allclose(fine, flow.sample(x0=x0, steps=400, method="heun"), atol=0.02)
    # On the linear path the step is Euler's.
    assert torch.allclose(pr.flow.denoising_steps(flow, x0, [0.0, 0.5, 1.0]), flow.sample(x0=x0, steps=2))
    with pytest.raises(ValueError, match="affine"):
        pr.flow.denoising_steps(exact_flow(), x0, [0.0, 1.0])


def test_what_has_no_ode_or_no_field_says_so():
    fields = Fields(names=("drift",), epsilon="foellmer", start="vector")
    network = MLP(MLPConfig(2, 8, 1, vector=2))
    present = Present(name_of_condition="vector")
    flow = pr.Flow(network, path="foellmer", predicts=fields, source=present, shape=(2,), conditions=("vector",))
    x = torch.zeros(3, 2)
    for use in (flow.invert, lambda x, **o: flow.transport(x, (0.0, 1.0), **o), flow.log_prob):
        with pytest.raises(ValueError, match="has no ODE"):
            use(x, condition={"vector": x})
    distilled = exact_flow(provenance=pr.Provenance(coupling="distilled"))
    with pytest.raises(ValueError, match="distilled"):
        distilled.sample(3, epsilon=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": (0.0, 1.5)}, "times"),
        ({"times": (0.0, 0.5, 1.0)}, "times"),
        ({"steps": [0.2, 0.5, 0.7]}, "steps"),
        ({"steps": 0}, "steps"),
        ({"cap": -1.0}, "cap"),
        ({"epsilon": math.inf}, "epsilon"),
        ({"epsilon": "trained"}, "epsilon"),
        ({"method": "rk4"}, "method"),
    ],
)
def test_bad_options_of_the_sde(options, message):
    settings = {"times": (0.0, 1.0), "epsilon": 0.5, **options}
    with pytest.raises(ValueError, match=message):
        transport_sde(
            exact_flow(), torch.zeros(2, 2, dtype=KIND), settings.pop("times"), settings.pop("epsilon"), **settings
        )


def test_the_foellmer_process_leaves_one_point():
    # From one point x0 to N(2, 0.3): the drift is known, and no ODE could do it.
    path, m, v = si.foellmer(1.0), 2.0, 0.3

    class Drift(torch.nn.Module):
        def forward(self, x, t, vector):
            c = path.at(t, x)
            score = -(x - c.sigma * vector - c.alpha * m) / (c.alpha**2 * v + c.gamma**2).clamp_min(1e-12)
            data = m - c.alpha * v * score
            latent = -c.gamma * score
            return c.alpha_dot * data + c.sigma_dot * vector - t.sqrt()[:, None] * latent

    fields = Fields(names=("drift",), epsilon="foellmer", start="vector")
    flow = pr.Flow(
        Drift(),
        path=path,
        predicts=fields,
        source=Present(name_of_condition="vector"),
        shape=(1,),
        conditions=("vector",),
    )
    past = torch.full((20_000, 1), -1.0, dtype=KIND)
    for amount in (None, 0.2):  # its own noise, and another
        generator = torch.Generator().manual_seed(0)
        options = {} if amount is None else {"epsilon": amount}
        x = flow.sample(x0=past, condition={"vector": past}, steps=200, generator=generator, **options)
        assert float(x.mean()) == pytest.approx(m, abs=0.02)
        assert float(x.var()) == pytest.approx(v, abs=0.02)


def test_named_amounts_of_noise():
    path = pr.paths.Linear()
    assert noise_amount("sigma", 2.0, path)(0.25) == pytest.approx(1.5)
    assert noise_amount("diffusion", 1.0, path)(0.5) == pytest.approx(1.0)
    assert noise_amount("variance", 1.0, si.linear())(0.5) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="form: unknown"):
        noise_amount("sgima", 1.0, path)
    with pytest.raises(ValueError, match="one-sided"):
        noise_amount("diffusion", 1.0, si.linear())
    with pytest.raises(ValueError, match="negative"):
        noise_amount("constant", -1.0, path)


def test_mirror_goes_out_and_comes_back_to_the_law():
    path = si.mirror(0.5)
    field = MixtureField(TARGET, TARGET, path, predicts="latent")
    flow = pr.Flow(field, path=path, predicts="latent", source=TARGET, shape=(2,))
    generator = torch.Generator().manual_seed(0)
    x0 = TARGET.sample(20_000, generator)
    x = flow.sample(x0=x0, epsilon=0.5, steps=60, generator=generator)
    assert torch.allclose(x.T.cov(), x0.T.cov(), atol=0.06)
    assert (x - x0).norm(dim=1).mean() > 0.5


# Likelihood and control


def test_log_likelihood_of_a_bridge_by_ode_and_by_paths():
    flow = exact_flow()
    generator = torch.Generator().manual_seed(0)
    x = TARGET.sample(60, generator)
    exact = TARGET.log_prob(x)
    assert (flow.log_prob(x, rtol=1e-6, atol=1e-6) - exact).abs().max() < 1e-3
    guided = flow.log_prob(x, epsilon=0.1, paths=64, steps=60, generator=generator, details=True)
    assert (guided.value - exact).abs().mean() < 0.03
    assert bool((guided.bound <= guided.value + 1e-9).all())
    plain = path_likelihood(flow, x, 0.1, SOURCE.log_prob, paths=64, steps=60, guided=False, generator=generator)
    assert (plain.value - exact).mean().abs() < 4 * float(plain.error.mean()) / math.sqrt(60) + 0.03
    assert plain.error.mean() > 4 * guided.error.mean()
    probed = path_likelihood(
        flow, x, 0.1, SOURCE.log_prob, paths=64, steps=60, divergence="hutchinson", generator=generator
    )
    assert (probed.value - exact).mean().abs() < 0.1
    with pytest.raises(ValueError, match="paths"):
        path_likelihood(flow, x, 0.1, SOURCE.log_prob, paths=1)


def test_samples_come_with_their_likelihood():
    flow = exact_flow()
    generator = torch.Generator().manual_seed(0)
    found = flow.sample_with_log_prob(30, generator=generator, method="dopri5", rtol=1e-7, atol=1e-7)
    assert torch.allclose(found.value, TARGET.log_prob(found.start), atol=1e-3)
    one_sided = pr.Flow(MixtureField(TARGET), shape=(2,))
    found = one_sided.sample_with_log_prob(200, generator=generator, divergence="hutchinson", probes=16, steps=40)
    error = found.value - TARGET.log_prob(found.start.double())
    assert float(error.mean()) == pytest.approx(0.0, abs=0.2)
    with pytest.raises(ValueError, match="without a density"):
        pr.Flow(MixtureField(TARGET), source=torch.randn(5, 2), shape=(2,)).sample_with_log_prob(3)


def test_the_bound_holds_and_its_parts_are_right():
    exact, path = exact_flow(), si.linear()

    class Wrong(torch.nn.Module):
        def forward(self, x, t):
            velocity, latent = exact.output(x, t).chunk(2, dim=1)
            gamma = path.at(t, x).gamma
            return torch.cat([velocity + 0.3, latent - 0.2 * gamma], dim=1)

    wrong = pr.Flow(Wrong(), path=path, predicts="velocity+latent", source=SOURCE, shape=(2,))
    x1 = TARGET.sample(200, torch.Generator().manual_seed(0))
    found = kl_control(wrong, exact, x1, 0.5, interval=(0.1, 0.9))
    assert found.velocity == pytest.approx(0.8 * 2 * 0.09, rel=1e-6)
    assert found.score == pytest.approx(0.8 * 2 * 0.04, rel=1e-6)
    assert found.bound == pytest.approx(0.8 * 2 * (0.3 + 0.5 * 0.2) ** 2 / 2, rel=1e-6)
    assert found.split >= found.bound
    assert found.best_epsilon == pytest.approx(1.5, rel=1e-6)
    with pytest.raises(ValueError, match="positive"):
        kl_control(wrong, exact, x1, 0.0)
    gap = loss_gap(wrong, exact, {"x1": x1}, Interpolation(), draws=8)
    assert gap["velocity"].mean == pytest.approx(0.045, abs=4 * gap["velocity"].error)


# What is known beforehand


def test_observations_and_what_starts_from_them():
    generator = torch.Generator().manual_seed(0)
    x1 = torch.rand(5, 1, 8, 8, generator=generator) * 2 - 1
    hidden = Inpainting(smallest=0.5, largest=0.5)
    context = hidden.observe({"x1": x1}, generator)["context"]
    image, mask = context[:, :-1], context[:, -1:]
    assert torch.equal((1 - mask).sum(dim=(1, 2, 3)), torch.full((5,), 16.0))
    assert torch.equal(image, x1 * mask)
    x0 = hidden.draw(x1.shape, x1, pr.Condition({"context": context}), generator)
    assert torch.equal(x0 * mask, x1 * mask)
    small = SuperResolution(2, 0.0).observe({"x1": x1}, generator)["context"]
    assert torch.allclose(small.mean(dim=(2, 3)), x1.mean(dim=(2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match="give 'context'"):
        hidden.draw(x1.shape, x1, None, generator)
    with pytest.raises(ValueError, match="past"):
        Present().observe({"x1": x1}, generator)
    with pytest.raises(ValueError, match="cannot be made 3 times"):
        SuperResolution(3).observe({"x1": x1}, generator)
    assert build_observation(hidden.spec()) == hidden
    source = ObservedSource(pr.data.TensorSource({"x1": x1}), hidden)
    rows = torch.tensor([3, 1])
    assert torch.equal(source.fetch(rows)["context"][1], source.fetch(torch.tensor([1]))["context"][0])
    flow = pr.Flow(MLP(MLPConfig(2)), source=hidden, shape=(1, 8, 8), conditions=("context",))
    assert pr.Flow.from_spec(flow.spec(), flow.network).source == hidden


def test_flows_with_latents_are_saved(tmp_path):
    path = Interpolant(si.Shrunk(pr.paths.Cosine(), SineSquared()), SineSquared())
    flow = pr.Flow(MLP(MLPConfig(2, 16, 2, fields=2)), path=path, predicts="velocity+score", source=SOURCE, shape=(2,))
    flow.save_pretrained(tmp_path / "saved")
    again = pr.Flow.from_pretrained(tmp_path / "saved")
    assert again.path == path
    assert again.prediction == flow.prediction
    x, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(again.velocity(x, t), flow.velocity(x, t))
    with pytest.raises(ValueError, match="not saved with it"):
        again.sample(2)
