"""Gradients through a solve: exact ones equal backpropagation, continuous ones converge, nothing is lost in silence."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from pantarhei import solve
from pantarhei.solve import THROUGH, PeakMemory, differentiable, gradient
from pantarhei.solve.adams import adams_weights
from pantarhei.solve.checkpoint import square_root

RUNGE_KUTTA = ["euler", "midpoint", "heun", "rk4", "rk38", "bosh3", "dopri5", "tsit5"]


class Field(nn.Module):
    """tanh layers of (x, t, c)."""

    def __init__(self, width=16, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.outer = nn.Linear(4 + 1 + 2, width).double(), nn.Linear(width, 4).double()
        self.drop = nn.Dropout(dropout)

    def forward(self, x, t, c):
        t = t.expand(len(x), 1) if t.ndim == 0 else t[:, None]
        return self.outer(self.drop(torch.tanh(self.inner(torch.cat([x, t, c], dim=1)))))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, C, W = normal(5, 4), normal(5, 2, seed=1), normal(5, 4, seed=2)


def loss(x):
    return (W * x).sum() + x.square().sum()


def found(field=None, **options):
    options = {"wrt": ("state", "condition", "parameters"), "condition": C, **options}
    return gradient(loss, field or Field(), X, **options)


def flat(result):
    return torch.cat([g.flatten() for g in (result.state, *result.condition, *result.parameters.values())])


def off(result, other):
    return float((flat(result) - flat(other)).norm() / flat(other).norm())


@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_exact_gradients_are_those_of_backpropagation(method):
    plain = found(method=method, steps=7, through="backprop", verify=True)
    assert plain.report.error < 1e-8
    for options in ({}, {"every": 3}, {"every": "sqrt", "offload": True}, {"through": "symplectic"}):
        other = found(method=method, steps=7, **options)
        assert off(other, plain) < 1e-13
        assert torch.allclose(other.x, plain.x)
        assert float(other.value) == pytest.approx(float(plain.value))
    reversible = solve.Reversible(solve.as_step(method))
    plain = found(method=reversible, steps=7, through="backprop")
    assert off(found(method=method, steps=7, through="reversible"), plain) < 1e-12


def test_steps_with_a_memory():
    for step in (solve.Adams(4), solve.Adams(6, least=2, equal_steps=True)):
        plain = found(method=step, steps=12, through="backprop", verify=True)
        assert plain.report.error < 1e-8
        for options in ({}, {"every": 5}):
            assert off(found(method=step, steps=12, **options), plain) < 1e-13
        with pytest.raises(ValueError, match="adams is no Runge-Kutta method"):
            found(method=step, steps=12, through="symplectic")


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("through", ["adjoint", "backsolve"])
def test_the_continuous_adjoint_converges_with_the_order_of_its_method(method, order, through):
    errors = [off(found(method=method, steps=n, through=through), found(method=method, steps=n)) for n in (8, 16, 32)]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(slopes) > order - 0.35


def test_error_control():
    plain = found(rtol=1e-8, atol=1e-8, through="backprop")
    for through in ("checkpoint", "symplectic"):
        assert off(found(rtol=1e-8, atol=1e-8, through=through), plain) < 1e-12
    assert off(found(rtol=1e-8, atol=1e-8, through="adjoint"), plain) < 1e-6
    with pytest.raises(ValueError, match="with error control only the last state"):
        differentiable(Field(), X, (0.0, 0.5, 1.0), condition=C)


@pytest.mark.parametrize("through", sorted(THROUGH))
def test_losses_of_states_on_the_way(through):
    field, leaf = Field(), X.clone().requires_grad_(True)
    times = (1.0, 0.5, 0.0)  # backwards
    states = differentiable(field, leaf, times, condition=C, method="midpoint", steps=6, through=through)
    grads = torch.autograd.grad((states * normal(3, 5, 4, seed=4)).sum(), leaf)[0]
    again = X.clone().requires_grad_(True)
    step = solve.Reversible(solve.as_step("midpoint")) if through == "reversible" else "midpoint"
    plain = solve.ode(field, again, times, condition=C, method=step, steps=6).xs
    assert torch.allclose(states, plain)
    expected = torch.autograd.grad((plain * normal(3, 5, 4, seed=4)).sum(), again)[0]
    assert torch.allclose(grads, expected, rtol=0.05 if through in ("adjoint", "backsolve") else 1e-10)


def test_as_a_part_of_a_larger_graph():
    field, latent = Field(), normal(5, 4, seed=5).requires_grad_(True)
    embed = nn.Linear(3, 2).double()
    condition = embed(normal(5, 3, seed=6))

    def run(solver):
        x = solver(2 * latent, condition)
        grads = torch.autograd.grad(loss(x), [latent, embed.weight, *field.parameters()], retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    ours = run(lambda x, c: differentiable(field, x, condition=c, parameters=field, method="heun", steps=5))
    theirs = run(lambda x, c: solve.ode(field, x, condition=c, method="heun", steps=5).x)
    assert torch.allclose(ours, theirs, rtol=1e-12)


def test_states_of_several_tensors_and_hooks():
    def field(x, t):
        return (x[1], -x[0] * (1 + t))

    def hook(x, t, i):
        return (x[0] * 1.01, x[1]) if i == 2 else None

    state = (X, W)
    plain = gradient(lambda x: x[0].sum() + x[1].square().sum(), field, state, method="rk4", steps=5,
                     after_step=hook, through="backprop")  # fmt: skip
    for every in (1, 2):
        other = gradient(lambda x: x[0].sum() + x[1].square().sum(), field, state, method="rk4", steps=5,
                         after_step=hook, every=every)  # fmt: skip
        assert all(torch.allclose(a, b) for a, b in zip(other.state, plain.state, strict=True))
    for through in ("symplectic", "adjoint", "backsolve", "reversible"):
        with pytest.raises(ValueError, match="a hook that changes the state"):
            gradient(lambda x: x[0].sum(), field, state, method="rk4", steps=5, after_step=hook, through=through)


@pytest.mark.parametrize(
    "method", ["heun", "bosh3", "dopri5", "tsit5"]
)  # the last three remember a slope that was drawn
def test_random_fields_are_repeated_or_refused(method):
    field = Field(dropout=0.3)
    torch.manual_seed(3)
    plain = found(field, method=method, steps=6, through="backprop")
    for every in (1, 4):
        torch.manual_seed(3)
        assert off(found(field, method=method, steps=6, every=every, verify=True), plain) < 1e-13
    for through in ("symplectic", "adjoint"):
        with pytest.raises(ValueError, match="draws random numbers"):
            found(field, method="heun", steps=6, through=through)


def test_what_was_not_named():
    hidden = torch.ones((), dtype=torch.float64, requires_grad=True)
    field = Field()

    def closure(x, t, c):
        return hidden * field(x, t, c)

    for through in THROUGH:
        for constants, named in ((field, None), ([hidden], None), (None, {"hidden": hidden})):
            with pytest.raises(ValueError, match="needs gradients and was not named"):
                gradient(
                    loss,
                    closure,
                    X,
                    condition=C,
                    wrt=("state", "parameters") if named else ("state",),
                    parameters=named,
                    constants=constants,
                    method="euler",
                    steps=3,
                    through=through,
                )
    ours = gradient(
        loss, closure, X, condition=C, wrt=("parameters",), parameters={"hidden": hidden}, constants=field,
        method="euler", steps=3,
    )  # fmt: skip
    assert set(ours.parameters) == {"hidden"}
    assert ours.state is None
    assert all(p.requires_grad for p in field.parameters())
    # The parameters of the module that is the field are constants without a word.
    assert gradient(loss, field, X, condition=C, method="euler", steps=3).parameters == {}


def test_the_last_steps_only():
    field = Field()
    whole = gradient(loss, field, X, condition=C, wrt=("parameters",), method="heun", steps=6)
    assert off_parameters(gradient_of_last(field, 6), whole) < 1e-13
    short = gradient_of_last(field, 2)
    middle = solve.ode(field, X, (0.0, 4 / 6), condition=C, method="heun", steps=4).x.detach()
    tail = gradient(loss, field, middle, (4 / 6, 1.0), condition=C, wrt=("parameters",), method="heun", steps=2)
    assert off_parameters(short, tail) < 1e-10
    assert short.report.backward == 4
    with pytest.raises(ValueError, match="the first state has no gradient"):
        gradient(loss, field, X, condition=C, method="heun", steps=6, truncate=2)


def gradient_of_last(field, steps):
    return gradient(loss, field, X, condition=C, wrt=("parameters",), method="heun", steps=6, truncate=steps)


def off_parameters(result, other):
    a, b = (torch.cat([g.flatten() for g in r.parameters.values()]) for r in (result, other))
    return float((a - b).norm() / b.norm())


def test_memory_does_not_grow_with_the_steps():
    field = Field(width=256)
    peaks = {
        (through, n): found(field, method="midpoint", steps=n, through=through, measure=True).report.peak_bytes
        for through in THROUGH
        for n in (8, 64)
    }
    state = X.nbytes
    assert peaks["backprop", 64] > 5 * peaks["backprop", 8]
    for through in ("checkpoint", "symplectic", "adjoint"):
        assert peaks[through, 64] - peaks[through, 8] < 1.5 * 56 * state
    for through in ("backsolve", "reversible"):
        assert abs(peaks[through, 64] - peaks[through, 8]) < 4 * state
    roots = [found(field, method="midpoint", steps=n, every="sqrt", measure=True).report.peak_bytes for n in (16, 256)]
    assert roots[1] - roots[0] < 3 * (2 * 16 - 2 * 4) * state
    assert square_root(256) == 16
    assert [square_root(n) for n in (1, 2, 17)] == [1, 2, 5]


def test_a_gradient_that_is_wrong_is_found():
    calls = []

    def changing(x, t):
        calls.append(t)
        return x * (1 + 0.1 * len(calls))

    with pytest.raises(FloatingPointError, match="verify: along a random direction"):
        gradient(lambda x: x.sum(), changing, X, method="euler", steps=4, verify=True)


def test_adams_weights_and_order():
    assert adams_weights((0.0, -1.0)) == pytest.approx((1.5, -0.5))
    assert adams_weights((0.0, -1.0, -2.0)) == pytest.approx((23 / 12, -16 / 12, 5 / 12))
    grid = [0.5 * (1 - math.cos(math.pi * i / 1)) for i in (0, 1)]
    for most, order in ((2, 2), (3, 3)):
        errors = []
        for n in (20, 40):
            grid = [(i / n) ** 1.5 for i in range(n + 1)]  # steps of different lengths
            x = solve.ode(lambda x, t: x * torch.cos(3 * t), X[:1], method=solve.Adams(most, least=2), steps=grid).x
            errors.append(float((x - X[:1] * math.exp(math.sin(3.0) / 3)).abs().max()))
        assert math.log2(errors[0] / errors[1]) > order - 0.4


def test_peak_memory_of_a_chain():
    x = torch.zeros(1000)
    with PeakMemory() as memory:
        y = x + 1
        z = y + 1
        del y
        z = z + 1
    assert memory.peak == 2 * 4000
    assert z.shape == x.shape


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"wrt": ()}, "wrt: some of"),
        ({"wrt": ("noise",)}, "wrt: some of"),
        ({"through": "magic"}, "through: "),
        ({"through": "adjoint", "every": 2}, "go with through='checkpoint'"),
        ({"through": "backprop", "truncate": 2}, "truncate: "),
        ({"every": 0}, "every: must be at least 1"),
        ({"steps": None, "method": "euler", "times": (0.0, 0.0)}, "times: must be strictly"),
        ({"times": (0.0, 0.3, 1.0)}, "0.3 is no node of the grid"),
    ],
)
def test_refused(options, said):
    settings = {"method": "euler", "steps": 4, "wrt": ("state",), "condition": C, **options}
    times = settings.pop("times", (0.0, 1.0))
    with pytest.raises(ValueError, match=said):
        gradient(lambda x: x.sum(), Field(), X, times, **settings)


def test_nothing_to_differentiate():
    with pytest.raises(ValueError, match="condition: there is none"):
        gradient(loss, lambda x, t: -x, X, wrt=("condition",), method="euler", steps=2)
    with pytest.raises(ValueError, match="parameters: there are none to train"):
        gradient(loss, lambda x, t: -x, X, wrt=("parameters",), method="euler", steps=2)
    with pytest.raises(ValueError, match="loss: a number"):
        gradient(lambda x: x, lambda x, t: -x, X, method="euler", steps=2)


# What would go wrong in silence


@pytest.mark.parametrize("through", sorted(set(THROUGH) - {"backprop"}))
def test_there_is_one_way_back(through):
    leaf = X.clone().requires_grad_(True)
    end = differentiable(Field(), leaf, condition=C, method="heun", steps=3, through=through)
    torch.autograd.grad(end.sum(), leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(end.sum(), leaf)


@pytest.mark.parametrize("through", sorted(THROUGH))
def test_hooks_that_watch_are_called_on_the_way_back(through):
    class Numbered(Field):
        step = 0

        def forward(self, x, t, c):
            return super().forward(x, t, c) * (1 + self.step)

    field = Numbered()

    def number(x, t, i):
        field.step = i

    step = solve.Reversible(solve.as_step("heun")) if through == "reversible" else "heun"
    exact = found(field, method=step, steps=5, before_step=number, through="backprop")
    ours = found(field, method=step, steps=5, before_step=number, through=through)
    assert off(ours, exact) < (0.2 if through in ("adjoint", "backsolve") else 1e-11)


@pytest.mark.parametrize("through", sorted(THROUGH))
def test_a_leaf_of_early_times_is_found_too(through):
    theta = torch.ones((), dtype=torch.float64, requires_grad=True)

    def gated(x, t):
        return -x * (theta if float(t) < 0.4 else 1.0)

    with pytest.raises(ValueError, match="was not named"):
        gradient(lambda x: x.sum(), gated, X, method="midpoint", steps=6, through=through)


def test_parameters_that_get_nothing():
    field, other = Field(), Field()
    with pytest.raises(ValueError, match="none of them needs a gradient"):
        differentiable(Field(), X, condition=C, parameters=other.requires_grad_(False), method="euler", steps=2)
    leaf = X.clone().requires_grad_(True)
    end = differentiable(field, leaf, condition=C, parameters=Field(), method="euler", steps=2)
    with pytest.raises(ValueError, match="depends on none of the tensors that were named"):
        end.sum().backward()
    named = gradient(loss, field, X, condition=C, wrt=("parameters",), method="euler", steps=2).parameters
    assert "inner.weight" in named


def test_random_reversible_fields_are_refused():
    with pytest.raises(ValueError, match="draws random numbers"):
        found(Field(dropout=0.3), method="heun", steps=4, through="reversible")


@pytest.mark.parametrize("through", sorted(THROUGH))
def test_what_becomes_of_the_ends_outside_does_not_matter(through):
    if through == "backprop":
        return
    field, start = Field(), X.clone()
    leaf = start.requires_grad_(True)
    end = differentiable(field, leaf, condition=C, method="heun", steps=4, through=through)
    value = (W * end).sum()
    with torch.no_grad():
        end.mul_(2)
        start.mul_(3)
    changed = torch.autograd.grad(value, leaf)[0]
    again = X.clone().requires_grad_(True)
    same = differentiable(field, again, condition=C, method="heun", steps=4, through=through)
    assert torch.allclose(changed, torch.autograd.grad((W * same).sum(), again)[0])


def test_precision_is_taken_up_again():
    field = Field().float()
    x, c = X.float().requires_grad_(True), C.float()
    grads = []
    for through in ("checkpoint", "backprop"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            end = differentiable(field, x, condition=c, method="euler", steps=4, through=through)
        grads.append(torch.autograd.grad(end.float().sum(), x)[0])
    assert torch.equal(*grads)


def test_hooks_need_a_grid():
    with pytest.raises(ValueError, match="hooks need a fixed grid"):
        differentiable(Field(), X, condition=C, after_step=lambda x, t, i: None)


def test_an_adaptive_gradient_is_verified_on_its_grid():
    assert found(rtol=1e-3, atol=1e-3, verify=True).report.error < 1e-6


def test_backsolve_keeps_nothing_on_the_way():
    peaks = []
    for steps in (10, 400):
        leaf = X.clone().requires_grad_(True)
        with PeakMemory() as memory:
            differentiable(Field(), leaf, condition=C, method="euler", steps=steps, through="backsolve")
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] < 3 * X.nbytes


@pytest.mark.parametrize("through", ["checkpoint", "backprop", "adjoint", "symplectic", "reversible"])
def test_half_precision_is_what_the_field_sees_and_no_more(through):
    seen = set()
    weights = normal(4, 4, seed=7).float()

    def field(x, t):
        seen.add(x.dtype)
        return torch.tanh(x @ weights.to(x.dtype))

    ends = {}
    for kind in (torch.float32, torch.bfloat16):
        x = X.to(kind).requires_grad_()
        end = differentiable(field, x, method="euler", steps=400, through=through)
        assert end.dtype == kind
        assert seen == {kind}
        (grad,) = torch.autograd.grad((W.to(kind) * end).sum().float(), x)
        assert grad.dtype == kind
        ends[kind] = (end.detach().float(), grad.float())
        assert torch.equal(solve.ode(field, X.to(kind), method="euler", steps=400).x, end) or through == "reversible"
        seen.clear()
    for wide, half in zip(*ends.values(), strict=True):
        # Steps of 1 / 400 that were summed in eight bits would be off by a tenth and more.
        assert float((wide - half).norm() / wide.norm()) < 0.02


def test_long_reversible_solves_say_where_they_end():
    x = X.float().requires_grad_()
    with pytest.warns(UserWarning, match="rounding grows to about 0.003"):
        differentiable(lambda x, t: -x, x, method="euler", steps=1010, through="reversible")


@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_small_gradients_pass_through_half_precision(size):
    weights = normal(4, 4, seed=7).float().requires_grad_()

    def run(half):
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            field = lambda x, t: torch.tanh(x @ weights)  # noqa: E731
            end = differentiable(field, X.float(), method="euler", steps=8, parameters=[weights])
        return torch.autograd.grad(size * (W.float() * end).sum(), weights)[0]

    half, single = run(True), run(False)
    assert 0 < float((half - single).norm() / single.norm()) < 0.01


def test_an_amount_of_noise_that_is_learned():
    amount = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for diffusion in (amount, lambda t: amount * (1 + t)):
        grads = []
        for through in ("checkpoint", "backprop"):
            step = solve.Stochastic(diffusion, noise=5)
            end = differentiable(lambda x, t: -x, X, method=step, steps=6, parameters=[amount], through=through)
            grads.append(torch.autograd.grad(loss(end), amount)[0])
        assert float(grads[0]) == pytest.approx(float(grads[1]), rel=1e-12)
        assert abs(float(grads[0])) > 0.1
    step, x = solve.Stochastic(amount, noise=5), X.clone().requires_grad_()
    end = loss(differentiable(lambda x, t: -x, x, method=step, steps=6))
    with pytest.raises(ValueError, match="was not named"):
        end.backward()


@pytest.mark.parametrize("noise", [True, 1.5])
def test_noise_is_a_whole_number_or_a_function(noise):
    with pytest.raises(ValueError, match="noise: a whole number"):
        solve.Stochastic(1.0, noise=noise)
