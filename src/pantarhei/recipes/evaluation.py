"""Evaluate a flow on its data: quality against steps, with the extractor named and the floor beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data import Source
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, TrajectoryModel
from pantarhei.flow.endings import Final
from pantarhei.flow.numbered import join, numbered_samples
from pantarhei.flow.updates import path_step
from pantarhei.metrics import ClassifierFeatures, Interval
from pantarhei.report import Table
from pantarhei.report.progress import Progress
from pantarhei.solve import as_step


class Coordinates:
    """Points are their own features."""

    name = "the coordinates themselves"

    def __call__(self, x: Tensor) -> Tensor:
        """(B, ...) to (B, D)."""
        return x.flatten(1)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: the data's parts, and features of the training part."""

    train: Tensor
    held_out: Tensor
    extractor: Any
    train_features: Tensor
    floor: float

    @property
    def classifier(self) -> ClassifierFeatures | None:
        """The extractor, where it also classifies."""
        return self.extractor if isinstance(self.extractor, ClassifierFeatures) else None


@dataclass(frozen=True)
class StepScores:
    """Scores of the samples of one number of steps.

    Attributes:
        steps, evaluations: steps of the sampler (None under error control), and rows that the network saw for a sample
            (with guidance two an evaluation).
        frechet: Frechet distance to the training images in the extractor's features, with an interval.
        kernel: kernel distance (KID) in these features.
        precision, recall: of k-nearest-neighbour manifolds in these features.
        density, coverage: their robust counterparts.
        inception_score: mean over ten splits, with Inception weights; else None.
        accuracy: share of samples that the classifier gives the label they were made for; None without labels.
        nearest: 1st percentile of the distance to the nearest training item.
        closer: share of samples nearer to a training item than the 1st percentile of held-out items is.
    """

    steps: int | None
    evaluations: float
    frechet: Interval
    kernel: float
    precision: float
    recall: float
    density: float
    coverage: float
    inception_score: float | None
    accuracy: float | None
    nearest: float
    closer: float


@dataclass(frozen=True)
class Evaluation:
    """Scores against steps, and what they are to be read with."""

    rows: tuple[StepScores, ...]
    extractor: str
    floor: float
    held_out_nearest: float
    count: int
    train_count: int
    method: str
    guidance: float
    seed: int

    def table(self) -> Table:
        """For people."""
        with_score = any(r.inception_score is not None for r in self.rows)

        def scores(row: StepScores) -> tuple[float | None, ...]:
            return (row.inception_score,) if with_score else ()

        rows: list[tuple[Any, ...]] = [
            (
                "adaptive" if r.steps is None else r.steps,
                r.evaluations,
                r.frechet,
                *scores(r),
                r.precision,
                r.recall,
                "-" if r.accuracy is None else f"{100 * r.accuracy:.1f} %",
                r.nearest,
                f"{100 * r.closer:.1f} %",
            )
            for r in self.rows
        ]
        score = ("-",) if with_score else ()
        rows.append(("held-out data", "-", self.floor, *score, "-", "-", "-", self.held_out_nearest, "1.0 %"))
        score = ("inception score",) if with_score else ()
        columns = ("steps", "NFE", "Frechet distance", *score, "precision", "recall", "accuracy", "nearest", "copies")
        caption = (
            f"{self.count:,} samples ({self.method}, guidance {self.guidance:g}, seed {self.seed}) against "
            f"{self.train_count:,} training items. Features: {self.extractor}. NFE: evaluations of the field. "
            "Brackets: 95 % subsampling interval. Accuracy: the classifier sees the label asked for. Nearest: 1st "
            "percentile of the distance to a training item; copies: nearer than 99 % of the held-out items."
        )
        return Table(columns, rows, caption)

    def data(self) -> dict[str, Any]:
        """For `evaluation.json`."""
        return asdict(self)


def features_of(extractor: Any, samples: Tensor) -> Tensor:
    """Features (N, D) of samples, in batches where they are images."""
    return extractor(samples) if isinstance(extractor, Coordinates) else metrics.extract(extractor, samples)


