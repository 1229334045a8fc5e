"""Random numbers that were drawn once, drawn again: those of torch's own generators, as dropout draws them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RandomState = tuple[Tensor, ...]


def random_state(device: torch.device) -> RandomState:
    """The states of the host's generator and, for a GPU, of its own."""
    return (torch.get_rng_state(), *((torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()))


def same_state(a: RandomState, b: RandomState) -> bool:
    """Whether nothing was drawn between two states."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def drawn_again(state: RandomState | None, device: torch.device) -> Iterator[None]:
    """Draw again what was drawn after a state, and go on afterwards as if nothing had been; None does nothing."""
    if state is None:
        yield
        return
    now = random_state(device)
    _take_up(state, device)
    try:
        yield
    finally:
        _take_up(now, device)


def _take_up(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
