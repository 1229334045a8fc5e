"""Differentiable samples: those of the sampler itself, with its exact gradients; the same ODE in other variables."""

import pytest
import torch

from pantarhei.flow import Flow, GaussianMixture, Reparameterisation, TrajectoryModel, differentiable_sample, keep_norm
from pantarhei.flow.closed_form import MixtureField
from pantarhei.flow.jumps import Move
from pantarhei.flow.paths import EDM, VP, Cosine, Linear, build_path
from pantarhei.networks import MLP, MLPConfig
from pantarhei.solve import Adams
from pantarhei.solve.gradient import Report

VARIABLES = ("rho", "snr", "flow", "angle")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow_of(path="vp", predicts="noise", classes=3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = MLP(MLPConfig(width=16, layers=2, classes=classes)).double()
        for p in network.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    null = {"label": classes} if classes else None
    return Flow(network, path=path, predicts=predicts, shape=(2,), null=null, **options)


def mixture_flow(path):
    covariances = 0.1 * torch.eye(2).double().expand(2, 2, 2)
    law = GaussianMixture(torch.tensor([0.3, 0.7]).double(), normal(2, 2, seed=4), covariances)
    path = build_path(path)
    field = MixtureField(law, path=path)
    return Flow(field, path=path, shape=(2,), interval=(0.02, 0.98), starts_scaled=True)


LABEL = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    "options",
    [
        {"path": "vp", "predicts": "noise", "method": "auto"},
        {"path": "edm", "predicts": "edm", "method": "edm", "grid": "edm"},
        {"path": "linear", "predicts": "velocity", "method": "heun"},
        {"path": "linear", "predicts": "velocity", "method": "dpm-solver", "final": "clean"},
        {"path": "cosine", "predicts": "v", "method": "reinterpolate-heun", "guidance": 2.0},
        {"path": "linear", "predicts": "velocity", "method": Adams(3)},
        {"path": "linear", "predicts": "velocity", "method": "dopri5", "steps": None},
    ],
)
def test_it_is_the_sample_with_its_exact_gradient(options):
    options = dict(options)
    flow = flow_of(options.pop("path"), options.pop("predicts"))
    options = {"steps": 6, **options}
    x0 = normal(4, 2)
    sampled = flow.sample(x0=x0, condition=LABEL, **options)
    found = []
    for through in ("checkpoint", "backprop"):
        leaf = x0.clone().requires_grad_(True)
        x = differentiable_sample(flow, leaf, condition=LABEL, parameters=flow.network, through=through, **options)
        assert torch.allclose(x, sampled, rtol=1e-9, atol=1e-12)
        grads = torch.autograd.grad(
            (x**2 * normal(4, 2, seed=3)).sum(), [leaf, *flow.network.parameters()], allow_unused=True
        )
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    assert torch.allclose(*found, rtol=1e-9, atol=1e-12)
    assert float(found[0].abs().max()) > 0


def test_weights_are_constants_where_they_are_not_named():
    flow = flow_of()
    leaf = normal(4, 2).requires_grad_(True)
    x = differentiable_sample(flow, leaf, condition=LABEL, steps=3)
    x.sum().backward()
    assert leaf.grad is not None
    assert all(p.grad is None and p.requires_grad for p in flow.network.parameters())
    some = {"last": flow.network.outputs.weight}
    differentiable_sample(flow, normal(4, 2), condition=LABEL, steps=3, parameters=some).sum().backward()
    assert [p.grad is not None for p in flow.network.parameters()].count(True) == 1


def test_the_network_is_in_evaluation_mode_on_the_way_back_too():
    flow = flow_of()
    flow.network.hidden = torch.nn.Sequential(torch.nn.Dropout(0.5), *flow.network.hidden)
    flow.network.train()
    leaf = normal(4, 2).requires_grad_(True)
    grads = []
    for _ in range(2):
        x = differentiable_sample(flow, leaf, condition=LABEL, steps=3)
        grads.append(torch.autograd.grad(x.sum(), leaf)[0])
    assert torch.equal(*grads)
    assert flow.network.training


