"""Sample number i of a seed: the same whatever the batch size, the device count or a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.data.seeds import mix
from pantarhei.data.sources import Source
from pantarhei.flow.conditions import Condition
from pantarhei.flow.flow import Flow

# Names of the independent streams of one seed.
NOISE, SOURCE, LABEL, PATHS = 0, 1, 2, 3
Conditions = Callable[[Sequence[int]], dict[str, Tensor]]


def numbered_noise(seed: int, numbers: Sequence[int], shape: Sequence[int], *, salt: int = NOISE) -> Tensor:
    """Unit normal draws that depend on (seed, number) only.

    Args:
        seed: the user's seed.
        numbers: one sample number a row.
        shape: shape of one sample.
        salt: separates independent streams of one seed.

    Returns:
        float32 CPU tensor (len(numbers), *shape).
    """
    generator = torch.Generator()
    out = torch.empty(len(numbers), *shape)
    for row, number in enumerate(numbers):
        generator.manual_seed(mix(seed, number, salt))
        out[row] = torch.randn(tuple(shape), generator=generator)
    return out


def path_noise(seed: int, numbers: Sequence[int]) -> Callable[[int, Tensor], Tensor]:
    """The noise of an SDE's steps for these samples, as `solve.sde` takes it: row i depends on (seed, i) only.

    Each row has a stream of its own, so the steps must be asked for once each and in order, as a solver does.
    """
    streams = [torch.Generator().manual_seed(mix(seed, number, PATHS)) for number in numbers]

    def draw(step: int, x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=stream) for stream in streams]).to(x)

    return draw


def numbered_labels(seed: int, numbers: Sequence[int], classes: int) -> Tensor:
    """Evenly drawn class labels, int64 (len(numbers),), that depend on (seed, number) only."""
    return torch.tensor([mix(seed, number, LABEL) % classes for number in numbers], dtype=torch.long)


def numbered_source(
    flow: Flow, seed: int, numbers: Sequence[int], condition: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The unit source draws x0 of these samples, given their conditions, in the flow's dtype and on its device.

    Raises:
        ValueError: the flow does not know the shape of a sample.
    """
    if flow.shape is None:
        raise ValueError("flow: it does not know the shape of a sample; give Flow(..., shape=...)")
    if getattr(flow.source, "gaussian", False):
        x0 = numbered_noise(seed, numbers, flow.shape)
    else:
        rows = []
        for row, i in enumerate(numbers):
            own = Condition({name: value[row : row + 1] for name, value in condition.items()}) if condition else None
            rows.append(flow.source.draw((1, *flow.shape), torch.empty(0), own, seeded(seed, i, SOURCE)))
        x0 = torch.cat(rows)
    return x0.to(flow.device, flow.dtype)


def numbered_conditions(flow: Flow, seed: int, given: Conditions | Source | None = None) -> Conditions:
    """What each sample is conditioned on.

    Args:
        flow: the flow.
        seed: the user's seed.
        given: a function of the numbers; a data source, whose items' conditions are then drawn; or None for evenly drawn
            class labels (of a flow conditioned on nothing but `label`).

    Raises:
        ValueError: if the flow has conditions that cannot be made up.
    """
    if not flow.conditions:
        return lambda numbers: {}
    if isinstance(given, Source):
        source = given

        def from_source(numbers: Sequence[int]) -> dict[str, Tensor]:
            rows = torch.tensor([mix(seed, i, LABEL) % len(source) for i in numbers])
            batch = source.fetch(rows)
            return {name: batch[name] for name in flow.conditions}

        return from_source
    if callable(given):
        return given
    classes = flow.null.get("label")
    if flow.conditions != ("label",) or not isinstance(classes, int):
        raise ValueError(f"conditions: this flow is conditioned on {', '.join(flow.conditions)}; give conditions=")
    return lambda numbers: {"label": numbered_labels(seed, numbers, classes)}


def numbered_samples(
    flow: Flow,
    numbers: Sequence[int],
    *,
    seed: int,
    conditions: Conditions | Source | None = None,
    batch: int = 256,
    **options: Any,
) -> Iterator[dict[str, Tensor]]:
    """Samples in batches: `x0`, `x1` and the conditions, float32 on the CPU.

    Args:
        flow: the flow.
        numbers: which samples.
        seed: the user's seed.
        conditions: see `numbered_conditions`.
        batch: rows at a time.
        options: of `Flow.sample`.
    """
    named = numbered_conditions(flow, seed, conditions)
    stochastic = flow.draws_noise(**options)
    for first in range(0, len(numbers), batch):
        part = numbers[first : first + batch]
        condition = named(part)
        x0 = numbered_source(flow, seed, part, condition)
        if stochastic:
            options["noise"] = path_noise(seed, part)
        x1 = flow.sample(x0=x0, condition=condition or None, **options)
        yield {"x0": x0.float().cpu(), "x1": x1.float().cpu(), **{k: v.cpu() for k, v in condition.items()}}


def join(batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batches as one."""
    parts = list(batches)
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
