"""Paths, losses, averages and samplers against the reference implementations of rectified flow."""

import re

import pytest
import torch
from torch import nn

from pantarhei.flow import Flow, FlowMatching, Term, make_grid
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.paths import VP, Cosine, Linear, change_path
from pantarhei.flow.times import shift_time
from pantarhei.solve import ode
from pantarhei.training import Average
from parity import Golden

pytestmark = pytest.mark.parity


def test_interpolants_and_changes_of_path():
    golden = Golden("rectified-flow", "interpolants")
    a, b = golden.config["ddim_a"], golden.config["ddim_b"]
    paths = {"straight": Linear(), "spherical": Cosine(), "ddim": VP(beta_min=b, beta_max=a + b)}
    t, x0, x1 = golden["in.t"].double(), golden["in.x_0"].double(), golden["in.x_1"].double()
    for name in golden.config["paths"]:
        path = paths[name]
        x_t, dx_t = path.sample(x0, x1, None, t)
        values = {"alpha": path.alpha(t), "beta": path.sigma(t), "x_t": x_t, "dot_x_t": dx_t}
        values |= {"dot_alpha": path.alpha_dot(t), "dot_beta": path.sigma_dot(t)}
        for key, value in values.items():
            golden.check(f"out.{name}.{key}", value)
    for match in golden.config["matches"]:
        source, target = match.split("_to_")
        t_source, scale = change_path(paths[source], paths[target], golden["in.t_target"].double())
        golden.check(f"out.match.{match}.t_source", t_source)
        golden.check(f"out.match.{match}.scale", scale)
    for shift in golden.config["shifts"]:
        for steps in golden.config["steps"]:
            noise_levels = torch.tensor([1 - s for s in make_grid(steps, shift=shift)])
            golden.check(f"out.diffusers.shift{shift:g}.n{steps}.sigmas_from_uniform", noise_levels)
            # The other grid's ends come from a table that is shifted already, and then it is shifted again.
            count = golden.config["num_train_timesteps"]
            first, last = (1 - shift_time(1 - s, shift) for s in (1.0, 1 / count))
            twice = [1 - shift_time(1 - s, shift) for s in torch.linspace(first, last, steps).tolist()]
            golden.check(f"out.diffusers.shift{shift:g}.n{steps}.sigmas_default", torch.tensor([*twice, 0.0]))
    golden.assert_all_compared()


class Velocity(nn.Module):
    """The golden's analytic velocity a x cos(ts t / ta) + b sin(ts t / tb) + c."""

    def __init__(self, golden):
        super().__init__()
        self.abc = nn.Parameter(golden["in.abc"].clone())
        self.config = None
        self.scale, self.ta, self.tb = (golden.config[k] for k in ("time_scale", "velocity_ta", "velocity_tb"))

    def forward(self, x, t):
        a, b, c = self.abc
        label = (self.scale * t).reshape(-1, *[1] * (x.ndim - 1))
        return a * x * torch.cos(label / self.ta) + b * torch.sin(label / self.tb) + c


def half_sum(prediction, target):
    return 0.5 * (prediction - target).square().flatten(1).sum(dim=1)


def test_losses_gradients_and_average():
    golden = Golden("rectified-flow", "losses_ema")
    for mode in golden.config["modes"]:
        for reduction, term in (("mean", Term()), ("halfsum", Term(metric=half_sum))):
            network = Velocity(golden)
            flow = Flow(network, shape=tuple(golden["in.x1"].shape[1:]))
            batch = {"x0": golden["in.z0"], "x1": golden["in.x1"], "t": golden[f"in.{mode}.t"]}
            objective = FlowMatching(terms=(term,), coupling=Pairs())
            golden.check(f"out.{mode}.x_t", objective.draw(flow, batch, None).x_t)
            loss, _ = objective(flow, batch, None)
            loss.backward()
            golden.check(f"out.{mode}.{reduction}.loss", loss)
            golden.check(f"out.{mode}.{reduction}.grad_abc", network.abc.grad)
    parameters = golden["in.ema.params"]
    decay = golden.config["ema_decay"]
    network = nn.Linear(parameters.shape[1], 1, bias=False)
    nn.init.constant_(network.weight, golden.config["ema_start"])
    average, seen = Average(network, decay=decay), []
    for row in parameters:
        with torch.no_grad():
            network.weight.copy_(row[None])
        average.update(network)
        seen.append(average.network.weight[0].clone())
    golden.check(f"out.ema.shadow_decay{decay:g}", torch.stack(seen))
    golden.assert_all_compared()


def test_samplers():
    golden = Golden("rectified-flow", "samplers")
    field, eps = Velocity(golden), golden.config["eps"]

    def in_float32(x, t):  # the reference integrates in double precision and evaluates in single
        return field(x.float(), t.float()).to(x.dtype)

    with torch.no_grad():
        for name in golden.names("out.euler"):
            steps = int(re.search(r"N(\d+)$", name).group(1))
            # The reference evaluates at eps + (1 - eps) i/N but steps by 1/N.
            x = ode(lambda x, t: field(x, eps + (1 - eps) * t), golden["in.z0"], method="euler", steps=steps).x
            golden.check(name, x)
        tolerances = {"rtol": golden.config["rk45_rtol"], "atol": golden.config["rk45_atol"]}
        forward = ode(in_float32, golden["in.z0"].double(), golden.config["rk45_interval"], **tolerances)
        golden.check("out.rk45", forward.x)
        golden.check("out.rk45_nfe", torch.tensor(forward.evaluations))
        backward = ode(in_float32, golden["in.x1"].double(), golden.config["reverse_interval"], **tolerances)
        golden.check("out.rk45_reverse_from_x1", backward.x)
    golden.assert_all_compared()
