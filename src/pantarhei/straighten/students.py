"""What every straightening has in common: a student that starts as its teacher, with notes of it, perhaps of low rank."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from pantarhei.flow import Flow
from pantarhei.networks.diffusers_adapters import TARGETS, add_peft
from pantarhei.networks.diffusers_models import DiffusersNetwork
from pantarhei.networks.lora import add_lora
from pantarhei.straighten.stores import PairSource


@dataclass(frozen=True)
class LowRank:
    """Train low-rank additions to the teacher's weights instead of these (Hu et al. 2106.09685).

    Attributes:
        rank: of the additions.
        alpha: their scale is alpha / rank; by default alpha = rank.
        targets: parts of the names of the layers that get one; all linear layers and convolutions by default. Models of
            diffusers get theirs through peft, by default in their attention.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()


def make_student(
    flow: Flow,
    pairs: PairSource | None = None,
    *,
    start: nn.Module | None = None,
    low_rank: LowRank | None = None,
    teacher: str = "",
    notes: dict[str, Any] | None = None,
) -> Flow:
    """A copy of a flow that is going to be rectified once more.

    Args:
        flow: the teacher, on the path and with the prediction that the student will have.
        pairs: what it will be trained on.
        start: network that it starts from, where it is not the teacher's.
        low_rank: train additions only.
        teacher: its name, for the provenance.
        notes: further notes for the provenance.
    """
    kept = {key: value for key, value in flow.provenance.notes.items() if key != "steps"}
    if pairs is not None:
        kept |= {"pairs": len(pairs), "guidance_in_pairs": pairs.header["guidance"]}
    kept |= notes or {}
    network = copy.deepcopy(start or flow.network).requires_grad_(True)
    if low_rank is not None:
        targets = low_rank.targets
        if isinstance(network, DiffusersNetwork):
            network = add_peft(network, low_rank.rank, low_rank.alpha, targets or TARGETS)
        else:
            add_lora(network, low_rank.rank, low_rank.alpha, targets)
        kept["low_rank"] = low_rank.rank
    student = flow.like(network, rectified=flow.provenance.rectified + 1, teacher=teacher, notes=kept)
    student.codec = None  # pairs live in the flow's space already
    return student
