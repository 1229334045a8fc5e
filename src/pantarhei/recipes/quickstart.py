"""The quickstart: digits, a rectified flow, one reflow round, and a page that shows what straightening did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pantarhei.files import write_json
from pantarhei.flow.numbered import numbered_labels, numbered_source
from pantarhei.interop import load
from pantarhei.recipes.cards import write_card
from pantarhei.recipes.evaluation import Evaluation, evaluate_flow, make_reference
from pantarhei.recipes.quickstart_page import STEPS, percent, write_page
from pantarhei.recipes.rectified_flow import RectifiedFlowConfig, build_task
from pantarhei.report import Table
from pantarhei.straighten import Solver, Straightness, inspect_pairs, make_pairs, reflow_task, straightness
from pantarhei.training import Optimization, Run, Task, checkpoints, train


@dataclass(frozen=True)
class QuickstartConfig:
    """Sizes of the quickstart, found on two CPU cores.

    Attributes:
        iterations, batch: training of the flow.
        pairs, pair_steps: what it is straightened with; Heun steps, two evaluations each.
        reflow_iterations: training on the pairs.
        count: samples of each evaluation.
    """

    recipe: RectifiedFlowConfig = field(default_factory=lambda: RectifiedFlowConfig(average=0.995))
    iterations: int = 600
    batch: int = 128
    pairs: int = 8192
    pair_steps: int = 12
    reflow_iterations: int = 500
    reflow: Optimization = field(default_factory=lambda: Optimization(lr=1e-3, warmup=20, decay="cosine"))
    count: int = 2000


@dataclass(frozen=True)
class Quickstart:
    """What the quickstart found."""

    before: Evaluation
    after: Evaluation
    straightness_before: Straightness
    straightness_after: Straightness
    report: Path

    def table(self) -> Table:
        """Before and after, side by side."""
        rows: list[tuple[Any, ...]] = [
            (b.steps, b.frechet, a.frechet, percent(b.accuracy), percent(a.accuracy), percent(a.closer))
            for b, a in zip(self.before.rows, self.after.rows, strict=True)
        ]
        rows.append(("held-out digits", self.before.floor, self.before.floor, "-", "-", "1.0 %"))
        columns = ("steps", "Frechet before", "Frechet after", "accuracy before", "after", "copies after")
        caption = (
            f"{self.after.count:,} samples (Euler) against {self.after.train_count:,} training digits, before and after "
            f"one reflow round. Features: {self.after.extractor}. Brackets: 95 % subsampling interval. Accuracy: share "
            "that the classifier reads as the digit asked for. Copies: nearer to a training digit than 99 % of the held-out."
        )
        return Table(columns, rows, caption)


def quickstart(
    out: str | Path,
    *,
    seed: int = 0,
    config: QuickstartConfig | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> Quickstart:
    """Train, straighten, evaluate, report. What an earlier call finished in `out` is not done again.

    Args:
        out: folder: `1-rectified-flow/`, `2-rectified-flow/` (runs), `report.html`, `evaluation.json`.
        seed: of everything.
        config: sizes.
        progress: show progress lines.
        say: takes a line at the start of each stage.
    """
    config, out = config or QuickstartConfig(), Path(out)
    recipe, first, second = config.recipe, out / "1-rectified-flow", out / "2-rectified-flow"
    train_set, held_out = recipe.data.open()
    loop: dict[str, Any] = {
        "batch": config.batch,
        "seed": seed,
        "progress": progress,
        "checkpoint_every": 100,
        "keep": 1,
    }

    say(f"1/4 training a rectified flow on {len(train_set):,} digits, {config.iterations} iterations")
    task, _ = build_task(recipe, seed)
    recipe_config = {"system": "rectified-flow", "recipe": recipe.spec()}
    _train_once(task, first, config.iterations, recipe_config, loop)
    teacher = load(first)

    say(f"2/4 making {config.pairs:,} pairs of noise and samples with {config.pair_steps} Heun steps")
    solver = Solver("heun", config.pair_steps)
    pairs = make_pairs(
        teacher, config.pairs, second / "pairs", seed=seed, solver=solver, teacher=str(first), progress=progress
    )
    for warning in inspect_pairs(pairs, teacher, limit=256).warnings:
        say(f"warning: {warning}")

    say(f"3/4 straightening: {config.reflow_iterations} iterations on the pairs")
    again = reflow_task(teacher, pairs, optimization=config.reflow, average=recipe.average, teacher=str(first))
    _train_once(
        again, second, config.reflow_iterations, {**recipe_config, "kind": "reflow", "teacher": str(first)}, loop
    )
    student = load(second)

    say("4/4 evaluating both, and writing the page")
    reference = make_reference(train_set, held_out, cache=out / "classifier.safetensors", seed=0)
    scores: dict[str, Any] = {"steps": STEPS, "count": config.count, "seed": seed + 1, "progress": progress}
    before = evaluate_flow(teacher, reference, **scores)
    after = evaluate_flow(student, reference, **scores)
    numbers = range(256)
    x0, label = numbered_source(teacher, seed + 2, numbers), numbered_labels(seed + 2, numbers, 10)
    straight = [straightness(flow, x0, condition=label) for flow in (teacher, student)]
    result = Quickstart(before, after, straight[0], straight[1], out / "report.html")
    data: dict[str, Any] = {"seed": seed, "before": before.data(), "after": after.data()}
    data |= {f"straightness_{k}": vars(s) for k, s in zip(("before", "after"), straight, strict=True)}
    write_json(out / "evaluation.json", data)
    write_page(result, teacher, student, reference, out, seed)
    return result


def _train_once(task: Task, folder: Path, iterations: int, config: dict[str, Any], loop: dict[str, Any]) -> None:
    """Train unless an earlier call has finished it; go on where one was interrupted."""
    newest = checkpoints.newest(folder / "checkpoints")
    if newest is not None and int(newest.name) >= iterations:
        seed = Run.open(folder).config["loop"]["seed"]
        if seed != loop["seed"]:
            raise ValueError(f"--seed: {folder.parent} was made with seed {seed}; choose another --out")
        return
    result = train(task, folder, iterations=iterations, config=config, resume=True, **loop)
    write_card(result.run, result)
    if result.reason == "interrupted":
        raise KeyboardInterrupt
