"""`pantarhei straighten rfpp`, `rectified-diffusion` and `phased`: students of any pretrained diffusion model or flow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import tyro

from pantarhei.cli.teachers import (
    Learning,
    Pairing,
    Student,
    Teacher,
    check_images,
    pairs_of,
    processes,
    say_gaps,
    train_student,
)
from pantarhei.cli.train import Keeping, Machines
from pantarhei.flow import PseudoHuber
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.times import UShaped, build_time_law
from pantarhei.recipes.perceptual import PerceptualName, build_metric
from pantarhei.recipes.rectified_flow import TimesName
from pantarhei.straighten import (
    MixedPairs,
    PairSource,
    Phases,
    Solver,
    invert_data,
    phased_task,
    plus_plus_task,
    rectified_diffusion_task,
)
from pantarhei.straighten.rectified_diffusion import LossName
from pantarhei.training import FlowTask

# A pretrained network goes on with a smaller step than one from scratch begins with.
FINE_TUNED = Student(learning=Learning(lr=5e-4))


def straighten_rfpp(
    teacher: tyro.conf.Positional[Path],
    out: Path,
    perceptual: PerceptualName = "none",
    vgg: Path | None = None,
    lpips: Path | None = None,
    divided: bool = True,
    huber: float = 0.00054,
    ushape: float = 4.0,
    real_share: float = 0.0,
    pairing: Pairing = Pairing(pair_steps=17),
    student: Student = FINE_TUNED,
) -> int:
    """Rectified flow++: one round on the teacher's pairs, from its weights, with U-shaped times and a robust loss.

    The student is a flow on the linear path; sample it with `--steps 1`, or with `--method reinterpolate` in 2 to 5 steps.

    Args:
        teacher: a run, a saved flow, a file of EDM or SiT, or a folder of diffusers.
        out: run folder of the student.
        perceptual: adds a distance of the images that come out: lpips (give --vgg and --lpips), or one that needs no
            weights: lpips-surrogate, gradients, classifier.
        vgg: weights of VGG16 as torchvision publishes them.
        lpips: the linear weights of LPIPS for VGG16.
        divided: divide the perceptual distance by the noise level (the paper's best setting on CIFAR-10).
        huber: transition c of the pseudo-Huber loss, as a multiple of the number of values of a sample.
        ushape: a of the U-shaped law of times; 0 is uniform.
        real_share: share of real data, inverted by the teacher, in the pairs; 1 takes no others.
        pairing: the teacher's pairs.
        student: what it starts from, how it learns, where it runs.
    """
    if ushape < 0 or not huber > 0:
        raise ValueError(f"--ushape, --huber: must not be negative, got {ushape:g} and {huber:g}")
    if not 0 <= real_share <= 1:
        raise ValueError(f"--real-share: must lie in 0 to 1, got {real_share:g}")
    opened = student.open_teacher(teacher, out)
    flow, solver = opened.flow, pairing.solver(opened.flow)
    metric = _perceptual(perceptual, opened, vgg, lpips, student.learning.seed)
    pairs = _with_real(opened, out, pairing, solver, student.learning.seed, real_share)
    task = plus_plus_task(
        flow,
        pairs,
        metric=PseudoHuber(huber),
        perceptual=metric,
        divided=divided,
        times=UShaped(ushape) if ushape else build_time_law("uniform"),
        any_teacher=pairing.any_teacher,
        **student.task_options(teacher),
    )
    return _finish(
        task, "rectified-flow-plus-plus", out, opened, pairs, solver, student, count=min(64, pairing.pair_batch)
    )


def straighten_rectified_diffusion(
    teacher: tyro.conf.Positional[Path],
    out: Path,
    loss: LossName = "data-huber",
    anchor: Literal["noise", "state"] = "noise",
    schedule: Literal["own", "linear", "scaled-linear"] = "own",
    times: Literal["own"] | TimesName = "own",
    label_dropout: float = 0.1,
    pairing: Pairing = Pairing(),
    student: Student = FINE_TUNED,
) -> int:
    """Rectified diffusion: the model goes on training as it is (schedule, prediction, network) on its own pairs.

    Sample the student with `--method ddim --steps 1 --final clean`.

    Args:
        teacher: a run, a saved flow, a file of EDM, or a folder of diffusers (DDPM, Stable Diffusion, SDXL, SD3).
        out: run folder of the student.
        loss: data-huber compares data estimates, as the published code; noise-mse is the paper's algorithm, and warns.
        anchor: what the pairs' noise is where the schedule leaves data in the noisiest state: the noise in it, or the state.
        schedule: of betas that a numbered student has instead of its teacher's (the published Stable Diffusion student has
            linear).
        times: law of the training time; own is uniform, over the numbers of a numbered schedule.
        label_dropout: how often the condition is dropped; guidance of the student needs it.
        pairing: the teacher's pairs.
        student: what it starts from, how it learns, where it runs.
    """
    opened = student.open_teacher(teacher, out)
    flow, solver = opened.flow, pairing.solver(opened.flow)
    pairs = pairs_of(flow, teacher, out, pairing, student.learning.seed, opened.conditions)
    task = rectified_diffusion_task(
        flow,
        pairs,
        loss=loss,
        anchor=anchor,
        schedule=None if schedule == "own" else schedule,
        times=None if times == "own" else build_time_law(times),
        dropout=label_dropout if flow.null else 0.0,
        any_teacher=pairing.any_teacher,
        **student.task_options(teacher),
    )
    return _finish(task, "rectified-diffusion", out, opened, pairs, solver, student, count=min(64, pairing.pair_batch))


def straighten_phased(
    teacher: tyro.conf.Positional[Path],
    out: Path,
    phases: int = 4,
    spacing: Literal["time", "logsnr"] = "time",
    substeps: int = 10,
    guidance: float = 1.0,
    label_dropout: float = 0.1,
    student: Student = FINE_TUNED,
) -> int:
    """Phased rectified diffusion: first-order within each of some phases, trained on real data without stored pairs.

    Sample the student with `--method ddim` and as many steps as phases.

    Args:
        teacher: a run, a saved flow, a file of EDM, or a folder of diffusers.
        out: run folder of the student.
        phases: how many.
        spacing: phases even in the model's own time, or in log(alpha / sigma).
        substeps: steps of the teacher through a phase.
        guidance: of the teacher (Stable Diffusion 1.5: 3, SDXL: 7.5).
        label_dropout: how often the student's condition is dropped.
        student: what it starts from, how it learns, where it runs; `--data` (or captioned pictures as `--prompts`) is
            what is trained on, where the teacher's run does not name its data.
    """
    opened = student.open_teacher(teacher, out)
    if guidance != 1.0 and not opened.flow.null:
        raise ValueError(f"--guidance: this teacher has no condition to be guided by, got {guidance:g}")
    if opened.data is None:
        raise ValueError("--data: phases are trained on real data, which this teacher does not name; give them")
    train_set, held_out = opened.data
    task = phased_task(
        opened.flow,
        train_set,
        held_out=held_out,
        phases=Phases.of(opened.flow, phases, spacing),
        substeps=substeps,
        guidance=guidance,
        dropout=label_dropout if opened.flow.null else 0.0,
        **student.task_options(teacher),
    )
    solver = Solver("edm", 32, guidance)
    return _finish(
        task, "rectified-diffusion", out, opened, None, solver, student, "phased", min(64, student.learning.batch)
    )


def _faces(
    pair_steps: int = 39, pairs: int = 1_000_000, machines: Machines = Machines(), **learning: Any
) -> dict[str, Any]:
    """The published settings on faces, with what is different elsewhere."""
    usual: dict[str, Any] = {"iterations": 1_000_000, "batch": 256, "dropout": 0.25, "lr": 2e-4, "warmup": 5000}
    student = Student(
        learning=Learning(**{**usual, **learning}, decay="constant", average=0.9999),
        machines=machines,
        keeping=Keeping(checkpoint_every=50_000, preview_every=50_000),
    )
    pairing = Pairing(pairs=pairs, pair_steps=pair_steps, store="states")
    return {"pairing": pairing, "student": student, "perceptual": "lpips"}


def _diffusion(iterations: int, batch: int, keep: int) -> Student:
    """The published settings of Stable Diffusion's students."""
    learning = Learning(iterations=iterations, batch=batch, lr=5e-6, warmup=500, decay="constant", average=0.9999)
    keeping = Keeping(checkpoint_every=keep, preview_every=0)
    return Student(learning=learning, machines=Machines(precision="bf16"), keeping=keeping)


