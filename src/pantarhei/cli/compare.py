"""`pantarhei straighten compare TEACHER`."""

from __future__ import annotations

from pathlib import Path

import tyro

from pantarhei.cli.teachers import PairMethod, Teaching, check_images, open_teacher, solver_named
from pantarhei.cli.train import Machines
from pantarhei.recipes.comparison import Budget, compare
from pantarhei.recipes.comparison_page import write_page
from pantarhei.recipes.evaluation import make_reference
from pantarhei.recipes.perceptual import PerceptualName, build_metric
from pantarhei.straighten import Solver


def straighten_compare(
    teacher: tyro.conf.Positional[Path],
    out: Path,
    budget: float = 10.0,
    evaluations: tuple[int, ...] = (1, 2, 4, 8),
    methods: tuple[str, ...] = (),
    count: int = 2000,
    batch: int = 128,
    lr: float = 5e-4,
    average: float = 0.995,
    pair_method: PairMethod = "auto",
    pair_steps: int = 17,
    max_pairs: int = 200_000,
    guidance: float = 1.0,
    perceptual: PerceptualName = "none",
    vgg: Path | None = None,
    lpips: Path | None = None,
    inception: Path | None = None,
    seed: int = 0,
    teaching: Teaching = Teaching(),
    machines: Machines = Machines(),
) -> int:
    """All methods that apply to a teacher, within one budget each, and solvers that need no training: one table, one page.

    Writes `comparison.html`, `comparison.json` and `comparison.md`; an interrupted comparison goes on by the same command.

    Args:
        teacher: a run, a saved flow, a file of EDM or SiT, or a folder of diffusers.
        out: folder.
        budget: minutes that each trained method may use, its pairs included.
        evaluations: numbers of network evaluations a sample to score.
        methods: parts of names of methods, such as "++" or "diffusion", instead of all.
        count: samples for each row.
        batch: items a training step.
        lr: learning rate of every student.
        average: decay of the students' moving average.
        pair_method: solver that makes the pairs (auto: edm, on the linear path heun).
        pair_steps: its steps.
        max_pairs: at most so many pairs.
        guidance: scale baked into pairs, and that of what needs no training.
        perceptual: adds rectified flow++ with this distance (lpips needs --vgg and --lpips).
        vgg: weights of VGG16.
        lpips: linear weights of LPIPS.
        inception: file of Inception weights; without it features come from a small classifier trained on the data.
        seed: of everything.
        teaching: what is known of the teacher; its `--data` are compared with.
        machines: where it runs.
    """
    opened = open_teacher(teacher, machines, teaching)
    if opened.data is None:
        raise ValueError("--data: samples are scored against data, which this teacher does not name; give them")
    if machines.threads is not None:
        import torch

        torch.set_num_threads(machines.threads)
    flow = opened.flow
    method = solver_named(pair_method, flow)
    metric = None
    if perceptual != "none":
        check_images(flow, perceptual)
        metric = build_metric(perceptual, opened.data[0], seed, vgg=vgg, linear=lpips)
    out.mkdir(parents=True, exist_ok=True)
    reference = make_reference(*opened.data, inception=inception, cache=out / "classifier.safetensors", seed=seed)
    spent = Budget(budget, batch, lr, average, max_pairs, Solver(method, pair_steps, guidance))
    result = compare(
        flow,
        opened.data,
        reference,
        out,
        spent,
        evaluations=evaluations,
        count=count,
        seed=seed,
        conditions=opened.conditions,
        perceptual=metric,
        methods=methods,
        name=str(teacher),
        **machines.options(),
    )
    print(result.table().text())
    for number, row in result.best().items():
        print(f"best with {number} evaluations: {row.arm} ({row.sampler}), Frechet distance {row.frechet.value:.4g}")
    print(write_page(result, out))
    return 0
