"""Seconds of training until the quickstart's 50-step quality: our loop, network and loss against torchcfm's.

Both sides train on the quickstart's training digits at equal parameters, batch, threads, learning rate, warm-up, clipping
and moving average. Every `EVERY` iterations the average draws 2,000 samples by 50 Euler steps; the run ends when their
Frechet distance is at most the median that the quickstart reached (docs/results/quickstart.json). The time of these
evaluations is not counted. Ours runs the whole `pr.train`: logging and checkpoints are counted.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from statistics import median
from typing import Any

import torch
from torch import nn

from harness import RESULTS, Bound, Record, compare, peer, use_threads
from pantarhei.flow import Flow
from pantarhei.recipes.evaluation import Reference, evaluate_flow, make_reference
from pantarhei.recipes.quickstart import QuickstartConfig
from pantarhei.recipes.rectified_flow import build_task
from pantarhei.training import Average, train
from train_unet import DIGITS, theirs

EVERY, FIRST, LIMIT, SEEDS, THREADS = 100, 300, 2400, (0, 1), 2


class Reached(Exception):
    """Ends a training run from inside its logger."""


def run(quick: bool = False) -> list[Record]:
    """One record: seconds to quality, median over the seeds."""
    use_threads(THREADS)
    config = QuickstartConfig()
    data, held_out = config.recipe.data.open()
    reference = make_reference(data, held_out)
    rows = json.loads((RESULTS.parent / "quickstart.json").read_text())["seeds"]
    target = median(row["frechet_50_before"] for row in rows) * (4 if quick else 1)
    details: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}

    def side(name: str, function: Callable[..., dict[str, float]]) -> Callable[[], float]:
        seeds = iter((0,) if quick else SEEDS)

        def measure() -> float:
            details[name].append(function(config, data, reference, target, next(seeds)))
            return details[name][-1]["seconds"]

        return measure

    record = compare(
        "time_to_quality",
        "digits 8x8",
        side("ours", _ours),
        side("peer", _theirs),
        peer=peer("torchcfm"),
        work=f"train on 1,438 digits, batch {config.batch}, lr {config.recipe.lr}, {THREADS} threads, until the Frechet "
        f"distance of 2,000 samples by 50 Euler steps is at most {target:.3f} (looked at every {EVERY} iterations)",
        counted="training time",
        unit="s",
        rounds=1 if quick else len(SEEDS),
        warmup=0,
        bound=Bound("at most", 1.0),
        details={"runs": details, "target": target},
    )
    return [record]


class _Clock:
    """Training seconds, without those spent looking."""

    def __init__(self, reference: Reference, target: float):
        self.reference, self.target = reference, target
        self.began, self.looking = time.perf_counter(), 0.0
        self.quality = float("inf")

    def reached(self, iteration: int, flow: Flow, seed: int) -> bool:
        if iteration < FIRST or iteration % EVERY:
            return False
        paused = time.perf_counter()
        scores = evaluate_flow(
            flow,
            self.reference,
            steps=(50,),
            count=2000,
            seed=seed + 100,
            conditions=lambda numbers: {"label": torch.tensor(list(numbers)) % 10},
        )
        self.quality = scores.rows[0].frechet.value
        self.looking += time.perf_counter() - paused
        return self.quality <= self.target

    def result(self, iteration: int) -> dict[str, float]:
        spent = time.perf_counter() - self.began - self.looking
        return {"seconds": spent, "iterations": iteration, "quality": self.quality}


def _ours(config: QuickstartConfig, data: object, reference: Reference, target: float, seed: int) -> dict[str, float]:
    task, _ = build_task(config.recipe, seed)
    clock, last = _Clock(reference, target), 0

    def look(iteration: int, values: Mapping[str, float]) -> None:
        nonlocal last
        last = iteration
        if "loss" in values and clock.reached(iteration, task.result(), seed):
            raise Reached

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"iterations": LIMIT, "batch": config.batch, "seed": seed, "checkpoint_every": 100}
        with suppress(Reached):
            train(task, f"{folder}/run", progress=False, loggers=[look], **options)
        return clock.result(last)


def _theirs(config: QuickstartConfig, data: object, reference: Reference, target: float, seed: int) -> dict[str, float]:
    recipe = config.recipe
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow, loss = theirs(DIGITS, generator)
    images, labels = reference.train, data.labels  # type: ignore[attr-defined]
    optimizer = torch.optim.Adam(flow.network.parameters(), lr=recipe.lr, fused=True)
    average, clock = Average(flow.network, recipe.average), _Clock(reference, target)
    for iteration in range(1, LIMIT + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, iteration / recipe.warmup)
        rows = torch.randint(len(images), (config.batch,), generator=generator)
        optimizer.zero_grad()
        loss(images[rows], labels[rows]).backward()
        nn.utils.clip_grad_norm_(flow.network.parameters(), recipe.clip)
        optimizer.step()
        average.update(flow.network)
        if clock.reached(iteration, flow.like(average.network), seed):
            break
    return clock.result(iteration)
