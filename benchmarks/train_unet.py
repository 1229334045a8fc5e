"""Training speed of our U-Net and loss against torchcfm's, at equal parameters, batch and threads.

Counted: samples per second of whole training steps - draw a batch, draw noise and times, loss, gradients, Adam - on one
thread in float32. Both sides have the same resolutions, channel multipliers and place of attention (the middle), the
same data in memory, the same fused Adam without clipping, and parameter counts within 3 %. The peer's U-Net runs with
its own defaults otherwise.

`train_for` trains either side for some seconds and returns a `Flow`, so that one piece of code judges both: a U-Net of
fewer operations is worth nothing if it learns less in a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness import Bound, Measure, Record, compare, line, peer, save, use_threads
from pantarhei.flow import Flow, FlowMatching
from pantarhei.networks import UNet, UNetConfig
from peers import torchcfm_modules

BOUND = Bound("at least", 1.0)
LARGEST_DIFFERENCE = 0.03
# Attention of torchcfm's U-Net beside that in its middle is asked for by the side length it should happen at; no image
# here is so large.
MIDDLE_ONLY = "1024"


@dataclass(frozen=True)
class Case:
    """One pair of networks of equal size, and what they are trained on."""

    name: str
    shape: tuple[int, int, int]
    classes: int
    batch: int
    ours: UNetConfig
    theirs: dict[str, Any]
    steps: int
    rounds: int


DIGITS = Case(
    name="digits 8x8",
    shape=(1, 8, 8),
    classes=10,
    batch=128,
    ours=UNetConfig(channels=1, width=32, multipliers=(1, 2), blocks=(1, 4), classes=10),
    theirs={"num_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 2, "class_cond": True, "num_classes": 10},
    steps=2,
    rounds=40,
)
RANDOM = Case(
    name="random 32x32x3",
    shape=(3, 32, 32),
    classes=0,
    batch=32,
    ours=UNetConfig(channels=3, width=32, multipliers=(1, 2, 2, 2), blocks=(1, 2, 2, 2)),
    theirs={"num_channels": 32, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 1},
    steps=1,
    rounds=30,
)


class PeerNetwork(nn.Module):
    """torchcfm's U-Net under our signature, `forward(x, t, label=None)`."""

    def __init__(self, case: Case):
        super().__init__()
        unet, _ = torchcfm_modules()
        self.unet = unet(dim=case.shape, attention_resolutions=MIDDLE_ONLY, **case.theirs)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The velocity at (x, t)."""
        velocity: Tensor = self.unet(t, x, y=label)
        return velocity


Loss = Callable[[Tensor, Tensor | None], Tensor]


def ours(case: Case, generator: torch.Generator) -> tuple[Flow, Loss]:
    """Our network and our loss of a batch."""
    flow = _flow(UNet(case.ours), case)
    objective = FlowMatching()

    def loss(x1: Tensor, label: Tensor | None) -> Tensor:
        batch = {"x1": x1} if label is None else {"x1": x1, "label": label}
        return objective(flow, batch, generator)[0]

    return flow, loss


def theirs(case: Case, generator: torch.Generator) -> tuple[Flow, Loss]:
    """The peer's network and the peer's loss of a batch, as its examples write it; the `Flow` is for sampling only."""
    network = PeerNetwork(case)
    matcher = torchcfm_modules()[1](sigma=0.0)

    def loss(x1: Tensor, label: Tensor | None) -> Tensor:
        x0 = torch.randn(x1.shape, generator=generator)
        t, x_t, velocity = matcher.sample_location_and_conditional_flow(x0, x1)
        error: Tensor = torch.mean((network.unet(t, x_t, y=label) - velocity) ** 2)
        return error

    return _flow(network, case), loss


SIDES = {"ours": ours, "torchcfm": theirs}


def run(quick: bool = False) -> list[Record]:
    """One record a case."""
    use_threads(1)
    return [_case(case, 3 if quick else case.rounds) for case in (DIGITS, RANDOM)]


def _case(case: Case, rounds: int) -> Record:
    data, labels = _data(case)
    counts, measures = [], []
    for side in SIDES.values():
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        flow, loss = side(case, generator)
        counts.append(sum(p.numel() for p in flow.network.parameters()))
        measures.append(_samples_per_second(case, _stepper(flow, loss, data, labels, case.batch, generator)))
    if abs(counts[0] / counts[1] - 1) > LARGEST_DIFFERENCE:
        raise RuntimeError(f"{case.name}: the networks differ by more than 3 %: {counts[0]} and {counts[1]} parameters")
    return compare(
        "train_unet",
        case.name,
        *measures,
        peer=peer("torchcfm"),
        work=f"training steps on {case.shape} images, batch {case.batch}, float32, one thread, fused Adam; "
        f"ours: {case.ours}, {counts[0]} parameters; peer: UNetModel({case.theirs}), {counts[1]} parameters",
        counted="training speed",
        unit="samples/s",
        rounds=rounds,
        bound=BOUND,
        details={"parameters": {"ours": counts[0], "peer": counts[1]}},
    )


def _samples_per_second(case: Case, step: Callable[[], None]) -> Measure:
    def measure() -> float:
        start = time.perf_counter()
        for _ in range(case.steps):
            step()
        return case.batch * case.steps / (time.perf_counter() - start)

    return measure


def _stepper(
    flow: Flow,
    loss: Loss,
    data: Tensor,
    labels: Tensor | None,
    batch: int,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
    clip: float | None = None,
) -> Callable[[], None]:
    optimizer = optimizer or torch.optim.Adam(flow.network.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        rows = torch.randint(len(data), (batch,), generator=generator)
        optimizer.zero_grad()
        loss(data[rows], None if labels is None else labels[rows]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(flow.network.parameters(), clip)
        optimizer.step()

    return step


@dataclass(frozen=True)
class Trained:
    """What a number of seconds of training gave; `flow.sample(count, steps=50, condition=labels)` draws from it."""

    flow: Flow
    iterations: int
    seconds: float
    parameters: int


def train_for(
    side: Literal["ours", "torchcfm"],
    seconds: float,
    *,
    case: Case = DIGITS,
    data: Tensor | None = None,
    labels: Tensor | None = None,
    lr: float = 2e-3,
    warmup: int = 20,
    cosine: bool = True,
    clip: float | None = 1.0,
    average: float | None = 0.999,
    seed: int = 0,
) -> Trained:
    """Train one side for some seconds of wall-clock time and return it as a `Flow`.

    Args:
        side: whose network and loss.
        seconds: of training; building the network is not counted.
        case: sizes and batch.
        data, labels: what to train on; the digits by default.
        lr, warmup, cosine, clip: Adam at this rate after some iterations of linear warm-up, falling to zero along a
            cosine *of the time spent*, so that any budget ends with a finished schedule; gradient norm limit.
        average: decay of the moving average of the weights that is returned (None: the weights themselves); both sides
            have our average with its warm-up.
        seed: of weights, batches, noise and times.
    """
    use_threads(1)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow, loss = SIDES[side](case, generator)
    if data is None:
        data, labels = _data(case)
    network = flow.network
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
    step = _stepper(flow, loss, data, labels, case.batch, generator, optimizer, clip)
    follower = None
    if average is not None:
        from pantarhei.training.averages import Average

        follower = Average(network, average)
    iterations, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        factor = min(1.0, (iterations + 1) / max(1, warmup))
        factor *= (1 + math.cos(math.pi * spent / seconds)) / 2 if cosine else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        step()
        if follower is not None:
            follower.update(network)
        iterations += 1
    spent = time.perf_counter() - start
    result = flow if follower is None else _flow(follower.network, case)
    return Trained(result, iterations, spent, sum(p.numel() for p in network.parameters()))


def _flow(network: nn.Module, case: Case) -> Flow:
    return Flow(network, shape=case.shape, conditions=("label",) if case.classes else ())


def _data(case: Case) -> tuple[Tensor, Tensor | None]:
    """The digits in [-1, 1] with their labels, or as many random images as make the batches differ."""
    if not case.classes:
        return torch.rand(256, *case.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1, None
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


if __name__ == "__main__":
    records = run()
    save(records)
    print(*map(line, records), sep="\n")
