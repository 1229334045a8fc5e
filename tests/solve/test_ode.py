"""Exact solutions: observed orders, both directions, dense output, tuples, error control, refusals."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from pantarhei.solve import METHODS, RungeKutta, StepResult, ode
from pantarhei.solve.state import add_scaled

ADAPTIVE = ("bosh3", "dopri5", "tsit5")


def swing(x, t):
    """x' = x cos(t): x = x0 exp(sin t - sin t0); t is 0-d or one a row."""
    return x * torch.cos(t).reshape(-1, *[1] * (x.ndim - 1))


def exact(x0, t0, t1):
    return x0 * math.exp(math.sin(t1) - math.sin(t0))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 2.0), (3.0, -1.0)])
def test_observed_order_is_the_stated_one(name, t0, t1):
    # x' = x (1 - x) cos t is nonlinear and solved by x / (1 - x) = C exp(sin t).
    x0 = torch.tensor([[0.3], [0.2]], dtype=torch.float64)
    odds = x0 / (1 - x0) * math.exp(math.sin(t1) - math.sin(t0))

    def error(n):
        found = ode(lambda x, t: x * (1 - x) * torch.cos(t), x0, (t0, t1), method=name, steps=n).x
        return float((found - odds / (1 + odds)).abs().max())

    order = METHODS[name].order
    n = {5: 48, 4: 20}.get(order, 80)
    # The fifth-order pairs meet rounding before their asymptotic range, where higher orders still show.
    assert order - 0.4 < math.log2(error(n) / error(2 * n)) < order + (1.4 if order == 5 else 0.4)


@pytest.mark.parametrize("name", METHODS)
def test_tableaus_are_consistent(name):
    tableau = METHODS[name].tableau
    assert sum(tableau.b) == pytest.approx(1, abs=1e-14)
    for row, c in zip(tableau.a, tableau.c, strict=True):
        assert sum(row) == pytest.approx(c, abs=1e-13)
    if tableau.error is not None:
        assert sum(tableau.error) == pytest.approx(0, abs=1e-14)
    if tableau.dense is not None:  # the continuous extension ends in the method's own weights
        assert [sum(row) for row in tableau.dense] == pytest.approx(list(tableau.b), abs=1e-12)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_continuous_extension_has_its_order(name):
    x0 = torch.ones(1, 1, dtype=torch.float64)
    worst = []
    for n in (8, 16):
        grid = [4.0 * i / n for i in range(n + 1)]
        asked = sorted({*grid, *(4.0 * (i + 0.3) / n for i in range(n)), *(4.0 * (i + 0.77) / n for i in range(n))})
        solution = ode(swing, x0, asked, method=name, steps=grid)
        truth = torch.tensor([exact(1.0, 0.0, t) for t in asked], dtype=torch.float64)
        worst.append(float((solution.xs[:, 0, 0] - truth).abs().max()))
    expected = 3 if name == "bosh3" else 4
    assert math.log2(worst[0] / worst[1]) > expected - 0.4


@pytest.mark.parametrize("name", METHODS)
def test_there_and_back(name):
    x0 = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = ode(swing, x0, (0.0, 1.5), method=name, steps=2000 if name == "euler" else 200).x
    back = ode(swing, there, (1.5, 0.0), method=name, steps=2000 if name == "euler" else 200).x
    assert torch.allclose(back, x0, rtol=2e-3 if name == "euler" else 1e-4)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("control", ["joint", "per_sample"])
@pytest.mark.parametrize(("t0", "t1"), [(-1.0, 2.0), (2.0, -1.0)])
def test_error_control_reaches_its_tolerance_and_the_exact_end(name, control, t0, t1):
    x0 = torch.linspace(0.5, 2, 7, dtype=torch.float64)[:, None]
    times = [t0, t0 + 0.4 * (t1 - t0), t0 + 0.41 * (t1 - t0), t1]
    seen = []

    def field(x, t):
        seen.append(t.detach().reshape(-1))
        return swing(x, t)

    solution = ode(field, x0, times, method=name, rtol=1e-8, atol=1e-10, control=control)
    for t, x in zip(times, solution.xs, strict=True):
        assert torch.allclose(x, exact(x0, t0, t), rtol=2e-6)
    times_seen = torch.cat(seen)
    assert times_seen.min() == min(t0, t1)  # no overshoot, and the end itself is reached
    assert times_seen.max() == max(t0, t1)