def test_gradients_of_the_condition():
    class Takes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(normal(3, 2, seed=7))

        def forward(self, x, t, embedding):
            return torch.tanh(embedding @ self.weight) - x * t[:, None]

    flow = Flow(Takes(), shape=(2,), conditions=("embedding",))
    embedding = normal(4, 3, seed=8).requires_grad_(True)
    found = []
    for through in ("checkpoint", "backprop", "symplectic", "adjoint"):
        x = differentiable_sample(
            flow, normal(4, 2), condition={"embedding": embedding}, steps=40, method="heun", through=through
        )
        found.append(torch.autograd.grad(x.square().sum(), embedding)[0])
    assert torch.allclose(found[1], found[0], rtol=1e-10)
    assert torch.allclose(found[2], found[0], rtol=1e-10)
    assert torch.allclose(found[3], found[0], rtol=1e-3)
    assert not torch.equal(found[3], found[0])


# Other variables


@pytest.mark.parametrize("path", [VP(), Cosine(), Linear(), EDM()])
@pytest.mark.parametrize("name", VARIABLES)
def test_clock_and_scale_have_inverses(path, name):
    turned = Reparameterisation(name, path, (0.05, 0.95))
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    assert torch.allclose(turned.time(turned.clock(t)), t, atol=1e-7)
    x = normal(3, 2)
    assert torch.allclose(turned.decode(turned.encode(x, 0.4), 0.4), x)
    steps = torch.tensor(turned.grid(t.tolist())).diff()
    assert bool((steps < 0).all() if name == "rho" else (steps > 0).all())


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("path", ["vp", "cosine"])
def test_every_variable_has_the_same_solution(name, path):
    flow, x0 = mixture_flow(path), normal(4, 2)
    exact = flow.sample(x0=x0, steps=1000, method="rk4", grid="logsnr", final="state")
    errors = []
    for steps in (40, 80):
        x = differentiable_sample(flow, x0, variables=name, steps=steps, method="heun", grid="logsnr", final="state")
        errors.append(float((x - exact).norm() / exact.norm()))
    assert errors[1] < 0.35 * errors[0]
    assert errors[1] < 0.02


@pytest.mark.parametrize("name", ["rho", "snr", "flow"])
def test_eulers_step_is_ddims_in_each(name):
    flow = flow_of("vp", "noise", interval=(0.02, 0.98), starts_scaled=True)
    x0 = normal(4, 2)
    ddim = flow.sample(x0=x0, condition=LABEL, steps=5, method="ddim", final="state")
    euler = differentiable_sample(flow, x0, condition=LABEL, variables=name, steps=5, method="euler", final="state")
    assert torch.allclose(euler, ddim, rtol=1e-6, atol=1e-8)


def test_singular_and_unknown_variables():
    flow = flow_of("linear", "velocity")
    with pytest.raises(ValueError, match="rho is singular at t = 0"):
        differentiable_sample(flow, normal(2, 2), condition=LABEL[:2], variables="rho", steps=3)
    with pytest.raises(ValueError, match="reparameterisation: "):
        Reparameterisation("magic", Linear())
    with pytest.raises(ValueError, match="method: ddim knows the path"):
        differentiable_sample(flow, normal(2, 2), condition=LABEL[:2], variables="flow", steps=3, method="ddim")


def test_error_control_in_other_variables_and_a_report():
    flow, report = mixture_flow("vp"), Report()
    leaf = normal(4, 2).requires_grad_(True)
    x = differentiable_sample(flow, leaf, variables="flow", steps=None, method="dopri5", final="state", report=report)
    x.sum().backward()
    assert report.steps > 2
    assert report.backward == 7 * report.steps
    fine = flow.sample(x0=leaf.detach(), steps=400, method="rk4", final="state")
    assert torch.allclose(x, fine, atol=1e-3)


def test_noise_on_its_shell():
    x0, other = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=2)
    kept = keep_norm(3 * x0, other)
    assert torch.allclose(kept.flatten(1).norm(dim=1), other.flatten(1).norm(dim=1))


# Noise on the way, and jumps


