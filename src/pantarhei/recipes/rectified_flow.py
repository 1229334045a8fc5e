"""Rectified flow (Liu et al. 2209.03003): how data, network, path and loop are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data import Source
from pantarhei.flow import FeatureJacobian, Flow, FlowMatching, Provenance, Term
from pantarhei.flow.couplings import build_coupling
from pantarhei.flow.objectives import LossTerm
from pantarhei.flow.sources import Samples
from pantarhei.flow.times import build_time_law
from pantarhei.images import augmentation
from pantarhei.metrics import train_classifier
from pantarhei.recipes.backbones import NetworkConfig, build_network
from pantarhei.recipes.data import DataConfig, Recipe
from pantarhei.training import FlowTask, Optimization

TimesName = Literal["uniform", "logit-normal", "mode", "cosmap", "u-shaped", "beta"]
PathName = Literal["linear", "vp", "sub-vp", "cosine", "spherical", "ve", "edm"]


@dataclass(frozen=True)
class RectifiedFlowConfig(Recipe):
    """The recipe.

    Attributes:
        data: what to train on.
        source: data to start from instead of noise, named like `--data`: the flow then carries these to `--data`.
        feature_loss: of a transfer, count only errors that a classifier sees which is trained first to tell the two data
            sets apart (the feature-Jacobian loss).
        network: sizes.
        path: the path; linear is rectified flow, the others are its nonlinear special cases.
        predicts: what the network predicts.
        times: law of the training time.
        coupling: how noise and data are paired.
        conditional: use class labels where the data have them.
        label_dropout: how often the label is hidden in training (needed for guidance).
        lr: learning rate of Adam.
        warmup: iterations of linear warm-up.
        clip: largest gradient norm.
        weight_decay: L2 penalty.
        average: decay of the moving average that samples.
        first_time: smallest time that is trained and sampled (the published networks have 0.001).
    """

    data: DataConfig = field(default_factory=DataConfig)
    source: str = ""
    feature_loss: bool = False
    network: NetworkConfig = field(default_factory=NetworkConfig)
    path: PathName = "linear"
    predicts: Literal["velocity", "data", "noise", "edm"] = "velocity"
    times: TimesName = "uniform"
    coupling: Literal["independent", "minibatch-ot"] = "independent"
    conditional: bool = True
    label_dropout: float = 0.1
    lr: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    weight_decay: float = 0.0
    average: float = 0.999
    first_time: float = 0.0

    def __post_init__(self) -> None:
        if self.feature_loss and not self.source:
            raise ValueError("feature_loss: this loss is for the transfer between two data sets; give a source")

    def optimization(self) -> Optimization:
        """The optimiser's settings."""
        return Optimization(lr=self.lr, warmup=self.warmup, clip=self.clip, weight_decay=self.weight_decay)


def build_task(config: RectifiedFlowConfig, seed: int) -> tuple[FlowTask, Any]:
    """The task and the augmentation (or None) of a recipe; weights are drawn from `seed`.

    Raises:
        ValueError, FileNotFoundError: for data or settings that cannot be used.
    """
    train_set, held_out = config.open()
    description = train_set.describe()
    shape = tuple(description["shape"])
    start = config.open_source()
    if start is not None and tuple(start[0].describe()["shape"]) != shape:
        other = tuple(start[0].describe()["shape"])
        raise ValueError(f"source: its items have shape {other}, those of the data {shape}; give --size or --channels")
    labels = getattr(train_set, "labels", None)
    # The label of a photograph that is carried over is not that of its partner.
    classes = int(labels.max()) + 1 if config.conditional and labels is not None and start is None else 0
    network = build_network(config.network, shape, classes, seed)
    flow = Flow(
        network,
        path=config.path,
        predicts=config.predicts,
        source=None if start is None else Samples(start[0]),
        shape=shape,
        null={"label": classes} if classes else None,
        interval=(config.first_time, 1.0) if config.first_time else None,
        provenance=Provenance(coupling=config.coupling, data=description["name"]),
    )
    terms: tuple[LossTerm, ...] = (Term(),)
    if config.feature_loss and start is not None:
        terms = (FeatureJacobian(domain_features(start[0], train_set, seed)),)
    objective = FlowMatching(
        times=build_time_law(config.times),
        coupling=build_coupling(config.coupling),
        dropout=config.label_dropout if classes else 0.0,
        terms=terms,
    )
    task = FlowTask(
        flow, objective, train_set, held_out=held_out, optimization=config.optimization(), average=config.average
    )
    augment = augmentation(config.data.augment) if config.data.augment else None
    return task, augment


def domain_features(first: Source, second: Source, seed: int, *, limit: int = 5000) -> Callable[[Tensor], Tensor]:
    """Hidden features of a classifier trained to tell two sets of images apart, frozen: (B, C, H, W) to (B, F).

    Raises:
        ValueError: the data are no images.
    """
    parts = [part.fetch(torch.arange(min(limit, len(part))))["x1"] for part in (first, second)]
    if parts[0].ndim != 4:
        raise ValueError("feature_loss: this loss is for images")
    labels = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    trained = train_classifier(torch.cat(parts), labels, seed=seed, data=f"{first.name} against {second.name}")
    return trained.network.features


@dataclass(frozen=True)
class Preset:
    """A recipe with its training length."""

    recipe: RectifiedFlowConfig
    iterations: int
    batch: int
    machines: dict[str, Any] = field(default_factory=dict)
    keeping: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    # The paper's settings (appendix, and the published configuration).
    "cifar10": Preset(
        RectifiedFlowConfig(
            data=DataConfig(data="cifar10", augment=("flip",)),
            network=NetworkConfig(architecture="ncsnpp", multipliers=(1, 2, 2, 2), dropout=0.15),
            conditional=False,
            lr=2e-4,
            warmup=5000,
            average=0.999999,
            first_time=1e-3,
        ),
        iterations=800_000,
        batch=128,
        keeping={"checkpoint_every": 10_000, "preview_every": 10_000},
    ),
    # 12.7 M parameters, sized for about 20 minutes on one GPU (estimated, not yet run there).
    "cifar10-small": Preset(
        RectifiedFlowConfig(
            data=DataConfig(data="cifar10", augment=("flip",)),
            network=NetworkConfig(architecture="ncsnpp", width=64, multipliers=(1, 2, 2, 2), blocks=(3,), dropout=0.1),
            lr=4e-4,
            warmup=500,
            average=0.9995,
        ),
        iterations=20_000,
        batch=256,
        machines={"precision": "bf16", "compile": True, "channels_last": True},
        keeping={"checkpoint_every": 2000, "preview_every": 5000},
    ),
}
