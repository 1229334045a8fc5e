"""Images in one step: reflow and distillation of digits, with the plain loss and with perceptual ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pantarhei.flow import Flow
from pantarhei.recipes.evaluation import evaluate_flow, make_reference
from pantarhei.recipes.perceptual import MetricName, build_metric
from pantarhei.recipes.rectified_flow import RectifiedFlowConfig, build_task
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import run
from pantarhei.straighten import Solver, distillation_task, make_pairs, reflow_task
from pantarhei.training import Optimization

METRICS: tuple[MetricName, ...] = ("squared", "gradients", "classifier")
SOLVER = Solver("heun", 12)


def one_step_digits(settings: Settings) -> dict[str, float]:
    """Frechet distances of one-step samples: a flow, its reflow, and three students distilled from that."""
    size, seed = settings.size, settings.seed
    recipe = RectifiedFlowConfig(average=0.995)
    train_set, held_out = recipe.data.open()
    # The judge is trained from another seed than the classifier of the loss, so that no student sees its own judge.
    judge = make_reference(train_set, held_out, seed=seed + 1000)
    found = {"floor": judge.floor}

    def score(name: str, flow: Flow, steps: tuple[int, ...] = (1,)) -> None:
        result = evaluate_flow(flow, judge, steps=steps, count=size(2000), seed=seed)
        for row in result.rows:
            found[f"{name}_{row.steps}_step{'s' if row.steps != 1 else ''}"] = row.frechet.value
            found[f"{name}_{row.steps}_accuracy"] = row.accuracy or 0.0

    task, _ = build_task(recipe, seed)
    first = run(task, seed, size(600), 128)
    score("1_rectified", first, (1, 50))
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(first, size(8192), Path(folder) / "1", seed=seed, solver=SOLVER)
        second = run(reflow_task(first, pairs, optimization=_adam(), average=0.995), seed, size(500), 128)
        score("2_rectified", second, (1, 50))
        pairs = make_pairs(second, size(8192), Path(folder) / "2", seed=seed, solver=SOLVER)
        for name in METRICS:
            metric = build_metric(name, train_set, seed)
            task = distillation_task(second, pairs, metric=metric, optimization=_adam(), average=0.995)
            score(f"distilled_{name}", run(task, seed, size(500), 128))
    found["reflow_gain"] = found["1_rectified_1_step"] / found["2_rectified_1_step"]
    found["distilled_over_reflow"] = found["distilled_squared_1_step"] / found["2_rectified_1_step"]
    for name in METRICS[1:]:
        found[f"{name}_over_squared"] = found[f"distilled_{name}_1_step"] / found["distilled_squared_1_step"]
    found["fine_after_over_before"] = found["2_rectified_50_steps"] / found["1_rectified_50_steps"]
    return found


def _adam() -> Optimization:
    return Optimization(lr=1e-3, warmup=20, decay="cosine")
