"""Data from noisy measurements, without training for it: hidden, dark and blurred digits, and a flow seen by few sensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pantarhei.data import kolmogorov_flow, velocity_of
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Blurred, Flow, Masked, Measurement, Sensors, posterior_sample
from pantarhei.flow.posterior import Operator
from pantarhei.networks import UNet, UNetConfig
from pantarhei.recipes.data import DataConfig
from pantarhei.recipes.optimization import Search, optimize_noise
from pantarhei.report import save_image_grid, vector_fields
from pantarhei.reproduce.adjoint_dpm.tasks import LEFT_OUT, digits
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import run
from pantarhei.training import FlowTask, Optimization

NOISE, DRAWS = 0.05, 16  # of the measurements; posterior samples of each
SIDE, SENSORS = 16, 24


def images(settings: Settings) -> dict[str, float]:
    """Digits of which a square, most pixels or the detail is missing."""
    flow = digits(settings.seed, settings.quick).flow
    train, held_out = DataConfig("digits").open()
    seen, held = (part.fetch(torch.arange(len(part))) for part in (train, held_out))
    truth = held["x1"][held["label"] != LEFT_OUT]
    truth = truth[torch.randperm(len(truth), generator=seeded(settings.seed, 120))[: settings.size(16)]]
    hole = torch.ones(1, 8, 8)
    hole[:, 2:6, 2:6] = 0
    some = (torch.rand(1, 8, 8, generator=seeded(settings.seed, 121)) < 0.3).float()
    operators: dict[str, Operator] = {"box": Masked(hole), "mask": Masked(some), "blur": Blurred(1.0)}
    null = {"condition": torch.full((len(truth) * DRAWS,), 10)}
    data = seen["x1"][seen["label"] != LEFT_OUT]
    found: dict[str, float] = {}
    shown = [truth]
    for name, operator in operators.items():
        figures, drawn = _measured(flow, operator, truth, data, settings, null)
        found |= {f"{key}_{name}": value for key, value in figures.items()}
        shown += [operator(truth), drawn[:, 0], drawn.mean(dim=1)]
    for key in ("misfit", "error_over_linear", "spread_off"):
        found[f"worst_{key}"] = max(found[f"{key}_{name}"] for name in operators)
    if settings.pictures:
        save_image_grid(torch.cat(shown), settings.pictures / "images.png", columns=len(truth))
    return found


def fields(settings: Settings) -> dict[str, float]:
    """Velocities of a stirred fluid from 24 sensors of 256 places, or from the speeds there only."""
    flow, data, held_out = fluid(settings)
    picked = torch.randperm(len(held_out), generator=seeded(settings.seed, 122))[: settings.size(8)]
    truth = held_out[picked]
    at = torch.randperm(SIDE**2, generator=seeded(settings.seed, 123))[:SENSORS]
    sensors = Sensors(torch.stack([at // SIDE, at % SIDE], dim=1))
    found, drawn = _measured(flow, sensors, truth, data, settings)
    flat, _ = _measured(flow, sensors, truth, data, settings, spread=float(data.std()))
    found["error_over_fixed_spread"] = found["error"] / flat["error"]
    found["energy_over_truth"] = float(drawn.square().mean() / truth.square().mean())
    # By a search for noise (D-Flow), four of each.
    value = _observed(sensors, truth, settings).repeat_interleave(4, dim=0)
    searched = optimize_noise(
        flow,
        Measurement(sensors, value, NOISE).mismatch,
        torch.randn(len(value), 2, SIDE, SIDE, generator=seeded(settings.seed, 124)),
        search=Search(8 if settings.quick else 60, 0.1, sampling={"steps": 10, "method": "midpoint"}),
    ).after
    means = searched.reshape(len(truth), 4, *truth.shape[1:]).mean(dim=1)
    found["error_of_search"] = _rms(means - truth)

    def speeds(x: Tensor) -> Tensor:
        return sensors(x).square().sum(dim=1, keepdim=True).clamp_min(1e-12).sqrt()

    def speed(x: Tensor) -> Tensor:
        return x.square().sum(dim=-3).sqrt()

    nonlinear, turned = _measured(flow, speeds, truth, data, settings, linear=False)
    found["misfit_of_speeds"] = nonlinear["misfit"]
    guess = speed(data).mean(dim=0)
    found["speed_error_over_mean"] = _rms(speed(turned).mean(dim=1) - speed(truth)) / _rms(guess - speed(truth))
    if settings.pictures:
        rows = {"truth": truth, "one sample": drawn[:, 0], "mean of 16": drawn.mean(dim=1), "from speeds": turned[:, 0]}
        vector_fields(rows, places=sensors.places, columns=6).savefig(settings.pictures / "fields.png", dpi=80)
    return found


def fluid(settings: Settings) -> tuple[Flow, Tensor, Tensor]:
    """A rectified flow of velocities (2, 16, 16) of unit deviation, its data, and those of other trajectories."""
    count = 8 if settings.quick else 64
    still: dict[str, Any] = {
        "size": SIDE,
        "viscosity": 0.05,
        "interval": 2.0,
        "burn_in": 2.0 if settings.quick else 20.0,
    }
    vorticity = kolmogorov_flow(count, 40, generator=seeded(settings.seed, 125), **still)
    velocity = velocity_of(vorticity)
    kept = count * 7 // 8
    velocity = velocity / velocity[:kept].std()
    data, held_out = velocity[:kept].flatten(0, 1), velocity[kept:].flatten(0, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = UNet(UNetConfig(channels=2, width=32, multipliers=(1, 2), blocks=1))
    task = FlowTask(
        Flow(network, shape=(2, SIDE, SIDE)),
        None,
        {"x1": data},
        optimization=Optimization(lr=1e-3, decay="cosine", warmup=50),
        average=0.99,
    )
    learned = run(task, settings.seed, settings.size(2000), 64)
    learned.network.eval()
    return learned, data, held_out


def _measured(
    flow: Flow,
    operator: Operator,
    truth: Tensor,
    data: Tensor,
    settings: Settings,
    sampling: dict[str, Any] | None = None,
    *,
    spread: float | None = None,
    linear: bool = True,
) -> tuple[dict[str, float], Tensor]:
    """How well posterior samples do, against the best linear estimate; and the samples, (items, draws, ...)."""
    value = _observed(operator, truth, settings)
    measurement = Measurement(operator, value.repeat_interleave(DRAWS, dim=0), NOISE, spread)
    x0 = torch.randn(len(truth) * DRAWS, *truth.shape[1:], generator=seeded(settings.seed, 126))
    x = posterior_sample(flow, measurement, x0=x0, steps=40, method="heun", **(sampling or {}))
    drawn = x.reshape(len(truth), DRAWS, *truth.shape[1:])
    error = _rms(drawn.mean(dim=1) - truth)
    # Of a right posterior the truth is one more draw: as far from the mean of the others as a deviation, and a little more.
    ratio = float(drawn.var(dim=1).mean().sqrt()) * (1 + 1 / DRAWS) ** 0.5 / error
    found = {"misfit": _rms(measurement.residual(x)) / NOISE, "error": error, "spread_off": max(ratio, 1 / ratio)}
    if linear:
        found["error_linear"] = _rms(best_linear(operator, value, data) - truth)
        found["error_over_linear"] = error / found["error_linear"]
    return found, drawn


def best_linear(operator: Operator, value: Tensor, data: Tensor) -> Tensor:
    """The best linear estimate by the mean and covariance of data (kriging, Gauss-Markov), (B, *shape)."""
    flat = data.flatten(1).double()
    mean, covariance = flat.mean(dim=0), torch.cov(flat.T)
    basis = torch.eye(flat.shape[1]).reshape(-1, *data.shape[1:])
    matrix = operator(basis).flatten(1).T.double()
    seen = matrix @ covariance @ matrix.T + NOISE**2 * torch.eye(len(matrix), dtype=torch.float64)
    gain = torch.linalg.solve(seen, matrix @ covariance).T
    return (mean + (value.flatten(1).double() - matrix @ mean) @ gain.T).reshape(-1, *data.shape[1:]).to(value.dtype)


def _observed(operator: Operator, truth: Tensor, settings: Settings) -> Tensor:
    clean = operator(truth)
    return clean + NOISE * torch.randn(clean.shape, generator=seeded(settings.seed, 127))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
