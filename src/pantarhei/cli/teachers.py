"""What the commands `straighten ...` share: the teacher, its pairs and data, how the student learns."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn

from pantarhei.cli.opening import fine_method, recipe_of
from pantarhei.cli.train import Keeping, Machines, check_new, run_training
from pantarhei.data import Source, split
from pantarhei.flow import Flow, TrajectoryModel
from pantarhei.flow.numbered import numbered_conditions, numbered_source
from pantarhei.interop import load
from pantarhei.recipes.data import DataConfig
from pantarhei.recipes.pipelines import open_prompts
from pantarhei.straighten import (
    LowRank,
    OnlinePairs,
    PairSource,
    Solver,
    check_convention,
    decode,
    find_pairs,
    inspect_pairs,
    pair_folder,
    straightness,
)
from pantarhei.training import FlowTask, Optimization, Run

PairMethod = Literal[
    "auto", "edm", "ddim", "dpm-solver", "euler", "midpoint", "heun", "rk4", "bosh3", "dopri5", "tsit5"
]


@dataclass(frozen=True)
class Pairing:
    """The teacher's pairs.

    Attributes:
        pairs: how many to make; they go to OUT/pairs.
        pairs_from: pairs that are there already: a pair store, or folders with z0.npy and z1.npy.
        any_teacher: allow stored pairs that other weights made.
        pair_method: solver that makes the pairs; auto takes edm (Heun's method as diffusion models need it) and, for an
            interpolant, heun.
        pair_steps: its steps.
        pair_rtol: error control with this tolerance instead of steps (dopri5, bosh3 or tsit5; the paper: dopri5, 1e-5).
        guidance: guidance scale baked into the pairs.
        store: tensors (any data), or states (images as PNG and noise as 32 bytes of a generator's state: a seventh of the
            disk, and the layout of rectified flow++'s own code).
        pair_batch: pairs made at a time; few for a large teacher.
    """

    pairs: int = 10_000
    pairs_from: Path | None = None
    any_teacher: bool = False
    pair_method: PairMethod = "auto"
    pair_steps: int = 20
    pair_rtol: float | None = None
    guidance: float = 1.0
    store: Literal["tensors", "states"] = "tensors"
    pair_batch: int = 256

    def solver(self, flow: Flow) -> Solver:
        """How they are made.

        Raises:
            ValueError: for settings that do not go together.
        """
        if self.pairs < 1:
            raise ValueError(f"--pairs: must be at least 1, got {self.pairs}")
        if self.pair_batch < 1:
            raise ValueError(f"--pair-batch: must be at least 1, got {self.pair_batch}")
        if self.pair_rtol is not None and self.pair_method not in ("bosh3", "dopri5", "tsit5"):
            raise ValueError(f"--pair-rtol: goes with --pair-method bosh3, dopri5 or tsit5, got {self.pair_method}")
        method = solver_named(self.pair_method, flow)
        return Solver(method, self.pair_steps, self.guidance, self.pair_rtol)


def solver_named(method: PairMethod, flow: Flow) -> str:
    """A method's name; "auto" is a fine one for the flow's path."""
    return fine_method(flow) if method == "auto" else method


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


@dataclass(frozen=True)
class Teaching:
    """What is known of the teacher beside its file.

    Attributes:
        data: what it was trained on, named as for `train`: for the check of its conventions, for phases, for real pairs. By
            default what its run says.
        prompts: prompts (a text file, one a line) or captioned pictures (a folder), for a teacher that reads prompts.
        base: pipeline folder that bare weights of a diffusers model belong to.
        check: before training, check on data that the teacher denoises as described, and that its own sampler agrees.
    """

    data: str = ""
    prompts: Path | None = None
    base: Path | None = None
    check: bool = True


@dataclass(frozen=True)
class Additions:
    """Train low-rank additions (LoRA) instead of all weights.

    Attributes:
        rank: of the additions; 0 trains all weights.
        alpha: they count alpha / rank; alpha = rank by default.
        targets: parts of the names of the layers that get one; all by default.
    """

    rank: int = 0
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def low_rank(self, seed: int) -> LowRank | None:
        """As an option of a task."""
        return LowRank(self.rank, self.alpha, self.targets, seed) if self.rank else None


@dataclass(frozen=True)
class Student:
    """The student: what it starts from, how it learns, where it runs.

    Attributes:
        start: a student to go on from (a run), instead of the teacher.
        teaching: what is known of the teacher.
        additions: low-rank training.
        learning: how it learns.
        machines: where it runs.
        keeping: what is kept on the way.
    """

    start: Path | None = None
    teaching: Teaching = Teaching()
    additions: Additions = Additions()
    learning: Learning = Learning()
    machines: Machines = field(default_factory=Machines)
    keeping: Keeping = field(default_factory=Keeping)

    def open_teacher(self, run: Path, out: Path) -> Teacher:
        """The teacher, opened and checked, once it is sure that `out` may be written."""
        check_new(out, self.learning.resume)
        return open_teacher(run, self.machines, self.teaching)

    def task_options(self, teacher: Path) -> dict[str, Any]:
        """As options of a task."""
        start = None if self.start is None else load(self.start).network
        return {
            "start": start,
            "low_rank": self.additions.low_rank(self.learning.seed),
            "teacher": str(teacher),
            **self.learning.task_options(),
        }


@dataclass(frozen=True)
class Teacher:
    """An opened teacher.

    Attributes:
        run: where it is.
        flow: with its averaged weights, on the device.
        data: training and held-out data, where they are known.
        recipe: what of `config.yaml` names these data, for the student's.
        conditions: what its samples are conditioned on, where that is no class label.
    """

    run: Path
    flow: Flow
    data: tuple[Source, Source] | None
    conditions: Source | None
    recipe: dict[str, Any]


def train_student(
    task: FlowTask,
    out: Path,
    kind: str,
    teacher: Path,
    pairs: PairSource | None,
    learning: Learning,
    machines: Machines,
    keeping: Keeping,
    system: str = "rectified-flow",
    recipe: dict[str, Any] | None = None,
) -> int:
    """Train, with the teacher's recipe in the configuration, so that the student can be evaluated on the same data."""
    config: dict[str, Any] = {"system": system, "kind": kind, "teacher": str(teacher)}
    stored = pairs is not None and not isinstance(pairs, OnlinePairs)
    config |= {
        **(recipe or recipe_in_run(teacher)),
        "pairs": str(pair_folder(pairs)) if stored and pairs is not None else None,
    }
    _set_dropout(task.flow.network, learning.dropout)
    task.validation_batch = min(task.validation_batch, learning.batch)
    return run_training(task, out, config, learning.loop_options(), machines, keeping)


def open_teacher(run: Path, machines: Machines, teaching: Teaching | None = None) -> Teacher:
    """The averaged flow, where pairs are made; a transfer makes them from the training part of its source.

    Raises:
        ValueError: it reads prompts, and there are none; or it does not do what its description says.
    """
    teaching = teaching or Teaching(check=False)
    recipe = recipe_of(run)
    start = recipe.open_source() if recipe is not None else None
    told: dict[str, Any] = {} if start is None else {"source": start[0]}
    if teaching.base is not None:
        told["base"] = teaching.base
    flow = load(run, **told)
    if machines.accelerator != "cpu" and torch.cuda.is_available():
        flow.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    flow.eval()
    data = recipe.open() if recipe is not None else None
    kept = recipe_in_run(run)
    if teaching.data:
        named = data_for(flow, teaching.data)
        data, kept = named.open(), {"recipe": {"data": asdict(named)}, "recipe_of": "rectified-flow"}
    conditions: Source | None = None
    if "tokens" in flow.conditions:
        if teaching.prompts is None:
            raise ValueError("--prompts: this teacher reads prompts; give a text file of them, or captioned pictures")
        conditions = open_prompts(flow, teaching.prompts)
        if "x1" in conditions.fetch(torch.arange(1)):
            data = split(conditions, 0.05) if len(conditions) >= 40 else (conditions, conditions)
    elif flow.conditions not in ((), ("label",)) and data is not None:
        conditions = data[0]
    if (licence := flow.provenance.notes.get("licence")) is not None:
        print(f"licence of the teacher's weights: {licence}")
    if teaching.check:
        _check(flow, data)
    return Teacher(run, flow, data, conditions, kept)


def data_for(flow: Flow, data: str) -> DataConfig:
    """Data by name, with side and channels of the images that the flow takes, if it takes any."""
    if flow.shape is None or len(flow.shape) != 3:
        return DataConfig(data=data)
    latents = flow.codec is not None
    size = flow.shape[-1] * int(getattr(flow.codec, "factor", 1))
    return DataConfig(data=data, size=size, channels=3 if latents else flow.shape[0])


def check_images(flow: Flow, metric: str) -> None:
    """Refuse a distance of images for a flow of something else, before pairs are made.

    Raises:
        ValueError: its samples are no images, or latents of them.
    """
    shape = flow.shape or ()
    if len(shape) != 3 or shape[0] not in (1, 3) or flow.codec is not None:
        kind = "latents" if flow.codec is not None else f"of shape {flow.shape}"
        raise ValueError(f"--perceptual: {metric} compares images, this flow's samples are {kind}")


def _check(flow: Flow, data: tuple[Source, Source] | None) -> None:
    """Check the teacher's conventions, and say what was found."""
    if flow.provenance.why_not_marginal() is not None or not getattr(flow.source, "gaussian", False):
        return  # what it denoises is not independent noise
    if data is None:
        print("warning: without --data only the teacher's own sampler can be compared with ours, where it has one")
    items = None if data is None else data[0].fetch(torch.arange(min(64, len(data[0]))))
    found = check_convention(flow, items)
    if found.errors:
        errors = ", ".join(f"{e:.3g} at {level:.2g}" for level, e in zip(found.levels, found.errors, strict=True))
        print(f"checked: relative error of denoised data by noise level: {errors}")
    if found.sampler is not None:
        print(f"checked: the teacher's own sampler and ours differ by {found.sampler:.2g} (relative, 50 steps)")


def _set_dropout(network: nn.Module, rate: float | None) -> None:
    """Another dropout, where the network has any."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Dropout)]
    if rate is None:
        return
    if not 0 <= rate < 1 or not layers:
        raise ValueError(f"--dropout: must lie in [0, 1) for a network trained with dropout, got {rate}")
    for layer in layers:
        layer.p = rate


def say_straightness(teacher: Flow, student: Flow) -> None:
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


@torch.no_grad()
def say_gaps(
    teacher: Teacher, student: Flow, solver: Solver, count: int = 64, steps: tuple[int, ...] = (1, 2, 4, 8)
) -> None:
    """Say how far samples of few steps are from the teacher's, before and after, from the same noise."""
    before = teacher.flow
    try:
        condition = numbered_conditions(before, 0, teacher.conditions)(range(count)) or None
    except ValueError:
        return
    x0 = numbered_source(before, 0, range(count), condition)
    student.to(x0.device)
    wanted = before.sample(x0=x0, condition=condition, decode=False, **solver.options())
    for name, flow in (("teacher", before), ("student", student)):
        method = "jump" if isinstance(flow, TrajectoryModel) else "ddim"
        found = [decode(flow, x0, n, condition, method, solver.guidance if flow is before else 1.0) for n in steps]
        errors = ", ".join(
            f"{float((x - wanted).square().mean()):.4g} ({n})" for n, x in zip(steps, found, strict=True)
        )
        print(f"mean squared distance to the teacher's samples, by evaluations: {name} {errors}")


def processes() -> tuple[int, int]:
    """Number of this process and of all, as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def pairs_of(
    flow: Flow,
    run: Path,
    out: Path,
    pairing: Pairing,
    seed: int,
    conditions: Source | None = None,
) -> PairSource:
    """Given pairs, or new ones, of which each process makes its share."""
    rank, world = processes()
    given = pairing.pairs_from
    made: dict[str, Any] = {"seed": seed, "solver": pairing.solver(flow), "teacher": str(run), "progress": True}
    made |= {"store": pairing.store, "conditions": conditions, "batch": pairing.pair_batch}
    store = find_pairs(flow, given or pairing.pairs, out / "pairs", rank=rank, world=world, **made)
    while given is None and store.missing():  # what the other processes make
        time.sleep(1.0)
    if rank == 0:
        # Of a large teacher only as many pairs are solved again as fit at a time.
        few = {"limit": min(512, 2 * pairing.pair_batch), "batch": pairing.pair_batch}
        found = inspect_pairs(store, flow if given is None else None, **few)
        error = "" if found.solver_error is None else f", solver error {100 * found.solver_error:.2f} %"
        print(f"pairs: {len(store):,} in {pair_folder(store)}{error}")
        for warning in found.warnings:
            print(f"warning: {warning}")
    return store


def recipe_in_run(run: Path) -> dict[str, object]:
    """The recipe that the teacher was trained with, and which system's it is."""
    config = Run.open(run).config if (run / "config.yaml").is_file() else {}
    recipe_of = config.get("recipe_of", config.get("system", "rectified-flow"))
    return {"recipe": dict(config.get("recipe", {})), "recipe_of": recipe_of}
