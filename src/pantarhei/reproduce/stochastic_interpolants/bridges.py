"""Schroedinger bridges against the exact ones: two Gaussians, two modes, two moons.

All errors are relative L2 errors of a drift over x_t drawn from the exact bridge at 18 times from 0.05 to 0.9. The exact
bridge is the closed form for Gaussians, else Sinkhorn's plan between quadrature rules of the two densities: there are no
samples in it, so no sampling error. What has to be beaten is the linear interpolant with independent ends and the same
latent: its exact drift, the coupling that its equation makes, and its energy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pantarhei.data import TOYS
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, MixtureField
from pantarhei.flow.entropic import sinkhorn_potentials
from pantarhei.flow.gammas import Brownian
from pantarhei.flow.gaussian_bridge import GaussianBridge
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.paths import Linear
from pantarhei.networks import MLP, MLPConfig
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.solve import sde
from pantarhei.straighten.schroedinger import Bridge, bridge_flow
from pantarhei.straighten.schroedinger_imf import markovian_fitting
from pantarhei.straighten.schroedinger_maxmin import BentLine, maxmin_bridge
from pantarhei.training import Optimization

TIMES = tuple(round(0.05 * i, 2) for i in range(1, 19))
GRID = tuple(sorted({*TIMES, *((1 - math.cos(math.pi * i / 60)) / 2 for i in range(61))}))
DATA, TEST = 200_000, 5_000
Drift = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Two laws, the noise between them, and their exact bridge."""

    source: GaussianMixture
    target: GaussianMixture
    epsilon: float
    drift: Drift
    backward_drift: Drift
    ends: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    cost: float
    data: Tensor

    def flow(self, seed: int, width: int) -> Flow:
        """A flow to be fitted."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = MLP(MLPConfig(self.source.dimension, width, 3, fields=2))
        return bridge_flow(network, self.epsilon, source=self.source, shape=(self.source.dimension,))

    def between(self, x0: Tensor, x1: Tensor, t: float, draws: torch.Generator) -> Tensor:
        """Points at t on Brownian bridges between pairs."""
        z = torch.randn(x0.shape, generator=draws, dtype=x0.dtype)
        return (1 - t) * x0 + t * x1 + math.sqrt(2 * self.epsilon * t * (1 - t)) * z


def gaussians(settings: Settings) -> dict[str, float]:
    """N(0, 1) to N(1, 4) with epsilon 0.5, by both methods."""
    exact = GaussianBridge(_mixture([1.0], [0.0], [1.0]), _mixture([1.0], [1.0], [4.0]), 0.5)
    source, target = _mixture([1.0], [0.0], [1.0]), _mixture([1.0], [1.0], [4.0])
    data = target.sample(settings.size(DATA), seeded(settings.seed, 80)).float()
    case = Case(source, target, 0.5, exact.drift, exact.backward_drift, exact.sample, exact.cost(), data)
    bridges = {"imf": _imf(case, settings, 800), "maxmin": _maxmin(case, settings, 3000)}
    found = _compare(case, bridges, settings)
    if settings.pictures:
        _draw_drifts(case, bridges, 0.5, (-3, 4), "two Gaussians").savefig(
            settings.pictures / "bridge-gaussians.png", dpi=110
        )
    return found


def two_modes(settings: Settings) -> dict[str, float]:
    """N(0, 1) to two modes by both methods; and two modes to two other ones by iterated fitting; epsilon 0.5."""
    modes = _mixture([0.4, 0.6], [-2.0, 2.0], [0.16, 0.16])
    case = _numeric(_mixture([1.0], [0.0], [1.0]), modes, 0.5, 0.01, settings)
    bridges = {"imf": _imf(case, settings, 1500), "maxmin": _maxmin(case, settings, 6000)}
    found = _compare(case, bridges, settings)
    if settings.pictures:
        _draw_drifts(case, bridges, 0.3, (-3, 3), "N(0, 1) to two modes").savefig(
            settings.pictures / "bridge-modes.png", dpi=110
        )
    # A fifth of the mass has to change sides, which independent pairs cross far more often.
    source, target = _mixture([0.5, 0.5], [-1.5, 1.5], [0.16, 0.16]), _mixture([0.3, 0.7], [-2.0, 2.0], [0.09, 0.09])
    both = _numeric(source, target, 0.5, 0.01, settings)
    more = _compare(both, {"imf": _imf(both, settings, 1500)}, settings)
    return {**found, **{f"both_{name}": value for name, value in more.items()}}


def moons(settings: Settings) -> dict[str, float]:
    """N(0, I) to two moons in the plane with epsilon 0.3, by both methods; max-min stays above 10 % here."""
    angle = (torch.arange(100, dtype=torch.float64) + 0.5) * math.pi / 100
    arc = torch.stack([angle.cos(), angle.sin()], dim=1)
    centres = 1.5 * (torch.cat([arc, torch.stack([1 - arc[:, 0], 0.5 - arc[:, 1]], dim=1)]) - torch.tensor([0.5, 0.25]))
    even = torch.ones(len(centres), dtype=torch.float64)
    # The law of the toy, with 100 even angles an arc for all angles: closer together than the noise is wide.
    target = GaussianMixture(even, centres, 0.08**2 * even)
    case = _numeric(GaussianMixture.standard(2), target, 0.3, 0.05, settings)
    data = TOYS["two_moons"](settings.size(DATA), seeded(settings.seed, 80))
    case = Case(**{**case.__dict__, "data": data})
    bridges = {"imf": _imf(case, settings, 2000, width=96), "maxmin": _maxmin(case, settings, 4000)}
    found = _compare(case, bridges, settings)
    if settings.pictures:
        start = torch.randn(50, 2, generator=seeded(settings.seed, 85))
        paths = torch.stack(_states(_float_drift(bridges["imf"]), start, case.epsilon, settings.seed, GRID[1:-1]))
        figure = draw.trajectories_2d(paths, background=data[:3000], title="Schroedinger bridge to two moons")
        figure.savefig(settings.pictures / "bridge-moons.png", dpi=110)
    return found


def _mixture(weights: list[float], means: list[float], variances: list[float]) -> GaussianMixture:
    """On the line."""
    w, m, v = (torch.tensor(values, dtype=torch.float64) for values in (weights, means, variances))
    return GaussianMixture(w, m[:, None], v)


def _numeric(
    source: GaussianMixture, target: GaussianMixture, epsilon: float, spacing: float, settings: Settings
) -> Case:
    """The bridge of two densities by Sinkhorn's algorithm on even grids, which integrate smooth densities very closely."""
    (x0, weights0), (x1, weights1) = _grid(source, 4 * spacing), _grid(target, spacing)
    exact = sinkhorn_potentials(x0, x1, epsilon, weights0=weights0, weights1=weights1)
    data = target.sample(settings.size(DATA), seeded(settings.seed, 80)).float()
    forward, backward = exact.forward_field(), exact.backward_field()
    return Case(source, target, epsilon, forward, backward, exact.sample, exact.cost(), data)