def make_reference(
    train_set: Source,
    held_out: Source,
    *,
    inception: str | Path | None = None,
    cache: Path | None = None,
    limit: int = 10_000,
    seed: int = 0,
) -> Reference:
    """Choose the feature extractor and compute what all evaluations share.

    Inception where its weights are given; else a small classifier trained on the labelled training images; else (points,
    or images without labels) the values themselves.

    Args:
        train_set, held_out: the data.
        inception: file of Inception weights.
        cache: where a trained classifier is kept for the next evaluation.
        limit: items of each part to use.
        seed: of the classifier.
    """
    train_batch = train_set.fetch(torch.arange(min(limit, len(train_set))))
    held_batch = held_out.fetch(torch.arange(min(limit, len(held_out))))
    train, held = train_batch["x1"], held_batch["x1"]
    extractor: Any
    if inception is not None:
        extractor = metrics.InceptionFeatures(inception)
    elif train.ndim == 4 and "label" in train_batch and min(train.shape[-2:]) >= 8:
        extractor = _classifier(train_set.name, train_batch, held_batch, cache, seed)
    else:
        extractor = Coordinates()
    features = features_of(extractor, train)
    floor = metrics.frechet_distance(features_of(extractor, held), features)
    return Reference(train, held, extractor, features, floor)


def check_gamma(flow: Flow, gamma: float | None, method: str, epsilon: Any = None) -> bool:
    """Whether sampling so is by jumps.

    Raises:
        ValueError: it is not, and a gamma is given.
    """
    jumps = isinstance(flow, TrajectoryModel) and flow.jumps_with(method, epsilon=epsilon)
    if gamma is not None and not jumps:
        raise ValueError("gamma: is for the jumps of trajectory models")
    return jumps


def evaluate_flow(
    flow: Flow,
    reference: Reference,
    *,
    steps: Sequence[int] = (1, 2, 4, 8, 50),
    count: int = 2000,
    seed: int = 0,
    method: str = "auto",
    rtol: float | None = None,
    guidance: float = 1.0,
    conditions: Any | None = None,
    batch: int = 256,
    progress: bool = False,
    noise: dict[str, Any] | None = None,
    final: Final = "auto",
    gamma: float | None = None,
) -> Evaluation:
    """Sample with each number of steps from the same noise, and score.

    Args:
        flow: the flow.
        reference: from `make_reference`.
        steps: numbers of steps.
        count: samples for each.
        seed: of the noise and the labels.
        method, guidance, final: of the sampler.
        rtol: relative and absolute tolerance of error control, instead of `steps`.
        conditions: see `numbered_conditions`.
        batch: rows at a time.
        progress: show a progress line.
        noise: options of `Flow.sample` for a stochastic equation (`epsilon`, its `method`, ...), instead of `method`.
        gamma: share of noise of the jumps of a trajectory model.

    Raises:
        ValueError: for count < 10 or steps < 1.
    """
    if count < 10:
        raise ValueError(f"count: at least 10 samples are needed, got {count}")
    if not steps or min(steps) < 1:
        raise ValueError(f"steps: every number of steps must be at least 1, got {list(steps)}")
    jumps = check_gamma(flow, gamma, method)
    method = "jump" if jumps else path_step(method, flow.path, 1.0).name
    if rtol is not None and (jumps or not as_step(method).adaptive):
        raise ValueError(f"rtol: {method} has no error control; take bosh3, dopri5 or tsit5")
    rows, memory = [], None
    numbers: list[int | None] = list(steps) if rtol is None else [None]
    with Progress(len(numbers) * count, "evaluating", "samples", shown=progress) as shown:
        for i, number in enumerate(numbers):
            tolerance = {} if rtol is None else {"rtol": rtol, "atol": rtol}
            if gamma is not None:
                tolerance = {"gamma": gamma}
            calls = [0]
            handle = flow.network.register_forward_hook(
                lambda _, seen, __, calls=calls: calls.__setitem__(0, calls[0] + len(seen[0]))
            )
            batches = numbered_samples(
                flow,
                range(count),
                seed=seed,
                conditions=conditions,
                batch=batch,
                steps=number,
                guidance=guidance,
                final=final,
                **(noise or {"method": method, **tolerance}),
            )
            try:
                samples = join(batches)
            finally:
                handle.remove()
            evaluations = calls[0] / count
            shown.update((i + 1) * count)
            memory = metrics.memorisation_report(samples["x1"], reference.train, reference.held_out)
            rows.append(_score(samples, reference, number, evaluations, memory, seed))
    assert memory is not None
    return Evaluation(
        tuple(rows),
        reference.extractor.name,
        reference.floor,
        memory.held_out_low,
        count,
        len(reference.train),
        f"{method}, stochastic" if noise else method,
        guidance,
        seed,
    )


