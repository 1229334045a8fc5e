"""Domain adaptation in feature space (Liu et al. 2209.03003, section on domain adaptation): features of a test domain are
carried to the train domain by an unlabelled rectified flow, where the train domain's own head classifies them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei import metrics, training
from pantarhei.data.seeds import generator as seeded
from pantarhei.data.seeds import mix
from pantarhei.files import read_tensors, write_json, write_tensors
from pantarhei.flow import Flow, FlowMatching, Provenance
from pantarhei.flow.couplings import build_coupling
from pantarhei.flow.sources import Samples
from pantarhei.naming import unknown
from pantarhei.networks import MLP, MLPConfig
from pantarhei.recipes.domain_features import Features, linear_head, nonzero
from pantarhei.report import Table
from pantarhei.training import FlowTask, Optimization

Head = Callable[[Tensor], Tensor]
NONE, CORAL, FLOW = "no adaptation", "CORAL", "rectified flow"
MOMENTS = "moments.safetensors"


# Maps from the test domain to the train domain


@dataclass(frozen=True)
class Alignment:
    """The affine map x -> (x - start) matrix + end."""

    start: Tensor
    matrix: Tensor
    end: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features (N, D) of the test domain, carried to the train domain; computed in float64."""
        _check_width(features, len(self.start))
        start, matrix, end = (part.to(features.device) for part in (self.start, self.matrix, self.end))
        return ((features.double() - start) @ matrix + end).to(features.dtype)


def coral(test: Tensor, train: Tensor, *, regularisation: float = 1.0) -> Alignment:
    """CORrelation ALignment (Sun, Feng, Saenko 1511.05547, algorithm 1): whitening, then recolouring.

    The map is x -> (x - m_test) (C_test + r I)^(-1/2) (C_train + r I)^(1/2) + m_train, with C the covariances. The paper
    takes r = 1, carries the labelled domain to the unlabelled one and trains a new classifier there; here the unlabelled
    one is carried, so that the classifier stays as it is. The paper leaves the means to a standardisation of both domains;
    here they are aligned too.

    Args:
        test: features of the domain to carry, (N, D).
        train: features of the domain to carry them to, (M, D).
        regularisation: r; as r goes to 0 the carried features take the train domain's covariance exactly, as it grows only
            the means are aligned.

    Raises:
        ValueError: unequal dimensions, fewer than two rows, or a regularisation that is not positive.
    """
    _check_domains(test, train)
    if not regularisation > 0:
        raise ValueError(f"regularisation: must be positive, got {regularisation}")
    powers = []
    for features, exponent in ((test, -0.5), (train, 0.5)):
        values, vectors = torch.linalg.eigh(torch.atleast_2d(features.double().T.cov()))
        powers.append((vectors * (values.clamp_min(0) + regularisation) ** exponent) @ vectors.T)
    return Alignment(test.double().mean(dim=0), powers[0] @ powers[1], train.double().mean(dim=0))


@dataclass(frozen=True)
class Transport:
    """A flow between two domains, with the standardisation that it lives behind.

    Attributes:
        flow: from the test domain (t = 0) to the train domain (t = 1), in standardised features.
        mean, scale: (D,), of the standardisation.
    """

    flow: Flow
    mean: Tensor
    scale: Tensor

    def __call__(self, features: Tensor, steps: int = 100, method: str = "euler", batch: int = 8192) -> Tensor:
        """Features (N, D) of the test domain, seen in training or not, carried to the train domain.

        Args:
            features: (N, D).
            steps: uniform steps; the paper takes 100 of Euler's.
            method: of the sampler.
            batch: rows at a time.
        """
        _check_width(features, len(self.mean))
        mean, scale = self.mean.to(self.flow.device), self.scale.to(self.flow.device)
        parts = []
        for part in features.split(batch):
            x0 = (part.to(mean) - mean) / scale
            parts.append(self.flow.sample(x0=x0, steps=steps, method=method) * scale + mean)
        return torch.cat(parts).to(features)

    def save(self, folder: str | Path) -> Path:
        """Write the flow (see `Flow.save_pretrained`) and its standardisation into a folder."""
        write_tensors(Path(folder) / MOMENTS, {"mean": self.mean, "scale": self.scale})
        return self.flow.save_pretrained(folder)

    @staticmethod
    def load(folder: str | Path) -> Transport:
        """Read what `save` wrote."""
        moments = read_tensors(Path(folder) / MOMENTS)
        return Transport(Flow.from_pretrained(folder), moments["mean"], moments["scale"])