def _grid(law: GaussianMixture, spacing: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights of a rectangle rule where there is any mass."""
    reach = 6 * float(law.covariances.diagonal(dim1=1, dim2=2).amax().sqrt())
    low, high = float(law.means.min()) - reach, float(law.means.max()) + reach
    axis = torch.arange(low, high, spacing, dtype=torch.float64)
    nodes = torch.cartesian_prod(*[axis] * law.dimension).reshape(-1, law.dimension)
    density = torch.cat([law.log_prob(part).exp() for part in nodes.split(20_000)])
    kept = density > 1e-6 * density.max()
    return nodes[kept], density[kept]


def _imf(case: Case, settings: Settings, iterations: int, width: int = 64) -> Bridge:
    size = settings.size
    return markovian_fitting(
        case.flow(settings.seed, width),
        case.data,
        rounds=3,
        pairs=size(40_000),
        iterations=size(iterations),
        last=size(3 * iterations),
        steps=40,
        seed=settings.seed,
        optimization=Optimization(lr=2e-3, decay="cosine", warmup=20),
        average=0.99,
        batch=512,
    )


def _maxmin(case: Case, settings: Settings, iterations: int, width: int = 64) -> Bridge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        interpolant = BentLine(case.source.dimension, width)
    return maxmin_bridge(
        case.flow(settings.seed, width),
        case.data,
        interpolant=interpolant,
        iterations=settings.size(iterations),
        inner=2,
        seed=settings.seed,
        optimization=Optimization(lr=2e-3, decay="cosine", warmup=20),
        interpolant_optimization=Optimization(lr=5e-3, decay="cosine"),
        batch=256,
    )


def _compare(case: Case, bridges: dict[str, Bridge], settings: Settings) -> dict[str, float]:
    """Each bridge, and the linear interpolant, against the exact one."""
    count, seed = settings.size(TEST), settings.seed
    linear = _linear_drift(case)
    x0 = case.source.sample(count, seeded(seed, 81))
    x1 = case.target.sample(count, seeded(seed, 82))
    energy = _mean([_power(case.drift, x, t) for t, x in _exact_points(case, count, seed)])
    found = {"exact_cost": case.cost, "exact_energy": energy, "independent_cost": _cost(x0, x1)}
    fields: dict[str, Drift] = {"linear": linear, **{name: _float_drift(each) for name, each in bridges.items()}}
    for name, drift in fields.items():
        points = _exact_points(case, count, seed)
        found[f"{name}_drift_error"] = _relative_error(drift, case.drift, points)
        states = _states(drift, x0, case.epsilon, seed)
        found[f"{name}_cost"] = _cost(x0, states[-1])
        at = {t: states[i] for i, t in enumerate(GRID[1:]) if t in TIMES}
        found[f"{name}_energy"] = _mean([_power(drift, x, t) for t, x in at.items()])
    for name, bridge in bridges.items():

        def back(x: Tensor, t: Tensor, bridge: Bridge = bridge) -> Tensor:
            with torch.no_grad():
                return bridge.backward_drift(x.float(), t.float()).double()

        points = _exact_points(case, count, seed)
        found[f"{name}_backward_drift_error"] = _relative_error(back, case.backward_drift, points)
        found[f"{name}_cost_over_linear"] = found[f"{name}_cost"] / found["linear_cost"]
        found[f"{name}_energy_over_linear"] = found[f"{name}_energy"] / found["linear_energy"]
    return found


def _exact_points(case: Case, count: int, seed: int) -> list[tuple[float, Tensor]]:
    draws = seeded(seed, 83)
    x0, x1 = case.ends(count, draws)
    return [(t, case.between(x0, x1, t, draws)) for t in TIMES]


def _linear_drift(case: Case) -> Drift:
    """The exact forward drift of the linear interpolant with independent ends and the bridge's latent."""
    field = MixtureField(case.target, case.source, Interpolant(Linear(), Brownian(2 * case.epsilon)))
    return lambda x, t: field(x, t) + case.epsilon * field.score(x, t)


def _float_drift(bridge: Bridge) -> Drift:
    def drift(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return bridge.drift(x.float(), t.float()).to(x)

    return drift


def _states(drift: Drift, x0: Tensor, epsilon: float, seed: int, grid: tuple[float, ...] = GRID) -> list[Tensor]:
    """States at the nodes after the first, by Euler-Maruyama with the same noise for every drift."""
    solution: Any = sde(drift, math.sqrt(2 * epsilon), x0, grid, generator=seeded(seed, 84))
    return list(solution.xs[1:])


def _relative_error(drift: Drift, exact: Drift, points: list[tuple[float, Tensor]]) -> float:
    wrong = size = 0.0
    for t, x in points:
        moment = torch.tensor(t, dtype=x.dtype)
        truth = exact(x, moment)
        wrong += float((drift(x, moment) - truth).square().sum())
        size += float(truth.square().sum())
    return math.sqrt(wrong / size)


def _power(drift: Drift, x: Tensor, t: float) -> float:
    return float(drift(x, torch.tensor(t, dtype=x.dtype)).square().sum(dim=1).mean())


def _cost(x0: Tensor, x1: Tensor) -> float:
    return float((x1 - x0).square().sum(dim=1).mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _draw_drifts(case: Case, bridges: dict[str, Bridge], t: float, limits: tuple[float, float], title: str) -> Any:
    x = torch.linspace(*limits, 200, dtype=torch.float64)[:, None]
    moment = torch.tensor(t, dtype=torch.float64)
    names = {"imf": "iterated Markovian fitting", "maxmin": "max-min"}
    lines: dict[str, Drift] = {"exact": case.drift, "linear interpolant": _linear_drift(case)}
    lines |= {names[name]: _float_drift(bridge) for name, bridge in bridges.items()}
    series = {name: (x[:, 0].tolist(), drift(x, moment)[:, 0].tolist()) for name, drift in lines.items()}
    return draw.curves(series, xlabel="x", ylabel=f"forward drift at t = {t:g}", title=title, markers=False)
