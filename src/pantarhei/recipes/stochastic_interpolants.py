"""Stochastic interpolants (Albergo et al. 2303.08797): noise or data to data, with a latent between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from pantarhei.data import Source
from pantarhei.data.seeds import mix
from pantarhei.flow import Flow, Interpolation, Observation, Provenance
from pantarhei.flow.couplings import build_coupling
from pantarhei.flow.gammas import Brownian, Gamma, NoLatent, build_gamma
from pantarhei.flow.interpolants import Interpolant, build_interpolant, encoding_decoding, linear, mirror, trigonometric
from pantarhei.flow.observations import ObservedSource, build_observation
from pantarhei.flow.paths import Cosine, Linear
from pantarhei.flow.sources import Samples
from pantarhei.flow.times import build_time_law
from pantarhei.images import augmentation
from pantarhei.networks import Pair, PairConfig, spec_of
from pantarhei.recipes.backbones import NetworkConfig, build_network
from pantarhei.recipes.data import Recipe
from pantarhei.recipes.rectified_flow import TimesName
from pantarhei.training import FlowTask, Optimization

PathName = Literal["linear", "trigonometric", "encoding-decoding", "mirror"]
GammaName = Literal["auto", "none", "brownian", "quadratic", "sine-squared", "sigmoid"]
FieldsName = Literal[
    "auto",
    "velocity",
    "velocity+latent",
    "velocity+score",
    "deterministic+latent",
    "deterministic+score",
    "latent",
    "score",
    "noise",
    "data",
]


@dataclass(frozen=True)
class StochasticInterpolantsConfig(Recipe):
    """The recipe.

    Attributes:
        data: what to train on.
        source: data to start from instead of noise, named like `--data`; `--path mirror` starts from the data themselves.
        observe: what is known of each image beforehand, which the network is given and the path starts from: inpainting (a
            rectangle is hidden) or super-resolution.
        network: sizes.
        networks: one network for two fields, or two networks.
        path: coefficients of source and data.
        gamma: the latent; auto is none from noise (which is a latent itself), sine-squared for encoding-decoding, and else
            brownian.
        gamma_scale: a of brownian, sqrt(a t (1 - t)).
        predicts: the fields; auto is velocity+latent with a latent, velocity without, latent on the mirror path.
        antithetic: see each pair with z and with -z; auto where a target is unbounded.
        times: law of the training time.
        coupling: how source and data are paired.
        conditional: use class labels where the data have them.
        label_dropout: how often the label is hidden in training (needed for guidance).
        lr: learning rate of Adam.
        warmup: iterations of linear warm-up.
        decay: of the learning rate, to zero over the run.
        clip: largest gradient norm.
        weight_decay: L2 penalty.
        average: decay of the moving average that samples.
    """

    observe: Literal["", "inpainting", "super-resolution"] = ""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    networks: Literal["one", "two"] = "one"
    path: PathName = "linear"
    gamma: GammaName = "auto"
    gamma_scale: float = 1.0
    predicts: FieldsName = "auto"
    antithetic: Literal["auto", "yes", "no"] = "auto"
    times: TimesName = "uniform"
    coupling: Literal["independent", "minibatch-ot"] = "independent"
    conditional: bool = True
    label_dropout: float = 0.1
    lr: float = 1e-3
    warmup: int = 50
    decay: Literal["constant", "linear", "cosine"] = "constant"
    clip: float = 1.0
    weight_decay: float = 0.0
    average: float = 0.999

    def __post_init__(self) -> None:
        if self.observe and (self.source or self.path == "mirror"):
            raise ValueError(
                "observe: an observed image is itself what the path starts from; leave --source and mirror out"
            )
        if self.path == "mirror" and self.source:
            raise ValueError("source: the mirror path starts from the data themselves")
        if self.gamma_scale != 1.0 and not isinstance(self.latent(), Brownian):
            raise ValueError(f"gamma_scale: is for the brownian latent, got gamma {self.gamma!r}")

    def latent(self) -> Gamma:
        """The latent's coefficient."""
        name = self.gamma
        if name == "auto":
            from_noise = not (self.source or self.observe) and self.path in ("linear", "trigonometric")
            name = "none" if from_noise else "sine-squared" if self.path == "encoding-decoding" else "brownian"
        return Brownian(self.gamma_scale) if name == "brownian" else build_gamma(name)

    def interpolant(self) -> Any:
        """The path: affine from noise without a latent, an interpolant otherwise.

        Raises:
            ValueError: a latent that the path cannot have.
        """
        latent = self.latent()
        one_sided = isinstance(latent, NoLatent) and not (self.source or self.observe)
        if self.path == "linear":
            return Linear() if one_sided else linear(latent)
        if self.path == "trigonometric":
            return Cosine() if one_sided else trigonometric(latent)
        if isinstance(latent, NoLatent):
            raise ValueError(f"gamma: the {self.path} path needs a latent")
        made = encoding_decoding() if self.path == "encoding-decoding" else mirror()
        return (
            build_interpolant({"ends": {"name": self.path}, "gamma": latent.spec()}) if made.gamma != latent else made
        )

    def fields(self) -> str:
        """What the network predicts."""
        if self.predicts != "auto":
            return self.predicts
        path = self.interpolant()
        if not isinstance(path, Interpolant) or isinstance(path.gamma, NoLatent):
            return "velocity"
        return "latent" if self.path == "mirror" else "velocity+latent"

    def observation(self) -> Observation | None:
        """What is known beforehand."""
        return build_observation(self.observe) if self.observe else None

    def open(self) -> tuple[Source, Source]:
        """The data; the held-out part with what is observed of it."""
        train_set, held_out = self.data.open()
        observation = self.observation()
        return train_set, held_out if observation is None else ObservedSource(held_out, observation)

    def open_source(self) -> tuple[Source, Source] | None:
        """The source's data; the data themselves on the mirror path; None for noise and for observed images."""
        if self.path == "mirror":
            return self.data.open()
        return super().open_source()

    def optimization(self) -> Optimization:
        """The optimiser's settings."""
        return Optimization(
            lr=self.lr, warmup=self.warmup, decay=self.decay, clip=self.clip, weight_decay=self.weight_decay
        )


