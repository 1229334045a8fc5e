"""Source distributions: what t = 0 holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pantarhei.data.sources import Source
from pantarhei.flow.conditions import Condition
from pantarhei.flow.observations import OBSERVATIONS, build_observation


class SourceLaw(Protocol):
    """The law of x0; it may depend on the condition."""

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """One x0 a row: `shape` is (B, *sample shape), `like` gives dtype and device."""

    def spec(self) -> dict[str, Any]:
        """The law as data."""


class StandardNormal:
    """x0 ~ N(0, I): the unit source draw of every generative path."""

    gaussian = True

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """Independent normal draws."""
        return torch.randn(tuple(shape), dtype=like.dtype, device=like.device, generator=generator)

    def log_prob(self, x0: Tensor) -> Tensor:
        """log N(x0; 0, I), shape (B,), in float64."""
        flat = x0.flatten(1).double()
        return -0.5 * (flat.square() + 1.8378770664093453).sum(dim=1)  # ln 2 pi

    def spec(self) -> dict[str, Any]:
        """{"name": "normal"}."""
        return {"name": "normal"}


class Samples:
    """x0 drawn from a set of samples (the source of a transfer between two data sets); no density.

    Args:
        samples: (N, *sample shape), values as the network should see them; or a data source, whose `x1` they are.
    """

    gaussian = False

    def __init__(self, samples: Tensor | Source):
        if isinstance(samples, Tensor) and (samples.ndim < 2 or samples.shape[0] < 1):
            raise ValueError(f"samples: shape (N, ...) with N >= 1 is needed, got {tuple(samples.shape)}")
        self.samples = samples

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """Rows drawn with replacement."""
        device = generator.device if generator is not None else "cpu"
        rows = torch.randint(len(self.samples), (shape[0],), generator=generator, device=device)
        x0 = self.take(rows)
        if tuple(shape[1:]) != tuple(x0.shape[1:]):
            raise ValueError(f"source: samples have shape {tuple(x0.shape[1:])}, asked {tuple(shape[1:])}")
        return x0.to(like)

    def take(self, rows: Tensor) -> Tensor:
        """The samples at `rows`."""
        if isinstance(self.samples, Tensor):
            return self.samples[rows.to(self.samples.device)]
        return self.samples.fetch(rows.cpu())["x1"]

    def spec(self) -> dict[str, Any]:
        """Samples are not saved with a flow; the spec only says that they were there."""
        name = {} if isinstance(self.samples, Tensor) else {"of": self.samples.name}
        return {"name": "samples", "count": len(self.samples), **name}


class Law(Protocol):
    """A law that can be drawn from and evaluated, such as a `GaussianMixture`."""

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws, (count, ...)."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (B,)."""


class Density:
    """x0 drawn from a law with a density.

    Args:
        law: such as a `GaussianMixture`.
    """

    gaussian = False

    def __init__(self, law: Law):
        self.law = law

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """Independent draws."""
        return self.law.sample(shape[0], generator).to(like)

    def log_prob(self, x0: Tensor) -> Tensor:
        """Log density, (B,), in float64."""
        return self.law.log_prob(x0).double()

    def spec(self) -> dict[str, Any]:
        """A law is not saved with a flow; the spec only says that it was there."""
        return {"name": "density", "of": type(self.law).__name__}


class Absent:
    """The source of a saved flow that starts from samples, which are not saved with it: only given x0 can be carried."""

    gaussian = False

    def __init__(self, spec: dict[str, Any]):
        self._spec = spec

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """There is nothing to draw from.

        Raises:
            ValueError: always; it says what to do.
        """
        kind = "a law" if self._spec["name"] == "density" else "samples"
        of = f" ({self._spec['of']})" if "of" in self._spec else ""
        verb = "is" if kind == "a law" else "are"
        raise ValueError(
            f"source: this flow starts from {kind}{of} that {verb} not saved with it; give x0= or load(source=)"
        )

    def spec(self) -> dict[str, Any]:
        """As it was saved."""
        return self._spec


def build_source(spec: Any) -> SourceLaw:
    """A source law from its spec, from samples (a tensor or a data source), from a density with `sample` and `log_prob`, or
    itself; None is the standard normal."""
    if spec is None or (isinstance(spec, dict) and spec["name"] == "normal"):
        return StandardNormal()
    if isinstance(spec, dict):
        return build_observation(spec) if spec["name"] in OBSERVATIONS else Absent(spec)
    if isinstance(spec, (Tensor, Source)):
        return Samples(spec)
    return spec if hasattr(spec, "draw") else Density(spec)
