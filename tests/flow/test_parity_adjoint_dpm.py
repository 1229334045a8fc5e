"""Gradients through samplers against the reference implementation: exponential ODEs, its schedulers, symplectic adjoint."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pantarhei import solve
from pantarhei.flow.paths import VP, Custom
from pantarhei.flow.predictions import Ends
from pantarhei.flow.reparameterisation import Reparameterisation
from parity import Golden

pytestmark = pytest.mark.parity
SYSTEM = "adjoint-dpm"


def steps_of(golden: Golden) -> dict[str, Any]:
    """Our methods under the golden's names."""
    config = golden.config
    rk4 = {"three_eighths": "rk38", "classic": "rk4"}[config["rk4_variant"]]
    adams = solve.Adams(
        config.get("adams_history", 4), least=config.get("adams_rk4_start_steps", 2) + 1, equal_steps=True
    )
    return {"euler": "euler", "midpoint": "midpoint", "rk4": rk4, "explicit_adams": adams, "dopri5": "dopri5"}


def weighted(golden: Golden) -> Callable[[Tensor], Tensor]:
    weight = golden["in.loss_weight"].double()
    return lambda x: (weight * x).sum()


def test_symplectic_adjoint() -> None:
    golden = Golden(SYSTEM, "symplectic_adjoint")
    weights = {name: golden[f"w.{name}"].double() for name in "ABb"}

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ weights["A"] + t * weights["b"]) @ weights["B"]

    grid = tuple(golden["in.t"].double().tolist())
    steps = steps_of(golden)
    for solver in golden.config["solvers"]:
        how: dict[str, Any] = {"method": steps[solver]}
        how |= {"rtol": 1e-7, "atol": 1e-9} if solver == "dopri5" else {"steps": grid}
        for route in golden.config["routes"]:
            found = solve.gradient(
                weighted(golden),
                field,
                golden["in.x0"].double(),
                (grid[0], grid[-1]),
                wrt=("state", "parameters"),
                parameters=weights,
                through=route,
                **how,
            )
            name = f"out.{solver}.{route}"
            golden.check(f"{name}.y", found.x)
            golden.check(f"{name}.grad_x0", found.state)
            for weight in "AB":
                golden.check(f"{name}.grad_{weight}", found.parameters[weight])
    golden.assert_all_compared()


def vp_path(golden: Golden, schedule: str) -> Any:
    """The schedule as a path of t = 1 - T."""
    config = golden.config
    if schedule == "linear":
        return VP(config["beta_0"], config["beta_1"])
    if schedule == "cosine":
        s = config["cosine_s"]

        def log_alpha(t: Tensor) -> Tensor:
            angle = math.pi / 2 * (1 - t + s) / (1 + s)
            return torch.log(torch.cos(angle)) - math.log(math.cos(math.pi / 2 * s / (1 + s)))

        first = 1 - config["t_start"]["cosine"]
    else:
        count = config["discrete_num_timesteps"]
        ends = config["discrete_beta_start"], config["discrete_beta_end"]
        log = 0.5 * torch.log1p(-torch.linspace(*ends, count, dtype=torch.float64)).cumsum(0)

        def log_alpha(t: Tensor) -> Tensor:  # nodes at T = (n + 1) / count, lines between and beyond them
            place = (1 - t) * count - 1
            below = place.detach().floor().clamp(0, count - 2).long()
            return log.to(t.dtype)[below] + (place - below) * (log[1:] - log[:-1]).to(t.dtype)[below]

        first = 0.0
    return Custom(
        data=lambda t: torch.exp(log_alpha(t)),
        source=lambda t: torch.sqrt(-torch.expm1(2 * log_alpha(t))),
        interval=(first, 1 - 1e-6),
    )


