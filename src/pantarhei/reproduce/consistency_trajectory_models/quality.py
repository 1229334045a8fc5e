"""How good the samples are: against the number of jumps, against consistency distillation, and without each term."""

from __future__ import annotations

from typing import Any

import torch

from pantarhei import metrics
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import TrajectoryModel
from pantarhei.networks.discriminators import make_discriminator
from pantarhei.report import figures as draw
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.consistency_trajectory_models.teachers import (
    BATCH,
    ITERATIONS,
    SIZES,
    STEPS,
    Ring,
    digits,
    distances,
    learn,
    ring,
    seconds_an_iteration,
    usual,
)
from pantarhei.reproduce.training import run, small_mlp
from pantarhei.straighten import Adversarial, trajectory_student, trajectory_task
from pantarhei.straighten.denoising_term import denoising_objective
from pantarhei.training import FlowTask, Optimization

LENGTHS = (1000, 4000)
GAMMAS = (0.0, 0.5, 1.0)
DIGIT_ITERATIONS = 500


def steps(settings: Settings) -> dict[str, float]:
    """Distances against the number of jumps for three amounts of noise, three networks and two training lengths."""
    taught = ring(settings.seed, settings.quick)
    found: dict[str, float] = {}
    series = {}
    for network in SIZES:
        for iterations in LENGTHS:
            model = usual(settings.seed, settings.quick, "ctm", network, iterations).model
            for gamma in GAMMAS:
                name = f"{network}_{iterations}_{gamma:g}"
                values = distances(taught, model, gamma)
                found |= {f"{name}_{count}": value for count, value in values.items()}
                found[f"{name}_16_over_1"] = values[16] / values[1]
                if iterations == LENGTHS[-1]:
                    series[f"{network}, gamma {gamma:g}"] = (list(STEPS), list(values.values()))
    found["floor"] = taught.distance(taught.law.sample(len(taught.truth), seeded(settings.seed, 98)))
    if settings.pictures:
        picture = draw.curves(
            series,
            xlabel="jumps",
            ylabel="sliced Wasserstein distance",
            title=f"after {LENGTHS[-1]:,} iterations",
            log_x=True,
            log_y=True,
        )
        picture.savefig(settings.pictures / "steps.png", dpi=110)
    return found


def distillation(settings: Settings) -> dict[str, float]:
    """Against consistency distillation in as many iterations, and in as much time; and against solvers."""
    taught = ring(settings.seed, settings.quick)
    ctm = usual(settings.seed, settings.quick)
    ratio = seconds_an_iteration(taught, "ctm") / seconds_an_iteration(taught, "cd")
    longer = round(ITERATIONS * max(ratio, 1.0))
    arms = {
        "ctm": ctm.model,
        "cd": usual(settings.seed, settings.quick, "cd").model,
        "cd_same_time": learn(taught, "cd", iterations=longer).model,
    }
    found: dict[str, float] = {"time_ratio": ratio, "cd_same_time_iterations": longer}
    for name, model in arms.items():
        values = distances(taught, model, None)
        found |= {f"{name}_{count}": value for count, value in values.items()}
        found[f"{name}_error"] = taught.error(model.sample(x0=taught.x0, steps=1))
    for count in (1, 2, 4):
        x = taught.teacher.sample(x0=taught.x0, steps=count, method="ddim", final="clean")
        found[f"teacher_ddim_{count}"] = taught.distance(x)
    x = taught.teacher.sample(x0=taught.x0, steps=17, method="edm")
    found["teacher_heun_35"] = taught.distance(x)
    found["equal_iterations"] = found["cd_1"] / found["ctm_1"]
    found["equal_time"] = found["cd_same_time_1"] / found["ctm_1"]
    found["error_equal_iterations"] = found["cd_error"] / found["ctm_error"]
    found["error_equal_time"] = found["cd_same_time_error"] / found["ctm_error"]
    return found


def terms(settings: Settings) -> dict[str, float]:
    """Without the denoising term, with adaptive weights, with an adversarial term, without matching."""
    taught = ring(settings.seed, settings.quick)
    size = settings.size
    adversarial = Adversarial(
        make_discriminator((2,)),
        weight=0.1,
        after=size(ITERATIONS) // 2,
        optimization=Optimization(lr=1e-3, betas=(0.5, 0.9), clip=None),
    )
    arms = {
        "full": usual(settings.seed, settings.quick).model,
        "no_denoising": learn(taught, denoising=0.0).model,
        "no_matching": _denoiser(taught),
        "adaptive": usual(settings.seed, settings.quick, adaptive=True).model,
        "adversarial": learn(taught, adversarial=adversarial).model,
        "adversarial_adaptive": learn(
            taught,
            denoising=1.0,
            adaptive=True,
            adversarial=Adversarial(
                make_discriminator((2,)),
                after=size(ITERATIONS) // 2,
                optimization=Optimization(lr=1e-3, betas=(0.5, 0.9), clip=None),
            ),
        ).model,
    }
    found: dict[str, float] = {}
    for name, model in arms.items():
        values = distances(taught, model, 0.0)
        found |= {f"{name}_1": values[1], f"{name}_16": values[16], f"{name}_score": _score_error(taught, model)}
        solved = model.sample(x0=taught.x0, steps=17, method="edm", grid="edm")
        found[f"{name}_ode"] = taught.distance(solved)
    for other in [name for name in arms if name != "full"]:
        for figure in ("1", "16", "score", "ode"):
            found[f"{other}_over_full_{figure}"] = found[f"{other}_{figure}"] / found[f"full_{figure}"]
    return found


