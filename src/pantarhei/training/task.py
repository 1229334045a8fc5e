"""Tasks: what is trained, by which optimisers, and the updates of one iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei.naming import unknown
from pantarhei.solve.unknowns import constant

OptimizerName = Literal["adam", "adamw", "radam", "sgd"]
Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Optimization:
    """How a group of parameters is optimised.

    Attributes:
        lr: learning rate after the warm-up.
        optimizer: "adam", "adamw", "radam", "sgd", or a function of the parameters that returns an optimiser.
        betas, eps: of the Adam family; for "sgd" the first beta is the momentum.
        weight_decay: decoupled for "adamw", L2 otherwise.
        warmup: iterations of linear warm-up from 0.
        decay: what follows until the last iteration: "constant", "linear" to 0 or "cosine" to 0.
        clip: largest gradient norm over the group; None does not clip.
    """

    lr: float = 2e-4
    optimizer: OptimizerName | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    decay: Decay = "constant"
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr: must be positive, got {self.lr}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip: must be positive or None, got {self.clip}")

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
        trained = [p for p in parameters if p.requires_grad]
        if callable(self.optimizer):
            return self.optimizer(trained)
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, self.lr, momentum=self.betas[0], weight_decay=self.weight_decay)
        kinds: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
        if self.optimizer not in kinds:
            raise ValueError(unknown("optimizer", self.optimizer, [*kinds, "sgd"]))
        return kinds[self.optimizer](
            trained,
            self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            **_fused(trained, self.optimizer),
        )

    def factor(self, iteration: int, iterations: int) -> float:
        """Multiple of the learning rate at an iteration, counted from 0."""
        if iteration < self.warmup:
            return (iteration + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (iteration - self.warmup) / max(1, iterations - self.warmup)
        if self.decay == "linear":
            return 1.0 - progress
        if self.decay == "cosine":
            import math

            return (1 + math.cos(math.pi * progress)) / 2
        raise ValueError(unknown("decay", self.decay, ["constant", "linear", "cosine"]))


def _fused(parameters: list[nn.Parameter], optimizer: str) -> dict[str, bool]:
    """One fused kernel a step where torch has one (not for sharded parameters)."""
    plain = all(type(p) in (nn.Parameter, Tensor) and p.is_floating_point() for p in parameters)
    return {"fused": True} if plain and optimizer in ("adam", "adamw") else {}


@dataclass(frozen=True)
class Trained:
    """A group of networks under one optimiser: paths of submodules of the task, such as "flow.network"."""

    paths: tuple[str, ...]
    optimization: Optimization = field(default_factory=Optimization)

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            object.__setattr__(self, "paths", (self.paths,))


@dataclass(frozen=True)
class Update:
    """One optimiser step: the loss to minimise, the group that steps, values to log.

    `weight` is what this micro-batch counts against the others (a number of nodes, of unmasked elements): the gradient
    is that of sum(weight * loss) / sum(weight) over micro-batches and processes.
    """

    loss: Tensor
    group: str
    log: Mapping[str, Any] = field(default_factory=dict)
    weight: float | Tensor = 1.0


class Task(nn.Module):
    """What a training run does. Subclasses hold networks (trained, frozen, averages) as submodules.

    The loop wraps each trained network where it stands (so gradient exchange and sharding happen in its forward),
    builds one optimiser a group, and runs the updates of each batch one after another.

    Attributes:
        groups: the trained groups by name.
        averages: for each path of an `Average`, the path of the network it follows.
        data: where batches come from (a data source).
        iteration: number of the current iteration, from 0; set by the loop.
        shared: a generator that draws the same on every process; set by the loop.
        autocast: makes the context of the run's precision, for networks that the loop does not wrap; set by the loop.
    """

    groups: Mapping[str, Trained]
    averages: Mapping[str, str]
    data: Any
    iteration: int
    shared: torch.Generator | None
    autocast: Callable[[], AbstractContextManager[Any]]

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.averages, self.data = {}, {}, None
        self.iteration, self.shared, self.autocast = 0, None, nullcontext

    def updates(self, batch: dict[str, Tensor], generator: torch.Generator) -> Iterator[Update]:
        """Yield the updates of one batch; what follows a yield sees the stepped weights."""
        raise TypeError(f"{type(self).__name__} does not define updates")

    def split(self, batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
        """A batch as `parts` micro-batches of nearly equal size.

        Raises:
            ValueError: if it cannot be split so far.
        """
        rows = len(next(iter(batch.values())))
        if parts > rows:
            raise ValueError(f"accumulate: a batch of {rows} cannot be split into {parts}")
        pieces = {name: value.tensor_split(parts) for name, value in batch.items()}
        return [{name: values[i] for name, values in pieces.items()} for i in range(parts)]

    @property
    def done(self) -> bool:
        """Whether to stop before the last iteration (early stopping)."""
        return False

    def validate(self) -> float | None:
        """A figure that falls as the task gets better, for keeping the best checkpoint; None keeps the last ones only."""
        return None

    def preview(self, folder: Path, iteration: int) -> None:
        """Write pictures of the present state into `folder`."""

    def extra_state(self) -> dict[str, Any]:
        """JSON-able state beyond networks, optimisers and averages."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def config(self) -> dict[str, Any]:
        """The task as data, for `config.yaml`."""
        return {}


@contextmanager
def held(network: nn.Module) -> Iterator[nn.Module]:
    """A network as a function of its input only: its parameters are constants, though gradients pass through it.

    Use it for the discriminator in a generator's update: nothing is accumulated in, or exchanged for, its parameters.
    """
    plain = unwrapped(network)
    with constant(plain.parameters()):
        yield plain


def slope(term: Tensor, of: Tensor, *, keep: bool = True) -> Tensor:
    """The gradient of a term with respect to one tensor, within an update (for weights and penalties).

    Under mixed precision Lightning Fabric refuses every backward pass through a wrapped network that is not its own; this
    one steps nothing and needs nothing of it.

    Args:
        term: a 0-d loss.
        of: what it depends on.
        keep: keep the graph.
    """
    from lightning_fabric import wrappers

    inside: Any = wrappers  # a flag of theirs, in the versions that have it
    before = getattr(inside, "_in_fabric_backward", None)
    if before is None:
        return torch.autograd.grad(term, of, retain_graph=keep)[0]
    inside._in_fabric_backward = True
    try:
        return torch.autograd.grad(term, of, retain_graph=keep)[0]
    finally:
        inside._in_fabric_backward = before


def unwrapped(network: nn.Module) -> nn.Module:
    """The user's module inside what the training loop wrapped it in."""
    from lightning_fabric.wrappers import _FabricModule

    return network.module if isinstance(network, _FabricModule) else network


def submodule_set(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where `path` (dotted) points."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
