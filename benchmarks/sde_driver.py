"""What the SDE sampler costs beyond its network and its noise: 100 Euler-Maruyama steps of a perceptron, batch 1,024."""

from __future__ import annotations

import torch

from harness import Bound, Peer, Record, compare, seconds, use_threads
from pantarhei.flow import Flow, GaussianMixture, Interpolant
from pantarhei.networks import MLP, MLPConfig

BATCH, STEPS = 1024, 100


def run(quick: bool = False) -> list[Record]:
    """Two records: a flow from noise, and a bridge with a latent, against bare network calls and normal draws."""
    use_threads(1)
    records = []
    for name, fields in (("from noise", 1), ("bridge with a latent", 2)):
        network = MLP(MLPConfig(2, 512, 3, fields=fields)).eval().requires_grad_(False)
        flow = Flow(network, shape=(2,))
        if fields == 2:
            source = GaussianMixture.standard(2, torch.float32)
            flow = Flow(network, path=Interpolant(), predicts="velocity+latent", source=source, shape=(2,))
        x, t = torch.randn(BATCH, 2), torch.rand(BATCH)

        def bare(network: MLP = network, x: torch.Tensor = x, t: torch.Tensor = t) -> None:
            for _ in range(STEPS):
                network(x, t)
                torch.randn(BATCH, 2)

        def sampled(flow: Flow = flow, x: torch.Tensor = x) -> None:
            flow.sample(x0=x, epsilon=0.5, steps=STEPS)

        records.append(
            compare(
                "sde driver",
                name,
                seconds(sampled),
                seconds(bare),
                peer=Peer("the network and the noise alone", torch.__version__),
                work=f"{STEPS} Euler-Maruyama steps, perceptron of 3 x 512, batch {BATCH}",
                counted="seconds",
                unit="s",
                rounds=2 if quick else 15,
                bound=Bound("at most", 1.15),
            )
        )
    return records
