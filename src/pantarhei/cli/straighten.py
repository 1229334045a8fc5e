"""`pantarhei straighten METHOD RUN`."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pantarhei.cli.opening import data_of, recipe_of
from pantarhei.cli.train import Keeping, Machines, check_new, report_end
from pantarhei.data.shards import HEADER, ShardStore
from pantarhei.flow import Flow
from pantarhei.flow.times import build_time_law
from pantarhei.interop import load
from pantarhei.recipes.perceptual import MetricName, build_metric
from pantarhei.recipes.rectified_flow import TimesName, open_source
from pantarhei.straighten import (
    OnlinePairs,
    PairSource,
    Solver,
    distillation_task,
    inspect_pairs,
    make_pairs,
    open_pairs,
    reflow_task,
)
from pantarhei.training import FlowTask, Optimization, Run, train


def straighten_reflow(
    run: tyro.conf.Positional[Path],
    out: Path,
    pairs: int = 10_000,
    pairs_from: Path | None = None,
    online: bool = False,
    any_teacher: bool = False,
    rounds: int = 1,
    iterations: int = 2000,
    batch: int = 128,
    seed: int = 0,
    pair_method: Literal["euler", "midpoint", "heun", "rk4"] = "heun",
    pair_steps: int = 20,
    guidance: float = 1.0,
    times: TimesName = "uniform",
    start: Literal["average", "raw"] = "average",
    lr: float = 1e-3,
    warmup: int = 20,
    decay: Literal["constant", "linear", "cosine"] = "cosine",
    average: float = 0.995,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Make pairs with a trained flow and train it on them.

    Args:
        run: the teacher: a run folder, a saved flow or a published checkpoint.
        out: run folder of the straightened flow; its pairs go to OUT/pairs. With several rounds, the folder of
            `round-1`, `round-2`, ...
        pairs: how many pairs.
        pairs_from: pairs that are there already: a pair store, or folders with z0.npy and z1.npy.
        online: make every pair when it is needed instead of storing them (slower, never the same pair twice).
        any_teacher: allow stored pairs that other weights made.
        rounds: how often to straighten.
        iterations: batches to train on, each round.
        batch: global batch size.
        seed: of pairs and training.
        pair_method: solver that makes the pairs.
        pair_steps: its steps.
        guidance: guidance scale baked into the pairs.
        times: law of the training time.
        start: weights of the teacher that the student goes on from (the average makes the pairs in any case).
        lr: learning rate.
        warmup: iterations of warm-up.
        decay: of the learning rate.
        average: decay of the moving average.
        resume: go on with the run in `out` (unfinished pairs go on by themselves).
        machines: where it runs.
        keeping: what is kept on the way.
    """
    for name, value in (("pairs", pairs), ("iterations", iterations), ("batch", batch), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"--{name}: must be at least 1, got {value}")
    if rounds > 1 and pairs_from is not None:
        raise ValueError("--pairs-from: later rounds need pairs of their own; give --pairs")
    if rounds == 1:
        check_new(out, resume)
    solver = Solver(pair_method, pair_steps, guidance)
    teacher, status = run, 0
    for number in range(1, rounds + 1):
        folder = out / f"round-{number}" if rounds > 1 else out
        check_new(folder, resume)
        flow = _open_teacher(teacher)
        store: PairSource
        if online:
            store = OnlinePairs(flow, iterations * batch, seed=seed, solver=solver, teacher=str(teacher))
        else:
            store = _pairs(flow, teacher, folder, pairs, seed, solver, pairs_from)
        task = reflow_task(
            flow,
            store,
            times=build_time_law(times),
            start=None if start == "average" else load(teacher, averaged=False).network,
            any_teacher=any_teacher,
            optimization=Optimization(lr=lr, warmup=warmup, decay=decay),
            average=average,
            teacher=str(teacher),
        )
        options = {"resume": resume, "iterations": iterations, "batch": batch, "seed": seed}
        status = _train(task, folder, "reflow", teacher, options, machines, keeping)
        if status:
            return status
        teacher = folder
    return status


