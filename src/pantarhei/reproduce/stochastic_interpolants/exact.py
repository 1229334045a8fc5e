"""What stochastic interpolants claim, put to the test with fields that are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, Interpolant, MixtureField, kl_control, transport_sde
from pantarhei.flow import interpolants as si
from pantarhei.flow.gammas import Brownian, NoLatent
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings

Density = Callable[[Tensor], Tensor]
BINS = 160


def mixture(means: list[float], variances: list[float]) -> GaussianMixture:
    """Equal modes on the line, in float64."""
    kind = torch.float64
    return GaussianMixture(
        torch.ones(len(means), dtype=kind),
        torch.tensor(means, dtype=kind)[:, None],
        torch.tensor(variances, dtype=kind),
    )


TWO, THREE = mixture([-3, 3], [0.25, 0.25]), mixture([-6, 0, 6], [0.5, 0.33, 0.5])


def exact_flow(target: GaussianMixture, source: GaussianMixture | None = None, path: Interpolant | None = None) -> Flow:
    """The flow between two mixtures with its exact velocity and latent."""
    source = source or GaussianMixture.standard(target.dimension)
    path = path or si.linear()
    field = MixtureField(target, source, path, predicts="velocity+latent")
    return Flow(field, path=path, predicts="velocity+latent", source=source, shape=(target.dimension,))


def divergence(samples: Tensor, density: Density, low: float, high: float) -> float:
    """KL(exact || samples) on the line in nats, from a histogram of 160 bins with half a count added to each."""
    counts = torch.histc(samples.double().flatten(), BINS, low, high) + 0.5
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    # The mass of a bin by Simpson's rule.
    ends, middles = density(edges[:, None]).exp(), density(((edges[1:] + edges[:-1]) / 2)[:, None]).exp()
    mass = (ends[1:] + ends[:-1] + 4 * middles).flatten()
    p, q = mass / mass.sum(), counts / counts.sum()
    return float(torch.special.xlogy(p, p / q).sum())


def any_two_densities(settings: Settings) -> dict[str, float]:
    """Two modes to three with the exact fields: ODE, forward and backward SDE at five times, against the sampling floor."""
    count, flow = settings.size(20_000), exact_flow(THREE, TWO)
    field = flow.network
    times = [0.2, 0.4, 0.6, 0.8, 1.0]
    found: dict[str, float] = {}
    worst: dict[str, float] = {}
    for number, kind in enumerate(("ode", "forward", "backward")):
        draws = seeded(settings.seed, 1, number, 80)
        down = kind == "backward"
        x = (THREE if down else TWO).sample(count, draws)
        here = 1.0 if down else 0.0
        ratios = []
        for time in [0.8, 0.6, 0.4, 0.2, 0.0] if down else times:
            amount = 0.0 if kind == "ode" else 0.5
            x = transport_sde(flow, x, (here, time), amount, steps=60, method="heun", generator=draws).x
            here = time

            def density(y: Tensor, time: float = time) -> Tensor:
                return field.log_prob(y, torch.tensor(time, dtype=torch.float64))  # type: ignore[operator]

            x0, x1 = TWO.sample(count, draws), THREE.sample(count, draws)
            z = torch.randn(x0.shape, generator=draws, dtype=torch.float64)
            fresh, _ = flow.path.sample(x0, x1, z, torch.tensor(time, dtype=torch.float64))
            value, floor = divergence(x, density, -9, 9), divergence(fresh, density, -9, 9)
            found[f"{kind}_{time:g}"], found[f"{kind}_{time:g}_floor"] = value, floor
            ratios.append(value / floor)
        worst[f"{kind}_worst_ratio"] = max(ratios)
    if settings.pictures:
        _draw_densities(flow, settings)
    return {**worst, **found}


def _draw_densities(flow: Flow, settings: Settings) -> None:
    """Histograms of the three solutions on the exact density, at five times."""
    import matplotlib.pyplot as plt

    assert settings.pictures is not None
    times = [0.0, 0.25, 0.5, 0.75, 1.0]
    grid = torch.linspace(-9, 9, 400, dtype=torch.float64)[:, None]
    figure, axes = plt.subplots(3, 5, figsize=(12, 5), sharex=True, sharey=True)
    for row, (name, amount) in enumerate((("ODE", 0.0), ("forward SDE", 0.5), ("backward SDE", 0.5))):
        draws = seeded(settings.seed, 2, row, 80)
        down = row == 2
        x = (THREE if down else TWO).sample(settings.size(20_000), draws)
        order = times[::-1] if down else times
        for i, time in enumerate(order):
            if i:
                step = (order[i - 1], time)
                x = transport_sde(flow, x, step, amount, steps=60, method="heun", generator=draws).x
            axis = axes[row, times.index(time)]
            axis.hist(x[:, 0].numpy(), bins=120, range=(-9, 9), density=True, color="#9ecae1")
            exact = flow.network.log_prob(grid, torch.tensor(time, dtype=torch.float64)).exp()  # type: ignore[operator]
            axis.plot(grid[:, 0].numpy(), exact.numpy(), color="#08306b", lw=1)
            axis.set_yticks([])
            axis.set_title(f"t = {time:g}" if row == 0 else "")
        axes[row, 0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(settings.pictures / "densities.png", dpi=100)
    plt.close(figure)


def equations(settings: Settings) -> dict[str, float]:
    """Residuals of the transport and both Fokker-Planck equations by fourth-order differences, relative to d rho / dt."""
    flow = exact_flow(THREE, TWO)
    field, step, width = flow.network, 1e-3, 1e-2
    epsilon = 0.5
    grid = torch.arange(-9, 9, width, dtype=torch.float64)[:, None]
    worst = {"transport": 0.0, "forward": 0.0, "backward": 0.0}
    draws = seeded(settings.seed, 3, 80)
    for time in (0.1 + 0.8 * torch.rand(5, generator=draws, dtype=torch.float64)).tolist():

        def rho(t: float) -> Tensor:
            return field.log_prob(grid, torch.tensor(t, dtype=torch.float64)).exp()  # type: ignore[operator]

        def slope(values: Tensor) -> Tensor:
            return (8 * (values[3:-1] - values[1:-3]) - (values[4:] - values[:-4])) / (12 * width)

        t = torch.tensor(time, dtype=torch.float64)
        density = rho(time)
        rate = (8 * (rho(time + step) - rho(time - step)) - (rho(time + 2 * step) - rho(time - 2 * step))) / (12 * step)
        velocity, score = flow.velocity(grid, t)[:, 0], flow.score(grid, t)[:, 0]
        # The second derivative as the first of the first, both of fourth order.
        bend = slope(slope(density))
        left = rate[2:-2] + slope(density * velocity)
        flux = slope(density * score)
        residuals = {
            "transport": left[2:-2],
            "forward": (left + epsilon * flux)[2:-2] - epsilon * bend,
            "backward": (left - epsilon * flux)[2:-2] + epsilon * bend,
        }
        for name, residual in residuals.items():
            worst[name] = max(worst[name], float(residual.norm() / rate[4:-4].norm()))
    return {**worst, "worst": max(worst.values())}


class Wrong(nn.Module):
    """Exact fields with sine waves added to velocity and score."""

    def __init__(self, exact: Flow, amplitude: float, wave: float, of_score: float):
        super().__init__()
        self.exact, self.amplitude, self.wave, self.of_score = exact, amplitude, wave, of_score

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity and latent, stacked."""
        t = t[0]  # one time for all rows, as samplers give it
        velocity, latent = self.exact.output(x, t).chunk(2, dim=1)
        gamma = self.exact.path.at(t, x).gamma
        wrong = velocity + self.amplitude * torch.sin(self.wave * x + 3 * t)
        return torch.cat([wrong, latent - gamma * self.of_score * torch.sin(2 * x)], dim=1)