@dataclass(frozen=True)
class TransportConfig:
    """How the flow between two domains is learned.

    Attributes:
        iterations, batch: length of training.
        width, layers: of the perceptron.
        lr: learning rate of Adam; it falls to 0 linearly.
        smoothing: standard deviation of the noise added to both domains in training, in units of the features' own
            deviation. Domains are a few hundred points in many dimensions: without smoothing, a flow trained for long
            learns the points instead of their law and carries one class to another. As smoothing grows the flow tends
            to `coral`, whose regularisation r is the same thing: noise of variance r adds r I to a covariance.
        coupling: "independent", as in the paper, or "minibatch-ot", which keeps near what is near and wants
            less smoothing (0.5) and fewer iterations (300).
        average: decay of the moving average.
    """

    iterations: int = 1000
    batch: int = 256
    width: int = 64
    layers: int = 2
    lr: float = 1e-3
    smoothing: float = 2.0
    coupling: Literal["independent", "minibatch-ot"] = "independent"
    average: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < float("inf"):
            raise ValueError(f"smoothing: must be at least 0, got {self.smoothing}")
        if self.coupling not in ("independent", "minibatch-ot"):
            raise ValueError(unknown("coupling", str(self.coupling), ["independent", "minibatch-ot"]))


def learn_transport(
    test: Tensor,
    train: Tensor,
    config: TransportConfig | None = None,
    *,
    seed: int = 0,
    run: str | Path | None = None,
    **options: Any,
) -> Transport:
    """Learn a rectified flow from the test domain to the train domain, without labels.

    Both are standardised by their pooled mean and deviation, each domain counting the same whatever its size.

    Args:
        test: features of the test domain, (N, D): the source.
        train: features of the train domain, (M, D): the data.
        config: how it is learned.
        seed: of the weights, the batches and the noise.
        run: where to leave the run folder; by default it is thrown away.
        options: further fields of `training.LoopConfig`, such as `progress` or `threads`.

    Raises:
        ValueError: unequal dimensions, fewer than two rows, or bad options.
    """
    config = config or TransportConfig()
    _check_domains(test, train)
    test, train = test.detach().float(), train.detach().float()
    mean = (test.mean(dim=0) + train.mean(dim=0)) / 2
    scale = nonzero(((test - mean).square().mean(dim=0) + (train - mean).square().mean(dim=0)).div(2).sqrt())
    source, data = Samples((test - mean) / scale), (train - mean) / scale

    def smoothed(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        x1 = batch["x1"]
        x0 = source.draw(x1.shape, x1, None, generator)
        noise = torch.randn((2, *x1.shape), generator=generator)
        return {"x0": x0 + config.smoothing * noise[0], "x1": x1 + config.smoothing * noise[1]}

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 31))
        network = MLP(MLPConfig(data.shape[1], config.width, config.layers))
    provenance = Provenance(coupling=config.coupling, data="features of the train domain", notes=asdict(config))
    flow = Flow(network, source=source, shape=data.shape[1:], provenance=provenance)
    objective = FlowMatching(coupling=build_coupling(config.coupling))
    optimization = Optimization(lr=config.lr, decay="linear")
    task = FlowTask(flow, objective, data.cpu(), optimization=optimization, average=config.average)
    options = {"progress": False, "tensorboard": False, "checkpoint_every": config.iterations, **options}
    options |= {"iterations": config.iterations, "batch": config.batch, "seed": seed, "augment": smoothed}
    with tempfile.TemporaryDirectory() as thrown_away:
        training.train(task, Path(thrown_away) / "run" if run is None else run, **options)
    return Transport(task.result(), mean.cpu(), scale.cpu())


# Adaptation


