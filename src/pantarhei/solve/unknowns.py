"""What a gradient is taken with respect to, besides the state, and what it must not miss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.solve.state import wide


class Unknowns:
    """Tensors that a field closes over, with a sum of the gradients that reach each.

    Args:
        tensors: those whose gradient is wanted; they need not be leaves.
        scaled: bring cotangents near 1 on their way through a field in float16, in which small gradients vanish.

    Attributes:
        sums: their gradients so far, in single precision where a tensor has less; None where nothing has come yet.
    """

    def __init__(self, tensors: Iterable[Tensor], *, scaled: bool = False):
        self.tensors, self.scaled = tuple(tensors), scaled
        self.sums: list[Tensor | None] = [None] * len(self.tensors)

    def pull(
        self,
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        *,
        of_unknowns: bool = True,
    ) -> list[Tensor]:
        """The vector-Jacobian product with respect to the inputs; that with respect to the unknowns is added to `sums`.

        Raises:
            ValueError: the outputs depend on a tensor that needs gradients and is none of these.
        """
        pairs = [
            (o, c if c.dtype == o.dtype else c.to(o.dtype))
            for o, c in zip(outputs, cotangents, strict=True)
            if c is not None and o.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(x) for x in inputs]
        ends, given = zip(*pairs, strict=True)
        check_leaves(
            ends, [*inputs, *self.tensors]
        )  # each time: a field may depend on more at some times than at others
        wanted = self.tensors if of_unknowns else ()
        power = _power_of(given) if self.scaled else None
        if power is not None:
            given = tuple(torch.ldexp(c, -power) for c in given)
        grads = torch.autograd.grad(ends, (*inputs, *wanted), given, allow_unused=True)
        if power is not None:
            grads = tuple(None if g is None else torch.ldexp(wide(g), power) for g in grads)
        self._add(grads[len(inputs) :])
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=False)]

    def _add(self, grads: Sequence[Tensor | None]) -> None:
        sums, new = [], []
        for i, grad in enumerate(grads):
            before = self.sums[i]
            if grad is None:
                continue
            if before is None:
                self.sums[i] = wide(grad).clone()
            else:
                sums.append(before)
                new.append(grad)
        if sums:
            torch._foreach_add_(sums, new)

    def gradients(self) -> list[Tensor]:
        """The sums, in the tensors' own types, handed over; zeros where nothing has come.

        Raises:
            ValueError: nothing has come to any of them.
        """
        sums, self.sums = self.sums, [None] * len(self.tensors)
        if sums and all(s is None for s in sums):
            raise ValueError(
                "gradient: the field depends on none of the tensors that were named; are they the right ones?"
            )
        return [torch.zeros_like(x) if s is None else s.to(x.dtype) for x, s in zip(self.tensors, sums, strict=True)]


def _power_of(tensors: Sequence[Tensor]) -> Tensor:
    """The power of two above the largest element of all, 0-d."""
    largest = torch.stack([t.detach().abs().amax().float() for t in tensors]).amax()
    return torch.frexp(largest.clamp_min(torch.finfo(torch.float32).tiny))[1]


def check_leaves(outputs: Sequence[Tensor], named: Sequence[Tensor]) -> None:
    """Refuse a graph that ends in a leaf that nobody named: its gradient would be lost without a word.

    Raises:
        ValueError: there is one.
    """
    known = {id(x) for x in named}
    stops = {x.grad_fn for x in named if x.grad_fn is not None}
    seen, todo = set(), [x.grad_fn for x in outputs if x.grad_fn is not None and x.grad_fn not in stops]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise ValueError(
                f"gradient: the field depends on a tensor of shape {tuple(leaf.shape)} that needs gradients and was not "
                "named; give it with `parameters` (or `condition`), or detach it"
            )
        todo += [following for following, _ in node.next_functions if following is not None and following not in stops]


def parameters_of(given: nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | None) -> dict[str, Tensor]:
    """Named tensors: a module's trainable parameters, a mapping's values, or a sequence's with their numbers."""
    if given is None:
        return {}
    if isinstance(given, nn.Module):
        return {name: p for name, p in given.named_parameters() if p.requires_grad}
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, Tensor):
        raise ValueError("parameters: a module, a mapping or a sequence of tensors is needed, got one tensor")
    return {str(i): x for i, x in enumerate(given)}


def own_module(field: Callable[..., Any]) -> nn.Module | None:
    """The module that a field is, or is a method of."""
    while isinstance(field, partial):
        field = field.func
    owner = getattr(field, "__self__", field)
    return owner if isinstance(owner, nn.Module) else None


@contextmanager
def constant(tensors: Iterable[Tensor], but: Iterable[Tensor] = ()) -> Iterator[None]:
    """Leaves that need no gradient for a while, but for some."""
    kept = {id(x) for x in but}
    held = [x for x in tensors if x.requires_grad and x.is_leaf and id(x) not in kept]
    for x in held:
        x.requires_grad_(False)
    try:
        yield
    finally:
        for x in held:
            x.requires_grad_(True)
