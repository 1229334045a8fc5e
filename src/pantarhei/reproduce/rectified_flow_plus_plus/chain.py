"""The paper's chain of configurations on digits: A (vanilla) to F, and G with real data."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, FlowMatching, PseudoHuber
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.times import UShaped
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow_plus_plus.setups import (
    Judge,
    Setup,
    adam,
    inverted,
    setup,
    student,
    surrogate,
)
from pantarhei.reproduce.training import run
from pantarhei.straighten import MixedPairs, PairSource, plus_plus_task
from pantarhei.straighten.rectified_flow_plus_plus import plus_plus_terms

FINE_TUNING = 200  # iterations
FINE_LR = 5e-4


def headline(settings: Settings) -> dict[str, float]:
    """One step on digits: vanilla 2-RF against rectified flow++ without the perceptual term."""
    made = setup("digits", settings)
    judge = Judge(made)
    found = {"floor": judge.floor, "teacher_frechet": judge(made.goal)}
    samples = {"held out": made.held_out, "teacher": made.goal}
    for name, letter in (("vanilla", "A"), ("plus_plus", "D")):
        flow = student("digits", letter, settings)
        for steps in (1, 2, 4):
            x = flow.sample(x0=made.x0, steps=steps)
            samples[f"{name} {steps}"] = x
            found[f"{name}_{steps}_frechet"] = judge(x)
            found[f"{name}_{steps}_error"] = float((x - made.goal).square().mean())
    for figure in ("frechet", "error"):
        found[f"{figure}_ratio"] = found[f"plus_plus_1_{figure}"] / found[f"vanilla_1_{figure}"]
    # What is left to gain is the distance above the teacher's own, which no student of its pairs is meant to beat.
    above = {name: found[f"{name}_1_frechet"] - found["teacher_frechet"] for name in ("vanilla", "plus_plus")}
    found["excess_ratio"] = above["plus_plus"] / above["vanilla"]
    if settings.pictures:
        save_image_grid(torch.cat([x[:16] for x in samples.values()]), settings.pictures / "one-step.png", columns=16)
    return found


def chain(settings: Settings) -> dict[str, float]:
    """All configurations, one after another, on the same pairs and for the same number of iterations."""
    made = setup("digits", settings)
    judge, perceptual = Judge(made), surrogate(settings.seed)
    found: dict[str, float] = {}
    samples = [made.goal[:16]]
    for name in ("A", "B", "C", "D", "E", "F", "G"):
        flow = _fine_tuned(settings.seed, settings.quick)["real"] if name == "G" else student("digits", name, settings)
        one, two = (flow.sample(x0=made.x0, steps=steps) for steps in (1, 2))
        samples.append(one[:16])
        found |= {f"{name}_frechet_1": judge(one), f"{name}_frechet_2": judge(two)}
        found[f"{name}_error_1"] = float((one - made.goal).square().mean())
        found[f"{name}_surrogate_1"] = _mean(perceptual, one, made.goal)
    for label, new, old in (
        ("u", "C", "B"),
        ("huber", "D", "C"),
        ("e", "E", "D"),
        ("f", "F", "E"),
        ("start", "B", "A"),
    ):
        for figure in ("frechet_1", "error_1", "surrogate_1"):
            found[f"{label}_{figure}_ratio"] = found[f"{new}_{figure}"] / found[f"{old}_{figure}"]
    found["f_over_d_surrogate_1"] = found["F_surrogate_1"] / found["D_surrogate_1"]
    found |= _weights(made)
    if settings.pictures:
        save_image_grid(torch.cat(samples), settings.pictures / "chain.png", columns=16)
    return found


@torch.no_grad()
def _mean(metric: Premetric, x: Tensor, y: Tensor) -> float:
    return float(torch.cat([metric(a, b) for a, b in zip(x.split(256), y.split(256), strict=True)]).mean())


@torch.no_grad()
def _weights(made: Setup) -> dict[str, float]:
    """The losses E and F as written in the paper, row by row, against those that are trained."""
    flow, metric = student("digits", "D", made.settings), surrogate(made.settings.seed)
    batch = made.pairs.tensors(64)
    found = {}
    for name, divided in (("E", False), ("F", True)):
        objective = FlowMatching(
            times=UShaped(4.0), coupling=Pairs(), terms=plus_plus_terms(PseudoHuber(), metric, divided)
        )
        rows = sum(value for _, value in objective.rows(flow, batch, seeded(made.settings.seed, 1, 94)))
        draw = objective.draw(flow, batch, seeded(made.settings.seed, 1, 94))
        noise_part = 1 - draw.t  # u of the paper
        velocity = flow.velocity(draw.x_t, draw.t)
        size, gap = draw.x1[0].numel(), velocity - (draw.x1 - draw.x0)
        huber = ((gap.square().flatten(1).sum(1) + (0.00054 * size) ** 2).sqrt() - 0.00054 * size) / size
        seen = metric(draw.x_t + noise_part[:, None, None, None] * velocity, draw.x1)
        wanted = (1 - noise_part) * huber + (seen / noise_part.clamp_min(1e-5) if divided else seen)
        found[f"{name}_loss_off"] = float(((rows - wanted).abs() / wanted.abs()).median())
    return found


def real_data(settings: Settings) -> dict[str, float]:
    """Fine-tuning on real digits with the noise they invert to, on half of these, and as long on made pairs only."""
    made = setup("digits", settings)
    judge, found = Judge(made), {}
    flows = {"before": student("digits", "D", settings), **_fine_tuned_plain(settings.seed, settings.quick)}
    for name, flow in flows.items():
        for steps in (1, 2):
            found[f"{name}_frechet_{steps}"] = judge(flow.sample(x0=made.x0, steps=steps))
    for steps in (1, 2):
        for name in ("real", "mixed"):
            found[f"{name}_over_made_{steps}"] = found[f"{name}_frechet_{steps}"] / found[f"made_frechet_{steps}"]
    store = inverted(made)
    x0 = store.tensors()["x0"].flatten(1)
    found["inverted_noise_mean_square"] = float(x0.square().mean())
    again = made.teacher.sample(x0=store.tensors(512)["x0"], steps=17, method="edm")
    found["inverted_and_back_error"] = float((again - store.tensors(512)["x1"]).square().mean())
    return found


@lru_cache(maxsize=16)
def _fine_tuned_plain(seed: int, quick: bool) -> dict[str, Flow]:
    settings = Settings(seed, quick)
    made = setup("digits", settings)
    real = inverted(made)
    stores = {"made": made.pairs, "mixed": MixedPairs(made.pairs, real, 0.5), "real": real}
    flow = student("digits", "D", settings)
    return {name: _on(flow, store, made, None) for name, store in stores.items()}


@lru_cache(maxsize=16)
def _fine_tuned(seed: int, quick: bool) -> dict[str, Flow]:
    """Configuration G: F, fine-tuned on real data."""
    settings = Settings(seed, quick)
    made = setup("digits", settings)
    return {"real": _on(student("digits", "F", settings), inverted(made), made, surrogate(seed))}


def _on(flow: Flow, store: PairSource, made: Setup, perceptual: Premetric | None) -> Flow:
    task = plus_plus_task(
        flow,
        store,
        perceptual=perceptual,
        any_teacher=True,
        optimization=adam(FINE_LR),
        average=made.sizes.average,
    )
    return run(task, made.settings.seed + 60, made.settings.size(FINE_TUNING), made.sizes.batch)