def build_task(config: StochasticInterpolantsConfig, seed: int) -> tuple[FlowTask, Any]:
    """The task and the augmentation (or None) of a recipe; weights are drawn from `seed`.

    Raises:
        ValueError, FileNotFoundError: for data or settings that cannot be used.
    """
    train_set, held_out = config.open()
    description = train_set.describe()
    shape = tuple(description["shape"])
    start, observation = config.open_source(), config.observation()
    if start is not None and tuple(start[0].describe()["shape"]) != shape:
        other = tuple(start[0].describe()["shape"])
        raise ValueError(f"source: its items have shape {other}, those of the data {shape}; give --size or --channels")
    if observation is not None and len(shape) != 3:
        raise ValueError(f"observe: {config.observe} is for images, got samples of shape {shape}")
    labels = getattr(train_set, "labels", None)
    # The label of what is carried over is not that of its partner.
    classes = int(labels.max()) + 1 if config.conditional and labels is not None and start is None else 0
    context = 0
    if observation is not None:
        context = held_out.fetch(_first())[observation.name_of_condition].shape[1]
    predicts = config.fields()
    flow = Flow(
        fields_network(config.network, config.networks, shape, classes, seed, context, predicts.count("+") + 1),
        path=config.interpolant(),
        predicts=predicts,
        source=observation or (None if start is None else Samples(start[0])),
        shape=shape,
        null={"label": classes} if classes else None,
        conditions=() if observation is None else (observation.name_of_condition,),
        provenance=Provenance(
            coupling=config.coupling if observation is None else config.observe, data=description["name"]
        ),
    )
    objective = Interpolation(
        times=build_time_law(config.times),
        antithetic={"auto": None, "yes": True, "no": False}[config.antithetic],
        coupling=build_coupling(config.coupling),
        dropout=config.label_dropout if classes else 0.0,
        observation=observation,
    )
    task = FlowTask(
        flow, objective, train_set, held_out=held_out, optimization=config.optimization(), average=config.average
    )
    return task, augmentation(config.data.augment) if config.data.augment else None


def fields_network(
    config: NetworkConfig,
    networks: Literal["one", "two"],
    shape: tuple[int, ...],
    classes: int,
    seed: int,
    context: int,
    fields: int,
) -> nn.Module:
    """One network of one or two fields, or two networks side by side."""
    if fields == 1 or networks == "one":
        return build_network(config, shape, classes, seed, context=context, fields=fields)
    parts = [build_network(config, shape, classes, mix(seed, i), context=context) for i in (0, 1)]
    first, second = (spec_of(part) for part in parts)
    assert first is not None
    assert second is not None
    pair = Pair(PairConfig(first, second))
    pair.first, pair.second = parts
    return pair


def _first() -> Any:
    import torch

    return torch.zeros(1, dtype=torch.long)