def _denoiser(taught: Ring) -> TrajectoryModel:
    """The denoising term alone: what is left where the comparison passes no gradient."""
    student = trajectory_student(taught.teacher, "ctm", start=small_mlp(taught.seed), predicts="edm")
    optimization = Optimization(lr=1e-3, decay="cosine", warmup=50)
    objective = denoising_objective(student)
    task = FlowTask(student, objective, taught.data, optimization=optimization, average=0.99)
    model: Any = run(task, taught.seed, Settings(taught.seed, taught.quick).size(ITERATIONS), BATCH)
    return model


def spans(settings: Settings) -> dict[str, float]:
    """The teacher some, one or all steps of the way: quality and time."""
    taught = ring(settings.seed, settings.quick)
    found: dict[str, float] = {}
    for span in ("soft", "local", "global"):
        learned = usual(settings.seed, settings.quick) if span == "soft" else learn(taught, span=span)
        values = distances(taught, learned.model, 0.0)
        found |= {
            f"{span}_1": values[1],
            f"{span}_16": values[16],
            f"{span}_error": taught.error(learned.model.sample(x0=taught.x0, steps=1)),
            f"{span}_milliseconds": 1000 * learned.seconds / settings.size(ITERATIONS),
        }
    found["local_over_soft"] = found["local_1"] / found["soft_1"]
    found["global_over_soft"] = found["global_1"] / found["soft_1"]
    return found


def kinds(settings: Settings) -> dict[str, float]:
    """Without a teacher, and the other ways to learn jumps."""
    taught = ring(settings.seed, settings.quick)
    arms = {
        "ctm": usual(settings.seed, settings.quick).model,
        "ctm_alone": learn(taught, "ctm", without_teacher=True).model,
        "cd": usual(settings.seed, settings.quick, "cd").model,
        "ct": learn(taught, "ct").model,
        "ict": learn(taught, "ict", metric=None).model,
        "meanflow": learn(taught, "meanflow").model,
        "meanflow_alone": learn(taught, "meanflow", without_teacher=True).model,
    }
    found: dict[str, float] = {}
    for name, model in arms.items():
        values = distances(taught, model, None)
        found |= {f"{name}_1": values[1], f"{name}_4": values[4]}
        found[f"{name}_error"] = taught.error(model.sample(x0=taught.x0, steps=1))
    found["alone_over_taught"] = found["ctm_alone_1"] / found["ctm_1"]
    found["alone_over_taught_error"] = found["ctm_alone_error"] / found["ctm_error"]
    return found


def images(settings: Settings) -> dict[str, float]:
    """On digits, with a trained teacher and its weights to start from."""
    taught = digits(settings.seed, settings.quick)
    size = settings.size
    truth = taught.truth.flatten(1)
    variance = taught.ends.var(dim=0).mean()
    found = {"teacher": metrics.sliced_wasserstein(taught.ends.flatten(1), truth, generator=seeded(0, 95))}
    rows = [taught.ends[:16]]
    arms = {
        "ctm": {"kind": "ctm", "times": 9},
        "ctm_adversarial": {
            "kind": "ctm",
            "times": 9,
            "adversarial": Adversarial(make_discriminator((1, 8, 8), 32), after=size(DIGIT_ITERATIONS) // 2),
        },
        "cd": {"kind": "cd", "times": 9},
        "meanflow": {"kind": "meanflow"},
    }

    def measured(name: str, x: torch.Tensor) -> None:
        found[f"{name}_error"] = float((x - taught.ends).square().mean() / variance)
        found[f"{name}_distance"] = metrics.sliced_wasserstein(x.flatten(1), truth, generator=seeded(0, 95))

    for count in (1, 2, 4, 8):
        x = taught.teacher.sample(x0=taught.x0, steps=count, method="ddim", final="clean")
        measured(f"teacher_ddim_{count}", x)
    for name, options in arms.items():
        task = trajectory_task(
            taught.teacher,
            taught.data,
            optimization=Optimization(lr=4e-4, optimizer="radam", decay="cosine", warmup=20),
            average=0.99,
            iterations=size(DIGIT_ITERATIONS),
            **options,  # type: ignore[arg-type]
        )
        model = run(task, settings.seed, size(DIGIT_ITERATIONS), 64)
        assert isinstance(model, TrajectoryModel)
        for count in (1, 2, 4):
            x = model.sample(x0=taught.x0, steps=count, generator=seeded(settings.seed, 96))
            measured(f"{name}_{count}", x)
            if count == 1:
                rows.append(x[:16])
    found["cd_over_ctm"] = found["cd_1_error"] / found["ctm_1_error"]
    found["ctm_over_two_steps"] = found["ctm_1_error"] / found["teacher_ddim_2_error"]
    found["adversarial_over_plain"] = found["ctm_adversarial_1_distance"] / found["ctm_1_distance"]
    if settings.pictures:
        save_image_grid(torch.cat(rows), settings.pictures / "digits.png", columns=16)
    return found


def _score_error(taught: Ring, model: TrajectoryModel) -> float:
    """Error of the data estimate at s = t on noisy data, over the data's size, averaged over levels between 0.02 and 5."""
    errors = []
    x1 = taught.truth[:2000]
    x0 = torch.randn(x1.shape, generator=seeded(taught.seed, 99))
    with torch.no_grad():
        for level in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
            t = model.path.time_at(torch.tensor(1 / level))
            x = model.path.sample(x0, x1, None, t)[0]
            exact = taught.teacher.denoise(x, t)
            errors.append(float(((model.denoise(x, t) - exact).square().mean() / x1.square().mean()).sqrt()))
    return sum(errors) / len(errors)