ERRORS = {"none": (0.0, 0.0, 0.0), "fast": (1.5, 6.0, 0.0), "slow": (1.0, 2.0, 0.0), "fast_and_score": (1.5, 6.0, 0.5)}
AMOUNTS = (0.0, 0.1, 0.5, 1.0, 3.0)
STEPS = 150


def control(settings: Settings) -> dict[str, float]:
    """KL of samples made with wrong fields, by the amount of noise; and the bound of the drift's error."""
    count = settings.size(20_000)
    target = mixture([-4, 0, 3], [0.25, 0.09, 0.36])
    exact = exact_flow(target)
    found: dict[str, float] = {}
    excess = []
    for number, (name, error) in enumerate(ERRORS.items()):
        flow = Flow(Wrong(exact, *error), path=exact.path, predicts="velocity+latent", source=exact.source, shape=(1,))
        for amount in AMOUNTS:
            draws = seeded(settings.seed, 4, number, 80)

            def capped(t: float, amount: float = amount) -> float:
                # What the sampler makes of this amount near the ends, so that the bound is that of the same equation.
                return min(amount, 0.5 * STEPS * t * (1 - t))

            x = flow.sample(count, epsilon=amount, steps=STEPS, generator=draws)
            found[f"{name}_{amount:g}"] = divergence(x, target.log_prob, -7, 7)
            if amount and name != "none":
                data = target.sample(settings.size(2000), draws)
                bound = kl_control(flow, exact, data, capped, interval=(0.005, 0.995), generator=draws)
                found[f"{name}_{amount:g}_bound"] = bound.bound
                excess.append((found[f"{name}_{amount:g}"] - found[f"none_{amount:g}"]) / bound.bound)
    found |= {"largest_share_of_bound": max(excess), "gain": found["fast_0"] / found["fast_3"]}
    found["ode_over_bound"] = found["fast_0"] / found["fast_0.5_bound"]
    if settings.pictures:
        lines = {
            name.replace("_", " "): ([max(a, 0.03) for a in AMOUNTS], [found[f"{name}_{a:g}"] for a in AMOUNTS])
            for name in ERRORS
        }
        figure = draw.curves(
            lines, xlabel="epsilon (leftmost: 0, the ODE)", ylabel="KL (nats)", log_x=True, log_y=True, markers=True
        )
        figure.savefig(settings.pictures / "control.png", dpi=110)
    return found


