"""Forward and backward of the CIFAR-10 network (DDPM++, 61.8 M parameters) against the same network written plainly.

The other side is `plain_ncsnpp.py`: the layers of the published code, each as its formula says. Both hold the same
weights and are checked to give the same output and the same gradients first. Each side runs in whichever memory layout,
(B, C, H, W) or channels last, is the quicker for it. Sixteen images are the least at which PyTorch hands a 1x1
convolution on one thread to oneDNN: smaller batches would put the plain side at a disadvantage that training never has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness import Bound, Measure, Peer, Record, compare, fastest, line, save, seconds, use_threads
from pantarhei.networks.ncsnpp import NCSNpp, NCSNppConfig
from pantarhei.networks.ncsnpp_keys import from_reference, to_reference
from plain_ncsnpp import CIFAR10, PARAMETERS, PlainNCSNpp

BATCH, SIDE, ROUNDS = 16, 32, 8
BOUND = Bound("at most", 0.9)
TOLERANCE = 1e-4
OURS = NCSNppConfig(dropout=CIFAR10.dropout)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def run(quick: bool = False) -> list[Record]:
    """One record: seconds of forward and backward in training mode."""
    use_threads(1)
    plain, ours = networks()
    check_same_work(plain, ours)
    batch = 2 if quick else BATCH
    sides = {name: _measures(network, batch) for name, network in (("ours", ours), ("plain", plain))}
    best = {name: fastest(measures, 1 if quick else 2) for name, measures in sides.items()}
    return [
        compare(
            "ncsnpp",
            "CIFAR-10",
            sides["ours"][best["ours"]],
            sides["plain"][best["plain"]],
            peer=Peer("plain PyTorch", torch.__version__),
            work=f"forward and backward of DDPM++ ({PARAMETERS['cifar10']} parameters), batch {batch} of 3x32x32, float32, "
            f"dropout {CIFAR10.dropout}, one thread; ours {best['ours']}, plain {best['plain']}",
            counted="time of forward and backward",
            unit="s",
            rounds=2 if quick else ROUNDS,
            warmup=1,
            bound=BOUND,
            details={"layouts": best},
        )
    ]


def networks() -> tuple[PlainNCSNpp, NCSNpp]:
    """The plain network and ours with the same weights, none of which is as good as zero."""
    torch.manual_seed(0)
    plain, ours = PlainNCSNpp(CIFAR10), NCSNpp(OURS)
    for parameter in plain.parameters():
        if parameter.ndim > 1 and parameter.detach().abs().max() < 1e-4:
            nn.init.normal_(parameter, std=0.02)
    ours.load_state_dict(from_reference(plain.state_dict(), OURS, "plain network"))
    counts = [sum(p.numel() for p in network.parameters()) for network in (plain, ours)]
    if counts != [PARAMETERS["cifar10"]] * 2:
        raise RuntimeError(f"{PARAMETERS['cifar10']} parameters were expected of both sides, got {counts}")
    return plain, ours


def check_same_work(plain: PlainNCSNpp, ours: NCSNpp) -> None:
    """Both give the same output and gradients, in either layout, with dropout off."""
    x, t = torch.randn(2, 3, SIDE, SIDE), torch.rand(2)
    expected, gradients = _passes(plain, x, t)
    for layout, memory_format in LAYOUTS.items():
        found, own = _passes(
            ours.to(memory_format=memory_format),  # type: ignore[call-overload]
            x.contiguous(memory_format=memory_format),
            t,
        )
        errors = {"output": _relative(found, expected)}
        errors.update({name: _relative(g, gradients[name]) for name, g in to_reference(own, OURS).items()})
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
        if wrong:
            raise RuntimeError(f"ncsnpp ({layout}): the two sides differ in {wrong}")


def _passes(network: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of its mean square by name."""
    network.eval()
    output = network(x, t)
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.square().mean(), parameters)
    return output.detach(), dict(zip(names, gradients, strict=True))


def _relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; a gradient that should vanish has only rounding errors to compare."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-7))


def _measures(network: nn.Module, batch: int) -> dict[str, Measure]:
    x, t = torch.randn(batch, 3, SIDE, SIDE), torch.rand(batch)
    network.train()

    def work(memory_format: torch.memory_format) -> Measure:
        seen = x.contiguous(memory_format=memory_format)

        def step() -> None:
            network(seen, t).square().mean().backward()

        def measure() -> float:
            # Changing the layout is free where it is in place already; gradients go between the steps.
            network.to(memory_format=memory_format)  # type: ignore[call-overload]
            network.zero_grad()
            return seconds(step)()

        return measure

    return {name: work(memory_format) for name, memory_format in LAYOUTS.items()}


if __name__ == "__main__":
    records = run()
    save(records)
    print(*map(line, records), sep="\n")
