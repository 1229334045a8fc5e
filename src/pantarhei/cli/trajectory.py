"""`pantarhei straighten trajectory` and `pantarhei train trajectory`: models that jump from any time to any later one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pantarhei.cli.teachers import Learning, Student, say_gaps, train_student
from pantarhei.cli.train import Keeping, Machines, check_new, run_training
from pantarhei.flow import Flow, PseudoHuber, squared
from pantarhei.flow.heads import Outer, Scaling
from pantarhei.flow.metrics import Premetric
from pantarhei.networks.discriminators import ProjectedDiscriminator, VGGMaps, make_discriminator
from pantarhei.networks.vgg import VGG16Features
from pantarhei.recipes.perceptual import MetricName, build_metric
from pantarhei.recipes.rectified_flow import PRESETS, RectifiedFlowConfig, build_task
from pantarhei.straighten import Adversarial, Solver, trajectory_task
from pantarhei.straighten.jump_times import Span
from pantarhei.straighten.trajectory_matching import Weight
from pantarhei.straighten.trajectory_students import Kind
from pantarhei.training import FlowTask
from pantarhei.training.machines import Precision

TASK = "consistency-trajectory-models"


@dataclass(frozen=True)
class Jumping:
    """What is learned of jumps.

    Attributes:
        kind: ctm (jumps anywhere, keeps the score), cd (consistency distillation: to the end only), ct and ict (the same
            from data, without a teacher), meanflow (mean velocities).
        without_teacher: of ctm and meanflow, learn from data alone, with the own average or each pair for a teacher.
        points: times of the grid that jumps are drawn on; 18, or of ct and ict a growing number.
        span: of ctm, how far the teacher leads: soft (some intervals of the grid), local (one) or global (all the way).
        longest: largest number of the teacher's steps, points - 1 by default.
        per_row: draw that number for each row, not for the batch.
        waypoint: of ctm without a teacher, who leads: self (one jump of the average) or self-steps (one a time of the grid).
        weight: of rows: uniform, snr, snr+1, karras, truncated-snr, root, length or interval; uniform by default, interval
            for ict.
        outer: form of ctm's jump: euler, variance or mixed (the last two for EDM networks).
        scaling: of cd, ct and ict: jump (any network), or boundary (that of the published models, for EDM networks).
        metric: of images at the data end: huber (of the whole image), squared, or one of images: lpips (give --vgg and
            --lpips), lpips-surrogate, gradients, classifier.
        denoising: weight of ctm's denoising term; 0 leaves it out.
        adaptive: weigh terms by ratios of gradient norms.
        adversarial: adds a discriminator: conv (a small one of our own) or vgg (heads on the features of --vgg).
        adversarial_after: iterations before it plays.
        adversarial_weight: of its term, times its adaptive weight.
        adversarial_shows: what it sees of the student: the estimate that is compared, or its own jump to the data end.
        difference: of meanflow, how far apart the times are whose difference is the derivative in its target; None takes the
            exact one.
        initial: what the branch of the second time starts with: zero (the teacher's first-order step) or random.
        vgg: weights of VGG16 as torchvision publishes them.
        lpips: the linear weights of LPIPS for VGG16.
    """

    kind: Kind = "ctm"
    without_teacher: bool = False
    points: int | None = None
    span: Span = "soft"
    longest: int | None = None
    per_row: bool = False
    waypoint: Literal["self", "self-steps"] | None = None
    weight: Weight | None = None
    outer: Outer = "euler"
    scaling: Scaling = "jump"
    metric: Literal["huber"] | MetricName = "huber"
    denoising: float = 1.0
    adaptive: bool = True
    adversarial: Literal["none", "conv", "vgg"] = "none"
    adversarial_after: int = 0
    adversarial_weight: float = 1.0
    adversarial_shows: Literal["estimate", "jump"] = "estimate"
    difference: float | None = 0.03
    initial: Literal["zero", "random"] = "zero"
    vgg: Path | None = None
    lpips: Path | None = None

    def check(self) -> None:
        """Refuse, before anything is read, files of weights that are missing or not named."""
        needed = {"--vgg": self.adversarial == "vgg" or self.metric == "lpips", "--lpips": self.metric == "lpips"}
        asked = "--metric lpips" if self.metric == "lpips" else "--adversarial vgg"
        for option, path in {"--vgg": self.vgg, "--lpips": self.lpips}.items():
            if path is None and needed[option]:
                raise ValueError(f"{option}: a file of weights is needed for {asked}")
            if path is not None and not path.is_file():
                raise ValueError(f"{option}: no file {path}")

    def options(self, flow: Flow, data: Any, seed: int) -> dict[str, Any]:
        """As options of a task."""
        plain: dict[str, Premetric] = {"huber": PseudoHuber(root=True), "squared": squared}
        metric: Premetric | None = plain.get(self.metric)
        if metric is None:
            metric = build_metric(self.metric, data, seed, vgg=self.vgg, linear=self.lpips)  # type: ignore[arg-type]
        return {
            "kind": self.kind,
            "without_teacher": self.without_teacher,
            "times": self.points,
            "span": self.span,
            "longest": self.longest,
            "per_row": self.per_row,
            "waypoint": self.waypoint,
            "weight": self.weight,
            "outer": self.outer,
            "scaling": self.scaling,
            "metric": metric,
            "denoising": self.denoising,
            "adaptive": self.adaptive,
            "adversarial": self._adversarial(flow),
            "difference": self.difference,
            "initial": self.initial,
        }

    def _adversarial(self, flow: Flow) -> Adversarial | None:
        if self.adversarial == "none":
            return None
        if self.adversarial == "vgg":
            assert self.vgg is not None  # checked
            judge: Any = ProjectedDiscriminator([VGGMaps(VGG16Features.from_file(self.vgg))])
        else:
            judge = make_discriminator(flow.shape or ())
        return Adversarial(judge, self.adversarial_weight, self.adversarial_after, shows=self.adversarial_shows)


def straighten_trajectory(
    teacher: tyro.conf.Positional[Path],
    out: Path,
    jumping: Jumping = Jumping(),
    guidance: float = 1.0,
    label_dropout: float = 0.0,
    student: Student = Student(),
) -> int:
    """Consistency trajectory models, consistency models and mean velocities, from a teacher or, with its network, from data.

    Sample the student with `--steps 1` (and more), its jumps with `--gamma`; of ctm and meanflow every other method
    integrates its score.

    Args:
        teacher: a run, a saved flow, a file of EDM or SiT, or a folder of diffusers.
        out: run folder of the student.
        jumping: what is learned of jumps.
        guidance: of the teacher, which the student then has built in.
        label_dropout: how often the condition is dropped; guidance of the student needs it.
        student: what it starts from, how it learns, where it runs; `--data` is what is trained on, where the teacher's run
            does not name its data. A second phase with the adversarial term goes on from the first by `--start`.
    """
    jumping.check()
    opened = student.open_teacher(teacher, out)
    flow = opened.flow
    if guidance != 1.0 and not flow.null:
        raise ValueError(f"--guidance: this teacher has no condition to be guided by, got {guidance:g}")
    if opened.data is None:
        raise ValueError("--data: jumps start from noisy data, which this teacher does not name; give them")
    train_set, held_out = opened.data
    learning = student.learning
    options = student.task_options(teacher)
    options["optimization"] = replace(options["optimization"], optimizer="radam")
    task = trajectory_task(
        flow,
        train_set,
        held_out=held_out,
        guidance=guidance,
        dropout=label_dropout if flow.null else 0.0,
        iterations=learning.iterations,
        **jumping.options(flow, train_set, learning.seed),
        **options,
    )
    how = (learning, student.machines, student.keeping)
    status = train_student(task, out, jumping.kind, teacher, None, *how, TASK, opened.recipe)
    if not status and student.machines.devices * student.machines.nodes == 1:
        say_gaps(opened, task.result(), Solver("edm", 17, guidance), min(64, learning.batch))
    return status


def _published(points: int, longest: int, iterations: int, batch: int, precision: Precision = "fp32") -> dict[str, Any]:
    """The published settings of the phase without the adversarial term."""
    learning = Learning(iterations=iterations, batch=batch, lr=4e-4, warmup=0, decay="constant", average=0.999)
    keeping = Keeping(checkpoint_every=5000, preview_every=5000)
    return {
        "jumping": Jumping(points=points, longest=longest, metric="lpips", initial="random"),
        "student": Student(learning=learning, machines=Machines(precision=precision), keeping=keeping),
    }


straighten_trajectory.presets = {  # type: ignore[attr-defined]
    "cifar10": _published(18, 17, 50_000, 256),
    "imagenet64": _published(40, 20, 10_000, 1440, "bf16"),
}


def train_trajectory(
    out: Path,
    jumping: Jumping = Jumping(kind="ict"),
    recipe: RectifiedFlowConfig = RectifiedFlowConfig(path="edm", predicts="edm", lr=4e-4),
    iterations: int = 2000,
    batch: int = 128,
    seed: int = 0,
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    machines: Machines = Machines(),
    keeping: Keeping = Keeping(),
) -> int:
    """Train a model of jumps from data, without a teacher.

    Args:
        out: run folder.
        jumping: what is learned of jumps: ict, ct, ctm or meanflow.
        recipe: data, network, path and optimiser.
        iterations: batches to train on.
        batch: global batch size.
        seed: of weights, data order and noise.
        resume: go on with the run in `out`.
        machines: where it runs.
        keeping: what is kept on the way.
    """
    if jumping.kind == "cd":
        raise ValueError(
            "--kind: consistency distillation has a teacher: pantarhei straighten trajectory TEACHER --kind cd"
        )
    left = {
        "times": recipe.times != "uniform",
        "coupling": recipe.coupling != "independent",
        "source": bool(recipe.source),
    }
    for name, given in left.items():
        if given:
            raise ValueError(f"--{name}: is of flow matching; jumps are learned from noise, on times of their own")
    jumping.check()
    check_new(out, resume)
    plain, augment = build_task(recipe, seed)
    task: FlowTask = trajectory_task(
        plain.flow,
        plain.data,
        held_out=plain.held_out,
        dropout=recipe.label_dropout if plain.flow.null else 0.0,
        iterations=iterations,
        optimization=replace(recipe.optimization(), optimizer="radam"),
        average=recipe.average,
        **{**jumping.options(plain.flow, plain.data, seed), "without_teacher": True},
    )
    config = {"system": TASK, "kind": jumping.kind, "recipe_of": "rectified-flow", "recipe": recipe.spec()}
    loop = {"iterations": iterations, "batch": batch, "seed": seed, "resume": resume, "augment": augment}
    return run_training(task, out, config, loop, machines, keeping)


def _of_recipe(name: str, **changes: Any) -> dict[str, Any]:
    """A preset of `train rectified-flow` for improved consistency training."""
    preset = PRESETS[name]
    edm: dict[str, Any] = {"path": "edm", "predicts": "edm", "first_time": 0.0}
    return {
        "recipe": replace(preset.recipe, **edm, **changes),
        "iterations": preset.iterations,
        "batch": preset.batch,
        "machines": Machines(**preset.machines),
        "keeping": Keeping(**preset.keeping),
    }


train_trajectory.presets = {  # type: ignore[attr-defined]
    # As published (2310.14189, appendix): lr 1e-4, dropout 0.3, batch 1,024.
    "cifar10": {
        **_of_recipe(
            "cifar10",
            lr=1e-4,
            warmup=0,
            average=0.99993,
            network=replace(PRESETS["cifar10"].recipe.network, dropout=0.3),
        ),
        "iterations": 400_000,
        "batch": 1024,
    },
    "cifar10-small": _of_recipe("cifar10-small"),
}
