"""Rectified flow on points, where distances are exact: rectification, reflow, distillation, transfer, other paths."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data import TOYS
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, MixtureField, NeighbourField
from pantarhei.flow.paths import VP, AffinePath, Linear, change_path
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import fit, run, small_mlp
from pantarhei.solve import ode
from pantarhei.straighten import (
    Solver,
    balance,
    check_marginals,
    distillation_task,
    make_pairs,
    reflow_task,
    straightness,
    transport_costs,
)
from pantarhei.training import Optimization

RING = "eight_gaussians"
TEACHER = Solver("midpoint", 100)
ITERATIONS, PAIRS, TEST = 2000, 10_000, 1000


def unified(settings: Settings) -> dict[str, float]:
    """Noise to a ring of modes, and the ring to two moons, with one call each."""
    size, seed = settings.size, settings.seed
    found: dict[str, float] = {}
    for name, source, target in (("generation", None, RING), ("transfer", RING, "two_moons")):
        start = None if source is None else toy(source, size(200_000), seed, 1)
        flow = Flow(small_mlp(seed), shape=(2,), source=start)
        flow = fit(flow, toy(target, size(200_000), seed, 2), seed=seed, iterations=size(5000), batch=512)
        x0 = noise(size(100_000), seed, 3) if source is None else toy(source, size(100_000), seed, 3)
        truth = toy(target, size(100_000), seed, 4)
        arrived = flow.sample(x0=x0, steps=100)
        found[f"{name}_distance"] = sliced(arrived, truth, seed)
        found[f"{name}_untransported"] = sliced(x0, truth, seed)
        found[f"{name}_floor"] = sliced(toy(target, size(100_000), seed, 5), truth, seed)
        found[f"{name}_ratio"] = found[f"{name}_distance"] / found[f"{name}_untransported"]
        if settings.pictures and name == "transfer":
            times = [i / 50 for i in range(51)]
            paths = flow.transport(x0[:200], times, steps=tuple(times)).xs
            picture = draw.trajectories_2d(paths, background=truth, title="eight modes to two moons")
            picture.savefig(settings.pictures / "transfer.png", dpi=110)
    return found


def marginals(settings: Settings) -> dict[str, float]:
    """Z_t against X_t for the exact field, by energy distance and a permutation test."""
    flow, count = exact_flow(), settings.size(1000)
    draws = seeded(settings.seed, 60)
    x0, fresh = noise(count, settings.seed, 1), noise(count, settings.seed, 2)
    checks = check_marginals(flow, x0, three_modes().sample(count, draws), fresh, generator=draws)
    found = {f"p_at_{check.time:g}": check.p_value for check in checks}
    # Four tests a seed: the least p-value times four is what one test would have given (Bonferroni).
    return {**found, "corrected_p": min(1.0, 4 * min(found.values()))}


def balance_identity(settings: Settings) -> dict[str, float]:
    """E|X1 - X0|^2 = E|Z1 - Z0|^2 + S + V for the exact field."""
    count = settings.size(10_000)
    x0, x1 = noise(count, settings.seed, 1), three_modes().sample(count, seeded(settings.seed, 61))
    found = balance(exact_flow(), x0, x1, steps=200)
    return {
        "given": found.given,
        "rectified": found.rectified,
        "straightness": found.straightness,
        "crossing": found.crossing,
        "remainder": abs(found.remainder),
    }


def convex_costs(settings: Settings) -> dict[str, float]:
    """Means of four convex costs before and after one rectification, on five pairs of toy sets and with two fields."""
    size, seed = settings.size, settings.seed
    found: dict[str, float] = {}
    pairs = (
        (None, RING),
        (None, "checkerboard"),
        (RING, "two_moons"),
        ("spiral", "circles"),
        ("pinwheel", "two_moons"),
    )
    for kind in ("neighbours", "network"):
        ratios: list[float] = []
        for source, target in pairs:
            count = size(3000)
            x0 = noise(count, seed, 1) if source is None else toy(source, count, seed, 1)
            x1 = toy(target, count, seed, 2)
            if kind == "neighbours":
                field = NeighbourField(x0, x1, neighbours=min(100, count), bandwidth=0.3)
                flow = Flow(field, predicts="data", shape=(2,), source=x0)
            else:
                flow = Flow(small_mlp(seed, width=64, layers=2), shape=(2,), source=None if source is None else x0)
                flow = fit(flow, x1, seed=seed, iterations=size(1000))
            z0 = x0[: size(1000)]
            z1 = flow.sample(x0=z0, steps=50)
            before, after = transport_costs(x1 - x0), transport_costs(z1 - z0)
            ratios += [after[name] / before[name] for name in before]
        found[f"{kind}_worst_ratio"] = max(ratios)
        found[f"{kind}_mean_ratio"] = sum(ratios) / len(ratios)
    return found


def reflow(settings: Settings) -> dict[str, float]:
    """Ring of eight modes: straightness and distance to the data by steps, before and after two rounds; k-step students."""
    size, seed = settings.size, settings.seed
    data = toy(RING, size(10_000), seed, 2)
    flow = fit(Flow(small_mlp(seed), shape=(2,)), data, seed=seed, iterations=size(ITERATIONS))
    x0, truth = noise(TEST, seed, 3), toy(RING, TEST, seed, 4)
    found = {"floor": metrics.wasserstein(toy(RING, TEST, seed, 5), truth)}
    flows, pairs = [flow], (noise(len(data), seed, 6), data)
    total = first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2, 3):
            if number > 1:
                store = make_pairs(flow, size(PAIRS), Path(folder) / str(number), seed=seed + number, solver=TEACHER)
                flow = run(reflow_task(flow, store, optimization=_adam(2e-3), average=0.99), seed, size(ITERATIONS))
                flows.append(flow)
                pairs = (store.tensors()["x0"], store.tensors()["x1"])
            found |= _by_steps(f"{number}_rectified", flow, x0, truth)
            parts = balance(flow, *(part[:2000] for part in pairs), steps=100)
            total += parts.crossing + parts.straightness
            found |= {f"{number}_rectified_crossing": parts.crossing, f"{number}_rectified_sum": total}
            first = parts.given if number == 1 else first
        found |= _distilled(flows[1], Path(folder) / "last", x0, truth, settings)
    found["sum_over_bound"] = total / first
    found["straighter"] = found["1_rectified_straightness"] / found["2_rectified_straightness"]
    found["one_step_gain"] = found["1_rectified_1_step"] / found["2_rectified_1_step"]
    if settings.pictures:
        times = [i / 50 for i in range(51)]
        for number, each in enumerate(flows, 1):
            paths = each.transport(x0[:200], times, steps=tuple(times)).xs
            figure = draw.trajectories_2d(paths, background=truth, title=f"{number}-rectified flow", limits=(-3.2, 3.2))
            figure.savefig(settings.pictures / f"ring-{number}.png", dpi=110)
    return found


def _distilled(flow: Flow, folder: Path, x0: Tensor, truth: Tensor, settings: Settings) -> dict[str, float]:
    """Students of 1, 2 and 4 steps against the same number of steps of their teacher."""
    size, seed = settings.size, settings.seed
    store = make_pairs(flow, size(PAIRS), folder, seed=seed + 100, solver=TEACHER)
    goal = flow.sample(x0=x0, steps=100, method="midpoint")
    found: dict[str, float] = {}
    for steps in (1, 2, 4):
        task = distillation_task(flow, store, steps=steps, optimization=_adam(1e-3), average=0.99)
        student = run(task, seed, size(ITERATIONS))
        ends = {"distilled": student.sample(x0=x0, steps=steps), "plain": flow.sample(x0=x0, steps=steps)}
        for name, x in ends.items():
            found[f"{name}_{steps}_distance"] = metrics.wasserstein(x, truth)
            found[f"{name}_{steps}_error"] = float((x - goal).square().sum(1).mean())
    for figure in ("distance", "error"):
        ratios = [found[f"distilled_{steps}_{figure}"] / found[f"plain_{steps}_{figure}"] for steps in (1, 2, 4)]
        found[f"distilled_worst_{figure}_ratio"] = max(ratios)
    return found


def _adam(lr: float) -> Optimization:
    return Optimization(lr=lr, decay="cosine", warmup=50)


def _by_steps(name: str, flow: Flow, x0: Tensor, truth: Tensor) -> dict[str, float]:
    found = {f"{name}_straightness": straightness(flow, x0, steps=100).value}
    for steps in (1, 2, 4, 8, 32, 100):
        label = f"{name}_{steps}_step{'s' if steps > 1 else ''}"
        found[label] = metrics.wasserstein(flow.sample(x0=x0, steps=steps), truth)
    return found


def other_paths(settings: Settings) -> dict[str, float]:
    """The same data and network on the linear, VP and sub-VP paths; and a VP flow moved to the linear path."""
    size, seed = settings.size, settings.seed
    x0, truth, data = noise(TEST, seed, 3), toy(RING, TEST, seed, 4), toy(RING, size(10_000), seed, 2)
    found: dict[str, float] = {}
    for path in ("linear", "vp", "sub-vp"):
        flow = fit(Flow(small_mlp(seed), path=path, shape=(2,)), data, seed=seed, iterations=size(2 * ITERATIONS))
        for steps in (1, 4, 100):
            x = flow.sample(x0=x0, steps=steps, final="state")
            found[f"{path}_{steps}"] = metrics.wasserstein(x, truth)
    curved = ("vp", "sub-vp")
    for steps in (1, 4):
        found[f"linear_over_best_curved_{steps}"] = found[f"linear_{steps}"] / min(
            found[f"{p}_{steps}"] for p in curved
        )
    at_100 = [found[f"{p}_100"] for p in ("linear", *curved)]
    found["worst_over_best_100"] = max(at_100) / min(at_100)
    return {**found, "conversion_error": _conversion_error(x0)}


def _conversion_error(x0: Tensor) -> float:
    """The exact VP flow of a mixture, and the same flow moved to the linear path: do equal starts end equally?"""
    mixture = three_modes(torch.float64)
    curved = Flow(MixtureField(mixture, path=VP()), path=VP(), shape=(2,))
    vp, linear = curved.path, Linear()
    low, high = curved.interval

    def moved(x: Tensor, t: Tensor) -> Tensor:
        # x_vp(s) = w x_linear(t): both have the same x0 and x1 estimates, and these give the linear velocity x1 - x0.
        s, w = change_path(vp, linear, t.reshape(1).double())
        ends = curved.ends(x * w, s.clamp(low, high)[0])
        return ends.data - ends.noise

    x0 = x0[:200].double()
    begin, end = (_linear_time(vp, t) for t in (low, high))
    first, last = (float(_scale(vp, t)) for t in (low, high))
    a = curved.transport(x0, (low, high), steps=None, method="dopri5", rtol=1e-8, atol=1e-8).x
    b = ode(moved, x0 * first, (begin, end), method="dopri5", rtol=1e-8, atol=1e-8).x / last
    return float((a - b).abs().max())


def _linear_time(path: AffinePath, t: float) -> float:
    moment = torch.tensor(t, dtype=torch.float64)
    return float(path.alpha(moment) / (path.alpha(moment) + path.sigma(moment)))


def _scale(path: AffinePath, t: float) -> Tensor:
    moment = torch.tensor(t, dtype=torch.float64)
    return 1 / (path.alpha(moment) + path.sigma(moment))


def one_step_transfer(settings: Settings) -> dict[str, float]:
    """Eight modes to two moons, before and after one reflow round: one Euler step against a hundred."""
    size, seed = settings.size, settings.seed
    start, data = toy(RING, size(10_000), seed, 1), toy("two_moons", size(10_000), seed, 2)
    flow = fit(Flow(small_mlp(seed), shape=(2,), source=start), data, seed=seed, iterations=size(ITERATIONS))
    x0, truth = toy(RING, TEST, seed, 3), toy("two_moons", TEST, seed, 4)
    found = {"floor": metrics.wasserstein(toy("two_moons", TEST, seed, 5), truth)}
    with tempfile.TemporaryDirectory() as folder:
        store = make_pairs(flow, size(PAIRS), Path(folder) / "pairs", seed=seed, solver=TEACHER)
        second = run(reflow_task(flow, store, optimization=_adam(2e-3), average=0.99), seed, size(2 * ITERATIONS))
    for name, each in (("1_rectified", flow), ("2_rectified", second)):
        one, many = (metrics.wasserstein(each.sample(x0=x0, steps=n), truth) for n in (1, 100))
        found |= {f"{name}_1_step": one, f"{name}_100_steps": many, f"{name}_ratio": one / many}
    return found


def toy(name: str, count: int, seed: int, salt: int) -> Tensor:
    """Points of a toy set that depend on (seed, salt)."""
    return TOYS[name](count, seeded(seed, salt, 62))


def noise(count: int, seed: int, salt: int) -> Tensor:
    """Unit normal points (count, 2) that depend on (seed, salt)."""
    return torch.randn(count, 2, generator=seeded(seed, salt, 63))


def three_modes(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """Three narrow modes in the plane."""
    angle = torch.arange(3, dtype=dtype) * 2 * math.pi / 3
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(torch.ones(3, dtype=dtype), means, torch.full((3,), 0.06, dtype=dtype))


def exact_flow() -> Flow:
    """The exact rectified flow from noise to the three modes."""
    return Flow(MixtureField(three_modes()), shape=(2,))


def sliced(a: Tensor, b: Tensor, seed: int) -> float:
    """Sliced 2-Wasserstein distance with directions drawn from the seed."""
    return metrics.sliced_wasserstein(a, b, generator=seeded(seed, 64))