class Toy:
    """What the toy network estimates: the noise, and the data that follow."""

    def __init__(self, golden: Golden, path: Any, schedule: str):
        self.weights = {name: golden[f"w.{name}"].double() for name in ("A", "B", "b")}
        self.path = path
        config = golden.config
        self.scale = 1.0
        self.shift = 0.0
        if schedule == "discrete":  # the model receives (T - 1 / count) count, and divides
            self.scale = config["discrete_num_timesteps"] / config["toy_time_divisor"]["discrete"]
            self.shift = 1 / config["discrete_num_timesteps"]

    def ends(self, x: Tensor, t: Tensor, condition: Any = None) -> Ends:
        w = self.weights
        seen = (1 - t - self.shift) * self.scale
        noise = torch.tanh(x @ w["A"] + seen * w["b"]) @ w["B"]
        at = self.path.at(t, x)
        return Ends((x - at.sigma * noise) / at.alpha, noise)


def times_of(golden: Golden, path: Any, schedule: str, skip: str) -> tuple[float, ...]:
    config = golden.config
    first, last, count = config["t_start"][schedule], config["t_end"], config["n_grid_points"]
    if skip == "time_uniform":
        nodes = np.linspace(first, last, count)
    elif skip == "time_quadratic":
        nodes = np.linspace(first**0.5, last**0.5, count) ** 2
    else:
        ends = torch.tensor([1 - first, 1 - last], dtype=torch.float64)
        low, high = torch.log(path.alpha(ends) / path.sigma(ends)).tolist()
        inner = path.time_at(torch.exp(torch.linspace(low, high, count, dtype=torch.float64)))
        return (1 - first, *inner.tolist()[1:-1], 1 - last)
    return tuple(1 - nodes)


def test_vp_exponential_ode() -> None:
    golden = Golden(SYSTEM, "vp_exponential_ode")
    config, steps = golden.config, steps_of(golden)
    probe = 1 - golden["in.t_probe"].double()
    for schedule in config["schedules"]:
        path = vp_path(golden, schedule)
        alpha, sigma = path.alpha(probe), path.sigma(probe)
        golden.check(f"out.{schedule}.log_alpha", torch.log(alpha))
        golden.check(f"out.{schedule}.sigma", sigma)
        golden.check(f"out.{schedule}.lambda", torch.log(alpha / sigma))
        golden.check(f"out.{schedule}.t_of_lambda", 1 - path.time_at(alpha / sigma))
    for run in config["runs"]:
        schedule, skip, solver = (run[key] for key in ("schedule", "skip_type", "solver"))
        path = vp_path(golden, schedule)
        toy = Toy(golden, path, schedule)
        times = times_of(golden, path, schedule, skip)
        variables = Reparameterisation("rho", path, (times[0], times[-1]))
        clocks = variables.grid(times)
        loss, field = weighted(golden), variables.field(toy)
        name = f"out.{schedule}.{skip}.{solver}"
        for route, through in (("adjoint", "adjoint"), ("discrete", "checkpoint")):
            found = solve.gradient(
                lambda y, loss=loss, variables=variables, end=times[-1]: loss(variables.decode(y, end)),
                field,
                variables.encode(golden["in.x_T"].double(), times[0]),
                (clocks[0], clocks[-1]),
                wrt=("state", "parameters"),
                parameters=toy.weights,
                method=steps[solver],
                steps=clocks,
                through=through,
            )
            golden.check(f"{name}.x", variables.decode(found.x, times[-1]))
            golden.check(f"{name}.grad_xT_{route}", found.state / float(variables.scale(times[0])))
            if f"{name}.grad_B_{route}" in golden.tensors:
                golden.check(f"{name}.grad_B_{route}", found.parameters["B"])
            if f"{name}.nfe_forward" in golden.tensors:
                golden.check(f"{name}.nfe_forward", torch.tensor([found.report.forward]))
    golden.assert_all_compared()


