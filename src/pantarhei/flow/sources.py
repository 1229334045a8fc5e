"""Source distributions: what t = 0 holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pantarhei.flow.conditions import Condition


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
        samples: (N, *sample shape), values as the network should see them.
    """

    gaussian = False

    def __init__(self, samples: Tensor):
        if samples.ndim < 2 or samples.shape[0] < 1:
            raise ValueError(f"samples: shape (N, ...) with N >= 1 is needed, got {tuple(samples.shape)}")
        self.samples = samples

    def draw(
        self, shape: Sequence[int], like: Tensor, condition: Condition | None, generator: torch.Generator | None
    ) -> Tensor:
        """Rows drawn with replacement."""
        if tuple(shape[1:]) != tuple(self.samples.shape[1:]):
            raise ValueError(f"source: samples have shape {tuple(self.samples.shape[1:])}, asked {tuple(shape[1:])}")
        device = generator.device if generator is not None else "cpu"
        rows = torch.randint(self.samples.shape[0], (shape[0],), generator=generator, device=device)
        return self.samples[rows.to(self.samples.device)].to(like)

    def spec(self) -> dict[str, Any]:
        """Samples are not saved with a flow; the spec only says that they were there."""
        return {"name": "samples", "count": self.samples.shape[0]}


def build_source(spec: Any) -> SourceLaw:
    """A source law from its spec, from samples (a tensor), or itself; None is the standard normal."""
    if spec is None or (isinstance(spec, dict) and spec["name"] == "normal"):
        return StandardNormal()
    if isinstance(spec, Tensor):
        return Samples(spec)
    if isinstance(spec, dict):
        raise ValueError("source: this flow starts from samples that are not saved with it; pass source= when loading")
    return spec
