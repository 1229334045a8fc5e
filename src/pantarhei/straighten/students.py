"""What every straightening has in common: a student that starts as its teacher, with notes of it, perhaps of low rank."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pantarhei.data.seeds import mix
from pantarhei.flow import Flow, PseudoHuber, on_path, squared
from pantarhei.flow.metrics import Premetric
from pantarhei.flow.paths import Numbered
from pantarhei.flow.predictions import EDMPreconditioned, Elsewhere
from pantarhei.networks.diffusers_adapters import TARGETS, adapt
from pantarhei.networks.diffusers_models import HALVES, DiffusersNetwork
from pantarhei.networks.lora import add_lora, merge_lora
from pantarhei.straighten.stores import PairSource


@dataclass(frozen=True)
class LowRank:
    """Train low-rank additions to the teacher's weights instead of these (Hu et al. 2106.09685).

    Attributes:
        rank: of the additions.
        alpha: their scale is alpha / rank; by default alpha = rank.
        targets: parts of the names of the layers that get one; all linear layers and convolutions by default. Models of
            diffusers get theirs through peft, by default in their attention.
        seed: of their first values.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    seed: int = 0


# Notes that describe how a teacher was made or is sampled, and not its student.
OF_THE_TEACHER = ("steps", "phases", "sampling_steps", "guidance_of_teacher", "low_rank", "method", "metric")


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

    Weights in half precision become float32: an optimiser's small steps would be lost in their rounding. The notes then
    name the teacher's type.

    Args:
        flow: the teacher, on the path and with the prediction that the student will have.
        pairs: what it will be trained on.
        start: network that it starts from, where it is not the teacher's.
        low_rank: train additions only.
        teacher: its name, for the provenance.
        notes: further notes for the provenance.
    """
    kept = {key: value for key, value in flow.provenance.notes.items() if key not in OF_THE_TEACHER}
    if pairs is not None:
        kept |= {"pairs": len(pairs), "guidance_in_pairs": pairs.header["guidance"]}
    kept |= notes or {}
    network = copy.deepcopy(start or flow.network).requires_grad_(True)
    if getattr(network, "lora", None) is not None:
        merge_lora(network)  # it goes on from what the additions made of it
    if any(p.dtype in HALVES for p in network.parameters()):
        network.float()
    if flow.dtype in HALVES:
        kept["teacher_dtype"] = str(flow.dtype).removeprefix("torch.")
    path = flow.prediction.origin if isinstance(flow.prediction, Elsewhere) else flow.path
    if isinstance(network, DiffusersNetwork) and isinstance(path, Numbered):
        network.follow(path.spec())  # a student may be on another schedule than its teacher
    if low_rank is not None:
        train_low_rank(network, low_rank)
        kept["low_rank"] = low_rank.rank
    student = flow.like(network, rectified=flow.provenance.rectified + 1, teacher=teacher, notes=kept)
    student.codec = None  # pairs live in the flow's space already
    return student


def train_low_rank(network: nn.Module, low_rank: LowRank) -> None:
    """Freeze a network and add what is trained instead, in place; models of diffusers get it through peft."""
    targets = low_rank.targets
    with torch.random.fork_rng():
        torch.manual_seed(mix(low_rank.seed, 63))
        if isinstance(network, DiffusersNetwork):
            adapt(network, low_rank.rank, low_rank.alpha, targets or TARGETS)
        else:
            add_lora(network, low_rank.rank, low_rank.alpha, targets)


def linear_student(flow: Flow) -> Flow:
    """The flow on the linear path, over all times that its prediction can have there.

    An EDM teacher knows t from 1/81 on (sigma = 80) where the student starts at 0; there it is told the noisiest label it
    knows, so that nothing is extrapolated.
    """
    moved = on_path(flow)
    prediction = moved.prediction
    if isinstance(prediction, EDMPreconditioned):
        first = max(moved.interval[0], 1e-5)
        prediction = replace(prediction, largest=min(prediction.largest, (1 - first) / first))
    interval = prediction.interval(moved.path)
    return moved.like(moved.network, predicts=prediction, interval=interval, starts_scaled=interval[0] > 0)


def name_of(metric: Premetric) -> str:
    """What a metric is called in a model card."""
    if metric is squared:
        return "squared"
    if isinstance(metric, PseudoHuber):
        unit = " elementwise" if metric.elementwise else " sqrt(D)" if metric.root else " D"
        return f"pseudo-Huber, c = {metric.c:g}{unit}"
    return str(getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__)))