class SigmaTable:
    """Noise levels between whole timesteps by lines, as the scheduler has them."""

    def __init__(self, golden: Golden):
        config = golden.config
        self.count = config["num_train_timesteps"]
        power = {"scaled_linear": 0.5, "linear": 1.0}[config["beta_schedule"]]
        ends = config["beta_start"] ** power, config["beta_end"] ** power
        betas = torch.linspace(*ends, self.count, dtype=torch.float64) ** (1 / power)
        squares = torch.cumprod(1 - betas, 0)
        self.sigmas = torch.sqrt((1 - squares) / squares)

    def level(self, t: Tensor) -> Tensor:
        place = (1 - t) * (self.count - 1)
        below = place.floor().clamp(0, self.count - 2).long()
        return torch.lerp(self.sigmas.to(t.dtype)[below], self.sigmas.to(t.dtype)[below + 1], place - below)

    def path(self) -> Custom:
        return Custom(
            data=lambda t: 1 / torch.sqrt(1 + self.level(t) ** 2),
            source=lambda t: self.level(t) / torch.sqrt(1 + self.level(t) ** 2),
        )


class GuidedToy:
    """What the toy network estimates under guidance, from embeddings that are unknowns themselves."""

    def __init__(self, golden: Golden, path: Custom):
        self.weights = {name: golden[f"w.{name}"] for name in ("A", "B", "C", "b")}
        self.path, self.guidance = path, golden.config["guidance_scale"]
        self.scale = (golden.config["num_train_timesteps"] - 1) / golden.config["toy_time_divisor"]

    def ends(self, x: Tensor, t: Tensor, embeds: Tensor) -> Ends:
        w = self.weights
        twice = torch.cat([x, x]) @ w["A"] + (1 - t) * self.scale * w["b"] + embeds.mean(dim=1) @ w["C"]
        without, given = (torch.tanh(twice) @ w["B"]).chunk(2)
        noise = without + self.guidance * (given - without)
        at = self.path.at(t, x)
        return Ends((x - at.sigma * noise) / at.alpha, noise)


def test_sd_scheduler() -> None:
    golden = Golden(SYSTEM, "sd_scheduler")
    config, steps = golden.config, steps_of(golden)
    table = SigmaTable(golden)
    path = table.path()
    count = config["num_inference_steps"]
    times = tuple(np.linspace(0, 1, count).tolist())
    stamps = torch.tensor([(1 - t) * (table.count - 1) for t in times])
    golden.check("out.timesteps", stamps)
    golden.check("out.sigmas", table.level(torch.tensor(times, dtype=torch.float64)))
    assert config["stage_sigma"] == "snap_to_nearest_grid_sigma"
    # Stages in the middle of two levels are as near to either: rounding decides, so the levels are theirs to the last bit.
    clocks = tuple(golden["out.sigmas"].tolist())
    variables = Reparameterisation("rho", path, (times[0], times[-1]), snapped=clocks)
    golden.check("out.init_noise_sigma", torch.tensor([clocks[0]]))
    field, embeds = variables.field(GuidedToy(golden, path)), golden["in.embeds"]
    for solver in config["solvers"]:
        for route, through in (("adjoint", "adjoint"), ("discrete", "checkpoint")):
            found = solve.gradient(
                lambda x: (golden["in.loss_weight"] * x).sum(),
                field,
                clocks[0] * golden["in.latents"],
                (clocks[0], clocks[-1]),
                wrt=("state", "condition"),
                condition=embeds,
                method=steps[solver],
                steps=clocks,
                through=through,
            )
            for mode in config["modes"]:
                name = f"out.{mode}.{solver}"
                golden.check(f"{name}.x", found.x)
                if f"{name}.grad_latents_{route}" in golden.tensors:
                    golden.check(f"{name}.grad_latents_{route}", found.state)  # of the scaled latents
                if f"{name}.grad_embeds_{route}" in golden.tensors:
                    golden.check(f"{name}.grad_embeds_{route}", found.condition[0])
    golden.assert_all_compared()
