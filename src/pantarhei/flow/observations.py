"""What is known of a sample beforehand: a masked image, a small image, the present state.

Data-dependent couplings start there. An observation of x1 becomes a condition of the network, and the law of x0 given that
condition ends near x1: x0 and x1 are no longer independent, and the paths are shorter (Albergo et al. 2310.03725). As a
`Flow.source` an observation draws such x0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.data.seeds import generator as seeded
from pantarhei.data.sources import Source
from pantarhei.flow.conditions import Condition
from pantarhei.naming import build


@dataclass(frozen=True)
class Observation:
    """Makes conditions out of data (`observe`), and source points out of conditions (`draw`).

    Attributes:
        name_of_condition: the network's argument: "context" (an image beside x) or "vector".
    """

    name_of_condition: str = field(default="context", kw_only=True)

    # As a source law: x0 given the condition is no standard normal.
    gaussian = False

    def observe(self, batch: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """The conditions of a batch with `x1` (B, ...)."""
        raise TypeError(f"{type(self).__name__} does not define observe")

    def start(self, known: Tensor, noise: Tensor) -> Tensor:
        """x0 given what is known and unit noise like x0."""
        raise TypeError(f"{type(self).__name__} does not define start")

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """One x0 a row, given the condition.

        Raises:
            ValueError: without it.
        """
        if condition is None or self.name_of_condition not in condition:
            raise ValueError(f"condition: this flow starts from what is observed; give {self.name_of_condition!r}")
        noise = torch.randn(tuple(shape), dtype=like.dtype, device=like.device, generator=generator)
        return self.start(condition[self.name_of_condition].to(like), noise)

    def spec(self) -> dict[str, Any]:
        """The observation as data."""
        return {"name": next(n for n, kind in OBSERVATIONS.items() if kind is type(self)), **asdict(self)}


@dataclass(frozen=True)
class Inpainting(Observation):
    """A random rectangle of each image is hidden.

    The condition stacks the image with zeros there, and the mask (1 is known). x0 is the image with noise where it is
    hidden.

    Attributes:
        smallest, largest: sides of the rectangle, as fractions of the image's.
    """

    smallest: float = 0.4
    largest: float = 0.7

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest <= 1:
            raise ValueError(f"smallest, largest: 0 < smallest <= largest <= 1 is needed, got {self}")

    def observe(self, batch: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """The masked images and their masks, (B, C + 1, H, W)."""
        x1 = batch["x1"]
        b, _, height, width = _images(x1)
        u = torch.rand(b, 4, generator=generator, device=x1.device)
        known = torch.ones(b, 1, height, width, dtype=torch.bool, device=x1.device)
        inside = known
        for axis, side in ((2, height), (3, width)):
            length = torch.round(side * (self.smallest + (self.largest - self.smallest) * u[:, axis - 2]))
            first = torch.floor((side - length + 1) * u[:, axis])
            place = torch.arange(side, device=x1.device)
            between = (place >= first[:, None]) & (place < (first + length)[:, None])
            inside = inside & between.reshape(b, 1, *((side, 1) if axis == 2 else (1, side)))
        mask = (~inside).to(x1.dtype)
        return {self.name_of_condition: torch.cat([x1 * mask, mask], dim=1)}

    def start(self, known: Tensor, noise: Tensor) -> Tensor:
        """The known part, and noise in the hidden part."""
        image, mask = known[:, :-1], known[:, -1:]
        return image + (1 - mask) * noise


@dataclass(frozen=True)
class SuperResolution(Observation):
    """Images are known at a lower resolution. The condition is the small image, enlarged; x0 is it with a little noise.

    Attributes:
        factor: how many pixels become one, along each side.
        noise: deviation of the noise: without any, x0 would lie on a thin set and its law could not be spread.
    """

    factor: int = 2
    noise: float = 0.3

    def __post_init__(self) -> None:
        if self.factor < 2 or not self.noise >= 0:
            raise ValueError(f"factor, noise: factor >= 2 and noise >= 0 are needed, got {self}")

    def observe(self, batch: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """The averaged image at full size, (B, C, H, W)."""
        x1 = batch["x1"]
        _, _, height, width = _images(x1)
        if height % self.factor or width % self.factor:
            raise ValueError(f"factor: images of {height}x{width} cannot be made {self.factor} times smaller")
        small = F.avg_pool2d(x1, self.factor)
        return {self.name_of_condition: F.interpolate(small, scale_factor=float(self.factor), mode="nearest")}

    def start(self, known: Tensor, noise: Tensor) -> Tensor:
        """The enlarged image and noise."""
        return known + self.noise * noise


@dataclass(frozen=True)
class Present(Observation):
    """The state before x1 is known: data with `past` beside `x1`. x0 is that state (plus noise, for an ODE to spread).

    Attributes:
        noise: deviation of noise added to x0; 0 for a bridge that leaves one point, which needs an SDE.
    """

    noise: float = 0.0

    def observe(self, batch: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
        """The present state, like x1."""
        if "past" not in batch:
            raise ValueError("data: a forecast needs the present state beside the next one, past and x1")
        return {self.name_of_condition: batch["past"]}

    def start(self, known: Tensor, noise: Tensor) -> Tensor:
        """The present state."""
        return known + self.noise * noise if self.noise else known


OBSERVATIONS: dict[str, type[Observation]] = {
    "inpainting": Inpainting,
    "super-resolution": SuperResolution,
    "present": Present,
}


def build_observation(spec: str | dict[str, Any] | Observation) -> Observation:
    """An observation from its name, from its `spec()`, or itself.

    Raises:
        ValueError: for an unknown name or a wrong constant.
    """
    return spec if isinstance(spec, Observation) else build("observe", OBSERVATIONS, spec)


def _images(x: Tensor) -> tuple[int, int, int, int]:
    if x.ndim != 4:
        raise ValueError(f"observe: images (B, C, H, W) are needed, got shape {tuple(x.shape)}")
    return x.shape[0], x.shape[1], x.shape[2], x.shape[3]


class ObservedSource:
    """A data source whose items come with what is observed of them: the same for each item at each time.

    Args:
        source: the data.
        observation: what is observed.
    """

    def __init__(self, source: Source, observation: Observation):
        self.source, self.observation = source, observation
        self.name = source.name
        self.labels = getattr(source, "labels", None)
        self.classes = getattr(source, "classes", None)

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, indices: Tensor) -> dict[str, Tensor]:
        """The items, with the observation's condition; item i is seen through draws of its own."""
        batch = self.source.fetch(indices)
        rows = []
        for row, index in enumerate(indices.tolist()):
            item = {name: value[row : row + 1] for name, value in batch.items()}
            rows.append(self.observation.observe(item, seeded(index, 90)))
        return {**batch, **{name: torch.cat([row[name] for row in rows]) for name in rows[0]}}

    def describe(self) -> dict[str, Any]:
        """As the source, with the observation."""
        return {**self.source.describe(), "observed": self.observation.spec()}
