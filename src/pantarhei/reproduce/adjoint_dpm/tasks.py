"""What gradients through sampling are for, with controls: new classes, embeddings from one pair, a style, an audit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pantarhei import metrics
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, FlowMatching, differentiable_sample
from pantarhei.metrics import ClassifierFeatures, train_classifier
from pantarhei.networks import UNet, UNetConfig
from pantarhei.recipes.auditing import audit
from pantarhei.recipes.data import DataConfig
from pantarhei.recipes.optimization import (
    Search,
    class_row,
    optimize_condition,
    optimize_noise,
    optimize_weights,
)
from pantarhei.recipes.sample_metrics import classified_as
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import run
from pantarhei.straighten import LowRank
from pantarhei.training import FlowTask, Optimization

LEFT_OUT, STEPS = 7, 20
SAMPLING: dict[str, Any] = {"steps": STEPS, "method": "euler"}


@dataclass(frozen=True)
class Digits:
    """A flow of digits that never saw one class, a classifier that saw all, and the images of that class."""

    flow: Flow
    classifier: ClassifierFeatures
    hidden: Tensor
    x0: Tensor


@lru_cache(maxsize=4)
def digits(seed: int, quick: bool) -> Digits:
    """Rectified flow of 0.4 million weights, 1,500 iterations of batch 64, conditions dropped one time in ten."""
    size = Settings(seed, quick).size
    train_set, held_out = DataConfig("digits").open()
    batch = train_set.fetch(torch.arange(len(train_set)))
    images, labels = batch["x1"], batch["label"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(UNetConfig(channels=1, width=32, multipliers=(1, 2), blocks=1, classes=10))
    flow = Flow(network, shape=tuple(images.shape[1:]), null={"label": 10})
    seen = labels != LEFT_OUT
    task = FlowTask(
        flow,
        FlowMatching(dropout=0.1),
        {"x1": images[seen], "label": labels[seen]},
        optimization=Optimization(lr=1e-3, decay="cosine", warmup=50),
        average=0.99,
    )
    learned = run(task, seed, size(1500), 64)
    learned.network.eval()
    classifier = train_classifier(images, labels, iterations=size(400), seed=seed)
    held = held_out.fetch(torch.arange(len(held_out)))
    x0 = torch.randn(64, *images.shape[1:], generator=seeded(seed, 110))
    return Digits(learned, classifier, held["x1"][held["label"] == LEFT_OUT], x0)


def vocabulary(settings: Settings) -> dict[str, float]:
    """Samples of a class that the flow never saw: by noise, and by one new row of its class embedding."""
    made = digits(settings.seed, settings.quick)
    flow, x0 = made.flow, made.x0[: settings.size(64)]
    metric = classified_as(made.classifier, LEFT_OUT)
    null = torch.full((len(x0),), 10)

    def chance(x: Tensor) -> float:
        with torch.no_grad():
            return float(torch.exp(-metric(x)).mean())

    def distance(x: Tensor) -> float:
        return metrics.sliced_wasserstein(x.flatten(1), made.hidden.flatten(1), generator=seeded(0, 111))

    by_noise = optimize_noise(flow, metric, x0, condition=null, search=Search(30, 0.3, sampling=SAMPLING), keep="norm")
    row = class_row(flow.network)
    by_row = optimize_condition(
        flow,
        metric,
        x0[:32],
        row,
        nulls={"label": class_row(flow.network, 10)},
        search=Search(30, 0.3, sampling=SAMPLING),
    )
    named = {"label": by_row.value.expand(len(x0), -1)}
    fresh = torch.randn(x0.shape, generator=seeded(settings.seed, 112))
    from_row = differentiable_sample(flow, fresh, condition=named, **SAMPLING).detach()
    found = {"chance_before": chance(by_noise.before), "distance_before": distance(by_noise.before)}
    # Control: as many draws of noise as the search saw, the best of them by the same measure.
    best = torch.full((len(x0),), torch.inf)
    for number in range(8 if settings.quick else 31):
        noise = torch.randn(x0.shape, generator=seeded(settings.seed, 113, number))
        with torch.no_grad():
            best = torch.minimum(best, metric(differentiable_sample(flow, noise, condition=null, **SAMPLING)))
    found["chance_best_of_31"] = float(torch.exp(-best).mean())
    for name, x in (("noise", by_noise.after), ("row", from_row)):
        found[f"chance_{name}"], found[f"distance_{name}"] = chance(x), distance(x)
        found[f"distance_{name}_over_before"] = found[f"distance_{name}"] / found["distance_before"]
    if settings.pictures:
        rows = torch.cat([by_noise.before[:16], by_noise.after[:16], from_row[:16], made.hidden[:16]])
        save_image_grid(rows, settings.pictures / "vocabulary.png", columns=16)
    return found


def embedding(settings: Settings) -> dict[str, float]:
    """An effect from one pair: the row of a hidden mixture of classes, found from one sample of it and its noise."""
    made = digits(settings.seed, settings.quick)
    flow = made.flow
    rows = torch.stack([class_row(flow.network, label) for label in (3, 8)])
    hidden = rows.mean(dim=0) + 0.3 * rows.std() * torch.randn(rows.shape[1], generator=seeded(settings.seed, 114))
    empty = class_row(flow.network, 10)
    example = _of_row(flow, made.x0[:1], hidden)
    found = optimize_condition(
        flow,
        lambda x: (x - example).square().flatten(1).mean(dim=1),
        made.x0[:1],
        class_row(flow.network),
        search=Search(settings.size(150), 0.05, sampling=SAMPLING),
    )
    noise = torch.randn(settings.size(64), *made.x0.shape[1:], generator=seeded(settings.seed, 115))
    wanted = _of_row(flow, noise, hidden)
    errors = {
        name: float((_of_row(flow, noise, row) - wanted).square().mean())
        for name, row in (("empty", empty), ("mean", class_row(flow.network)), ("found", found.value))
    }
    return {
        **{f"error_{name}": value for name, value in errors.items()},
        "error_on_the_pair": found.losses[found.best],
        "gain": errors["empty"] / errors["found"],
    }


def style(settings: Settings) -> dict[str, float]:
    """Thin strokes: the mean brightness of samples is led to half, by all weights and by low-rank additions."""
    made = digits(settings.seed, settings.quick)
    flow, x0 = made.flow, made.x0[:32]
    label = torch.arange(len(x0)) % LEFT_OUT
    brightness = ((flow.sample(x0=x0, condition=label, **SAMPLING) + 1) / 2).flatten(1).mean(dim=1)
    target = 0.5 * float(brightness.mean())

    def statistic(x: Tensor) -> Tensor:
        return (((x + 1) / 2).flatten(1).mean(dim=1) - target).square()

    found: dict[str, float] = {}
    shown = []
    fresh = torch.randn(max(64, settings.size(256)), *x0.shape[1:], generator=seeded(settings.seed, 116))
    labels = torch.arange(len(fresh)) % LEFT_OUT
    base = flow.sample(x0=fresh, condition=labels, **SAMPLING)
    found["error_before"] = float(statistic(base).mean())
    features = made.classifier
    for name, how in (("weights", {}), ("low_rank", {"low_rank": LowRank(4)})):
        search = Search(settings.size(60), 2e-4 if name == "weights" else 2e-3, sampling=SAMPLING)
        tuned = optimize_weights(
            flow,
            statistic,
            x0,
            condition=label,
            search=search,
            seed=settings.seed,
            **how,  # type: ignore[arg-type]
        )
        x = tuned.value.eval().sample(x0=fresh, condition=labels, **SAMPLING)
        found[f"error_{name}"] = float(statistic(x).mean())
        found[f"fall_{name}"] = 1 - found[f"error_{name}"] / found["error_before"]
        with torch.no_grad():
            # What is drawn, whatever its brightness: features of images scaled to one mean and deviation.
            same = [features(_plain(part)).double() for part in (base, x)]
            found[f"accuracy_{name}"] = float((features.classify(_plain(x)).argmax(dim=1) == labels).float().mean())
        found[f"c2st_{name}"] = metrics.c2st(*same, generator=seeded(0, 117))
        shown.append(x[:16])
    with torch.no_grad():
        found["accuracy_before"] = float((features.classify(_plain(base)).argmax(dim=1) == labels).float().mean())
    if settings.pictures:
        save_image_grid(torch.cat([base[:16], *shown]), settings.pictures / "style.png", columns=16)
    return found


def security(settings: Settings) -> dict[str, float]:
    """A small classifier is attacked by noise within 0.1, against random noise in the same box."""
    made = digits(settings.seed, settings.quick)
    x0 = torch.randn(settings.size(128), *made.x0.shape[1:], generator=seeded(settings.seed, 118))
    labels = torch.arange(len(x0)) % LEFT_OUT
    if settings.quick:  # too little is learned for any sample to be what it was asked to be
        samples = made.flow.sample(x0=x0, condition=labels, **SAMPLING)
        labels = made.classifier.classify(samples).argmax(dim=1)
    found = audit(
        made.flow,
        made.classifier.classify,
        x0,
        labels,
        bound=0.1,
        search=Search(30, 0.3, sampling=SAMPLING),
        seed=settings.seed,
    )
    return {
        "correct": float(found.correct.double().mean()),
        "rate": found.rate,
        "control": found.control,
        "rate_over_control": found.rate / max(found.control, 1 / int(found.correct.sum())),
        "distance": float(found.distance.mean()),
    }


def _of_row(flow: Flow, x0: Tensor, row: Tensor) -> Tensor:
    named = {"label": row.expand(len(x0), *row.shape)}
    return differentiable_sample(flow, x0, condition=named, **SAMPLING).detach()


def _plain(x: Tensor) -> Tensor:
    """Images with the mean and deviation of each put to fixed values."""
    flat = x.flatten(1)
    mean, deviation = (value.reshape(-1, 1, 1, 1) for value in (flat.mean(dim=1), flat.std(dim=1)))
    return ((x - mean) / deviation.clamp_min(1e-3) * 0.75 - 0.4).clamp(-1, 1)
