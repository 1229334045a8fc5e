"""What a straightened flow is good for beside one step: the new update rule, and inversion in few steps."""

from __future__ import annotations

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, on_path
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow_plus_plus.setups import DATA, Data, Setup, data_distance, setup, student
from pantarhei.straighten import Reconstruction, reconstruct, tuned_grid
from pantarhei.straighten.editing import invert_quickly

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
        found[f"{data}_two_steps_differ"] = abs(found[f"{data}_half_2_ratio"] - 1)
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
    found: dict[str, float] = {}
    rows = {"data": x[:12]}
    for count in (4, 8):
        arms = {"student": reconstruct(flow, x, (count, count), noise=noise)}
        arms["euler_own_grid"] = reconstruct(made.teacher, x, (count, count), method="ddim", noise=noise)
        arms["euler_linear"] = reconstruct(linear, x, (count, count), noise=noise)
        arms["euler_tuned"] = _on_grid(linear, x, tuned_grid(linear, count, made.x0[:64]), noise)
        for name, teacher, method in (("heun_own_grid", made.teacher, "edm"), ("heun_linear", linear, "heun")):
            arms[name] = _on_grid(teacher, x, _even(teacher, count // 2), noise, method)
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


def _even(flow: Flow, steps: int) -> tuple[float, ...]:
    low, high = flow.interval
    return tuple(low + (high - low) * i / steps for i in range(steps)) + (high,)


def _on_grid(
    flow: Flow, x: Tensor, grid: tuple[float, ...], noise: Tensor, method: str = "euler"
) -> Reconstruction:
    """There and back on the same grid: two evaluations a step with Heun's method, one with Euler's."""
    high = min(grid[-1], 1 - 1e-3)
    x0 = invert_quickly(flow, x, 1, method=method, grid=(high, *reversed(grid[:-1])), noise=noise)
    again = flow.sample(x0=x0, steps=grid, method=method, final="state")
    return Reconstruction(x, x0, again, (len(grid) - 1, len(grid) - 1))
