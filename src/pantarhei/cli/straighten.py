"""`pantarhei straighten reflow` and `straighten distil`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from pantarhei.cli.opening import data_of
from pantarhei.cli.teachers import Learning, Pairing, open_teacher, pairs_of, say_straightness, train_student
from pantarhei.cli.train import Keeping, Machines, check_new
from pantarhei.flow.times import build_time_law
from pantarhei.interop import load
from pantarhei.recipes.perceptual import MetricName, build_metric
from pantarhei.recipes.rectified_flow import TimesName
from pantarhei.straighten import OnlinePairs, PairSource, check_reflow, check_teacher, distillation_task, reflow_task


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
    teacher, status = run, 0
    for number in range(1, rounds + 1):
        folder = out / f"round-{number}" if rounds > 1 else out
        check_new(folder, learning.resume)
        flow = open_teacher(teacher, machines).flow
        check_reflow(flow)
        solver = pairing.solver(flow)
        # New draws in every round, as the method asks.
        seed = learning.seed + number - 1
        store: PairSource
        if online:
            count = learning.iterations * learning.batch
            store = OnlinePairs(flow, count, seed=seed, solver=solver, teacher=str(teacher))
        else:
            store = pairs_of(flow, teacher, folder, pairing, seed)
        task = reflow_task(
            flow,
            store,
            times=build_time_law(times),
            start=None if start == "average" else load(teacher, averaged=False).network,
            any_teacher=pairing.any_teacher,
            teacher=str(teacher),
            **learning.task_options(),
        )
        status = train_student(task, folder, "reflow", teacher, store, learning, machines, keeping)
        if status:
            return status
        if machines.devices * machines.nodes == 1:
            say_straightness(flow, task.result())
        teacher = folder
    return status


def straighten_distil(
    run: tyro.conf.Positional[Path],
    out: Path,
    steps: int = 1,
    metric: MetricName = "squared",
    vgg: Path | None = None,
    lpips: Path | None = None,
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
        vgg: weights of VGG16 as torchvision publishes them, for lpips.
        lpips: the linear weights of LPIPS for VGG16.
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
    flow = open_teacher(run, machines).flow
    check_teacher(flow, eps)
    if metric != "squared" and len(flow.shape or ()) != 3:
        raise ValueError(f"--metric: {metric} compares images, this flow's samples have shape {flow.shape}")
    data = data_of(run)[0] if metric == "classifier" else None
    distance = build_metric(metric, data, learning.seed, vgg=vgg, linear=lpips)
    store = pairs_of(flow, run, out, pairing, learning.seed)
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
    return train_student(task, out, "distillation", run, store, learning, machines, keeping)


# The paper's settings for its CIFAR-10 networks.
_PAPER = {
    "pairing": Pairing(pairs=1_000_000, pair_method="dopri5", pair_rtol=1e-5),
    "learning": Learning(iterations=300_000, dropout=0.1, lr=2e-4, warmup=5000, decay="constant", average=0.9999),
    "keeping": Keeping(checkpoint_every=10_000, preview_every=10_000),
}
straighten_reflow.presets = {"cifar10": {**_PAPER, "start": "raw"}}  # type: ignore[attr-defined]
straighten_distil.presets = {"cifar10": {**_PAPER, "eps": 1e-3}}  # type: ignore[attr-defined]
