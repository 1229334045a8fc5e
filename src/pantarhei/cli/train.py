"""`pantarhei train RECIPE`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pantarhei.recipes import forecasting, stochastic_interpolants
from pantarhei.recipes.cards import write_card
from pantarhei.recipes.forecasting import ForecastConfig
from pantarhei.recipes.rectified_flow import PRESETS, RectifiedFlowConfig, build_task
from pantarhei.recipes.stochastic_interpolants import StochasticInterpolantsConfig
from pantarhei.training import Task, TrainResult, train


@dataclass(frozen=True)
class Machines:
    """Where it runs.

    Attributes:
        devices: processes (GPUs, or CPU processes) a node.
        nodes: number of nodes.
        strategy: auto (one process, or ddp for several), ddp, or fsdp (sharded).
        accelerator: auto takes a GPU where there is one.
        precision: fp32 or bf16.
        compile: torch.compile the network.
        channels_last: memory layout of images.
        accumulate: micro-batches a batch.
        workers: processes that fetch data.
        threads: CPU threads.
    """

    devices: int = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    channels_last: bool = False
    accumulate: int = 1
    workers: int = 0
    threads: int | None = None

    def options(self) -> dict[str, Any]:
        """As options of `train`."""
        return dict(vars(self))


@dataclass(frozen=True)
class Keeping:
    """What is kept on the way.

    Attributes:
        checkpoint_every: iterations between checkpoints.
        keep: how many of the last checkpoints stay, beside the best.
        log_every: iterations between logged lines.
        preview_every: iterations between sample pictures; 0 for none.
        tensorboard: write TensorBoard events.
        wandb: log to Weights & Biases.
    """

    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 50
    preview_every: int = 500
    tensorboard: bool = True
    wandb: bool = False

    def options(self) -> dict[str, Any]:
        """As options of `train`."""
        return dict(vars(self))


def train_rectified_flow(
    out: Path,
    recipe: RectifiedFlowConfig = RectifiedFlowConfig(),
    iterations: int = 2000,
    batch: int = 128,
    seed: int = 0,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Train a rectified flow: from noise to data, or from one data set to another.

    Args:
        out: run folder.
        recipe: data, network, path and optimiser.
        iterations: batches to train on.
        batch: global batch size.
        seed: of weights, data order and noise.
        resume: go on with the run in `out`.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    check_new(out, resume)
    task, augment = build_task(recipe, seed)
    loop = {"iterations": iterations, "batch": batch, "seed": seed, "resume": resume, "augment": augment}
    return run_training(task, out, {"system": "rectified-flow", "recipe": recipe.spec()}, loop, machines, keeping)


train_rectified_flow.presets = {  # type: ignore[attr-defined]
    name: {
        "recipe": preset.recipe,
        "iterations": preset.iterations,
        "batch": preset.batch,
        "machines": Machines(**preset.machines),
        "keeping": Keeping(**preset.keeping),
    }
    for name, preset in PRESETS.items()
}


def train_stochastic_interpolants(
    out: Path,
    recipe: StochasticInterpolantsConfig = StochasticInterpolantsConfig(),
    iterations: int = 2000,
    batch: int = 128,
    seed: int = 0,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Train a stochastic interpolant: from noise, other data or what is known of an image, to data.

    Args:
        out: run folder.
        recipe: data, path, latent, fields, network and optimiser.
        iterations: batches to train on.
        batch: global batch size.
        seed: of weights, data order and noise.
        resume: go on with the run in `out`.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    check_new(out, resume)
    task, augment = stochastic_interpolants.build_task(recipe, seed)
    loop = {"iterations": iterations, "batch": batch, "seed": seed, "resume": resume, "augment": augment}
    config = {"system": "stochastic-interpolants", "recipe": recipe.spec()}
    return run_training(task, out, config, loop, machines, keeping)


def train_forecasting(
    out: Path,
    recipe: ForecastConfig = ForecastConfig(),
    iterations: int = 3000,
    batch: int = 256,
    seed: int = 0,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Train a probabilistic forecast: a bridge from the present state to the law of the next one.

    Args:
        out: run folder.
        recipe: series, lag, network and optimiser.
        iterations: batches to train on.
        batch: global batch size.
        seed: of weights, data order and noise.
        resume: go on with the run in `out`.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    check_new(out, resume)
    task = forecasting.build_task(recipe, seed)
    loop = {"iterations": iterations, "batch": batch, "seed": seed, "resume": resume}
    following = f"pantarhei forecast {out} --out forecast"
    config = {"system": "forecasting", "recipe": recipe.spec()}
    return run_training(task, out, config, loop, machines, keeping, following)


def run_training(
    task: Task,
    out: Path,
    config: dict[str, Any],
    loop: dict[str, Any],
    machines: Machines,
    keeping: Keeping,
    following: str = "",
) -> int:
    """Train, write the model card and say where things are, and what `following` command may come next."""
    return report_end(train(task, out, config=config, **loop, **machines.options(), **keeping.options()), following)


def check_new(out: Path, resume: bool) -> None:
    """Refuse early, before data are read, what `Run.create` would refuse later."""
    if not resume and any((out / "checkpoints").glob("[0-9]*")):
        raise ValueError(f"--out: {out} already holds a run; go on with --resume, or choose another folder")


def report_end(result: TrainResult, following: str = "") -> int:
    """Write the model card and say where things are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return 0
    write_card(result.run, result)
    if result.reason == "interrupted":
        print(f"interrupted at iteration {result.iteration}; saved. Go on with the same command and --resume")
        return 130
    print(f"trained {result.iteration} iterations in {result.seconds:.0f} s: {result.run.folder}")
    print(f"next: {following or f'pantarhei sample {result.run.folder} --count 64 --out samples'}")
    return 0