def smoothing(settings: Settings) -> dict[str, float]:
    """Modes of the density half way and the steepest slope of the velocity, without a latent and with two kinds of it.

    The means are drawn a little anew for each seed.
    """
    shift = 0.2 * torch.rand(5, generator=seeded(settings.seed, 5, 80), dtype=torch.float64) - 0.1
    start = mixture((torch.tensor([-2.0, 2.0]) + shift[:2]).tolist(), [0.05, 0.05])
    end = mixture((torch.tensor([-6.0, 0.0, 6.0]) + shift[2:]).tolist(), [0.1, 0.1, 0.1])
    grid = torch.linspace(-9, 9, 6001, dtype=torch.float64)[:, None]
    half = torch.tensor(0.5, dtype=torch.float64)
    paths = {"none": si.linear(NoLatent()), "brownian": si.linear(Brownian(2.0)), "encoding": si.encoding_decoding()}
    found: dict[str, float] = {}
    for name, path in paths.items():
        field = MixtureField(end, start, path)
        density, velocity = field.log_prob(grid, half), field(grid, half)[:, 0]
        inner = density[1:-1]
        found[f"{name}_modes"] = float(((inner > density[:-2]) & (inner > density[2:])).sum())
        # Where there is mass: the velocity of a mixture is steepest between modes that nothing passes.
        slope = (velocity[2:] - velocity[:-2]) / (grid[2:, 0] - grid[:-2, 0])
        found[f"{name}_slope"] = float(slope[inner > inner.max() - math.log(1000)].abs().max())
    found["modes_gone"] = found["none_modes"] - found["brownian_modes"]
    found["slope_ratio"] = found["brownian_slope"] / found["none_slope"]
    return found
