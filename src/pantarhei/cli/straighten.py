"""`pantarhei straighten METHOD RUN`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from pantarhei.cli.train import Keeping, Machines, check_new, report_end
from pantarhei.data.shards import ShardStore
from pantarhei.flow import Flow
from pantarhei.flow.times import build_time_law
from pantarhei.interop import load
from pantarhei.recipes.rectified_flow import TimesName
from pantarhei.straighten import Solver, inspect_pairs, make_pairs, reflow_task
from pantarhei.training import Optimization, Run, train


def straighten_reflow(
    run: tyro.conf.Positional[Path],
    out: Path,
    pairs: int = 10_000,
    iterations: int = 2000,
    batch: int = 128,
    seed: int = 0,
    pair_method: Literal["euler", "midpoint", "heun", "rk4"] = "heun",
    pair_steps: int = 20,
    guidance: float = 1.0,
    times: TimesName = "uniform",
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
        run: the teacher: a run folder or a saved flow.
        out: run folder of the straightened flow; its pairs go to OUT/pairs.
        pairs: how many pairs.
        iterations: batches to train on.
        batch: global batch size.
        seed: of pairs and training.
        pair_method: solver that makes the pairs.
        pair_steps: its steps.
        guidance: guidance scale baked into the pairs.
        times: law of the training time.
        lr: learning rate.
        warmup: iterations of warm-up.
        decay: of the learning rate.
        average: decay of the moving average.
        resume: go on with the run in `out` (unfinished pairs go on by themselves).
        machines: where it runs.
        keeping: what is kept on the way.
    """
    check_new(out, resume)
    for name, value in (("pairs", pairs), ("iterations", iterations), ("batch", batch)):
        if value < 1:
            raise ValueError(f"--{name}: must be at least 1, got {value}")
    flow = load(run)
    store = _pairs(flow, run, out, pairs, seed, Solver(pair_method, pair_steps, guidance))
    task = reflow_task(
        flow,
        store,
        times=build_time_law(times),
        optimization=Optimization(lr=lr, warmup=warmup, decay=decay),
        average=average,
        teacher=str(run),
    )
    config = {"system": "rectified-flow", "kind": "reflow", "teacher": str(run), "recipe": _recipe_of(run)}
    result = train(
        task,
        out,
        resume=resume,
        config=config,
        iterations=iterations,
        batch=batch,
        seed=seed,
        **machines.options(),
        **keeping.options(),
    )
    return report_end(result)


def _pairs(flow: Flow, run: Path, out: Path, count: int, seed: int, solver: Solver) -> ShardStore:
    """Pairs, made by the first process (others wait for the files by finding them finished)."""
    import os

    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    if rank == 0:
        store = make_pairs(flow, count, out / "pairs", seed=seed, solver=solver, teacher=str(run), progress=True)
        found = inspect_pairs(store, flow)
        print(f"pairs: {len(store):,} in {store.folder}, solver error {100 * (found.solver_error or 0):.2f} %")
        for warning in found.warnings:
            print(f"warning: {warning}")
        return store
    import time

    while not (out / "pairs" / "header.json").is_file() or ShardStore(out / "pairs").missing():
        time.sleep(1.0)
    return ShardStore(out / "pairs")


def _recipe_of(run: Path) -> dict[str, object]:
    """The teacher's recipe, so that the straightened run can be evaluated on the same data."""
    return dict(Run.open(run).config.get("recipe", {})) if (run / "config.yaml").is_file() else {}
