"""What recipes train on: data by name; and what commands may ask of any recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from pantarhei.data import TOYS, Source, read_points, split, toy_source
from pantarhei.images import open_images


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


R = TypeVar("R", bound="Recipe")


@dataclass(frozen=True)
class Recipe:
    """What commands ask of a recipe, whatever its system.

    Attributes:
        data: what to train on.
        source: data to start from, named like `data`; empty for noise.
    """

    data: DataConfig = field(default_factory=DataConfig)
    source: str = ""

    def open(self) -> tuple[Source, Source]:
        """The training part and the held-out part of the data, with the conditions that a flow of this recipe takes."""
        return self.data.open()

    def open_source(self) -> tuple[Source, Source] | None:
        """Training and held-out part of what a transfer starts from; None for noise."""
        return self.data.open(self.source) if self.source else None

    def spec(self) -> dict[str, Any]:
        """As data for `config.yaml`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def read_recipe(kind: type[R], spec: Mapping[str, Any], **parts: type[Any]) -> R:
    """A recipe from its `spec()`; `parts` name the fields that are configurations themselves.

    Raises:
        ValueError: settings that this recipe does not have.
    """
    settings = dict(spec)
    try:
        kinds: dict[str, Any] = {"data": DataConfig, **parts}
        for name, part in kinds.items():
            if name in settings:
                settings[name] = part(**settings[name])
        return kind(**settings)
    except TypeError as error:
        raise ValueError(f"recipe: these settings are not of {kind.__name__}: {error}") from None
