"""Optimise what samples come from, noise, a condition or the weights, for any differentiable measure of the samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.data.seeds import mix
from pantarhei.flow import Condition, Flow, differentiable_sample, keep_norm
from pantarhei.flow.conditions import as_condition
from pantarhei.flow.provenance import TUNED
from pantarhei.images.pixels import from_uint8, to_uint8
from pantarhei.networks.embeddings import ClassEmbedding
from pantarhei.straighten.students import LowRank, train_low_rank

# Samples as they are decoded, (B, ...), to what is minimised: (B,), or 0-d for all of them together.
Metric = Callable[[Tensor], Tensor]
Watch = Callable[[int, float], None]
HALF_SCALE = 4096.0


@dataclass(frozen=True)
class OfRows:
    """A metric that depends on which samples it sees: `function(samples, rows)`, with their numbers (B,)."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, samples: Tensor) -> Tensor:
        """That of the first samples."""
        return self.function(samples, torch.arange(len(samples), device=samples.device))


@dataclass(frozen=True)
class Search:
    """How something is optimised.

    Attributes:
        iterations: updates.
        lr: of AdamW; of normalised steps their length.
        weight_decay: of AdamW.
        scale: multiplies the metric.
        sampling: options of `differentiable_sample`: steps, method, guidance, through, variables, truncate ...
        batch: rows sampled at a time.
        seed: of noise that a sampler draws on its way, of an SDE or between jumps: the same at every update.
    """

    iterations: int = 30
    lr: float = 0.01
    weight_decay: float = 0.0
    scale: float = 1.0
    sampling: dict[str, Any] = field(default_factory=dict)
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1 or not self.lr > 0 or self.batch < 1:
            raise ValueError(
                f"search: iterations >= 1, lr > 0 and batch >= 1 are needed, got {self.iterations}, {self.lr:g} and "
                f"{self.batch}"
            )


@dataclass(frozen=True)
class Found:
    """What a search led to.

    Attributes:
        value: the noise, the condition's rows, or the flow.
        before, after: samples at the start and with `value`, from the same noise where that is not what was searched.
        losses: the mean metric before each update, and at the end.
        best: iteration whose value this is, the one with the least metric (of noise: row by row, -1 then).
        measure: mean metric of what `after` was made with.
    """

    value: Any
    before: Tensor
    after: Tensor
    losses: tuple[float, ...]
    best: int
    measure: float


def optimize_noise(
    flow: Flow,
    metric: Metric,
    x0: Tensor,
    *,
    condition: Any = None,
    search: Search = Search(),
    keep: Literal["norm", "free"] = "norm",
    bound: float | None = None,
    steps_by: Literal["adamw", "sign", "normalised"] = "adamw",
    watch: Watch | None = None,
) -> Found:
    """The noise whose samples have the least metric, each row for itself (2307.10711; D-Flow 2402.14017).

    Args:
        flow: whose samples; its weights stay as they are.
        metric: (B, ...) to (B,).
        x0: where the search starts.
        condition: of the samples.
        search: iterations and step sizes.
        keep: "norm" puts each row back on the sphere of its first norm, where Gaussian noise is; "free" lets it go.
        bound: largest change of any element: the search stays within this box around the start.
        steps_by: AdamW, the sign of the gradient, or the gradient divided by its norm, row by row.
        watch: is told iteration and mean metric.

    Returns:
        The best noise of each row.

    Raises:
        ValueError: settings out of range.
        FloatingPointError: a metric that is not finite.
    """
    if bound is not None and not bound > 0:
        raise ValueError(f"bound: must be positive, got {bound:g}")
    start = x0.detach()
    named = _rows(flow, condition, len(x0))
    value = _wide(start).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([value], lr=search.lr, weight_decay=search.weight_decay)
    best, least = value.detach().clone(), torch.full((len(x0),), torch.inf, device=x0.device)
    losses: list[float] = []
    before: list[Tensor] = []
    for iteration in range(search.iterations + 1):
        last = iteration == search.iterations
        rows = torch.arange(len(x0), device=x0.device)
        found = []
        for part in rows.split(search.batch):
            samples = _drawn(flow, value[part].to(x0.dtype), part, search, None if named is None else named.index(part))
            values = _finite(_of(metric, samples, part), len(part))
            found.append(values.detach())
            if iteration == 0:
                before.append(samples.detach())
            if not last:
                _leave(flow, search.scale * values.sum(), [value])
        values = torch.cat(found).to(least.dtype)
        better = values < least
        best[better], least = value.detach()[better], torch.minimum(values, least)
        losses.append(float(values.mean()))
        if watch is not None:
            watch(iteration, losses[-1])
        if not last:
            _step(value, optimizer, search.lr, steps_by)
            with torch.no_grad():
                if keep == "norm":
                    value.copy_(keep_norm(value, start))
                if bound is not None:  # around the start, which is a tensor of its own
                    value.copy_(torch.minimum(torch.maximum(value, start - bound), start + bound))
    best = best.to(x0.dtype)
    after = _all(flow, best, search, named)
    return Found(best, torch.cat(before), after, tuple(losses), -1, float(least.mean()))