def of_both_ways(flow, x0, leaves, **options):
    """Samples and their gradients in x0 and others, through 'checkpoint' and 'backprop'."""
    found, leaves = [], list(leaves)
    for through in ("checkpoint", "backprop"):
        leaf = x0.clone().requires_grad_(True)
        x = differentiable_sample(flow, leaf, through=through, generator=torch.Generator().manual_seed(3), **options)
        loss = (x**2 * normal(*x.shape, seed=3).to(x)).sum()
        grads = torch.autograd.grad(loss, [leaf, *leaves], allow_unused=True)
        found.append((x.detach(), torch.cat([g.flatten() for g in grads if g is not None])))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"path": "vp", "predicts": "noise", "epsilon": 0.3, "cap": None},
        {
            "path": "linear",
            "predicts": "velocity",
            "epsilon": lambda t: 0.4 * (1 - t),
            "method": "heun",
            "guidance": 2.0,
        },
        {"path": "linear", "predicts": "velocity", "epsilon": 0.2, "last": "denoise"},
    ],
)
def test_samples_of_an_sde_with_their_noise_fixed(options):
    options = dict(options)
    flow = flow_of(options.pop("path"), options.pop("predicts"))
    how = {"condition": LABEL, "parameters": flow.network, "steps": 7, **options}
    (x, exact), (y, plain) = of_both_ways(flow, normal(4, 2), flow.network.parameters(), **how)
    assert torch.equal(x, y)
    assert torch.allclose(exact, plain, rtol=1e-9, atol=1e-12)
    # The noise is noise: from another number another sample; the law is tested with `sample`, whose steps these are.
    other = differentiable_sample(flow, normal(4, 2), generator=torch.Generator().manual_seed(4), **how)
    assert float((other - x).abs().max()) > 1e-3
    # Without a generator it is drawn from torch's own, and drawn again on the way back.
    leaf = normal(4, 2).requires_grad_(True)
    torch.manual_seed(5)
    first = differentiable_sample(flow, leaf, **how)
    (grad,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.manual_seed(5)
    again = differentiable_sample(flow, leaf, through="backprop", **how)
    assert torch.equal(first, again)
    assert torch.allclose(grad, torch.autograd.grad(again.square().sum(), leaf)[0], rtol=1e-9)


def test_an_sde_of_a_known_law():
    # Of Gaussian data: whatever epsilon, samples have their deviation; noise makes them forget where they began.
    law = GaussianMixture(torch.ones(1).double(), torch.zeros(1, 1).double(), 0.25 * torch.ones(1, 1, 1).double())
    field = MixtureField(law, path=Linear())
    flow = Flow(field, path="linear", shape=(1,), interval=(0.001, 0.999), starts_scaled=True)
    x0 = normal(4000, 1).requires_grad_(True)
    x = differentiable_sample(flow, x0, epsilon=0.3, steps=200, cap=None, generator=torch.Generator().manual_seed(1))
    assert float(x.detach().std()) == pytest.approx(0.5, rel=0.05)
    (grad,) = torch.autograd.grad(x.sum(), x0)
    assert 0 < float(grad.mean()) < 0.5  # 0.5 without noise


def jumping(head="ctm", path="linear", predicts="velocity"):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = MLP(MLPConfig(width=16, layers=2, classes=3, second_time=True)).double()
        for p in network.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return TrajectoryModel(network, head=head, path=path, predicts=predicts, shape=(2,), null={"label": 3})


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 4}, {"steps": 4, "gamma": 0.5}, {"steps": 3, "gamma": 1.0}, {"steps": 2, "guidance": 2.0}],
)
@pytest.mark.parametrize(("path", "predicts"), [("linear", "velocity"), ("edm", "edm")])
def test_jumps_have_gradients_too(options, path, predicts):
    model = jumping(path=path, predicts=predicts)
    how = {"condition": LABEL, "parameters": model.network, **options}
    (x, exact), (y, plain) = of_both_ways(model, normal(4, 2), model.network.parameters(), **how)
    assert torch.equal(x, y)
    assert torch.allclose(exact, plain, rtol=1e-9, atol=1e-12)
    if not options.get("gamma"):
        assert torch.allclose(x, model.sample(x0=normal(4, 2), condition=LABEL, **options), rtol=1e-12)
    report = Report()
    differentiable_sample(model, normal(4, 2), report=report, **how)
    assert report.forward == options.get("steps", 1)