def test_joint_control_takes_scipy_steps():
    def numpy_field(t, y):
        return [y[1], -4 * y[0] - 0.3 * y[1] + math.sin(t)]

    def field(x, t):
        return torch.stack([x[1], -4 * x[0] - 0.3 * x[1] + torch.sin(t)])

    reference = solve_ivp(numpy_field, (0, 10), [1.0, 0.0], method="RK45", rtol=1e-6, atol=1e-8)
    ours = ode(field, torch.tensor([1.0, 0.0], dtype=torch.float64), (0.0, 10.0), rtol=1e-6, atol=1e-8)
    assert ours.evaluations == reference.nfev
    assert ours.accepted == len(reference.t) - 1
    assert torch.allclose(ours.x, torch.tensor(reference.y[:, -1]), rtol=1e-9)


def test_per_sample_control_spends_rows_where_they_are_needed():
    rates = torch.logspace(0, 2, 64, dtype=torch.float64)[:, None]
    x0 = torch.ones(64, 1, dtype=torch.float64)

    class Rates:
        def __init__(self, value):
            self.value = value

        def index(self, rows):
            return Rates(self.value[rows])

    def stiff(x, t, condition):
        return -condition.value * (x - torch.cos(t.reshape(-1, 1)))

    joint = ode(stiff, x0, (0.0, 3.0), condition=Rates(rates), rtol=1e-6, atol=1e-6)
    rowwise = ode(stiff, x0, (0.0, 3.0), condition=Rates(rates), rtol=1e-6, atol=1e-6, control="per_sample")
    assert torch.allclose(joint.x, rowwise.x, atol=1e-4)
    assert rowwise.rows < 0.67 * joint.rows


def test_states_may_be_tuples():
    x0 = (torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    def field(state, t):
        x, _ = state
        return -x, x.square().sum(dim=1)

    tight = {"rtol": 1e-8, "atol": 1e-8}
    for options in ({"method": "rk4", "steps": 40}, tight, {**tight, "control": "per_sample"}):
        x, integral = ode(field, x0, (0.0, 1.0), **options).x
        assert torch.allclose(x, x0[0] * math.exp(-1), rtol=1e-5)
        assert torch.allclose(integral, torch.full((3,), 1 - math.exp(-2), dtype=torch.float64), rtol=1e-5)


def test_gradients_flow_through_fixed_and_adaptive_solves():
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0 = torch.ones(2, 1, dtype=torch.float64)
    for options in ({"method": "rk4", "steps": 50}, {"rtol": 1e-9}, {"rtol": 1e-9, "control": "per_sample"}):
        loss = ode(lambda x, t: rate * x, x0, (0.0, 1.0), **options).x.sum()
        (gradient,) = torch.autograd.grad(loss, rate)
        assert gradient.item() == pytest.approx(2 * math.exp(0.7), rel=1e-5)


def test_hooks_change_the_state_and_first_same_as_last_methods_notice():
    x0 = torch.ones(1, dtype=torch.float64)
    for name in ("euler", "dopri5"):
        halved = ode(lambda x, t: 0 * x + 1, x0, (0.0, 1.0), method=name, steps=2, after_step=lambda x, t, i: x / 2)
        assert halved.x.item() == pytest.approx(((1 + 0.5) / 2 + 0.5) / 2)
    restarted = ode(lambda x, t: x, x0, (0.0, 1.0), method="dopri5", steps=20, before_step=lambda x, t, i: x * 2)
    assert restarted.x.item() == pytest.approx(2**20 * math.e, rel=1e-8)


def test_observe_sees_every_step_and_stores_nothing():
    seen = []
    ode(swing, torch.ones(1), (0.0, 1.0), method="euler", steps=4, observe=lambda x, t, i: seen.append((t, i)))
    assert seen == [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)]