def optimize_condition(
    flow: Flow,
    metric: Metric,
    x0: Tensor,
    start: Tensor,
    *,
    name: str | None = None,
    others: dict[str, Tensor] | None = None,
    free: Tensor | None = None,
    nulls: dict[str, Tensor] | None = None,
    search: Search = Search(lr=0.05, iterations=50),
    watch: Watch | None = None,
) -> Found:
    """One condition for all samples whose metric is the least: an embedding for what no word or class stands for.

    Args:
        flow: whose samples; its weights stay as they are.
        metric: (B, ...) to (B,) or 0-d; one example to be like is `(x - example).square()`.
        x0: noises of the samples, (B, *shape).
        start: one row of the condition, floating-point: a text's embedding, or a row for a network of ours with classes
            (see `class_row`).
        name: which condition, where the flow has several, or its network takes it instead of another (`text` of tokens).
        others: one row of each of the network's other conditions.
        free: where it may change (true), of a shape that broadcasts to it: the tokens after those of a prompt, say.
        nulls: rows for no condition, for guidance: of this one and the others, where the flow's own do not fit.
        search: iterations and step sizes.
        watch: is told iteration and mean metric.

    Returns:
        The row with the least metric.

    Raises:
        ValueError: a start that is no floating-point row, or a flow without the condition.
        FloatingPointError: a metric that is not finite.
    """
    name = name or (flow.conditions[0] if len(flow.conditions) == 1 else None)
    if name is None:
        raise ValueError(f"name: which condition? this flow has {', '.join(flow.conditions) or 'none'}")
    if not start.is_floating_point():
        raise ValueError(f"start: a floating-point row of '{name}' is needed, got {start.dtype}")
    dropped = {**flow.null, **(nulls or {})}
    value = _wide(start.detach()).clone().requires_grad_(True)
    mask = torch.ones_like(start, dtype=torch.bool) if free is None else free.bool().expand_as(start)
    if not bool(mask.any()):
        raise ValueError("free: nothing may change")
    optimizer = torch.optim.AdamW([value], lr=search.lr, weight_decay=search.weight_decay)

    def condition(row: Tensor, rows: int) -> Condition:
        beside = {key: v.expand(rows, *v.shape) for key, v in (others or {}).items()}
        return Condition({name: row.to(start.dtype).expand(rows, *row.shape), **beside}, dropped)

    def gradient(last: bool) -> float:
        return _accumulated(flow, metric, x0, search, lambda part: condition(value, len(part)), [value], last=last)

    before = _all(flow, x0, search, condition(value.detach(), len(x0)))

    def step() -> None:
        assert value.grad is not None
        value.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            value.copy_(torch.where(mask, value, start))  # weight decay, too, leaves the rest alone

    best, losses, at = _searched(search, gradient, step, lambda: value.detach().to(start.dtype, copy=True), watch)
    after = _all(flow, x0, search, condition(best, len(x0)))
    return Found(best, before, after, losses, at, losses[at])


