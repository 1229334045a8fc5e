"""`pantarhei straighten METHOD RUN`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from pantarhei.cli.opening import data_of, recipe_of
from pantarhei.cli.train import Keeping, Machines, check_new, report_end
from pantarhei.flow import Flow
from pantarhei.flow.numbered import numbered_conditions, numbered_source
from pantarhei.flow.times import build_time_law
from pantarhei.interop import load
from pantarhei.recipes.perceptual import MetricName, build_metric
from pantarhei.recipes.rectified_flow import TimesName
from pantarhei.straighten import (
    OnlinePairs,
    PairSource,
    Solver,
    check_reflow,
    check_teacher,
    distillation_task,
    find_pairs,
    inspect_pairs,
    pair_folder,
    reflow_task,
    straightness,
)
from pantarhei.training import FlowTask, Optimization, Run, train


@dataclass(frozen=True)
class Pairing:
    """The teacher's pairs.

    Attributes:
        pairs: how many to make; they go to OUT/pairs.
        pairs_from: pairs that are there already: a pair store, or folders with z0.npy and z1.npy.
        any_teacher: allow stored pairs that other weights made.
        pair_method: solver that makes the pairs.
        pair_steps: its steps.
        pair_rtol: error control with this tolerance instead of steps (dopri5, bosh3 or tsit5; the paper: dopri5, 1e-5).
        guidance: guidance scale baked into the pairs.
    """

    pairs: int = 10_000
    pairs_from: Path | None = None
    any_teacher: bool = False
    pair_method: Literal["euler", "midpoint", "heun", "rk4", "bosh3", "dopri5", "tsit5"] = "heun"
    pair_steps: int = 20
    pair_rtol: float | None = None
    guidance: float = 1.0

    def solver(self) -> Solver:
        """How they are made.

        Raises:
            ValueError: for settings that do not go together.
        """
        if self.pairs < 1:
            raise ValueError(f"--pairs: must be at least 1, got {self.pairs}")
        if self.pair_rtol is not None and self.pair_method not in ("bosh3", "dopri5", "tsit5"):
            raise ValueError(f"--pair-rtol: goes with --pair-method bosh3, dopri5 or tsit5, got {self.pair_method}")
        return Solver(self.pair_method, self.pair_steps, self.guidance, self.pair_rtol)


@dataclass(frozen=True)
class Learning:
    """How the student learns.

    Attributes:
        iterations: batches to train on (each round).
        batch: global batch size.
        seed: of pairs and training.
        dropout: of the student, where it should differ from the teacher's.
        lr: learning rate.
        warmup: iterations of warm-up.
        decay: of the learning rate.
        average: decay of the moving average.
        resume: go on with the run in `out` (unfinished pairs go on by themselves).
    """

    iterations: int = 2000
    batch: int = 128
    seed: int = 0
    dropout: float | None = None
    lr: float = 1e-3
    warmup: int = 20
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    average: float = 0.995
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: must be at least 1, got {getattr(self, name)}")

    def task_options(self) -> dict[str, Any]:
        """As options of a task."""
        optimization = Optimization(lr=self.lr, warmup=self.warmup, decay=self.decay)
        return {"optimization": optimization, "average": self.average}

    def loop_options(self) -> dict[str, Any]:
        """As options of `train`."""
        return {"resume": self.resume, "iterations": self.iterations, "batch": self.batch, "seed": self.seed}


def straighten_reflow(
    run: tyro.conf.Positional[Path],
    out: Path,
    rounds: int = 1,
    online: bool = False,
    times: TimesName = "uniform",
    start: Literal["average", "raw"] = "average",
    pairing: Pairing = Pairing(),
    learning: Learning = Learning(),
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Make pairs with a trained flow and train it on them.

    Args:
        run: the teacher: a run folder, a saved flow or a published checkpoint.
        out: run folder of the straightened flow. With several rounds, the folder of `round-1`, `round-2`, ...
        rounds: how often to straighten. An interrupted command goes on with --resume; finished rounds are kept.
        online: make every pair when it is needed instead of storing them (slower, never the same pair twice).
        times: law of the training time.
        start: weights of the teacher that the student goes on from (the average makes the pairs in any case).
        pairing: the teacher's pairs.
        learning: how the student learns.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    if rounds < 1:
        raise ValueError(f"--rounds: must be at least 1, got {rounds}")
    if rounds > 1 and pairing.pairs_from is not None:
        raise ValueError("--pairs-from: later rounds need pairs of their own; give --pairs")
    solver, teacher, status = pairing.solver(), run, 0
    for number in range(1, rounds + 1):
        folder = out / f"round-{number}" if rounds > 1 else out
        check_new(folder, learning.resume)
        flow = _open_teacher(teacher, machines)
        check_reflow(flow)
        flow.require_field()
        # New draws in every round, as the method asks.
        seed = learning.seed + number - 1
        store: PairSource
        if online:
            count = learning.iterations * learning.batch
            store = OnlinePairs(flow, count, seed=seed, solver=solver, teacher=str(teacher))
        else:
            store = _pairs(flow, teacher, folder, pairing, seed)
        task = reflow_task(
            flow,
            store,
            times=build_time_law(times),
            start=None if start == "average" else load(teacher, averaged=False).network,
            any_teacher=pairing.any_teacher,
            teacher=str(teacher),
            **learning.task_options(),
        )
        status = _train(task, folder, "reflow", teacher, store, learning, machines, keeping)
        if status:
            return status
        if machines.devices * machines.nodes == 1:
            _compare(flow, task.result())
        teacher = folder
    return status


def straighten_distil(
    run: tyro.conf.Positional[Path],
    out: Path,
    steps: int = 1,
    metric: MetricName = "squared",
    squared_too: bool = False,
    reverse: bool = False,
    eps: float = 0.0,
    pairing: Pairing = Pairing(),
    learning: Learning = Learning(),
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Distil a flow to a few Euler steps on its own pairs; best after a reflow.

    Args:
        run: the teacher: a run folder, a saved flow or a published checkpoint.
        out: run folder of the student.
        steps: Euler steps of the student.
        metric: squared regresses the velocity; gradients (a surrogate without learned features) and classifier (features of
            a classifier trained on the run's labels) compare the images that come out.
        squared_too: add the squared loss to another metric.
        reverse: distil the way from data to noise (use the student with `pantarhei invert`).
        eps: first time of the sampler; the published recipe has 0.001.
        pairing: the teacher's pairs.
        learning: how the student learns.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    check_new(out, learning.resume)
    if steps < 1:
        raise ValueError(f"--steps: must be at least 1, got {steps}")
    flow = _open_teacher(run, machines)
    check_teacher(flow, eps)
    if metric != "squared" and len(flow.shape or ()) != 3:
        raise ValueError(f"--metric: {metric} compares images, this flow's samples have shape {flow.shape}")
    distance = build_metric(metric, data_of(run)[0] if metric == "classifier" else None, learning.seed)
    store = _pairs(flow, run, out, pairing, learning.seed)
    task = distillation_task(
        flow,
        store,
        steps=steps,
        metric=distance,
        squared_too=squared_too,
        reverse=reverse,
        eps=eps,
        any_teacher=pairing.any_teacher,
        teacher=str(run),
        **learning.task_options(),
    )
    return _train(task, out, "distillation", run, store, learning, machines, keeping)


# The paper's settings for its CIFAR-10 networks.
_PAPER = {
    "pairing": Pairing(pairs=1_000_000, pair_method="dopri5", pair_rtol=1e-5),
    "learning": Learning(iterations=300_000, dropout=0.1, lr=2e-4, warmup=5000, decay="constant", average=0.9999),
    "keeping": Keeping(checkpoint_every=10_000, preview_every=10_000),
}
straighten_reflow.presets = {"cifar10": {**_PAPER, "start": "raw"}}  # type: ignore[attr-defined]
straighten_distil.presets = {"cifar10": {**_PAPER, "eps": 1e-3}}  # type: ignore[attr-defined]


def _train(
    task: FlowTask,
    out: Path,
    kind: str,
    teacher: Path,
    pairs: PairSource,
    learning: Learning,
    machines: Machines,
    keeping: Keeping,
) -> int:
    # The teacher's recipe stays with the student, so that it can be evaluated on the same data.
    config: dict[str, Any] = {"system": "rectified-flow", "kind": kind, "teacher": str(teacher)}
    config |= {**_recipe(teacher), "pairs": None if isinstance(pairs, OnlinePairs) else str(pair_folder(pairs))}
    _set_dropout(task.flow.network, learning.dropout)
    return report_end(
        train(task, out, config=config, **learning.loop_options(), **machines.options(), **keeping.options())
    )


def _open_teacher(run: Path, machines: Machines) -> Flow:
    """The averaged flow, where pairs are made; a transfer makes them from the training part of its source."""
    recipe = recipe_of(run)
    start = recipe.open_source() if recipe is not None else None
    flow = load(run) if start is None else load(run, source=start[0])
    if machines.accelerator != "cpu" and torch.cuda.is_available():
        flow.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    return flow.eval()


def _set_dropout(network: nn.Module, rate: float | None) -> None:
    """Another dropout, where the network has any."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Dropout)]
    if rate is None:
        return
    if not 0 <= rate < 1 or not layers:
        raise ValueError(f"--dropout: must lie in [0, 1) for a network trained with dropout, got {rate}")
    for layer in layers:
        layer.p = rate