def test_a_trajectory_model_is_solved_where_a_method_is_named():
    model = jumping()
    x = differentiable_sample(model, normal(4, 2), condition=LABEL, method="heun", steps=5)
    assert torch.allclose(x, model.sample(x0=normal(4, 2), condition=LABEL, method="heun", steps=5), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variables": "flow"}, "variables: are another form"),
        ({"through": "adjoint"}, "jump is no Runge-Kutta method"),
        ({"through": "reversible"}, "steps of jump go one way only"),
        ({"start": 0.5}, "start: does not go with jumps"),
        ({"moves": [Move(0.5, 0.2), Move(0.1, 0.1)]}, "moves: jumps lead towards the data"),
        ({"moves": [Move(0.5, 0.7)]}, "each with back <= to"),
        ({"epsilon": 0.2, "gamma": 0.5}, "gamma: does not go with the SDE"),
        ({"truncate": 1}, "truncate: there is no gradient of x0 then"),
        ({"final": "denoise"}, "final, transforms"),
        ({"gamma": 0.5, "method": "heun"}, "gamma: goes with noise"),
    ],
)
def test_what_does_not_go_with_jumps(options, said):
    with pytest.raises(ValueError, match=said):
        differentiable_sample(jumping(), normal(4, 2).requires_grad_(), condition=LABEL, **options)


def test_ways_with_equations_of_their_own_take_heun_where_auto_knows_the_path():
    flow = flow_of("vp", "noise")
    x = differentiable_sample(flow, normal(4, 2), condition=LABEL, steps=5, through="symplectic")
    assert torch.allclose(x, flow.sample(x0=normal(4, 2), condition=LABEL, steps=5, method="heun"), rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{"variables": "flow"}, {"through": "adjoint"}, {"method": "heun"}, {"epsilon": 0.1}]
)
def test_error_control_needs_a_method_that_has_it(options):
    flow = flow_of("linear", "velocity")
    with pytest.raises(ValueError, match="has no error control; give a number of steps"):
        differentiable_sample(flow, normal(4, 2), condition=LABEL, steps=None, **options)


def test_noise_that_is_given():
    # The same draws in the sampler that has gradients and in the one that has not.
    flow = flow_of("linear", "velocity")
    draws = normal(6, 4, 2, seed=9)
    options = {"epsilon": 0.3, "steps": 6, "condition": LABEL, "x0": normal(4, 2)}
    plain = flow.sample(noise=lambda i, x: draws[i], **options)
    x = differentiable_sample(flow, options.pop("x0"), noise=lambda i, x: draws[i], **options)
    assert torch.allclose(x, plain, rtol=1e-12)
    model = jumping()
    options = {"gamma": 0.6, "steps": 4, "condition": LABEL, "x0": normal(4, 2)}
    plain = model.sample(noise=lambda i, x: draws[i], **options)
    x = differentiable_sample(model, options.pop("x0"), noise=lambda i, x: draws[i], **options)
    assert torch.allclose(x, plain, rtol=1e-12)


def test_the_last_steps_of_an_sde():
    flow = flow_of("linear", "velocity")
    how = {"condition": LABEL, "parameters": flow.network, "epsilon": 0.3, "steps": 6}
    x = differentiable_sample(flow, normal(4, 2), generator=torch.Generator().manual_seed(1), truncate=2, **how)
    grads = torch.autograd.grad(x.square().sum(), list(flow.network.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in grads if g is not None) > 0


def test_a_sample_that_nobody_goes_back_through_keeps_nothing():
    flow, report = flow_of("linear", "velocity"), Report()
    with torch.no_grad():
        x = differentiable_sample(flow, normal(4, 2), condition=LABEL, steps=50, report=report)
    assert (report.kept_bytes, report.backward) == (0, 0)
    assert torch.allclose(x, flow.sample(x0=normal(4, 2), condition=LABEL, steps=50), rtol=1e-12)