class AdamsBashforth:
    """A multistep method in the step protocol: its memory is the previous slope."""

    name, order, adaptive = "ab2", 2, False

    def start(self, field, x, t, dt, slope=None):
        return None

    def __call__(self, field, x, t, dt, memory):
        slope = field(x, t)
        previous = slope if memory is None else memory
        return StepResult(add_scaled(x, (1.5, -0.5), (slope, previous), dt), slope, None, (slope,))


class Reversible:
    """An algebraically reversible wrapper (McCallum & Foster 2024): its memory is the second state."""

    name, adaptive = "reversible", False

    def __init__(self, inner: RungeKutta, coupling: float = 0.99):
        self.inner, self.coupling, self.order = inner, coupling, inner.order

    def start(self, field, x, t, dt, slope=None):
        return x

    def __call__(self, field, x, t, dt, memory):
        def increment(state, time, h):
            return self.inner(field, state, time, h, self.inner.start(field, state, time, h)).x - state

        new = self.coupling * x + (1 - self.coupling) * memory + increment(memory, t, dt)
        second = memory - increment(new, t + dt, -dt)
        return StepResult(new, second, None, ())


def test_the_step_protocol_carries_multistep_and_reversible_methods():
    x0 = torch.ones(1, 1, dtype=torch.float64)
    for step in (AdamsBashforth(), Reversible(METHODS["midpoint"])):
        errors = [abs(ode(swing, x0, (0.0, 2.0), method=step, steps=n).x.item() - exact(1, 0, 2)) for n in (40, 80)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.5)


def test_float32_stays_float32_and_times_reach_the_field_in_it():
    def field(x, t):
        assert t.dtype == x.dtype == torch.float32
        return -x

    for options in ({"method": "heun", "steps": 3}, {}, {"control": "per_sample"}):
        assert ode(field, torch.ones(2, 2), (0.0, 1.0), **options).x.dtype == torch.float32


def test_a_fixed_step_solve_compiles_to_one_graph():
    def run(x):
        return ode(lambda y, t: -y * t, x, (0.0, 1.0), method="heun", steps=4).x

    x = torch.randn(3, 2)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), run(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eulr"}, "unknown method 'eulr'"),
        ({"steps": 0}, "at least 1"),
        ({"times": (0.0,)}, "at least two"),
        ({"times": (0.0, 1.0, 0.5)}, "strictly"),
        ({"times": (0.0, math.nan)}, "finite"),
        ({"rtol": -1.0}, "non-negative"),
        ({"steps": [0.0, 0.5]}, "grid must run"),
        ({"control": "both"}, "control"),
        ({"after_step": lambda x, t, i: x}, "fixed grid"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ode(swing, torch.ones(2, 1), **options)


def test_bad_states_and_fields_are_named():
    with pytest.raises(TypeError, match="floating-point"):
        ode(swing, torch.ones(2, dtype=torch.long))
    with pytest.raises(FloatingPointError, match="not finite"):
        ode(lambda x, t: x / 0, torch.zeros(2, 1))
    with pytest.raises(FloatingPointError, match="max_steps"):
        ode(swing, torch.ones(2, 1), (0.0, 100.0), max_steps=5)


def test_per_sample_control_refuses_rows_that_depend_on_each_other():
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="independent"):
        ode(lambda x, t: x - x.mean(dim=0), x, control="per_sample")
    captured = torch.randn(5, 2)
    with pytest.raises(ValueError, match="single row"):
        ode(lambda x, t: x.flatten() @ captured.flatten() * x, x, control="per_sample")
    with pytest.raises(ValueError, match=r"shape \(5, 5\)"):
        ode(lambda x, t: x * t, torch.ones(5, 1), control="per_sample")