def _compare(teacher: Flow, student: Flow) -> None:
    """Say how much straighter the student is, on a few draws."""
    if teacher.path.spec()["name"] != "linear":
        return
    x0 = numbered_source(teacher, 0, range(64))
    condition = numbered_conditions(teacher, 0)(range(64)) if teacher.conditions in ((), ("label",)) else None
    if condition is None:
        return
    before, after = (
        straightness(f.to(x0.device), x0, condition=condition or None, steps=50) for f in (teacher, student)
    )
    print(
        f"straightness S / E|Z1 - Z0|^2: {before.normalised:.3g} before, {after.normalised:.3g} after (0 is straight)"
    )


def _pairs(flow: Flow, run: Path, out: Path, pairing: Pairing, seed: int) -> PairSource:
    """Given pairs, or new ones, of which each process makes its share."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    given = pairing.pairs_from
    made: dict[str, Any] = {"seed": seed, "solver": pairing.solver(), "teacher": str(run), "progress": True}
    store = find_pairs(flow, given or pairing.pairs, out / "pairs", rank=rank, world=world, **made)
    while given is None and store.missing():  # what the other processes make
        time.sleep(1.0)
    if rank == 0:
        found = inspect_pairs(store, flow if given is None else None)
        error = "" if found.solver_error is None else f", solver error {100 * found.solver_error:.2f} %"
        print(f"pairs: {len(store):,} in {pair_folder(store)}{error}")
        for warning in found.warnings:
            print(f"warning: {warning}")
    return store


def _recipe(run: Path) -> dict[str, object]:
    """The recipe that the teacher was trained with, and which system's it is."""
    config = Run.open(run).config if (run / "config.yaml").is_file() else {}
    recipe_of = config.get("recipe_of", config.get("system", "rectified-flow"))
    return {"recipe": dict(config.get("recipe", {})), "recipe_of": recipe_of}
