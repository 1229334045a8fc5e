"""Pair generation: pairs per second, as a share of what the network's forward alone allows.

The work is 512 pairs of 8x8 digits by 12 Heun steps (24 evaluations) with the quickstart's U-Net; ours includes drawing
the noise and writing the store, the other side is the bare forward passes on ready inputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from harness import Bound, Measure, Peer, Record, compare, seconds, use_threads
from pantarhei.flow import Flow
from pantarhei.recipes.backbones import NetworkConfig, build_network
from pantarhei.straighten import Solver, make_pairs

COUNT, STEPS, BATCH, SHAPE, CLASSES = 512, 12, 256, (1, 8, 8), 10


def run(quick: bool = False) -> list[Record]:
    """One record: pairs per second against the forward alone."""
    use_threads(1)
    network = build_network(NetworkConfig(), SHAPE, CLASSES, seed=0).eval()
    for parameter in network.parameters():  # layers that start at zero would make the trajectories trivial
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    flow = Flow(network, shape=SHAPE, null={"label": CLASSES})
    x, t, label = torch.randn(BATCH, *SHAPE), torch.rand(BATCH), torch.randint(CLASSES, (BATCH,))

    def forward_only() -> None:
        with torch.no_grad():
            for _ in range(2 * STEPS * COUNT // BATCH):
                network(x, t, label=label)

    def pairs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            make_pairs(flow, COUNT, Path(folder) / "pairs", solver=Solver("heun", STEPS), batch=BATCH)

    def rate(work: Callable[[], None]) -> Measure:
        measure = seconds(work)
        return lambda: COUNT / measure()

    return [
        compare(
            "pairs",
            "digits 8x8",
            rate(pairs),
            rate(forward_only),
            peer=Peer("the network's forward alone", torch.__version__),
            work=f"{COUNT} pairs of 1x8x8, {STEPS} Heun steps, batch {BATCH}; ours with noise and files",
            counted="pairs per second",
            unit="1/s",
            rounds=2 if quick else 15,
            bound=Bound("at least", 0.9),
        )
    ]