def bits_per_dimension(
    flow: Flow, held_out: Source, count: int, *, passes: int = 1, probes: int = 1, seed: int = 0, batch: int = 64
) -> dict[str, Any]:
    """-log2 p per dimension of held-out images, uniformly dequantised, by the probability-flow ODE (RK45, 1e-5).

    Args:
        flow: conditioned on nothing, or on the images' labels.
        held_out: images whose `describe()` says how many `levels` a pixel has (256 by default).
        count: how many images.
        passes: how often each is dequantised anew (the published script takes 5).
        probes: of the divergence.
        seed: of the noise and the probes.
        batch: images at a time.

    Returns:
        mean, standard_error over images, images, levels.

    Raises:
        ValueError: the data are no images, or the flow has no likelihood of the data.
    """
    levels = int(held_out.describe().get("levels", 256))
    rows = torch.arange(min(count, len(held_out)))
    values = []
    for number in range(passes):
        for part in rows.split(batch):
            items = held_out.fetch(part)
            if items["x1"].ndim != 4:
                raise ValueError("likelihood: bits per dimension are for images")
            draws = seeded(seed, number, int(part[0]), 41)
            steps = torch.round((items["x1"] + 1) / 2 * (levels - 1))
            x = (steps + torch.rand(steps.shape, generator=draws)) / levels * 2 - 1
            log_p = flow.log_prob(
                x.to(flow.device, flow.dtype),
                condition={name: items[name] for name in flow.conditions} or None,
                divergence="hutchinson",
                probes=probes,
                generator=seeded(seed, number, int(part[0]), 42, device=flow.device),
            )
            # One level is 2 / levels wide in [-1, 1].
            values.append(-log_p.cpu() / math.log(2) / x[0].numel() + math.log2(levels / 2))
    bits = torch.cat(values)
    return {
        "mean": float(bits.mean()),
        "standard_error": float(bits.std() / len(bits) ** 0.5),
        "images": len(rows),
        "levels": levels,
    }


def _score(
    samples: dict[str, Tensor], reference: Reference, steps: int | None, evaluations: float, memory: Any, seed: int
) -> StepScores:
    features = features_of(reference.extractor, samples["x1"])
    draws = seeded(seed, steps or 0, 40)
    sets = metrics.evaluate_sets(reference.train_features, features, resamples=50, generator=draws)
    score = accuracy = None
    if isinstance(reference.extractor, metrics.InceptionFeatures):
        score = metrics.inception_score(reference.extractor.logits(features)).mean
    if reference.classifier is not None and "label" in samples:
        accuracy = reference.classifier.accuracy(samples["x1"], samples["label"])
    return StepScores(
        steps,
        evaluations,
        sets.frechet,
        sets.kernel.mean,
        sets.precision,
        sets.recall,
        sets.density,
        sets.coverage,
        score,
        accuracy,
        memory.samples_low,
        memory.closer,
    )


def _classifier(
    name: str, train: dict[str, Tensor], held: dict[str, Tensor], cache: Path | None, seed: int
) -> ClassifierFeatures:
    if cache is not None and cache.exists():
        return ClassifierFeatures.load(cache)
    found = metrics.train_classifier(
        train["x1"], train["label"], seed=seed, held_out=(held["x1"], held["label"]), data=name
    )
    if cache is not None:
        found.save(cache)
    return found