# Configurations F, F, F and E of the paper.
straighten_rfpp.presets = {  # type: ignore[attr-defined]
    "cifar10": _faces(17, iterations=800_000, batch=512, dropout=0.13),
    "afhq64": _faces(),
    "ffhq64": _faces(),
    "imagenet64": {
        **_faces(
            *(39, 5_000_000, Machines(precision="bf16")),
            iterations=700_000,
            batch=2048,
            dropout=0.1,
            lr=1e-4,
            warmup=2500,
        ),
        "divided": False,
    },
}
straighten_rectified_diffusion.presets = {  # type: ignore[attr-defined]
    "sd15": {
        "pairing": Pairing(1_600_000, pair_method="dpm-solver", pair_steps=25, guidance=5.0, pair_batch=8),
        "student": _diffusion(200_000, 128, 5000),
        "schedule": "linear",
    },
    "sdxl": {
        "pairing": Pairing(1_600_000, pair_method="dpm-solver", pair_steps=25, guidance=7.5, pair_batch=2),
        "student": _diffusion(200_000, 128, 5000),
    },
}
straighten_phased.presets = {  # type: ignore[attr-defined]
    "sd15": {"guidance": 3.0, "student": _diffusion(20_000, 160, 1000)},
    "sdxl": {"guidance": 7.5, "student": _diffusion(20_000, 40, 1000)},
}


