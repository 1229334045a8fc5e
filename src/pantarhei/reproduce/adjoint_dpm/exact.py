"""Gradients of small exact problems: errors of every way back, memory against steps, other variables."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei import solve
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, differentiable_sample
from pantarhei.flow.closed_form import MixtureField
from pantarhei.flow.grids import make_grid
from pantarhei.flow.paths import build_path
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings

DIMENSION, CONDITION, BATCH = 64, 8, 64
STEPS = (8, 16, 32, 64, 128)
PATHS, GRIDS, METHODS = ("vp", "cosine", "linear"), ("uniform", "logsnr", "quadratic"), ("euler", "heun", "rk4")
EXACT = ("checkpoint", "symplectic", "reversible")


class Velocity(nn.Module):
    """A perceptron of 3 x 256 from (x, t, condition), random weights."""

    def __init__(self, seed: int, width: int = 256):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (DIMENSION + 1 + CONDITION, width, width, width)
            layers: list[nn.Module] = []
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), nn.SiLU()]
            self.layers = nn.Sequential(*layers, nn.Linear(width, DIMENSION))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """dx/dt."""
        return self.layers(torch.cat([x, t.expand(len(x), 1).to(x), condition], dim=1))


def gradients(settings: Settings) -> dict[str, float]:
    """Every way back against exact backpropagation and against differences, in double precision."""
    field, x, condition, w = _problem(settings, torch.float64)
    found: dict[str, float] = {}
    curves: dict[str, Any] = {}

    def run(method: str, steps: int, through: Any, **how: Any) -> solve.Gradient:
        return solve.gradient(
            lambda end: (w * end).sum(),
            field,
            x,
            condition=condition,
            wrt=("state", "condition", "parameters"),
            method=method,
            steps=steps,
            through=through,
            **how,
        )

    for method in ("euler", "midpoint", "rk4"):
        step = solve.as_step(method)
        for steps in STEPS[: 2 if settings.quick else len(STEPS)]:
            exact, own = _flat(run(method, steps, "backprop")), None
            for through in solve.THROUGH:
                if through == "backprop":
                    continue
                reference = exact
                if through == "reversible":
                    own = _flat(run(solve.Reversible(step), steps, "backprop"))  # type: ignore[arg-type]
                    reference = own
                off = float((_flat(run(method, steps, through)) - reference).norm() / reference.norm())
                found[f"{through}_{method}_{steps}"] = off
                curves.setdefault(f"{through}, {method}", ([], []))
                curves[f"{through}, {method}"][0].append(steps)
                curves[f"{through}, {method}"][1].append(max(off, 1e-17))
            found[f"difference_{method}_{steps}"] = run(method, steps, "backprop", verify=True).report.error or 0.0
    found["exact_worst"] = max(v for k, v in found.items() if k.startswith(EXACT))
    found["difference_worst"] = max(v for k, v in found.items() if k.startswith("difference_"))
    last, before = (STEPS[1], STEPS[0]) if settings.quick else (STEPS[-1], STEPS[-2])
    for method, order in (("euler", 1), ("midpoint", 2)):
        ratio = found[f"adjoint_{method}_{before}"] / found[f"adjoint_{method}_{last}"]
        found[f"order_{method}_over_nominal"] = float(torch.tensor(ratio).log2()) / order
    found["adjoint_euler_128"] = found[f"adjoint_euler_{last}"]
    if settings.pictures:
        shown = {k: v for k, v in curves.items() if k.startswith(("adjoint", "backsolve", "checkpoint"))}
        figure = draw.curves(shown, xlabel="steps", ylabel="error against backpropagation", log_x=True, log_y=True)
        figure.savefig(settings.pictures / "errors.png", dpi=110)
    return found


def memory(settings: Settings) -> dict[str, float]:
    """Peak of allocations beyond parameters and gradients, against the number of steps."""
    field, x, condition, w = _problem(settings, torch.float32)
    parameters = sum(p.nbytes for p in field.parameters())
    found: dict[str, float] = {}
    curves: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {name: {"through": name} for name in solve.THROUGH}
    ways["checkpoint, sqrt"] = {"through": "checkpoint", "every": "sqrt"}
    for name, how in ways.items():
        for steps in STEPS[:2] if settings.quick else STEPS:
            leaf = x.clone().requires_grad_(True)
            with solve.PeakMemory() as peak:
                end = solve.differentiable(
                    field, leaf, condition=condition, parameters=field, method="midpoint", steps=steps, **how
                )
                torch.autograd.grad((w * end).sum(), [leaf, *field.parameters()])
            value = float(peak.peak - parameters)
            found[f"{name}_{steps}"] = value
            curves.setdefault(name, ([], []))
            curves[name][0].append(steps)
            curves[name][1].append(value / 2**20)
    few, many = (STEPS[0], STEPS[1]) if settings.quick else (STEPS[0], STEPS[-1])
    state = float(x.nbytes)
    for name in ways:
        found[f"{name}_states_a_step"] = (found[f"{name}_{many}"] - found[f"{name}_{few}"]) / (many - few) / state
    found["backprop_growth"] = found[f"backprop_{many}"] / found[f"backprop_{few}"] / (many / few)
    found["checkpoint_over_backprop"] = found[f"checkpoint_{many}"] / found[f"backprop_{many}"]
    found["worst_states_a_step"] = max(found[f"{name}_states_a_step"] for name in ways if name != "backprop")
    if settings.pictures:
        figure = draw.curves(
            curves, xlabel="steps", ylabel="MiB beyond parameters and gradients", log_x=True, log_y=True
        )
        figure.savefig(settings.pictures / "memory.png", dpi=110)
    return found


def variables(settings: Settings) -> dict[str, float]:
    """Errors of samples and of continuous adjoints in each variable, on each path, grid and method; 20 steps."""
    generator = seeded(settings.seed, 101)
    means = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    law = GaussianMixture(
        torch.full((4,), 0.25, dtype=torch.float64), means, 0.04 * torch.eye(8, dtype=torch.float64).expand(4, 8, 8)
    )
    count = settings.size(64)
    x0, w = (torch.randn(count, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    found: dict[str, float] = {}
    for path_name in PATHS:
        path = build_path(path_name)
        interval = (0.0 if path_name == "vp" else 0.01, 0.999)
        flow = Flow(
            MixtureField(law, path=path), path=path, shape=(8,), interval=interval, starts_scaled=interval[0] > 0
        )
        fine = 60 if settings.quick else 1500
        reference, gradient = _solved(flow, x0, w, None, fine, "rk4", "logsnr", "checkpoint")
        for grid in GRIDS:
            nodes = make_grid(20, interval, kind=grid, path=path)  # type: ignore[arg-type]
            for method in METHODS:
                for name in (None, "rho", "flow"):
                    x, g = _solved(flow, x0, w, name, nodes, method, grid, "adjoint")
                    key = f"{path_name}_{grid}_{method}_{name or 'none'}"
                    found[f"{key}_sample"] = float((x - reference).norm() / reference.norm())
                    found[f"{key}_adjoint"] = float((g - gradient).norm() / gradient.norm())
    for name in ("rho", "flow"):
        for what in ("sample", "adjoint"):
            ratios = [
                found[f"{p}_{g}_{m}_none_{what}"] / max(found[f"{p}_{g}_{m}_{name}_{what}"], 1e-30)
                for p in PATHS[:2]
                for g in GRIDS
                for m in METHODS
            ]
            found[f"{name}_{what}_gain"] = float(torch.tensor(ratios).median())
            found[f"{name}_{what}_better"] = sum(r > 1 for r in ratios) / len(ratios)
    return found


def _solved(
    flow: Flow, x0: Tensor, w: Tensor, name: Any, steps: Any, method: Any, grid: str, through: Any
) -> tuple[Tensor, Tensor]:
    leaf = x0.clone().requires_grad_(True)
    more: dict[str, Any] = {"grid": grid} if isinstance(steps, int) else {}
    x = differentiable_sample(
        flow, leaf, variables=name, steps=steps, method=method, final="state", through=through, **more
    )
    return x.detach(), torch.autograd.grad((w * x).sum(), leaf)[0]


def _problem(settings: Settings, dtype: torch.dtype) -> tuple[Velocity, Tensor, Tensor, Tensor]:
    field = Velocity(settings.seed).to(dtype)
    generator = seeded(settings.seed, 100)
    x, w = (torch.randn(BATCH, DIMENSION, generator=generator).to(dtype) for _ in range(2))
    return field, x, torch.randn(BATCH, CONDITION, generator=generator).to(dtype), w


def _flat(found: solve.Gradient) -> Tensor:
    state: Any = found.state
    parts = (state, *found.condition, *found.parameters.values())
    return torch.cat([g.flatten() for g in parts])
