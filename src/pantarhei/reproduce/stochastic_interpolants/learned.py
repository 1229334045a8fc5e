"""Learned interpolants on points: minimisers, the amount of noise, likelihoods, and what the framework contains."""

from __future__ import annotations

import math
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data import TOYS
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import (
    Flow,
    GaussianMixture,
    Interpolation,
    MixtureField,
    Provenance,
    denoising_steps,
    noise_amount,
    path_likelihood,
)
from pantarhei.flow import interpolants as si
from pantarhei.flow.paths import VP, Linear, Spherical
from pantarhei.networks import MLP, MLPConfig
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import run
from pantarhei.straighten import ArrayPairs, reflow_task
from pantarhei.training import FlowTask, Optimization


def network(seed: int, dimension: int, fields: int, width: int = 256, layers: int = 3) -> MLP:
    """A perceptron of one or two fields whose weights are drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(MLPConfig(dimension, width, layers, fields=fields))


def learn(flow: Flow, data: Tensor, settings: Settings, iterations: int, batch: int, **objective: Any) -> Flow:
    """Train with Adam and a cosine schedule; the result has the averaged weights."""
    optimization = Optimization(lr=2e-3, decay="cosine", warmup=50)
    task = FlowTask(flow, Interpolation(**objective), data, optimization=optimization, average=0.99)
    return run(task, settings.seed, settings.size(iterations), batch)


def modes(count: int, radius: float, deviation: float, turn: float = 0.0) -> GaussianMixture:
    """Equal modes on a circle in the plane."""
    angle = torch.arange(count) * 2 * math.pi / count + turn
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(torch.ones(count), means, torch.full((count,), deviation**2))


SETS = ("velocity+latent", "velocity+score", "deterministic+latent", "deterministic+score")


def minimisers(settings: Settings) -> dict[str, float]:
    """Two modes to three in the plane: each pair of fields, learned, against the exact ones; and antithetic gradients."""
    size, seed = settings.size, settings.seed
    source, target = modes(2, 1.5, 0.5), modes(3, 2.0, 0.5, 0.3)
    path = si.linear()
    exact = Flow(MixtureField(target, source, path, predicts=SETS[0]), path=path, predicts=SETS[0], source=source)
    draws = seeded(seed, 1, 81)
    data = target.sample(size(100_000), draws)
    x0, x1 = source.sample(size(20_000), draws), target.sample(size(20_000), draws)
    t = 0.02 + 0.96 * torch.rand(len(x0), generator=draws)
    x, _ = path.sample(x0, x1, torch.randn(x0.shape, generator=draws), t)
    found: dict[str, float] = {}
    for predicts in SETS:
        flow = Flow(network(seed, 2, 2), path=path, predicts=predicts, source=source, shape=(2,))
        flow = learn(flow, data, settings, 2000, 512)
        with torch.no_grad():
            for name in ("velocity", "score"):
                wanted = getattr(exact, name)(x, t)
                error = getattr(flow, name)(x, t) - wanted
                found[f"{predicts}_{name}"] = float((error.square().mean() / wanted.square().mean()).sqrt())
    return found | _antithetic(seed)


def _antithetic(seed: int) -> dict[str, float]:
    """Deviation of the gradient at t = 0.001 over batches: pairs z, -z against two independent latents."""
    source, target, path = modes(2, 1.5, 0.5), modes(3, 2.0, 0.5, 0.3), si.linear()
    found = {}
    for predicts in ("velocity+latent", "velocity+score"):
        flow = Flow(network(seed, 2, 2, width=64), path=path, predicts=predicts, source=source, shape=(2,))
        spread = []
        for paired in (True, False):
            gradients = []
            for i in range(64):
                draws = seeded(seed, i, 82)
                count = 64 if paired else 128
                batch = {"x0": source.sample(count, draws), "x1": target.sample(count, draws)}
                batch |= {"t": torch.full((count,), 1e-3), "z": torch.randn(count, 2, generator=draws)}
                rows = dict(Interpolation(antithetic=paired).rows(flow, batch, None))
                name = "score" if predicts.endswith("score") else "velocity"
                flow.network.zero_grad()
                rows[name].mean().backward()
                parts = [p.grad.flatten() for p in flow.network.parameters() if p.grad is not None]
                gradients.append(torch.cat(parts).clone())
            spread.append(float(torch.stack(gradients).std(dim=0).norm()))
        found[f"antithetic_{'score' if predicts.endswith('score') else 'velocity'}"] = spread[1] / spread[0]
    return found


AMOUNTS = (0.0, 0.1, 0.5, 1.0, 2.5)


def amounts(settings: Settings) -> dict[str, float]:
    """Noise to a checkerboard with one learned pair of fields: quality and cross-entropy by the amount of noise."""
    size, seed = settings.size, settings.seed
    draws = seeded(seed, 1, 83)
    board = TOYS["checkerboard"]
    path = si.linear()
    source = GaussianMixture.standard(2, torch.float32)
    flow = Flow(network(seed, 2, 2), path=path, predicts="velocity+latent", source=source, shape=(2,))
    flow = learn(flow, board(size(200_000), draws), settings, 3000, 500)
    count = size(10_000)
    truth, fresh = board(count, draws), board(count, draws)
    found = {"floor": _sliced(fresh, truth, seed)}
    clouds = {}
    for amount in AMOUNTS:
        x = flow.sample(count, epsilon=amount, steps=100, generator=seeded(seed, 2, 83))
        found[f"distance_{amount:g}"] = _sliced(x, truth, seed)
        found[f"outside_{amount:g}"] = float((~_on_board(x)).float().mean())
        clouds[f"epsilon {amount:g}"] = x[:5000]
    points = board(size(400), draws)
    exact = -math.log(32.0)
    log_p = flow.log_prob(points, method="dopri5")
    found["cross_entropy_excess_0"] = exact - float(log_p.mean())
    for amount in (0.1, 0.5):
        value = path_likelihood(flow, points, amount, source.log_prob, paths=32, steps=100, generator=draws).value
        found[f"cross_entropy_excess_{amount:g}"] = exact - float(value.mean())
    above = {amount: found[f"outside_{amount:g}"] for amount in AMOUNTS[1:]}
    best = min(above, key=lambda amount: above[amount])
    found |= {"best": best, "gain_outside": found["outside_0"] / above[best]}
    found["gain_distance"] = found["distance_0"] / min(found[f"distance_{a:g}"] for a in AMOUNTS[1:])
    found["entropy_gain"] = found["cross_entropy_excess_0"] - found["cross_entropy_excess_0.5"]
    if settings.pictures:
        figure = draw.scatter_2d({"data": truth[:5000], **clouds}, columns=3, limits=(-4.6, 4.6))
        figure.savefig(settings.pictures / "amounts.png", dpi=110)
    return found


def _on_board(x: Tensor) -> Tensor:
    """Whether points lie on a dark square."""
    cells = torch.floor(x / 2)
    inside = (x.abs() <= 4).all(dim=1)
    return inside & (torch.remainder(cells.sum(dim=1), 2) == 0)


def _sliced(a: Tensor, b: Tensor, seed: int) -> float:
    return metrics.sliced_wasserstein(a, b, generator=seeded(seed, 64))


def likelihoods(settings: Settings) -> dict[str, float]:
    """A bridge between mixtures with exact fields: its log-likelihood by ODE, with probes, and by random paths."""
    seed, draws = settings.seed, seeded(settings.seed, 1, 84)
    source, target = (
        GaussianMixture(part.weights.double(), part.means.double(), part.covariances.double())
        for part in (modes(2, 1.5, 0.5), modes(3, 2.0, 0.5, 0.3))
    )
    path = si.linear()
    field = MixtureField(target, source, path, predicts="velocity+latent")
    flow = Flow(field, path=path, predicts="velocity+latent", source=source, shape=(2,))
    x = target.sample(settings.size(500), draws)
    exact = target.log_prob(x)
    found = {"ode_error": float((flow.log_prob(x, rtol=1e-6, atol=1e-6) - exact).abs().mean())}
    probed = flow.log_prob(x, divergence="hutchinson", probes=16, generator=draws, details=True)
    off = probed.value - exact
    found["probes_standard_errors"] = abs(float(off.mean())) / float(off.std() / len(off) ** 0.5)
    found["probes_coverage"] = float((off.abs() <= 2 * probed.error).double().mean())
    amount = noise_amount("constant", 0.1, path)
    for name, guided in (("guided", True), ("plain", False)):
        result = path_likelihood(flow, x, amount, source.log_prob, paths=64, steps=100, guided=guided, generator=draws)
        error = result.value - exact
        found |= {f"{name}_mean_error": abs(float(error.mean())), f"{name}_error": float(error.abs().mean())}
        found |= {f"{name}_standard_error": float(result.error.mean())}
        found[f"{name}_gap"] = float((exact - result.bound).mean())
    found["guiding_gain"] = found["plain_standard_error"] / found["guided_standard_error"]
    return {**found, "seed": seed}


def contained(settings: Settings) -> dict[str, float]:
    """Diffusion, its deterministic sampler and rectified flow inside the framework."""
    seed, draws = settings.seed, seeded(settings.seed, 1, 85)
    target = modes(3, 2.0, 0.5, 0.3)
    target = GaussianMixture(target.weights.double(), target.means.double(), target.covariances.double())
    x = 2 * torch.randn(500, 2, generator=draws, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(500, generator=draws, dtype=torch.float64)
    # Score-based diffusion: on alpha = t = exp(-tau) the reverse of dX = -X dtau + sqrt(2) dW has drift (x + 2 s) / t.
    path = Spherical()
    flow = Flow(MixtureField(target, path=path), path=path, shape=(2,))
    amount = torch.tensor([noise_amount("diffusion", 1.0, path)(float(each)) for each in t], dtype=torch.float64)[
        :, None
    ]
    forward = flow.velocity(x, t) + amount * flow.score(x, t)
    found = {"diffusion_error": _relative(forward, (x + 2 * flow.score(x, t)) / t[:, None])}
    # The paper's denoising sampler is DDIM (Song et al. 2010.02502, eq. 12, in their signal rates a).
    vp = VP()
    ddpm = Flow(MixtureField(target, path=vp), path=vp, predicts="velocity", shape=(2,))
    times = [0.1 + 0.08 * i for i in range(11)]
    ours, theirs = denoising_steps(ddpm, x, times), x
    for time, end in pairwise(times):
        now = torch.full((len(x),), time, dtype=torch.float64)
        a, b = (float(vp.alpha(torch.tensor(moment, dtype=torch.float64))) ** 2 for moment in (time, end))
        noise = ddpm.noise(theirs, now)
        theirs = b**0.5 * (theirs - (1 - a) ** 0.5 * noise) / a**0.5 + (1 - b) ** 0.5 * noise
    found["ddim_error"] = _relative(ours, theirs)
    return found | _rectified(settings, seed)


def _relative(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).norm() / wanted.norm())


def _rectified(settings: Settings, seed: int) -> dict[str, float]:
    """Pairs of an interpolant's ODE teach a straight flow: its law stays, its paths straighten."""
    size, draws = settings.size, seeded(seed, 2, 85)
    source, target, path = modes(2, 1.5, 0.5), modes(3, 2.0, 0.5, 0.3), si.linear()
    field = MixtureField(target, source, path)
    teacher = Flow(field, path=path, predicts="velocity", source=source, shape=(2,))
    x0 = source.sample(size(20_000), draws)
    x1 = teacher.sample(x0=x0, steps=100, method="heun")
    straight = Flow(network(seed, 2, 1), path=Linear(), source=x0, shape=(2,), provenance=Provenance("pairs"))
    with tempfile.TemporaryDirectory() as folder:
        pairs = _stored(Path(folder), x0, x1)
        optimization = Optimization(lr=2e-3, decay="cosine")
        task = reflow_task(straight, pairs, optimization=optimization, average=0.99, any_teacher=True)
        student = run(task, seed, size(3000), 512)
    fresh, truth = source.sample(2000, draws), target.sample(2000, draws)
    arrived, again = student.sample(x0=fresh, steps=50), target.sample(2000, draws)
    found = {"rectified_distance": metrics.wasserstein(arrived, truth), "floor": metrics.wasserstein(again, truth)}
    found["rectified_over_floor"] = found["rectified_distance"] / found["floor"]
    found["straightness_before"], found["straightness_after"] = (_bend(flow, fresh) for flow in (teacher, student))
    found["straighter"] = found["straightness_before"] / found["straightness_after"]
    return found


def _bend(flow: Flow, x0: Tensor) -> float:
    """E int |x(1) - x(0) - dx/dt|^2 dt along the flow's paths."""
    times = [i / 100 for i in range(101)]
    with torch.no_grad():
        paths = flow.transport(x0, times, steps=tuple(times), method="heun").xs
    rate = (paths[1:] - paths[:-1]) * 100
    return float((paths[-1] - paths[0] - rate).square().sum(dim=2).mean())


def _stored(folder: Path, x0: Tensor, x1: Tensor) -> ArrayPairs:
    import numpy as np

    np.save(folder / "z0.npy", x0.numpy())
    np.save(folder / "z1.npy", x1.numpy())
    return ArrayPairs(folder, gaussian=False)
