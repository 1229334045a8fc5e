"""How much memory a computation allocates at its peak."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory:
    """A context in which allocations are counted: `peak` is the most that was held at once beyond what was there before.

    On a GPU it is what the caching allocator says. On a CPU every tensor that an operation makes is followed until it is
    freed, backward passes included, which costs time: do not time what is measured.

    Args:
        device: where the tensors live.

    Attributes:
        peak: bytes.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device, self.peak = torch.device(device), 0
        self._before, self._follow = 0, _Follow()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._follow.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._follow.__exit__(kind, error, trace)
            self.peak = self._follow.peak


class _Follow(TorchDispatchMode):
    """Follows the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.held, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_storage(x) for x in _tensors((args, kwargs))}  # views and in-place results are nothing new
        for tensor in _tensors(result):
            key = _storage(tensor)
            if key in self._sizes or key in known:
                continue
            storage = tensor.untyped_storage()
            self._sizes[key] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.held -= self._sizes.pop(key, 0)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (tuple, list)):
        return [tensor for part in tree for tensor in _tensors(part)]
    if isinstance(tree, dict):
        return _tensors(list(tree.values()))
    return []
