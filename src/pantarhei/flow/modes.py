"""Training and evaluation mode of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Dropout off while a network is used, and back as it was."""
    training = isinstance(network, nn.Module) and network.training
    if training:
        network.eval()
    try:
        yield
    finally:
        if training:
            network.train()