def straighten_distil(
    run: tyro.conf.Positional[Path],
    out: Path,
    steps: int = 1,
    pairs: int = 10_000,
    pairs_from: Path | None = None,
    any_teacher: bool = False,
    metric: MetricName = "squared",
    squared_too: bool = False,
    reverse: bool = False,
    eps: float = 0.0,
    iterations: int = 2000,
    batch: int = 128,
    seed: int = 0,
    pair_method: Literal["euler", "midpoint", "heun", "rk4"] = "heun",
    pair_steps: int = 20,
    guidance: float = 1.0,
    lr: float = 1e-3,
    warmup: int = 20,
    decay: Literal["constant", "linear", "cosine"] = "cosine",
    average: float = 0.995,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Distil a flow to a few Euler steps on its own pairs; best after a reflow.

    Args:
        run: the teacher: a run folder, a saved flow or a published checkpoint.
        out: run folder of the student; pairs that are made go to OUT/pairs.
        steps: Euler steps of the student.
        pairs: how many pairs to make.
        pairs_from: pairs of this teacher that are there already.
        any_teacher: allow stored pairs that other weights made.
        metric: squared regresses the velocity; gradients (a surrogate without learned features) and classifier (features of
            a classifier trained on the run's labels) compare the images that come out.
        squared_too: add the squared loss to another metric.
        reverse: distil the way from data to noise (use the student with `pantarhei invert`).
        eps: first time of the sampler; the published recipe has 0.001.
        iterations: batches to train on.
        batch: global batch size.
        seed: of pairs and training.
        pair_method: solver that makes the pairs.
        pair_steps: its steps.
        guidance: guidance scale baked into the pairs.
        lr: learning rate.
        warmup: iterations of warm-up.
        decay: of the learning rate.
        average: decay of the moving average.
        resume: go on with the run in `out`.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    check_new(out, resume)
    for name, value in (("pairs", pairs), ("iterations", iterations), ("batch", batch), ("steps", steps)):
        if value < 1:
            raise ValueError(f"--{name}: must be at least 1, got {value}")
    flow = _open_teacher(run)
    store = _pairs(flow, run, out, pairs, seed, Solver(pair_method, pair_steps, guidance), pairs_from)
    task = distillation_task(
        flow,
        store,
        steps=steps,
        metric=build_metric(metric, data_of(run)[0] if metric == "classifier" else None, seed),
        squared_too=squared_too,
        reverse=reverse,
        eps=eps,
        any_teacher=any_teacher,
        optimization=Optimization(lr=lr, warmup=warmup, decay=decay),
        average=average,
        teacher=str(run),
    )
    options = {"resume": resume, "iterations": iterations, "batch": batch, "seed": seed}
    return _train(task, out, "distillation", run, options, machines, keeping)


def _train(
    task: FlowTask, out: Path, kind: str, teacher: Path, options: dict[str, Any], machines: Machines, keeping: Keeping
) -> int:
    # The teacher's recipe stays with the student, so that it can be evaluated on the same data.
    config = {"system": "rectified-flow", "kind": kind, "teacher": str(teacher), "recipe": _recipe(teacher)}
    return report_end(train(task, out, config=config, **options, **machines.options(), **keeping.options()))


def _open_teacher(run: Path) -> Flow:
    """The averaged flow; a transfer makes its pairs from the training part of its source."""
    recipe = recipe_of(run)
    start = open_source(recipe) if recipe is not None else None
    return load(run) if start is None else load(run, source=start[0])


def _pairs(flow: Flow, run: Path, out: Path, count: int, seed: int, solver: Solver, given: Path | None) -> PairSource:
    """Given pairs, or new ones made by the first process (others wait for the files by finding them finished)."""
    if given is not None:
        return open_pairs(given)
    folder = out / "pairs"
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
        store = make_pairs(flow, count, folder, seed=seed, solver=solver, teacher=str(run), progress=True)
        found = inspect_pairs(store, flow)
        print(f"pairs: {len(store):,} in {store.folder}, solver error {100 * (found.solver_error or 0):.2f} %")
        for warning in found.warnings:
            print(f"warning: {warning}")
        return store
    while not (folder / HEADER).is_file() or ShardStore(folder).missing():
        time.sleep(1.0)
    return ShardStore(folder)


def _recipe(run: Path) -> dict[str, object]:
    return dict(Run.open(run).config.get("recipe", {})) if (run / "config.yaml").is_file() else {}