@dataclass(frozen=True)
class Adapted:
    """The test domain's features after one method.

    Attributes:
        method: "no adaptation", "CORAL" or "rectified flow".
        seed: of the flow; None for the others.
        features: (N, D).
        distance: sliced 2-Wasserstein distance to the train domain's features.
        predictions: (N,) classes that the head sees, or None without a head.
        accuracy: share of predictions that are right, or None where labels or head are not known.
    """

    method: str
    seed: int | None
    features: Tensor
    distance: float
    predictions: Tensor | None
    accuracy: float | None

    @property
    def file(self) -> str:
        """The name of its file."""
        name = self.method.lower().replace(" ", "-")
        return f"{name}.safetensors" if self.seed is None else f"{name}-{self.seed}.safetensors"


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` gives: the test domain before and after, one entry a method and seed."""

    results: tuple[Adapted, ...]
    train: Features
    test: Features
    settings: dict[str, Any]

    def of(self, method: str) -> list[Adapted]:
        """The entries of one method."""
        return [found for found in self.results if found.method == method]

    def table(self) -> Table:
        """For people: each method, and the mean and deviation over the flow's seeds."""
        rows: list[tuple[Any, ...]] = [
            (r.method, "-" if r.seed is None else str(r.seed), _percent(r.accuracy), r.distance) for r in self.results
        ]
        flows = self.of(FLOW)
        if len(flows) > 1:
            distance = metrics.mean_and_deviation([r.distance for r in flows])[0]
            known = [100 * r.accuracy for r in flows if r.accuracy is not None]
            mean, deviation = metrics.mean_and_deviation(known) if known else (0.0, 0.0)
            rows.append((FLOW, "mean", f"{mean:.1f} ± {deviation:.1f} %" if known else "-", distance))
        caption = (
            f"{len(self.test):,} items of {self.test.name}, adapted without labels to {len(self.train):,} of "
            f"{self.train.name}. Accuracy: of the train domain's head on the adapted features. Distance: sliced "
            "2-Wasserstein, to the train domain's features."
        )
        return Table(("method", "seed", "accuracy", "distance"), rows, caption)

    def data(self) -> dict[str, Any]:
        """For `adaptation.json`."""
        kept = ("method", "seed", "accuracy", "distance", "file")
        return {
            "train": {"name": self.train.name, "count": len(self.train)},
            "test": {"name": self.test.name, "count": len(self.test)},
            "settings": self.settings,
            "results": [{key: getattr(r, key) for key in kept} for r in self.results],
        }

    def save(self, folder: str | Path) -> Path:
        """Write `adaptation.json`, and a safetensors file a result: `features`, and `predictions`, `labels` where known.

        Raises:
            OSError: the disk is full; files that were there are whole.
        """
        folder = Path(folder)
        for r in self.results:
            optional = {"predictions": r.predictions, "labels": self.test.labels}
            tensors = {"features": r.features, **{k: v for k, v in optional.items() if v is not None}}
            write_tensors(folder / r.file, tensors, {"method": r.method, "seed": str(r.seed)})
        return write_json(folder / "adaptation.json", self.data())


def adapt(
    train: Features,
    test: Features,
    *,
    head: Head | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    config: TransportConfig | None = None,
    regularisation: float = 1.0,
    steps: int = 100,
    method: str = "euler",
    **options: Any,
) -> Adaptation:
    """Carry a test domain's features to the train domain, by CORAL and by a rectified flow a seed, and classify them there.

    The flows see the very items that are adapted (without labels), as in the paper: the accuracy is transductive. For new
    items of the test domain keep the `Transport` of `learn_transport`.

    Args:
        train: the domain that the head was trained on.
        test: the other domain; its labels, where known, are used for the accuracy only.
        head: any `head(features (N, D)) -> logits (N, C)`; by default `linear_head` of the train domain's labels, and none
            where there are no labels.
        seeds: of the flows.
        config: how each flow is learned.
        regularisation: of CORAL.
        steps, method: of the flow's sampler.
        options: see `learn_transport`.

    Raises:
        ValueError: unequal dimensions, no seeds or equal ones, steps below 1, or a head that does not fit.
    """
    config = config or TransportConfig()
    if train.features.shape[1] != test.features.shape[1]:
        sizes = f"{train.name} has {train.features.shape[1]} features an item, {test.name} {test.features.shape[1]}"
        raise ValueError(f"test: {sizes}; both must come from the same network")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: at least one is needed, each once, got {list(seeds)}")
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    x, labels = test.features, train.labels
    if head is None and labels is not None:
        head = linear_head(train.features, labels)
    carried = [(NONE, None, x), (CORAL, None, coral(x, train.features, regularisation=regularisation)(x))]
    results = [_adapted(*one, train, test, head) for one in carried]
    for seed in seeds:
        transport = learn_transport(x, train.features, config, seed=seed, **options)
        results.append(_adapted(FLOW, seed, transport(x, steps, method), train, test, head))
    settings = {**asdict(config), "regularisation": regularisation, "steps": steps, "method": method}
    return Adaptation(tuple(results), train, test, settings)


@torch.no_grad()
def _adapted(
    method: str, seed: int | None, features: Tensor, train: Features, test: Features, head: Head | None
) -> Adapted:
    distance = metrics.sliced_wasserstein(features, train.features, generator=seeded(0, 32))
    if head is None:
        return Adapted(method, seed, features, distance, None, None)
    logits = head(features)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(features):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"head: must give logits (N, C), here N = {len(features)}; got {got}")
    predictions = logits.argmax(dim=1)
    accuracy = None if test.labels is None else float((predictions == test.labels).double().mean())
    return Adapted(method, seed, features, distance, predictions, accuracy)


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f} %"


def _check_width(features: Tensor, width: int) -> None:
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"features: shape (N, {width}) is needed, got {tuple(features.shape)}")


def _check_domains(test: Tensor, train: Tensor) -> None:
    for name, value in (("test", test), ("train", train)):
        if value.ndim != 2 or len(value) < 2:
            raise ValueError(f"{name}: features (N, D) with N >= 2 are needed, got shape {tuple(value.shape)}")
    if test.shape[1] != train.shape[1]:
        raise ValueError(f"test: {test.shape[1]} features an item, train has {train.shape[1]}; they must agree")
