"""Field transformers: changes of the sampled field that see (x, t, step). Guidance is one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pantarhei.flow.conditions import Condition

ConditionedField = Callable[[Tensor, Tensor, Condition | None], Tensor]


class FieldTransform(Protocol):
    """Gives the field's value at (x, t), free to call the field it transforms as often as it likes."""

    def __call__(
        self, field: ConditionedField, x: Tensor, t: Tensor, condition: Condition | None, step: int | None
    ) -> Tensor:
        """The transformed value; `step` is the number of the step, None under error control."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, v_null + scale (v_cond - v_null) (Ho & Salimans 2207.12598); scale 1 is none.

    Attributes:
        scale: strength g.
        interval: times in which it acts (Kynkaanniemi et al. 2404.07724); outside it the conditional field is used.
        batched: evaluate both in one call of twice the rows (faster on a GPU) or in two calls (half the memory).
        channels: guide only so many channels, the first ones, and leave the others conditional; None guides all. The
            published samples of DiT and SiT guide 3 of 4 latent channels.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    batched: bool = True
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels: guidance must act on at least one channel, got {self.channels}")

    def __call__(
        self, field: ConditionedField, x: Tensor, t: Tensor, condition: Condition | None, step: int | None
    ) -> Tensor:
        """The guided velocity."""
        if condition is None:
            raise ValueError("guidance: there is no condition to guide by; pass condition= (or guidance=1)")
        if self.channels is not None and (x.ndim < 2 or self.channels > x.shape[1]):
            raise ValueError(f"channels: guidance on {self.channels} channels, but states are {tuple(x.shape[1:])}")
        if self.scale == 1.0:
            return field(x, t, condition)
        null = condition.null()
        if self.batched:
            both = field(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, condition.cat(null))
            conditional, unconditional = both.chunk(2)
        else:
            conditional, unconditional = field(x, t, condition), field(x, t, null)
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)
        low, high = self.interval
        if low <= 0.0 and high >= 1.0:
            return guided
        inside = ((t >= low) & (t <= high)).reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else (t >= low) & (t <= high)
        return torch.where(inside, guided, conditional)


@dataclass(frozen=True)
class Stretched:
    """Every velocity times a factor.

    With 1 / (1 - eps) on the interval [eps, 1] an Euler sampler takes steps of 1 / N between times that are (1 - eps) / N
    apart: the published sampler of rectified flow does (eps = 1e-3), and so do figures measured with it.
    """

    factor: float

    def __call__(
        self, field: ConditionedField, x: Tensor, t: Tensor, condition: Condition | None, step: int | None
    ) -> Tensor:
        """The stretched velocity."""
        return self.factor * field(x, t, condition)


class TransformedField:
    """A field under transformers, the first of which is the innermost. `step` is set by the sampler."""

    def __init__(self, field: ConditionedField, transforms: Sequence[FieldTransform]):
        self.step: int | None = None
        self.transforms = tuple(transforms)
        self._value = field
        for transform in transforms:
            self._value = self._under(transform, self._value)

    def __call__(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The transformed field at (x, t)."""
        return self._value(x, t, condition)

    def _under(self, transform: FieldTransform, inner: ConditionedField) -> ConditionedField:
        def value(x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
            return transform(inner, x, t, condition, self.step)

        return value

    def number_steps(self, hook: Callable[[Any, float, int], Any] | None) -> Callable[[Any, float, int], Any]:
        """A `before_step` hook that keeps `step` and then calls `hook`."""

        def before(x: Any, t: float, step: int) -> Any:
            self.step = step
            return None if hook is None else hook(x, t, step)

        return before
