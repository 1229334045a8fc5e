"""How easily a classifier is fooled by samples of noise near to where they came from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.data.seeds import mix
from pantarhei.flow import Flow
from pantarhei.images.pixels import from_uint8, to_uint8
from pantarhei.recipes.optimization import Found, OfRows, Search, Watch, conditions_by_row, drawn, optimize_noise


@dataclass(frozen=True)
class Audit:
    """How often a classifier is fooled by samples of noise near to where they came from.

    Attributes:
        found: the search.
        correct: rows that the classifier had right to begin with; only these count.
        fooled: rows of these that it has wrong afterwards, on the images as they are saved.
        rate: share of the correct rows that are fooled.
        control: the same for random noise within the same bound.
        distance: root mean square distance of each image from its first, (B,).
    """

    found: Found
    correct: Tensor
    fooled: Tensor
    rate: float
    control: float
    distance: Tensor


def audit(
    flow: Flow,
    classifier: Callable[[Tensor], Tensor],
    x0: Tensor,
    labels: Tensor,
    *,
    condition: Any = None,
    bound: float = 0.1,
    search: Search | None = None,
    saved: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    watch: Watch | None = None,
) -> Audit:
    """Search, within a box of the noise, for samples of a class that a classifier takes for another (2307.10711, section 4).

    Args:
        flow: whose samples.
        classifier: decoded samples to logits (B, classes).
        x0: noises.
        labels: what the samples are of, (B,).
        condition: of the samples; the labels by default, where the flow takes them.
        bound: largest change of any element of the noise.
        search: steps go along the gradient divided by its norm, of length `lr` each; `Search()` by default.
        saved: what becomes of samples that are saved; rounding to 8 bits in [-1, 1] for images by default.
        seed: of the random control.
        watch: is told iteration and mean metric.

    Raises:
        ValueError: none of the samples is classified correctly to begin with.
    """
    search = search or Search()
    saved = saved or (rounded if x0.ndim == 4 else (lambda x: x))
    x0, labels = x0.to(flow.device), labels.to(flow.device)
    condition = labels if condition is None and flow.conditions == ("label",) else condition
    of_rows = conditions_by_row(flow, condition, len(x0))

    def right(noise: Tensor) -> tuple[Tensor, Tensor]:
        images = saved(drawn(flow, noise, search, of_rows))
        with torch.no_grad():
            return classifier(images).argmax(dim=1) == labels, images

    def confidence(x: Tensor, rows: Tensor) -> Tensor:
        return -F.cross_entropy(classifier(x), labels[rows], reduction="none")

    correct, first = right(x0)
    if not bool(correct.any()):
        raise ValueError("classifier: it has none of the samples right to begin with; there is nothing to fool")
    how: dict[str, Any] = {"keep": "free", "bound": bound, "steps_by": "normalised", "watch": watch}
    found = optimize_noise(flow, OfRows(confidence), x0, condition=condition, search=search, **how)
    still, images = right(found.value)
    generator = torch.Generator(x0.device).manual_seed(mix(seed, 72))
    moved = (2 * torch.rand(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device) - 1) * bound
    by_chance, _ = right(x0 + moved)
    fooled = correct & ~still
    count = int(correct.sum())
    distance = (images - first).square().flatten(1).mean(dim=1).sqrt()
    control = float((correct & ~by_chance).sum()) / count
    return Audit(
        replace(found, before=first, after=images), correct, fooled, float(fooled.sum()) / count, control, distance
    )


def rounded(x: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit files keep them."""
    return from_uint8(to_uint8(x)).to(x.dtype)
