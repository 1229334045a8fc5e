"""Whether the flow's form matters once the pairs are fixed; and first-order paths, which need not be straight."""

from __future__ import annotations

import math
import tempfile
from functools import lru_cache

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, MixtureField, on_path
from pantarhei.flow.paths import EDM, VP, AffinePath, Linear, SubVP
from pantarhei.flow.predictions import EDMPreconditioned, Prediction, build_prediction
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import BATCH, RING, TEST, PairsInMemory, adam, few, toy
from pantarhei.reproduce.training import fit, run, small_mlp
from pantarhei.straighten import Solver, first_order, make_pairs, rectified_diffusion_task

ITERATIONS, PAIRS = 1500, 10_000
DEVIATION = math.sqrt(2.04)  # of the ring's coordinates
# Velocity-type outputs: on the curved paths the angular one, which no coefficient of the path blows up.
FORMS: dict[str, tuple[AffinePath, Prediction]] = {
    "linear_velocity": (Linear(), build_prediction("velocity")),
    "vp_velocity": (VP(), build_prediction("v")),
    "subvp_velocity": (SubVP(), build_prediction("v")),
    "edm_velocity": (EDM(), EDMPreconditioned(sigma_data=DEVIATION)),
    "linear_data": (Linear(), build_prediction("data")),
    "vp_data": (VP(), build_prediction("data")),
    "subvp_data": (SubVP(), build_prediction("data")),
}
PLAIN = ("linear_velocity", "vp_velocity", "subvp_velocity", "edm_velocity")


def forms(settings: Settings) -> dict[str, float]:
    """One set of exact pairs, seven forms from scratch: one-step distances to the data."""
    size, seed = settings.size, settings.seed
    x0, truth = _noise(settings), toy(RING, size(TEST[RING]), seed, 2)
    found = {"floor": metrics.wasserstein(toy(RING, size(TEST[RING]), seed, 3), truth)}
    found["teacher"] = metrics.wasserstein(_exact().sample(x0=x0, steps=100, method="heun"), truth)
    for name in FORMS:
        found[name] = metrics.wasserstein(few(_rectified(name, seed, settings.quick), x0, 1), truth)
    for name in PLAIN:
        found[f"unrectified_{name}"] = metrics.wasserstein(few(_plain(name, seed, settings.quick), x0, 1), truth)
    for name, among in (("all", FORMS), ("velocity", PLAIN), ("data", [n for n in FORMS if n.endswith("data")])):
        values = [found[form] for form in among]
        found[f"worst_over_best_{name}"] = max(values) / min(values)
    found["least_gain"] = min(found[f"unrectified_{name}"] / found[name] for name in PLAIN)
    return found


def first_order_paths(settings: Settings) -> dict[str, float]:
    """First-orderness and straightness, raw and mapped to the linear path, before and after."""
    x0 = _noise(settings)[:512]
    flows = {
        "vp_plain": _plain("vp_velocity", settings.seed, settings.quick),
        "vp": _rectified("vp_velocity", settings.seed, settings.quick),
        "subvp": _rectified("subvp_velocity", settings.seed, settings.quick),
        "linear": _rectified("linear_velocity", settings.seed, settings.quick),
    }
    found: dict[str, float] = {}
    for name, flow in flows.items():
        measured = first_order(flow, x0)
        many = few(flow, x0, 32)
        gap = (few(flow, x0, 1) - many).square().mean() / many.var(dim=0).mean()
        found |= {
            f"{name}_spread_of_data": measured.data,
            f"{name}_gap_1_to_32": float(gap),
            f"{name}_raw_straightness": _raw_straightness(_paths(flow, x0)),
            f"{name}_mapped_straightness": measured.straightness,
        }
    found["spread_gain"] = found["vp_plain_spread_of_data"] / found["vp_spread_of_data"]
    for figure in ("gap_1_to_32", "mapped_straightness"):
        found[f"worst_{figure}"] = max(found[f"{name}_{figure}"] for name in ("vp", "subvp", "linear"))
    found["least_raw_straightness"] = min(found["vp_raw_straightness"], found["subvp_raw_straightness"])
    if settings.pictures:
        for name in ("vp_plain", "vp"):
            for label, flow in (("raw", flows[name]), ("mapped", on_path(flows[name]))):
                picture = draw.trajectories_2d(_paths(flow, x0[:150]), title=f"{TITLES[name]}, {label}", limits=(-3, 3))
                picture.savefig(settings.pictures / f"first-order-{name.replace('_', '-')}-{label}.png", dpi=110)
    return found


TITLES = {"vp_plain": "VP", "vp": "VP rectified"}


def _raw_straightness(paths: Tensor) -> float:
    """S / E|x_1 - x_0|^2 of the states as they are, from paths with even times."""
    shift = paths[-1] - paths[0]
    turning = (len(paths) - 1) * paths.diff(dim=0) - shift
    return float(turning.square().sum(2).mean() / shift.square().sum(1).mean())


def _paths(flow: Flow, x0: Tensor) -> Tensor:
    """Trajectories (T, N, 2) at even times, by a method that is accurate on curved paths too."""
    low, high = flow.interval
    times = [low + (high - low) * i / 64 for i in range(65)]
    first = float(flow.path.sigma(torch.tensor(low, dtype=torch.float64)))
    with torch.no_grad():
        return flow.transport(first * x0, times, steps=tuple(times), method="edm").xs


@lru_cache(maxsize=64)
def _rectified(name: str, seed: int, quick: bool) -> Flow:
    path, prediction = FORMS[name]
    size = Settings(seed, quick).size
    flow = Flow(small_mlp(seed), path=path, predicts=prediction, shape=(2,))
    pairs = _pairs(seed, quick)
    task = rectified_diffusion_task(flow, pairs, any_teacher=True, optimization=adam(RING), average=0.99)
    return run(task, seed, size(ITERATIONS), BATCH[RING])


@lru_cache(maxsize=64)
def _plain(name: str, seed: int, quick: bool) -> Flow:
    path, prediction = FORMS[name]
    size = Settings(seed, quick).size
    flow = Flow(small_mlp(seed), path=path, predicts=prediction, shape=(2,))
    data = toy(RING, size(PAIRS), seed, 1)
    return fit(flow, data, seed=seed, iterations=size(ITERATIONS), batch=BATCH[RING])


@lru_cache(maxsize=8)
def _pairs(seed: int, quick: bool) -> PairsInMemory:
    count = Settings(seed, quick).size(PAIRS)
    with tempfile.TemporaryDirectory() as folder:
        store = make_pairs(_exact(), count, folder, seed=seed, solver=Solver("heun", 50), batch=2000)
        return PairsInMemory.of(store)


def _exact() -> Flow:
    """The exact flow from noise to the ring."""
    angle = torch.arange(8) * math.pi / 4
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Flow(MixtureField(GaussianMixture(torch.ones(8), means, torch.full((8,), 0.04))), shape=(2,))


def _noise(settings: Settings) -> Tensor:
    return torch.randn(settings.size(TEST[RING]), 2, generator=seeded(settings.seed, 93))
