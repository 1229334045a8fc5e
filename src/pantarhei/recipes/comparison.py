"""Which way of making a teacher fast is best? All methods that apply, one teacher, one budget, one table.

A trained method may use so many minutes for everything: its pairs, its training. Methods that share pairs are each charged
for all of them. What needs no training (solvers, tuned grids) stands beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pantarhei.data import Source
from pantarhei.files import read_json, write_json
from pantarhei.flow import Flow, TrajectoryModel, on_path
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.numbered import Conditions, numbered_conditions, numbered_source
from pantarhei.flow.pretrained import fingerprint
from pantarhei.interop import load
from pantarhei.recipes.comparison_rows import Comparison, Judge, Row, file_name
from pantarhei.recipes.evaluation import Reference
from pantarhei.straighten import (
    PairSource,
    Solver,
    distillation_task,
    make_pairs,
    phased_task,
    plus_plus_task,
    rectified_diffusion_task,
    reflow_task,
    trajectory_task,
    tuned_grid,
)
from pantarhei.straighten.first_order import clean_end
from pantarhei.straighten.pairs import pair_stream
from pantarhei.straighten.students import linear_student, name_of
from pantarhei.straighten.trajectory_students import Kind
from pantarhei.training import FlowTask, Optimization, train

PAIR_SHARE = 0.4  # of the budget, at most, that goes into pairs
TRIAL = 3.0  # seconds in which the time of an iteration is measured
Sampler = Callable[[Flow, int], dict[str, Any]]


@dataclass(frozen=True)
class Budget:
    """What each trained method may use.

    Attributes:
        minutes: for everything.
        batch: items a training step.
        lr, average: of the student.
        pairs: at most so many.
        solver: how pairs are made.
    """

    minutes: float
    batch: int = 128
    lr: float = 5e-4
    average: float = 0.995
    pairs: int = 200_000
    solver: Solver = field(default_factory=lambda: Solver("edm", 17))


@dataclass(frozen=True)
class Arm:
    """A trained method.

    Attributes:
        name: in tables, and of its folder.
        task: makes its task from the teacher and the pairs.
        pairs: whether it needs pairs.
        samplers: name -> options of `Flow.sample` for a number of evaluations.
        applies: why it does not, or None.
        least, most: numbers of evaluations that it is trained for.
    """

    name: str
    task: Callable[[Flow, PairSource | None, Any], FlowTask]
    pairs: bool = True
    samplers: tuple[str, ...] = ("ddim",)
    applies: Callable[[Flow], str | None] = lambda flow: None
    least: int = 1
    most: int = 1_000


def trained_arms(data: tuple[Source, Source], perceptual: Premetric | None) -> tuple[Arm, ...]:
    """The methods, each with the settings its paper recommends.

    Conditions are never dropped: students are compared without further guidance, where that is pure loss.
    """

    def optimization(budget: Budget) -> dict[str, Any]:
        return {"optimization": Optimization(lr=budget.lr, warmup=50, decay="cosine"), "average": budget.average}

    def reflow(flow: Flow, pairs: PairSource | None, budget: Budget) -> FlowTask:
        assert pairs is not None
        return reflow_task(linear_student(flow), pairs, any_teacher=True, **optimization(budget))

    def plus_plus(metric: Premetric | None) -> Callable[[Flow, PairSource | None, Budget], FlowTask]:
        def made(flow: Flow, pairs: PairSource | None, budget: Budget) -> FlowTask:
            assert pairs is not None
            return plus_plus_task(flow, pairs, perceptual=metric, **optimization(budget))

        return made

    def rectified_diffusion(flow: Flow, pairs: PairSource | None, budget: Budget) -> FlowTask:
        assert pairs is not None
        return rectified_diffusion_task(flow, pairs, **optimization(budget))

    def phased(flow: Flow, pairs: PairSource | None, budget: Budget) -> FlowTask:
        return phased_task(flow, data[0], held_out=data[1], guidance=budget.solver.guidance, **optimization(budget))

    def trajectory(kind: Kind) -> Callable[[Flow, PairSource | None, Budget], FlowTask]:
        def made(flow: Flow, pairs: PairSource | None, budget: Budget) -> FlowTask:
            usual = optimization(budget)
            usual["optimization"] = replace(usual["optimization"], optimizer="radam")
            guidance = budget.solver.guidance
            alone = kind == "ict"  # a grid that does not grow: how long it may train is not known yet
            own = {"times": 40} if alone else {"guidance": guidance}
            if kind == "ctm":
                own["times"] = 9  # an iteration costs 2 k + 10 evaluations: budgets buy more of the shorter ones
            return trajectory_task(flow, data[0], held_out=data[1], kind=kind, **own, **usual)

        return made

    def distil(flow: Flow, pairs: PairSource | None, budget: Budget) -> FlowTask:
        assert pairs is not None
        return distillation_task(flow, pairs, **optimization(budget))

    def on_real_data(flow: Flow) -> str | None:
        reason = flow.provenance.why_not_marginal()
        return None if reason is None else f"starts from noisy data, and {reason}"

    def only_linear(flow: Flow) -> str | None:
        plain = flow.path.spec()["name"] == "linear" and flow.prediction.spec()["name"] == "velocity"
        return None if plain else "needs a velocity on the linear path"

    both = ("ddim", "reinterpolate")
    arms = [
        Arm("rectified flow (reflow)", reflow, samplers=both),
        Arm("rectified flow++", plus_plus(None), samplers=both),
        Arm("rectified diffusion", rectified_diffusion),
        Arm("phased (4)", phased, pairs=False, least=4),
        Arm("consistency distillation", trajectory("cd"), pairs=False, samplers=("jump",), applies=on_real_data),
        Arm("consistency trajectory", trajectory("ctm"), pairs=False, samplers=("jump",), applies=on_real_data),
        Arm("consistency training", trajectory("ict"), pairs=False, samplers=("jump",), applies=on_real_data),
        Arm("mean velocity", trajectory("meanflow"), pairs=False, samplers=("jump",), applies=on_real_data),
        Arm("distilled to 1 step", distil, applies=only_linear, most=1),
    ]
    if perceptual is not None:
        name = getattr(perceptual, "name", "perceptual")
        arms.insert(2, Arm(f"rectified flow++ with {name}", plus_plus(perceptual), samplers=both))
    return tuple(arms)


def compare(
    teacher: Flow,
    data: tuple[Source, Source],
    reference: Reference,
    out: str | Path,
    budget: Budget,
    *,
    evaluations: Sequence[int] = (1, 2, 4, 8),
    count: int = 2000,
    seed: int = 0,
    conditions: Conditions | Source | None = None,
    perceptual: Premetric | None = None,
    methods: Sequence[str] = (),
    name: str = "",
    batch: int = 256,
    say: Callable[[str], None] = print,
    **loop: Any,
) -> Comparison:
    """Run every method that applies on one teacher within a budget, and score them all.

    Whatever is finished in `out` is kept, so an interrupted comparison goes on.

    Args:
        teacher: on an affine path, with a Gaussian source.
        data: training and held-out data, for the phased method and the scores.
        reference: from `make_reference`.
        out: folder of pairs, students and `comparison.json`.
        budget: of each trained method.
        evaluations: numbers of network evaluations to score.
        count: samples for each row.
        seed: of everything that is drawn.
        conditions: see `numbered_conditions`.
        perceptual: adds rectified flow++ with it.
        methods: parts of the names of the trained methods to run; all by default.
        name: of the teacher.
        batch: rows sampled at a time.
        say: takes progress lines.
        loop: further fields of `LoopConfig`.

    Raises:
        ValueError: for a budget, count or numbers out of range, methods that are not known, or a teacher without a Gaussian
            source.
    """
    if not budget.minutes > 0:
        raise ValueError(f"budget: must be positive, got {budget.minutes:g} minutes")
    if count < 10:
        raise ValueError(f"count: at least 10 samples are needed, got {count}")
    if not evaluations or min(evaluations) < 1:
        raise ValueError(f"evaluations: every number must be at least 1, got {list(evaluations)}")
    if not getattr(teacher.source, "gaussian", False):
        raise ValueError("teacher: the methods compared here start from noise")
    out = Path(out)
    arms = trained_arms(data, perceptual)
    for wanted in methods:
        if not any(wanted in arm.name for arm in arms):
            raise ValueError(f"methods: {wanted!r} is none of {', '.join(arm.name for arm in arms)}")
    arms = tuple(a for a in arms if not methods or any(wanted in a.name for wanted in methods))
    if loop.get("devices", 1) * loop.get("nodes", 1) > 1:
        raise ValueError("devices: a comparison runs in one process")
    setting = {
        "budget": asdict(budget),
        "count": count,
        "seed": seed,
        "teacher": fingerprint(teacher.network),
        "data": [part.describe().get("name", "") for part in data],
        "extractor": reference.extractor.name,
        "perceptual": None if perceptual is None else name_of(perceptual),
    }
    _check_setting(out / "setting.json", setting)
    judge = Judge(teacher, reference, budget.solver, count, seed, conditions, batch)
    rows: list[Row] = []
    for arm_name, sampler, number, (flow, how) in _free_arms(teacher, evaluations, seed, budget.solver.guidance, judge):
        rows.append(judge.row(arm_name, sampler, number, flow, how, 0.0, out, _evaluations(how)))
        say(f"{arm_name}, {sampler}, {number} evaluations: Frechet distance {rows[-1].frechet.value:.4g}")
    pairs, pair_minutes = None, 0.0
    if any(arm.pairs and _applies(arm, teacher) is None for arm in arms):
        pairs, pair_minutes = _pairs(teacher, out / "pairs", budget, seed, conditions, name, say)
    skipped = {}
    for arm in arms:
        reason = _applies(arm, teacher)
        if reason is not None:
            skipped[arm.name] = reason
            continue
        folder = out / file_name(arm.name)
        charged = pair_minutes if arm.pairs else 0.0
        student, used = _trained(arm, teacher, pairs, folder, budget, charged, seed, loop, say)
        for sampler in arm.samplers:
            for number in evaluations:
                if not arm.least <= number <= arm.most or (sampler == "reinterpolate" and number <= 2):
                    continue  # the start noise is the present one in the first step, and the last step needs none
                options = {"steps": number, "method": sampler, "final": clean_end(student)}
                rows.append(judge.row(arm.name, sampler, number, student, options, charged + used, out))
                say(f"{arm.name}, {sampler}, {number} evaluations: Frechet distance {rows[-1].frechet.value:.4g}")
    about = {
        "teacher": name,
        "trained_on": teacher.provenance.data,
        "provenance": asdict(teacher.provenance),
        "budget_minutes": budget.minutes,
        "pairs": 0 if pairs is None else len(pairs),
        "pair_minutes": pair_minutes,
        "evaluations": list(evaluations),
        "guidance": budget.solver.guidance,
        "count": count,
        "seed": seed,
        "skipped": skipped,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    result = Comparison(
        tuple(rows), judge.teacher_score, judge.teacher_evaluations, reference.floor, reference.extractor.name, about
    )
    write_json(out / "comparison.json", {**asdict(result), "rows": [asdict(row) for row in result.rows]})
    return result


def _applies(arm: Arm, teacher: Flow) -> str | None:
    """Why a method does not apply to a teacher, or None."""
    if isinstance(teacher, TrajectoryModel) and arm.samplers != ("jump",):
        return "would train the teacher's field, and let its jumps go stale"
    return arm.applies(teacher)


def _free_arms(
    teacher: Flow, evaluations: Sequence[int], seed: int, guidance: float, judge: Judge
) -> Iterator[tuple[str, str, int, tuple[Flow, dict[str, Any]]]]:
    """What needs no training, each on the path and grid where it is best known."""
    moved = on_path(teacher)
    tuning = range(1_000_000, 1_000_032)  # other noises than those that are scored
    condition = judge.named(tuning) or None
    x0 = numbered_source(teacher, pair_stream(seed), tuning, condition)
    for number in evaluations:
        clean = {"final": "clean", "guidance": guidance}
        if isinstance(teacher, TrajectoryModel):
            yield "own jumps", "jump", number, (teacher, {"steps": number, "method": "jump", "guidance": guidance})
        yield "DDIM, own grid", "ddim", number, (teacher, {"steps": number, "method": "ddim", **clean})
        yield "Euler, linear path", "euler", number, (moved, {"steps": number, "method": "euler", **clean})
        if number > 1:
            own = {"steps": number, "method": "dpm-solver", "grid": _levels(teacher), **clean}
            yield "DPM-Solver++ (2M), own grid", "dpm-solver", number, (teacher, own)
            even = {"steps": number, "method": "dpm-solver", **clean}
            yield "DPM-Solver++ (2M), linear path", "dpm-solver", number, (moved, even)
            grid = tuned_grid(moved, number, x0, condition=condition, guidance=guidance)
            yield "tuned grid", "ddim", number, (moved, {"steps": grid, "method": "ddim", **clean})
        if number > 2:
            steps = (number + 1) // 2
            yield "Heun (EDM)", "edm", number, (teacher, {"steps": steps, "method": "edm", **clean})


def _evaluations(options: dict[str, Any]) -> int:
    """Rows of a sample that the network sees, with a clean end: one a step, but two a step of Heun's before the last."""
    steps = options["steps"]
    count = steps if isinstance(steps, int) else len(steps) - 1
    rows = 1 if options["guidance"] == 1.0 else 2  # guidance asks for two rows at once
    return rows * (2 * count - 1 if options["method"] == "edm" else count)