def _perceptual(
    name: PerceptualName, teacher: Teacher, vgg: Path | None, lpips: Path | None, seed: int
) -> Premetric | None:
    """The distance of images that is asked for."""
    if name == "none":
        return None
    check_images(teacher.flow, name)
    data = None if teacher.data is None else teacher.data[0]
    return build_metric(name, data, seed, vgg=vgg, linear=lpips)


def _with_real(teacher: Teacher, out: Path, pairing: Pairing, solver: Solver, seed: int, share: float) -> PairSource:
    """The teacher's pairs, mixed with inverted real data, or these alone."""
    made = None
    if share < 1:
        made = pairs_of(teacher.flow, teacher.run, out, pairing, seed, teacher.conditions)
    if not share:
        assert made is not None
        return made
    if teacher.data is None:
        raise ValueError("--real-share: this teacher does not name its data; give --data")
    method = "edm" if solver.method == "dpm-solver" else solver.method  # which runs one way only
    plain = Solver(method, solver.steps, 1.0, solver.rtol)
    folder = out / "inverted"
    rank, world = processes()
    how: dict[str, Any] = {"solver": plain, "teacher": str(teacher.run), "batch": pairing.pair_batch, "progress": True}
    real = invert_data(teacher.flow, teacher.data[0], folder, rank=rank, world=world, **how)
    while real.missing():  # what the other processes make
        time.sleep(1.0)
    return real if made is None else MixedPairs(made, real, share)


def _finish(
    task: FlowTask,
    system: str,
    out: Path,
    teacher: Teacher,
    pairs: PairSource | None,
    solver: Solver,
    student: Student,
    kind: str = "",
    count: int = 64,
) -> int:
    """Train, and say what became of the few-step samples."""
    kind = kind or system
    machines = student.machines
    how = (student.learning, machines, student.keeping)
    status = train_student(task, out, kind, teacher.run, pairs, *how, system, teacher.recipe)
    if not status and machines.devices * machines.nodes == 1:
        say_gaps(teacher, task.result(), solver, count)
    return status
