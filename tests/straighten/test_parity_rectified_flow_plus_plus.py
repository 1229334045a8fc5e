"""Rectified flow++ against the reference: samplers of both update rules, inversion, slerp, losses and the U-shaped law."""

import pytest
import torch

from pantarhei.flow import Flow, FlowMatching, PseudoHuber, Term, paths, squared
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.times import UShaped
from pantarhei.flow.updates import Reinterpolation
from pantarhei.straighten.editing import inversion_grid, slerp
from pantarhei.straighten.rectified_flow_plus_plus import plus_plus_terms
from parity import Golden

pytestmark = pytest.mark.parity
SYSTEM = "rectified-flow-plus-plus"


class Analytic(torch.nn.Module):
    """v(z, u) = a z cos(wa u) + b sin(wb u + c) in the reference's time u = 1 - t, with our sign."""

    def __init__(self, config, ab):
        super().__init__()
        self.config, (self.a, self.b) = config, ab

    def forward(self, x, t):
        c = self.config
        u = (1 - t).reshape(-1, 1, 1, 1)
        velocity = self.a * x * torch.cos(c["velocity_wa"] * u)
        return -(velocity + self.b * torch.sin(c["velocity_wb"] * u + c["velocity_c"]))


def states_of(flow, z, grid, method):
    return flow.transport(z, grid, steps=grid, method=method).xs


def data_estimates(flow, states, grid, z, kind, keeps_noise):
    """The last data estimate of each step: at its start, or (Heun) at its predictor."""
    found = []
    for i, x in enumerate(states[:-1]):
        t, end = (torch.tensor(value, dtype=x.dtype) for value in grid[i : i + 2])
        estimate = flow.denoise(x, t)
        if kind == "heun" and i + 2 < len(states):
            rule = end * estimate + (1 - end) * z if keeps_noise else x + (end - t) * flow.velocity(x, t)
            estimate = flow.denoise(rule, end)
        found.append(estimate)
    return torch.stack(found)


def bends(states, steps):
    """Per sample: mean over steps and elements of (x_i - x_{i+1}) N - (x_first - x_last), squared."""
    gaps = (states[:-1] - states[1:]) * steps - (states[0] - states[-1])
    return gaps.square().flatten(2).mean(dim=(0, 2))


def method_of(kind, mode, z):
    """Re-interpolation keeps z itself: the golden's start is not scaled to its first time."""
    if mode == "new":
        return Reinterpolation(paths.Linear(), 1.0, corrected=kind == "heun", noise=z)
    return "euler" if kind == "euler" else "heun-euler"


def rising(n, config):
    """The reference's grid of n steps in our time: the first of its times is replaced by u_max."""
    return (1 - config["u_max"], *(i / n for i in range(1, n)), 1.0)


def test_samplers_of_both_rules():
    g = Golden(SYSTEM, "samplers")
    c = g.config
    z = g["in.z"]
    flow = Flow(Analytic(c, g["in.ab"]), shape=z.shape[1:])
    cases = [("euler", n, n) for n in c["euler_n"]] + [("heun", n, (n + 1) // 2) for n in c["heun_nfe"]]
    for kind, number, steps in cases:
        for mode in c["modes"]:
            name = f"out.{kind}_N{number}_{mode}"
            if mode == "inversion":
                inverter = "euler" if kind == "euler" else "heun-euler"
                grid = inversion_grid(flow, number, inverter)
                grid = (1 - c["inversion_u_min"], *grid[1:])
                # The golden starts from z itself: no noise is mixed in here.
                found = flow.transport(z, (grid[0], grid[-1]), steps=grid, method=inverter).x
                g.check(f"{name}.final", found)
                continue
            grid = rising(steps, c)
            states = states_of(flow, z, grid, method_of(kind, mode, z))
            g.check(f"{name}.final", states[-1])
            g.check(f"{name}.traj", states)
            g.check(f"{name}.xhat", data_estimates(flow, states, grid, z, kind, mode == "new"))
            per_sample = bends(states, steps)
            g.check(f"{name}.straightness", per_sample.mean())
            g.check(f"{name}.straightness_per_sample", per_sample)
    grid = tuple(1 - u for u in c["custom_grid"])
    custom = g.names("out.euler_custom")
    assert len(custom) == 1
    g.check(custom[0], states_of(flow, z, grid, method_of("euler", c["custom_mode"], z))[-1])
    ends = [z[int(name.partition("[")[2][:-1])][None] for name in c["slerp_from"]]
    g.check("out.slerp", torch.cat([slerp(*ends, w).flatten(1) for w in c["slerp_weights"]]))
    g.assert_all_compared()


class Given(torch.nn.Module):
    """Answers with the prediction that the golden brings (in its sign)."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity

    def forward(self, x, t):
        return -self.velocity


def test_losses_and_the_law_of_times():
    g = Golden(SYSTEM, "losses_tdist")
    c = g.config
    batch = {"x1": g["in.x"], "x0": g["in.z"], "t": 1 - g["in.t_rfpp"]}
    flow = Flow(Given(g["in.pred_v"]), shape=g["in.x"].shape[1:])
    objective = FlowMatching(coupling=Pairs())
    draw = objective.draw(flow, batch, None)
    g.check("out.z_t", draw.x_t)
    output = flow.output(draw.x_t, draw.t)
    g.check("out.pred_x", flow.denoise(draw.x_t, draw.t))
    huber = PseudoHuber(c["huber_c_per_dim"])
    g.check("out.huber", Term("velocity", huber)(flow, draw, output))
    g.check("out.l2sq", Term("velocity", squared)(flow, draw, output))
    g.check("out.l2", Term("velocity", squared)(flow, draw, output).sqrt())

    def perceptual(prediction, target):
        return g["in.lpips_values"]

    for name, divided in (("lpips_huber", False), ("lpips_huber_divt", True)):
        terms = plus_plus_terms(huber, perceptual, divided)
        g.check(f"out.{name}", sum(term(flow, draw, output) for term in terms))
    a, u = c["a"], g["in.u"]
    law = UShaped(a)
    g.check("out.u_shaped_pdf", law.pdf(u))
    # The law is the even mixture of a one-sided exponential and its mirror image.
    one_sided, mirrored = (a * torch.exp(a * v) / (torch.e**a - 1) for v in (u, 1 - u))
    g.check("out.one_sided_pdf", one_sided)
    assert torch.allclose(law.pdf(u), (one_sided + mirrored) / 2)
    drawn = g[c["ks_sample"]].double()
    low, high = c["u_map"]
    levels = ((drawn - low) / (high - low)).clamp(0, 1)
    grid = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    distribution = torch.cumulative_trapezoid(law.pdf(grid), grid)
    found = distribution[(levels * (len(grid) - 2)).long()]
    steps = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    assert float((found - steps).abs().max()) < 1.63 / len(drawn) ** 0.5  # the 1 % level of Kolmogorov and Smirnov