def _levels(flow: Flow) -> str:
    """The grid of a multistep method: even in log(alpha / sigma), but even in t on EDM's path and the linear one."""
    return "uniform" if flow.path.spec()["name"] in ("edm", "linear") else "logsnr"


def _pairs(
    teacher: Flow,
    folder: Path,
    budget: Budget,
    seed: int,
    conditions: Conditions | Source | None,
    name: str,
    say: Callable[[str], None],
) -> tuple[PairSource, float]:
    """As many pairs as a part of the budget buys, and what they took in minutes."""
    note = folder.parent / "pairs.json"
    known: dict[str, Any] = read_json(note) if note.is_file() else {}
    made: dict[str, Any] = {"seed": seed, "solver": budget.solver, "conditions": conditions, "teacher": name}
    if not known:
        x0 = numbered_source(teacher, seed, range(64), numbered_conditions(teacher, seed, conditions)(range(64)))
        condition = numbered_conditions(teacher, seed, conditions)(range(64)) or None
        began = time.monotonic()
        teacher.sample(x0=x0, condition=condition, decode=False, **budget.solver.options())
        rate = 64 / (time.monotonic() - began)
        count = int(min(budget.pairs, max(64, rate * 60 * budget.minutes * PAIR_SHARE)))
        known = {"count": count, "minutes": 0.0}
        write_json(note, known)
    began = time.monotonic()
    try:
        store = make_pairs(teacher, known["count"], folder, progress=True, **made)
    finally:  # what an interrupted session took counts as well
        known["minutes"] += (time.monotonic() - began) / 60
        write_json(note, known)
    say(f"pairs: {known['count']:,} in {known['minutes']:.2f} minutes")
    return store, float(known["minutes"])


