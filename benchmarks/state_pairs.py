"""Pairs as noise states and PNG samples: the cost of making them, of training from disk, and their size.

1. Making: pairs per second, as a share of what the network's forward alone allows; ours draws the noise from generator
   states, packs PNG files and merges the archives.
2. Training: iterations per second from the archives on disk, as a share of those from tensors in memory. Noise is drawn
   anew and images are decoded in the loop itself, without worker processes.
3. Size: bytes of the archives, as a share of the float32 arrays that the code of rectified flow keeps.

The images are half noise, which PNG can hardly shrink; those of trained flows take fewer bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harness import Bound, Measure, Peer, Record, compare, seconds, use_threads
from pantarhei.data import Source, TensorSource
from pantarhei.data.stream import Stream
from pantarhei.flow import Flow, FlowMatching
from pantarhei.flow.couplings import Pairs
from pantarhei.networks import UNet, UNetConfig
from pantarhei.straighten import PairSource, Solver, make_pairs, write_array_pairs

SHAPE, STEPS = (3, 32, 32), 12
NETWORK = UNetConfig(channels=3, width=32, multipliers=(1, 2, 2, 2), blocks=(1, 2, 2, 2))


class Halving(nn.Module):
    """The U-Net as a velocity whose samples lie in [-1, 1] without training: dx/dt = -0.7 x + a little of its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = UNet(NETWORK)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at (x, t)."""
        return 0.01 * self.network(x, t) - 0.7 * x


def run(quick: bool = False) -> list[Record]:
    """Three records: making, training, size."""
    use_threads(1)
    count, batch, rounds = (16, 8, 2) if quick else (128, 64, 9)
    flow = Flow(Halving().eval(), shape=SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        making = _making(flow, count, batch, rounds)
        pairs = make_pairs(flow, 2 * count, Path(folder) / "pairs", solver=Solver("euler", 1), store="states")
        return [making, _training(pairs, batch // 2, 2 * rounds), _size(pairs, Path(folder))]


def _making(flow: Flow, count: int, batch: int, rounds: int) -> Record:
    x, t = torch.randn(batch, *SHAPE), torch.rand(batch)

    def forward_only() -> None:
        with torch.no_grad():
            for _ in range(2 * STEPS * count // batch):
                flow.network(x, t)

    def pairs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder) / "pairs"
            make_pairs(flow, count, to, solver=Solver("heun", STEPS), batch=batch, shard_size=batch, store="states")

    def rate(work: Callable[[], None]) -> Measure:
        measure = seconds(work)
        return lambda: count / measure()

    return compare(
        "state_pairs",
        "making, 32x32x3",
        rate(pairs),
        rate(forward_only),
        peer=Peer("the network's forward alone", torch.__version__),
        work=f"{count} pairs of 3x32x32, {STEPS} Heun steps, batch {batch}; ours with noise states, PNG files and archives",
        counted="images per second",
        unit="1/s",
        rounds=rounds,
        warmup=1,
        bound=Bound("at least", 0.9),
    )


def _training(pairs: PairSource, batch: int, rounds: int, iterations: int = 4) -> Record:
    def measure(source: Source) -> Measure:
        steps = _steps(source, batch)

        def work() -> None:
            for _ in range(iterations):
                next(steps)

        elapsed = seconds(work)
        return lambda: iterations / elapsed()

    return compare(
        "state_pairs",
        "training, 32x32x3",
        measure(pairs),
        measure(TensorSource(pairs.tensors())),
        peer=Peer("the same pairs in memory", torch.__version__),
        work=f"training iterations on {len(pairs)} pairs of 3x32x32, batch {batch}, U-Net of width {NETWORK.width}, Adam",
        counted="iterations per second",
        unit="1/s",
        rounds=rounds,
        warmup=1,
        bound=Bound("at least", 0.95),
    )


def _steps(source: Source, batch: int) -> Iterator[None]:
    flow = Flow(Halving(), shape=SHAPE)
    objective = FlowMatching(coupling=Pairs())
    optimizer = torch.optim.Adam(flow.network.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    for items in Stream(source, batch):
        optimizer.zero_grad()
        objective(flow, items, generator)[0].backward()
        optimizer.step()
        yield


def _size(pairs: PairSource, folder: Path) -> Record:
    arrays = write_array_pairs(pairs, folder / "arrays")

    def size(of: Path) -> Measure:
        return lambda: sum(path.stat().st_size for path in of.iterdir()) / len(pairs)

    return compare(
        "state_pairs",
        "size, 32x32x3",
        size(folder / "pairs"),
        size(arrays),
        peer=Peer("z0.npy and z1.npy", f"NumPy {np.__version__}"),
        work=f"{len(pairs)} pairs of 3x32x32; samples that are half noise",
        counted="bytes a pair on disk",
        unit="B",
        rounds=1,
        warmup=0,
        bound=Bound("at most", 0.25),
    )
