"""Optimise what samples come from, noise, a condition or the weights, for any differentiable measure of the samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei.data.seeds import mix
from pantarhei.flow import Condition, Flow, differentiable_sample, keep_norm
from pantarhei.flow.conditions import as_condition
from pantarhei.flow.provenance import TUNED
from pantarhei.networks.embeddings import ClassEmbedding
from pantarhei.solve.state import wide
from pantarhei.straighten.students import LowRank, train_low_rank

# Samples as they are decoded, (B, ...), to what is minimised: (B,), or 0-d for all of them together.
Metric = Callable[[Tensor], Tensor]
Watch = Callable[[int, float], None]
OfSome = Callable[[Tensor], Condition | None]  # the conditions of some samples, by their numbers (B,)
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
    of_rows = conditions_by_row(flow, condition, len(x0))
    value = wide(start).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([value], lr=search.lr, weight_decay=search.weight_decay)
    best, least = value.detach().clone(), torch.full((len(x0),), torch.inf, device=x0.device)

    def gradient(last: bool) -> float:
        x0 = value.to(start.dtype)
        values = _accumulated(flow, metric, x0, search, of_rows, [value], last=last).to(least.dtype)
        better = values < least
        best[better], least[better] = value.detach()[better], values[better]
        return float(values.mean())

    @torch.no_grad()
    def step() -> None:
        _move(value, optimizer, search.lr, steps_by)
        if keep == "norm":
            value.copy_(keep_norm(value, start))
        if bound is not None:  # around the start, which is a tensor of its own
            value.copy_(torch.minimum(torch.maximum(value, start - bound), start + bound))

    before = drawn(flow, start, search, of_rows)
    _, losses, _ = _searched(search, gradient, step, lambda: None, watch)
    best = best.to(start.dtype)
    return Found(best, before, drawn(flow, best, search, of_rows), losses, -1, float(least.mean()))


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
    value = wide(start.detach()).clone().requires_grad_(True)
    mask = torch.ones_like(start, dtype=torch.bool) if free is None else free.bool().expand_as(start)
    if not bool(mask.any()):
        raise ValueError("free: nothing may change")
    optimizer = torch.optim.AdamW([value], lr=search.lr, weight_decay=search.weight_decay)

    def condition(row: Tensor, rows: Tensor) -> Condition:
        beside = {key: v.expand(len(rows), *v.shape) for key, v in (others or {}).items()}
        return Condition({name: row.to(start.dtype).expand(len(rows), *row.shape), **beside}, dropped)

    def gradient(last: bool) -> float:
        values = _accumulated(
            flow, metric, x0, search, lambda rows: condition(value, rows), [value], last=last, mean=True
        )
        return float(values.mean())

    before = drawn(flow, x0, search, lambda rows: condition(start, rows))

    def step() -> None:
        assert value.grad is not None
        value.grad.mul_(mask)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            value.copy_(torch.where(mask, value, start))  # weight decay, too, leaves the rest alone

    best, losses, at = _searched(search, gradient, step, lambda: value.detach().to(start.dtype, copy=True), watch)
    after = drawn(flow, x0, search, lambda rows: condition(best, rows))
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
    of_rows = conditions_by_row(flow, condition, len(x0))
    updates = iter(range(search.iterations + 1))

    def gradient(last: bool) -> float:
        anew = replace(search, seed=mix(seed, 74, next(updates)))
        rows = of_rows(torch.arange(len(x0), device=x0.device))
        noise = flow.source.draw(tuple(x0.shape), x0.to(tuned.dtype), rows, generator)
        unknowns = list(trained.values())
        values = _accumulated(tuned, metric, noise, anew, of_rows, unknowns, parameters=trained, last=last, mean=True)
        return float(values.mean())

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    before = drawn(flow, x0, search, of_rows)
    _, losses, _ = _searched(search, gradient, step, lambda: None, watch)
    after = drawn(tuned, x0.to(tuned.dtype), search, of_rows)
    return Found(tuned, before, after, losses, search.iterations, losses[-1])


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


def conditions_by_row(flow: Flow, condition: Any, rows: int) -> OfSome:
    """The conditions of some of so many samples."""
    named = as_condition(condition, flow.null, rows, flow.device)
    return lambda some: None if named is None else named.index(some)


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


def _move(value: Tensor, optimizer: torch.optim.Optimizer, lr: float, by: str) -> None:
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
        value.sub_(lr * way)
    value.grad = None


def _accumulated(
    flow: Flow,
    metric: Metric,
    x0: Tensor,
    search: Search,
    of_rows: OfSome,
    unknowns: Sequence[Tensor],
    *,
    parameters: Any = None,
    last: bool = False,
    mean: bool = False,
) -> Tensor:
    """The metric of all rows (B,), some at a time; the gradient of its sum, or mean, is left with the unknowns.

    At the last time it is not needed.
    """
    found = []
    for rows in torch.arange(len(x0), device=x0.device).split(search.batch):
        samples = _drawn(flow, x0[rows], rows, search, of_rows(rows), parameters=parameters)
        values = _finite(_of(metric, samples, rows), len(rows))
        found.append(values.detach())
        if not last:
            _leave(flow, search.scale * values.sum() / (len(x0) if mean else 1), unknowns)
    return torch.cat(found)


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
def drawn(flow: Flow, x0: Tensor, search: Search, of_rows: OfSome) -> Tensor:
    """Samples by a search's sampler, some at a time, without gradients."""
    parts = torch.arange(len(x0), device=x0.device).split(search.batch)
    return torch.cat([_drawn(flow, x0[rows], rows, search, of_rows(rows), truncate=None) for rows in parts])