def _trained(
    arm: Arm,
    teacher: Flow,
    pairs: PairSource | None,
    folder: Path,
    budget: Budget,
    charged: float,
    seed: int,
    loop: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[Flow, float]:
    """The student of a method and the minutes it was trained."""
    note = folder.parent / f"{folder.name}.json"
    if note.is_file() and read_json(note).get("done"):
        return load(folder).to(teacher.device), float(read_json(note)["minutes"])
    left = 60 * (budget.minutes - charged)
    if left <= 0:
        raise ValueError(f"budget: {budget.minutes:g} minutes are used up by the pairs alone; give more")
    iterations = int(read_json(note)["iterations"]) if note.is_file() else 0
    if not iterations:
        seconds = _seconds_an_iteration(arm.task(teacher, pairs, budget), budget, seed, loop)
        iterations = max(10, int(left / seconds))
        write_json(note, {"iterations": iterations, "done": False})
    say(f"{arm.name}: {iterations:,} iterations")
    options: dict[str, Any] = {
        "iterations": iterations,
        "batch": budget.batch,
        "seed": seed,
        "resume": True,
        "checkpoint_every": max(50, iterations // 10),
        "log_every": max(1, iterations // 20),
        "tensorboard": False,
        "config": {"system": "comparison", "kind": arm.name},
        **loop,
    }
    task = arm.task(teacher, pairs, budget)
    result = train(task, folder, **options)
    if result.reason == "interrupted":
        raise KeyboardInterrupt
    used = result.seconds / 60  # over all sessions
    write_json(note, {"iterations": iterations, "done": True, "minutes": used})
    student = task.result()
    return student, used


def _seconds_an_iteration(task: FlowTask, budget: Budget, seed: int, loop: dict[str, Any]) -> float:
    """By a trial of some seconds in a folder that is thrown away."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {**loop, "batch": budget.batch, "seed": seed}
        options |= {"tensorboard": False, "progress": False}
        began = time.monotonic()
        if train(task, Path(folder) / "warm", iterations=3, **options).reason == "interrupted":
            raise KeyboardInterrupt
        trial = max(5, int(3 * TRIAL / (time.monotonic() - began)))
        result = train(task, Path(folder) / "timed", iterations=trial, **options)
        if result.reason == "interrupted":
            raise KeyboardInterrupt
        return result.seconds / trial


def _check_setting(path: Path, setting: dict[str, Any]) -> None:
    """Refuse to go on with a comparison that was begun with other settings."""
    if not path.is_file():
        write_json(path, setting)
        return
    kept = read_json(path)
    changed = [key for key, value in setting.items() if kept.get(key) != value]
    if changed:
        raise ValueError(
            f"{path.parent} holds a comparison with another {', '.join(changed)}; choose another folder or delete it"
        )
