"""Couplings: which source point is paired with which data point in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pantarhei.flow.conditions import Condition
from pantarhei.flow.sources import SourceLaw
from pantarhei.naming import build


class Coupling(Protocol):
    """Gives the x0 of each x1."""

    name: str

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        source: SourceLaw,
        condition: Condition | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """x0, row by row the partner of `batch["x1"]`."""


class Independent:
    """x0 drawn independently of x1. Where the batch brings an `x0`, that one is used: stored or given pairs."""

    name = "independent"

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        source: SourceLaw,
        condition: Condition | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The batch's own x0, else a draw."""
        if "x0" in batch:
            return batch["x0"]
        return source.draw(batch["x1"].shape, batch["x1"], condition, generator)


class Pairs:
    """Stored or given pairs: the batch must bring `x0` (reflow, distillation, paired translation)."""

    name = "pairs"

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        source: SourceLaw,
        condition: Condition | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """The batch's x0."""
        if "x0" not in batch:
            raise ValueError("coupling: 'pairs' needs x0 in every batch (a pair store or a paired data set)")
        return batch["x0"]


class MinibatchOT:
    """Re-pairs a batch by optimal transport of squared distances (Tong et al. 2302.00482, Pooladian et al. 2304.14772).

    Args:
        method: "exact" solves the assignment (a permutation); "sinkhorn" samples partners from the entropic plan.
        regularisation: entropic regularisation, as a fraction of the mean squared distance.

    The second needs POT (`pip install "pantarhei[ot]"`). Conditions stay with their x1: x0 is what is permuted.
    """

    name = "minibatch-ot"

    def __init__(self, method: Literal["exact", "sinkhorn"] = "exact", regularisation: float = 0.05):
        if method not in ("exact", "sinkhorn"):
            raise ValueError(f"method: must be 'exact' or 'sinkhorn', got {method!r}")
        if not regularisation > 0:
            raise ValueError(f"regularisation: must be positive, got {regularisation}")
        self.method = method
        self.regularisation = regularisation

    def __call__(
        self,
        batch: Mapping[str, Tensor],
        source: SourceLaw,
        condition: Condition | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """x0 in the order that pairs it with x1."""
        x1 = batch["x1"]
        x0 = Independent()(batch, source, condition, generator)
        cost = torch.cdist(x1.flatten(1).float(), x0.flatten(1).float()).square()
        matrix = cost.detach().double().cpu().numpy()
        if self.method == "exact":
            from scipy.optimize import linear_sum_assignment  # scikit-learn brings scipy

            partner = torch.as_tensor(linear_sum_assignment(matrix)[1])
        else:
            ot = _import_pot()
            uniform = torch.full((len(cost),), 1 / len(cost), dtype=torch.float64).numpy()
            plan = ot.sinkhorn(uniform, uniform, matrix / matrix.mean(), reg=self.regularisation, method="sinkhorn_log")
            weights = torch.as_tensor(plan).float().clamp_min(0).to(generator.device if generator else "cpu")
            partner = torch.multinomial(weights + 1e-30, 1, generator=generator)[:, 0]
        return x0[partner.to(x0.device)]


def _import_pot() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError('minibatch optimal transport needs POT: pip install "pantarhei[ot]"') from error
    return ot


COUPLINGS: dict[str, type[Any]] = {"independent": Independent, "pairs": Pairs, "minibatch-ot": MinibatchOT}


def build_coupling(spec: str | Coupling) -> Coupling:
    """A coupling from its name, or itself.

    Raises:
        ValueError: for an unknown name.
    """
    return build("coupling", COUPLINGS, spec) if isinstance(spec, str) else spec
