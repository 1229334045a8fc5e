"""Rectified flow (Liu et al. 2209.03003): how data, network, path and loop are put together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from pantarhei.data import TOYS, Source, split, toy_source
from pantarhei.data.seeds import mix
from pantarhei.flow import Flow, FlowMatching, Provenance
from pantarhei.flow.couplings import build_coupling
from pantarhei.flow.times import build_time_law
from pantarhei.images import augmentation, open_images
from pantarhei.naming import unknown
from pantarhei.networks import MLP, MLPConfig, UNet, UNetConfig
from pantarhei.training import FlowTask, Optimization

TimesName = Literal["uniform", "logit-normal", "mode", "cosmap", "u-shaped", "beta"]
PathName = Literal["linear", "vp", "sub-vp", "cosine", "spherical", "ve", "edm"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
        data: `digits` (built in), a folder or zip of images, a CIFAR-10 folder or archive, parquet, `hf:NAME`, or a 2-D
            toy set (eight_gaussians, two_moons, checkerboard, ...).
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

    def open(self) -> tuple[Source, Source]:
        """The training part and the held-out part.

        Raises:
            ValueError, FileNotFoundError: unknown name or path, damaged or unequal images.
        """
        if self.data in TOYS:
            return split(toy_source(self.data, 10_000, seed=0), self.held_out)
        source = open_images(self.data, size=self.size, channels=self.channels)
        try:
            test = open_images(self.data, size=self.size, channels=self.channels, split="test")
        except (ValueError, FileNotFoundError):  # most data have one part only
            return split(source, self.held_out)
        return source, test


@dataclass(frozen=True)
class NetworkConfig:
    """Network sizes; what is left out follows from the data.

    Attributes:
        width: feature channels at full resolution (images) or hidden width (points).
        multipliers: channels of each resolution as multiples of `width`.
        blocks: residual blocks a side, one number for all resolutions or one each; or hidden layers for points.
        attention: self-attention at the lowest resolution.
        dropout: in the residual blocks.
    """

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
    """

    data: DataConfig = field(default_factory=DataConfig)
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
    labels = getattr(train_set, "labels", None)
    classes = int(labels.max()) + 1 if config.conditional and labels is not None else 0
    network = build_network(config.network, shape, classes, seed)
    flow = Flow(
        network,
        path=config.path,
        predicts=config.predicts,
        shape=shape,
        null={"label": classes} if classes else None,
        provenance=Provenance(coupling=config.coupling, data=description["name"]),
    )
    objective = FlowMatching(
        times=build_time_law(config.times),
        coupling=build_coupling(config.coupling),
        dropout=config.label_dropout if classes else 0.0,
    )
    task = FlowTask(
        flow, objective, train_set, held_out=held_out, optimization=config.optimization(), average=config.average
    )
    augment = augmentation(config.data.augment) if config.data.augment else None
    return task, augment


def build_network(config: NetworkConfig, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
    """A U-Net for images (C, H, W) or an MLP for points (D,), with weights drawn from `seed`."""
    sizes: Any
    if len(shape) == 1:
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
        return MLP(sizes) if isinstance(sizes, MLPConfig) else UNet(sizes)


def default_multipliers(size: int) -> tuple[int, ...]:
    """Resolutions down to 4 (tiny images) or 8 pixels."""
    if size <= 8:
        return (1, 2)
    count = 1
    while size % 2 == 0 and size > 8 and count < 4:
        size, count = size // 2, count + 1
    return (1, 2, 2, 2)[:count]


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
