"""Rectified flow (Liu et al. 2209.03003): how data, network, path and loop are put together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei.data import TOYS, Source, read_points, split, toy_source
from pantarhei.data.seeds import mix
from pantarhei.flow import FeatureJacobian, Flow, FlowMatching, Provenance, Term
from pantarhei.flow.couplings import build_coupling
from pantarhei.flow.objectives import LossTerm
from pantarhei.flow.sources import Samples
from pantarhei.flow.times import build_time_law
from pantarhei.images import augmentation, open_images
from pantarhei.metrics import train_classifier
from pantarhei.naming import unknown
from pantarhei.networks import NETWORKS, MLPConfig, NCSNppConfig, UNetConfig
from pantarhei.training import FlowTask, Optimization

TimesName = Literal["uniform", "logit-normal", "mode", "cosmap", "u-shaped", "beta"]
PathName = Literal["linear", "vp", "sub-vp", "cosine", "spherical", "ve", "edm"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        data: `digits` (built in), a folder or zip of images, a CIFAR-10 folder or archive, parquet, `hf:NAME`, points
            (N, D) in a .npy file (or `x1` in a .safetensors file), or a 2-D toy set (eight_gaussians, two_moons, ...).
        size: resize the short side to this many pixels and crop the centre.
        channels: 1 or 3; by default those of the first image.
        held_out: fraction kept away from training, for validation and evaluation (where the data bring no test split).
        augment: augmentations by name: flip, crop, shift.
    """

    data: str = "digits"
    size: int | None = None
    channels: int | None = None
    held_out: float = 0.2
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "augment", tuple(self.augment))
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: must lie strictly between 0 and 1, got {self.held_out}")

    def open(self, data: str | None = None) -> tuple[Source, Source]:
        """The training part and the held-out part, of these data or of others opened the same way.

        Raises:
            ValueError, FileNotFoundError: unknown name or path, damaged or unequal images.
        """
        data = data or self.data
        if data in TOYS:
            return split(toy_source(data, 10_000, seed=0), self.held_out)
        if data.endswith((".npy", ".safetensors")):
            return split(read_points(data), self.held_out)
        source = open_images(data, size=self.size, channels=self.channels)
        try:
            test = open_images(data, size=self.size, channels=self.channels, split="test")
        except (ValueError, FileNotFoundError):  # most data have one part only
            return split(source, self.held_out)
        return source, test


@dataclass(frozen=True)
class NetworkConfig:
    """Network sizes; what is left out follows from the data.

    Attributes:
        architecture: of image networks: unet (compact, quick on a CPU) or ncsnpp (DDPM++, the paper's).
        width: feature channels at full resolution (images) or hidden width (points).
        multipliers: channels of each resolution as multiples of `width`.
        blocks: residual blocks a side, one number for all resolutions or (unet) one each; or hidden layers for points.
        attention: self-attention, at the lowest resolution (unet) or at side 16 (ncsnpp).
        dropout: in the residual blocks.
    """

    architecture: Literal["unet", "ncsnpp"] = "unet"
    width: int | None = None
    multipliers: tuple[int, ...] | None = None
    blocks: tuple[int, ...] | None = None
    attention: bool = True
    dropout: float = 0.0


@dataclass(frozen=True)
class RectifiedFlowConfig:
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

    def spec(self) -> dict[str, Any]:
        """As data for `config.yaml`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def build_task(config: RectifiedFlowConfig, seed: int) -> tuple[FlowTask, Any]:
    """The task and the augmentation (or None) of a recipe; weights are drawn from `seed`.

    Raises:
        ValueError, FileNotFoundError: for data or settings that cannot be used.
    """
    train_set, held_out = config.data.open()
    description = train_set.describe()
    shape = tuple(description["shape"])
    start = open_source(config)
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


def open_source(config: RectifiedFlowConfig) -> tuple[Source, Source] | None:
    """Training and held-out part of what a transfer starts from; None for noise."""
    return config.data.open(config.source) if config.source else None


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


def build_network(config: NetworkConfig, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """A U-Net for images (C, H, W) or an MLP for points (D,), with weights drawn from `seed`."""
    sizes: Any
    if len(shape) == 3 and config.architecture == "ncsnpp":
        multipliers = config.multipliers or default_multipliers(min(shape[1:]))
        attention = (16,) if config.attention and 16 in [min(shape[1:]) >> i for i in range(len(multipliers))] else ()
        blocks = config.blocks or (4,)
        if len(blocks) > 1 or shape[1] != shape[2]:
            raise ValueError(f"network: ncsnpp takes one number of blocks and square images, got {blocks} and {shape}")
        sizes = NCSNppConfig(
            size=shape[1],
            channels=shape[0],
            width=config.width or 128,
            multipliers=multipliers,
            blocks=blocks[0],
            attention=attention,
            dropout=config.dropout,
            classes=classes,
        )
    elif len(shape) == 1:
        sizes = MLPConfig(shape[0], config.width or 128, config.blocks[0] if config.blocks else 3, classes)
    elif len(shape) == 3:
        multipliers = config.multipliers or default_multipliers(min(shape[1:]))
        factor = 2 ** (len(multipliers) - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"multipliers: {len(multipliers)} resolutions need images divisible by {factor}, got {shape[1]}x{shape[2]}; "
                "give --size or fewer multipliers"
            )
        width = config.width or (32 if min(shape[1:]) <= 16 else 64)
        blocks = config.blocks or (*(1,) * (len(multipliers) - 1), 4 if len(multipliers) < 3 else 2)
        blocks = blocks * len(multipliers) if len(blocks) == 1 else blocks
        sizes = UNetConfig(shape[0], width, multipliers, blocks, config.attention, classes, dropout=config.dropout)
    else:
        raise ValueError(f"data: images (C, H, W) or points (D,) are needed, got samples of shape {shape}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, 30))
        return NETWORKS[type(sizes)](sizes)


def default_multipliers(size: int) -> tuple[int, ...]:
    """Resolutions down to 4 (tiny images) or 8 pixels."""
    if size <= 8:
        return (1, 2)
    count = 1
    while size % 2 == 0 and size > 8 and count < 4:
        size, count = size // 2, count + 1
    return (1, 2, 2, 2)[:count]


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


def config_of(spec: dict[str, Any]) -> RectifiedFlowConfig:
    """The recipe that a run's `config.yaml` holds.

    Raises:
        ValueError: for a run of another system, or unknown settings.
    """
    recipe = dict(spec.get("recipe", {}))
    try:
        data = DataConfig(**recipe.pop("data", {}))
        network = NetworkConfig(**recipe.pop("network", {}))
        return RectifiedFlowConfig(data=data, network=network, **recipe)
    except TypeError as error:
        raise ValueError(unknown("recipe", str(error), [])) from None
