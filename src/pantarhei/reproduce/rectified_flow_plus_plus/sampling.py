"""What a straightened flow is good for beside one step: the new update rule, and inversion in few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, evaluation_mode, make_grid, on_path
from pantarhei.flow.grids import Grid
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow_plus_plus.setups import DATA, Data, Setup, data_distance, setup, student
from pantarhei.straighten import Reconstruction, reconstruct, tuned_grid
from pantarhei.straighten.editing import INVERSION_EDGE

HALF = 0.5


def update_rule(settings: Settings) -> dict[str, float]:
    """Re-interpolation with the first noise against Euler's steps, for a student trained half as long and a full one."""
    found: dict[str, float] = {}
    for data in DATA:
        made = setup(data, settings)
        for name, length in (("half", HALF), ("full", 1.0)):
            flow = student(data, "D", settings, length)
            for steps in (2, 3, 4, 8):
                euler, new = made.error(flow, steps), made.error(flow, steps, "reinterpolate")
                found |= {f"{data}_{name}_{steps}_euler": euler, f"{data}_{name}_{steps}_new": new}
                found[f"{data}_{name}_{steps}_ratio"] = new / euler
        found[f"{data}_worst_ratio"] = max(found[f"{data}_half_{steps}_ratio"] for steps in (3, 4))
        found["two_steps_differ"] = max(found.get("two_steps_differ", 0.0), abs(found[f"{data}_half_2_ratio"] - 1))
        found |= _by_distance(made, data, settings)
    return found


def _by_distance(made: Setup, data: Data, settings: Settings) -> dict[str, float]:
    """The same by the distance to the data."""
    flow = student(data, "D", settings, HALF)
    found = {}
    for steps in (3, 4):
        for name, method in (("euler", "euler"), ("new", "reinterpolate")):
            x = flow.sample(x0=made.x0, steps=steps, method=method)
            found[f"{data}_half_{steps}_{name}_distance"] = data_distance(made, x)
    return found


def inversion(settings: Settings) -> dict[str, float]:
    """Held-out digits to noise and back, in four and in eight evaluations each way: student against teacher."""
    made = setup("digits", settings)
    x = made.held_out
    noise = torch.randn(x.shape, generator=seeded(settings.seed, 1, 93))
    flow = student("digits", "D", settings)
    linear = on_path(made.teacher)
    fine = Reconstruction(x, made.teacher.invert(x, steps=40, method="edm"), x, (80, 0))
    found = {"teacher_finely_inverted_shell": fine.shell_distance}
    rows = {"data": x[:12]}
    for count in (4, 8):
        arms = {"student": reconstruct(flow, x, (count, count), noise=noise)}
        for name, teacher, grid, method in (
            ("euler_own_grid", made.teacher, _even(made.teacher, count), "ddim"),
            ("euler_linear", linear, _even(linear, count), "euler"),
            ("euler_tuned", linear, tuned_grid(linear, count, made.x0[:64]), "euler"),
            ("heun_own_grid", made.teacher, _even(made.teacher, count // 2), "edm"),
            ("heun_linear", linear, _even(linear, count // 2), "heun"),
        ):
            arms[name] = _on_grid(teacher, x, grid, noise, method)
        for name, arm in arms.items():
            found |= {f"{name}_{count}_error": arm.error, f"{name}_{count}_shell": arm.shell_distance}
        for kind in ("euler", "heun"):
            mine = [name for name in arms if name.startswith(kind)]
            best = min(mine, key=lambda name: arms[name].error)
            rows[f"{kind} {count}"] = arms[best].again[:12]
            found[f"{kind}_{count}_gain"] = arms[best].error / arms["student"].error
            shell = min(arms[name].shell_distance for name in mine)
            found[f"{kind}_{count}_shell_ratio"] = arms["student"].shell_distance / shell
        rows[f"student {count}"] = arms["student"].again[:12]
    if settings.pictures:
        order = ["data", "euler 4", "heun 4", "student 4", "euler 8", "heun 8", "student 8"]
        save_image_grid(torch.cat([rows[name] for name in order]), settings.pictures / "inversion.png", columns=12)
    return found


def _even(flow: Flow, steps: int) -> Grid:
    return make_grid(steps, flow.interval)


def _on_grid(flow: Flow, x: Tensor, grid: Grid, noise: Tensor, method: Any) -> Reconstruction:
    """There and back on one grid of the teacher: an evaluation a step with Euler's method, two with Heun's."""
    low, high = grid[0], min(grid[-1], 1 - INVERSION_EDGE)
    alpha, sigma = (_at(coefficient, high) for coefficient in (flow.path.alpha, flow.path.sigma))
    first = _at(flow.path.sigma, low)
    with torch.no_grad(), evaluation_mode(flow.network):
        start = alpha * x + sigma * noise
        x0 = flow.transport(start, (high, low), steps=(high, *reversed(grid[:-1])), method=method).x / first
        again = flow.transport(first * x0, (low, grid[-1]), steps=grid, method=method).x
    return Reconstruction(x, x0, again / _at(flow.path.alpha, grid[-1]), (len(grid) - 1, len(grid) - 1))


def _at(coefficient: Callable[[Tensor], Tensor], t: float) -> float:
    return float(coefficient(torch.tensor(t, dtype=torch.float64)))