def optimize_weights(
    flow: Flow,
    metric: Metric,
    x0: Tensor,
    *,
    condition: Any = None,
    low_rank: LowRank | None = None,
    only: Sequence[str] = (),
    search: Search = Search(lr=1e-4, iterations=100),
    watch: Watch | None = None,
    seed: int = 0,
) -> Found:
    """A flow whose samples have the least metric, by tuning a copy's weights on fresh noise each time (DRaFT 2309.17400).

    Args:
        flow: is copied, not changed.
        metric: (B, ...) to (B,) or 0-d.
        x0: noises that before and after are shown with; their number is that of each update's.
        condition: of the samples.
        low_rank: train low-rank additions only.
        only: parts of the names of the weights to train; all by default.
        search: iterations and step sizes.
        watch: is told iteration and mean metric.
        seed: of the noise.

    Returns:
        The flow after the last update.

    Raises:
        ValueError: names that fit no weight.
        FloatingPointError: a metric that is not finite.
    """
    network = copy.deepcopy(flow.network).requires_grad_(True)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
        network = network.float()  # small updates vanish in half precision
    notes = {**flow.provenance.notes, "tuned": f"{search.iterations} updates"}
    tuned = flow.like(network, coupling=TUNED, notes=notes)
    if low_rank is not None:
        train_low_rank(network, low_rank)
    trained = {
        key: p
        for key, p in network.named_parameters()
        if p.requires_grad and (not only or any(part in key for part in only))
    }
    if not trained:
        raise ValueError(f"only: no weight is named like {', '.join(only)}")
    optimizer = torch.optim.AdamW(list(trained.values()), lr=search.lr, weight_decay=search.weight_decay)
    generator = torch.Generator(x0.device).manual_seed(mix(seed, 71))
    named = _rows(flow, condition, len(x0))

    updates = iter(range(search.iterations + 1))

    def gradient(last: bool) -> float:
        anew = replace(search, seed=mix(seed, 74, next(updates)))
        noise = flow.source.draw(tuple(x0.shape), x0.to(tuned.dtype), named, generator)
        rows: Callable[[Tensor], Condition | None] = lambda part: None if named is None else named.index(part)  # noqa: E731
        return _accumulated(tuned, metric, noise, anew, rows, list(trained.values()), trained, last=last)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    before = _all(flow, x0, search, named)
    _, losses, _ = _searched(search, gradient, step, lambda: None, watch)
    after = _all(tuned, x0.to(tuned.dtype), search, named)
    return Found(tuned, before, after, losses, search.iterations, losses[-1])


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
    search: Search = Search(),
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
        search: steps go along the gradient divided by its norm, of length `lr` each.
        saved: what becomes of samples that are saved; rounding to 8 bits in [-1, 1] for images by default.
        seed: of the random control.
        watch: is told iteration and mean metric.

    Raises:
        ValueError: none of the samples is classified correctly to begin with.
    """
    saved = saved or (rounded if x0.ndim == 4 else (lambda x: x))
    x0, labels = x0.to(flow.device), labels.to(flow.device)
    condition = labels if condition is None and flow.conditions == ("label",) else condition
    named = _rows(flow, condition, len(x0))

    def right(noise: Tensor) -> tuple[Tensor, Tensor]:
        images = saved(_all(flow, noise, search, named))
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


def class_row(network: nn.Module, label: int | None = None) -> Tensor:
    """A row of a network's class embedding to start from: that of a class, or the mean of all.

    Raises:
        ValueError: the network has no classes, or not this one.
    """
    tables = [module for module in network.modules() if isinstance(module, ClassEmbedding)]
    if not tables:
        raise ValueError("network: it has no embedding of classes")
    rows = tables[0].weight.detach()
    if label is None:
        return rows[:-1].mean(dim=0)
    if not 0 <= label < len(rows):
        raise ValueError(f"label: must lie in [0, {len(rows) - 1}], got {label}")
    return rows[label].clone()


def rounded(x: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit files keep them."""
    return from_uint8(to_uint8(x)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In single precision at least: what is optimised; small updates vanish below it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(flow: Flow, condition: Any, rows: int) -> Condition | None:
    named = as_condition(condition, flow.null, rows)
    return None if named is None else named.to(flow.device)


def _of(metric: Metric, samples: Tensor, rows: Tensor) -> Tensor:
    return metric.function(samples, rows) if isinstance(metric, OfRows) else metric(samples)


def _finite(values: Tensor, rows: int) -> Tensor:
    """The metric row by row.

    Raises:
        ValueError: another shape.
        FloatingPointError: it is not finite.
    """
    if values.shape not in ((), (rows,)):
        raise ValueError(
            f"metric: one number a sample ({rows},) is needed, or one for all, got shape {tuple(values.shape)}"
        )
    if torch.is_grad_enabled() and not values.requires_grad:
        raise ValueError(
            "metric: it does not depend differentiably on the samples (a comparison, argmax, detach or NumPy in it?)"
        )
    if not bool(values.isfinite().all()):
        raise FloatingPointError("metric: not finite on the samples; smaller steps, or another start?")
    return values if values.ndim else values.expand(rows)


def _step(value: Tensor, optimizer: torch.optim.Optimizer, lr: float, by: str) -> None:
    assert value.grad is not None
    if by == "adamw":
        optimizer.step()
    else:
        grad = value.grad
        if by == "normalised":
            dims = tuple(range(1, grad.ndim))
            way = grad / torch.linalg.vector_norm(grad, dim=dims, keepdim=True).clamp_min(1e-20)
        else:
            way = grad.sign()
        with torch.no_grad():
            value.sub_(lr * way)
    value.grad = None


def _accumulated(
    flow: Flow,
    metric: Metric,
    x0: Tensor,
    search: Search,
    condition: Callable[[Tensor], Condition | None],
    unknowns: Sequence[Tensor],
    parameters: Any = None,
    *,
    last: bool = False,
) -> float:
    """The mean metric over all rows, some at a time; its gradient is left with what was optimised, but at the last time."""
    total = 0.0
    for part in torch.arange(len(x0), device=x0.device).split(search.batch):
        samples = _drawn(flow, x0[part], part, search, condition(part), parameters=parameters)
        share = _finite(_of(metric, samples, part), len(part)).sum() / len(x0)
        total += float(share.detach())
        if not last:
            _leave(flow, search.scale * share, unknowns)
    return total


def _leave(flow: Flow, loss: Tensor, unknowns: Sequence[Tensor]) -> None:
    """Add a loss's gradient to that of the unknowns, and to nobody else's: a metric has weights, too."""
    factor = HALF_SCALE if flow.dtype == torch.float16 else 1.0  # small gradients vanish in such states
    grads = torch.autograd.grad(factor * loss, unknowns, allow_unused=True)
    for unknown, grad in zip(unknowns, grads, strict=True):
        if grad is not None:
            grad = grad if factor == 1.0 else grad / factor
            unknown.grad = grad if unknown.grad is None else unknown.grad + grad


def _searched(
    search: Search,
    gradient: Callable[[bool], float],
    step: Callable[[], Any],
    value: Callable[[], Any],
    watch: Watch | None,
) -> tuple[Any, tuple[float, ...], int]:
    """The best value, the metric before each update and at the end, and where it was best.

    Args:
        search: how often.
        gradient: gives the metric, and leaves its gradient unless it is told that this is the last time.
        step: one update, after which no gradient is left.
        value: what is kept where the metric is least.
        watch: is told.
    """
    losses: list[float] = []
    best, at = value(), 0
    for iteration in range(search.iterations + 1):
        last = iteration == search.iterations
        losses.append(gradient(last))
        if watch is not None:
            watch(iteration, losses[-1])
        if losses[-1] <= min(losses):
            best, at = value(), iteration
        if not last:
            step()
    return best, tuple(losses), at


def _drawn(flow: Flow, x0: Tensor, rows: Tensor, search: Search, condition: Condition | None, **options: Any) -> Tensor:
    """Samples of some rows; noise on the way is the same each time."""
    generator = torch.Generator().manual_seed(mix(search.seed, 73, int(rows[0])))
    return differentiable_sample(flow, x0, condition=condition, generator=generator, **{**search.sampling, **options})


@torch.no_grad()
def _all(flow: Flow, x0: Tensor, search: Search, condition: Condition | None) -> Tensor:
    parts = torch.arange(len(x0), device=x0.device).split(search.batch)
    return torch.cat(
        [
            _drawn(flow, x0[part], part, search, None if condition is None else condition.index(part), truncate=None)
            for part in parts
        ]
    )
