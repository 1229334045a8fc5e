"""Couplings that depend on the data: bridges that start from what is known; and forecasts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, FlowMatching, GaussianMixture, Inpainting, MixtureField, Provenance
from pantarhei.flow.gammas import NoLatent
from pantarhei.flow.interpolants import linear
from pantarhei.flow.observations import ObservedSource
from pantarhei.recipes import forecasting
from pantarhei.recipes.backbones import NetworkConfig, build_network
from pantarhei.recipes.data import DataConfig
from pantarhei.report import image_grid, save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import run
from pantarhei.solve import ode
from pantarhei.training import FlowTask, Optimization


def correlated_ends(settings: Settings) -> dict[str, float]:
    """Gaussian ends with and without correlation, exact fields: length of the paths, and calls that dopri5 takes."""
    draws = seeded(settings.seed, 1, 86)
    d, kind = 8, torch.float64
    root = torch.randn(d, d, generator=draws, dtype=kind) / d**0.5
    start = root @ root.T + 0.5 * torch.eye(d, dtype=kind)
    one = torch.ones(1, dtype=kind)
    shift = torch.randn(1, d, generator=draws, dtype=kind)
    source = GaussianMixture(one, torch.zeros(1, d, dtype=kind), start[None])
    # x1 = x0 + shift + noise: what is known fixes most of x1.
    target = GaussianMixture(one, shift, start[None] + 0.1 * torch.eye(d, dtype=kind))
    x0 = source.sample(500, draws)
    found: dict[str, float] = {}
    for name, cross in (("independent", None), ("coupled", start)):
        field = MixtureField(target, source, linear(NoLatent()), cross=cross)
        solution = ode(field, x0, (0.0, 1.0), method="dopri5", rtol=1e-6, atol=1e-6)
        times = torch.linspace(0, 1, 65, dtype=kind)
        paths = ode(field, x0, times, method="rk4", steps=times).xs
        found[f"{name}_length"] = float((paths[1:] - paths[:-1]).norm(dim=2).sum(dim=0).mean())
        found[f"{name}_calls"] = float(solution.evaluations)
    found["length_ratio"] = found["coupled_length"] / found["independent_length"]
    found["calls_ratio"] = found["independent_calls"] / found["coupled_calls"]
    return found


COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def inpainting(settings: Settings) -> dict[str, float]:
    """Hidden parts of digits, filled from noise in the hole alone, or from noise everywhere, by the same network."""
    size, seed = settings.size, settings.seed
    train_set, held_out = DataConfig().open()
    observed = Inpainting()
    test = ObservedSource(held_out, observed).fetch(torch.arange(len(held_out)))
    network = NetworkConfig(width=32, blocks=(1, 2))
    found: dict[str, float] = {}
    pictures = []
    known = test["context"].float()
    hole = 1 - known[:, -1:]
    for name in ("coupled", "independent"):
        flow = Flow(
            build_network(network, (1, 8, 8), 0, seed, context=2),
            source=observed if name == "coupled" else None,
            shape=(1, 8, 8),
            conditions=("context",),
            provenance=Provenance(coupling="inpainting" if name == "coupled" else "independent"),
        )
        objective = FlowMatching(observation=observed)
        task = FlowTask(flow, objective, train_set, optimization=Optimization(lr=1e-3, decay="cosine"), average=0.99)
        flow = run(task, seed, size(1500), 64)
        noise = torch.randn(known.shape[0], 1, 8, 8, generator=seeded(seed, 2, 86))
        x0 = observed.start(known, noise) if name == "coupled" else noise
        times = [i / 32 for i in range(33)]
        with torch.no_grad():
            paths = flow.transport(x0, times, steps=tuple(times), condition={"context": known}).xs
        found[f"{name}_length"] = float((paths[1:] - paths[:-1]).flatten(2).norm(dim=2).sum(dim=0).mean())
        for count in COUNTS:
            x = flow.sample(x0=x0, steps=count, condition={"context": known})
            # What was known is put back, for both: only the hidden part is judged.
            x = known[:, :1] * (1 - hole) + x * hole
            found[f"{name}_{count}"] = metrics.sliced_wasserstein(
                x.flatten(1), test["x1"].flatten(1), generator=seeded(seed, 64)
            )
        pictures.append(x[:16])
    found["length_ratio"] = found["coupled_length"] / found["independent_length"]
    found["calls_ratio"] = _calls_ratio(found)
    if settings.pictures:
        rows = torch.cat([test["x1"][:16], known[:16, :1] * (1 - hole[:16]), *pictures])
        save_image_grid(rows, settings.pictures / "inpainting.png", columns=16)
    return found


def _calls_ratio(found: dict[str, float]) -> float:
    """How many times more steps noise everywhere takes to the same distance, median over four goals that both reach.

    The goals are 5, 10, 20 and 40 % above the larger of the two least distances; steps between counts are interpolated.
    """
    floor = max(min(found[f"{name}_{count}"] for count in COUNTS) for name in ("coupled", "independent"))
    ratios = sorted(
        _steps_to(found, "independent", goal * floor) / _steps_to(found, "coupled", goal * floor)
        for goal in (1.05, 1.1, 1.2, 1.4)
    )
    return (ratios[1] + ratios[2]) / 2


def _steps_to(found: dict[str, float], name: str, goal: float) -> float:
    """Steps at which a flow first comes as near as `goal`, linear in log steps and log distance."""
    before, above = COUNTS[0], found[f"{name}_{COUNTS[0]}"]
    if above <= goal:
        return float(before)
    for count in COUNTS[1:]:
        distance = found[f"{name}_{count}"]
        if distance <= goal:
            share = math.log(above / goal) / math.log(above / distance)
            return math.exp(math.log(before) + share * math.log(count / before))
        before, above = count, distance
    return float(COUNTS[-1])


def forecast_double_well(settings: Settings) -> dict[str, float]:
    """The double well: a bridge, a regressor of the same network, persistence."""
    return _forecast(settings, "double_well", NetworkConfig(width=128, blocks=(3,)), iterations=3000, batch=256)


def forecast_kolmogorov(settings: Settings) -> dict[str, float]:
    """Vorticity of a stirred two-dimensional fluid: a bridge, a regressor of the same network, persistence."""
    network = NetworkConfig(width=24, multipliers=(1, 2, 2), blocks=(1, 1, 2))
    return _forecast(settings, "kolmogorov", network, iterations=700, batch=32)


def _forecast(
    settings: Settings, data: str, network: NetworkConfig, *, iterations: int, batch: int
) -> dict[str, float]:
    flows: dict[str, Flow] = {}
    fields = data == "kolmogorov"
    for kind in ("bridge", "regressor"):
        recipe = forecasting.ForecastConfig(data=DataConfig(data=data), kind=kind, network=network, average=0.99)
        task = forecasting.build_task(recipe, settings.seed)
        flows[kind] = run(task, settings.seed, settings.size(iterations), batch)
    _, test, _, _ = recipe.open_series()
    leads = (1,) if fields else (1, 2, 4)
    scores = forecasting.score_forecasts(
        flows,
        test,
        leads=leads,
        cases=64 if fields else 512,
        members=16 if fields else 32,
        steps=25,
        seed=settings.seed,
    )
    found: dict[str, float] = {}
    for row in scores:
        found[f"{row.name}_{row.lead}_energy"], found[f"{row.name}_{row.lead}_crps"] = row.energy, row.crps
        if row.spread is not None:
            found[f"{row.name}_{row.lead}_spread"] = row.spread
    for score in ("energy", "crps"):
        others = min(found[f"{name}_1_{score}"] for name in ("persistence", "regressor"))
        found[f"{score}_ratio"] = found[f"bridge_1_{score}"] / others
    if settings.pictures:
        _draw(flows["bridge"], test, settings, fields)
    return found


def _draw(flow: Flow, series: Tensor, settings: Settings, fields: bool) -> None:
    assert settings.pictures is not None
    draws = seeded(settings.seed, 3, 86)
    if fields:
        state, truth = series[:4, 0], series[:4, 1]
        members = forecasting.forecast(flow, state, members=4, steps=25, generator=draws)[0]
        columns = torch.stack([state, truth, *members], dim=1).flatten(0, 1) / 3
        image_grid(columns.clamp(-1, 1), columns=6, scale=3).save(settings.pictures / "kolmogorov.png")
        return
    from pantarhei.report.figures import scatter_2d

    places = torch.tensor([[-1.0, 0.0], [-0.3, 0.3], [0.0, 0.0], [0.8, -0.5]])
    many = forecasting.forecast(flow, places, members=1000, steps=25, generator=draws)[0]
    sets = {f"from ({x:g}, {y:g})": many[:, i] for i, (x, y) in enumerate(places.tolist())}
    scatter_2d(sets, columns=4).savefig(settings.pictures / "double-well.png", dpi=110)
