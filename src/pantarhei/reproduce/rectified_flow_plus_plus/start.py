"""The teacher's weights as a start: they are a flow exactly, and training from them is shorter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.data import as_source
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, MixtureField, on_path, squared
from pantarhei.flow.paths import EDM
from pantarhei.flow.times import Uniform
from pantarhei.networks import SongUNet, SongUNetConfig
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow.points import three_modes
from pantarhei.reproduce.rectified_flow_plus_plus.setups import ARMS, Setup, fresh_network, setup, task_of
from pantarhei.reproduce.training import train_quietly
from pantarhei.straighten import plus_plus_task
from pantarhei.training import Optimization

SIGMA_DATA = 0.5


class MixtureDenoiser(nn.Module):
    """The network F inside the exact denoiser of a mixture: EDM's preconditioning around it gives E[x1 | x_t]."""

    def __init__(self, mixture: GaussianMixture):
        super().__init__()
        self.path = EDM()
        self.field = MixtureField(mixture, path=self.path)

    def forward(self, seen: Tensor, label: Tensor) -> Tensor:
        """F at x_t / q and ln(sigma) / 4."""
        sigma = torch.exp(4 * label)[:, None]
        q = torch.sqrt(sigma**2 + SIGMA_DATA**2)
        x = q * seen
        data = self.field.denoise(x, self.path.time_at(1 / sigma[:, 0]))
        return (data - SIGMA_DATA**2 * x / q**2) * q / (sigma * SIGMA_DATA)


@torch.no_grad()
def exact(settings: Settings) -> dict[str, float]:
    """The EDM ODE and the linear one, solved from the same noise: an analytic denoiser, and a network of random weights."""
    mixture = three_modes(torch.float64)
    analytic = Flow(MixtureDenoiser(mixture), path="edm", predicts="edm", shape=(2,))
    x0 = torch.randn(settings.size(1000), 2, generator=seeded(settings.seed, 1, 92), dtype=torch.float64)
    found = {"analytic_difference": _difference(analytic, x0, 1e-9)}
    options: dict[str, Any] = {"steps": None, "method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
    found["analytic_difference_as_sampled"] = float(
        (analytic.sample(x0=x0, **options) - on_path(analytic).sample(x0=x0, **options)).abs().max()
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        # Frequencies of scale 1: at 16 the field swings so fast with the noise level that a solve takes thousands of steps.
        sizes = SongUNetConfig(8, 1, 16, (1, 2), 1, (4,), fourier_scale=1.0, dropout=0.0, augment_dim=0)
        network = _awake(SongUNet(sizes)).double().eval()
    random = Flow(network, path="edm", predicts="edm", shape=(1, 8, 8))
    x0 = torch.randn(4, 1, 8, 8, generator=seeded(settings.seed, 2, 92), dtype=torch.float64)
    return found | {"network_difference": _difference(random, x0, 1e-7)}


def _awake(network: nn.Module) -> nn.Module:
    """Last layers start near zero; drawn at full size they make the network matter."""
    for parameter in network.parameters():
        if parameter.ndim > 1 and float(parameter.detach().std()) < 1e-3:
            nn.init.xavier_uniform_(parameter)
    return network


def _difference(flow: Flow, x0: Tensor, tolerance: float) -> float:
    """Largest difference between the ends of both ODEs, solved with error control from the same noise of the same level."""
    ends = []
    for each in (flow, on_path(flow)):
        first, last = torch.tensor(each.interval, dtype=torch.float64)
        options: dict[str, Any] = {"steps": None, "method": "dopri5", "rtol": tolerance, "atol": tolerance}
        # The noisiest state is sigma x0 on both paths: 80 x0, and 80/81 x0 at t = 1/81.
        x = each.transport(each.path.sigma(first) * x0, each.interval, **options).x
        ends.append(x / each.path.alpha(last))
    return float((ends[0] - ends[1]).abs().max())


def shorter(settings: Settings) -> dict[str, float]:
    """Iterations until the held-out loss of a vanilla student with random weights is reached from the teacher's weights."""
    made = setup("digits", settings)
    curves = {
        "teacher's weights": _losses(made, "B", made.sizes.start_lr),
        "random weights, velocity": _losses(made, "A", made.sizes.scratch_lr),
        "random weights, EDM form": _losses(made, "B", made.sizes.scratch_lr, fresh=True),
    }
    start, *scratch = curves.values()
    target = min(losses[-1] for _, losses in scratch)
    needed = min(_reached(curve, target) for curve in scratch)
    found = {f"final_loss_{i}": losses[-1] for i, (_, losses) in enumerate(curves.values())}
    found |= {"target": target, "iterations_scratch": needed, "iterations_start": _reached(start, target)}
    found["share"] = found["iterations_start"] / needed
    if settings.pictures:
        figure = draw.curves(curves, xlabel="iteration", ylabel="held-out loss", log_y=True)
        figure.savefig(settings.pictures / "start.png", dpi=110)
    return found


Curve = tuple[list[float], list[float]]


def _losses(made: Setup, name: str, lr: float, fresh: bool = False) -> Curve:
    """Held-out loss of the averaged weights by iteration, at a constant learning rate."""
    task = task_of(made, ARMS[name], Optimization(lr=lr, warmup=50))
    if fresh:
        network = fresh_network(made.data, made.settings.seed + 1000)
        task = plus_plus_task(
            made.teacher,
            made.pairs,
            start=network,
            metric=squared,
            times=Uniform(),
            optimization=Optimization(lr=lr, warmup=50),
            average=made.sizes.average,
        )
    task.held_out = as_source({"x0": made.x0, "x1": made.goal})
    found: Curve = ([], [])

    def note(iteration: int, values: Mapping[str, float]) -> None:
        if "validation" in values:
            found[0].append(iteration)
            found[1].append(values["validation"])

    size = made.settings.size
    train_quietly(
        task,
        seed=made.settings.seed,
        iterations=size(made.sizes.student),
        batch=made.sizes.batch,
        checkpoint_every=min(20, size(made.sizes.student)),
        loggers=[note],
    )
    return found


def _reached(curve: Curve, target: float) -> float:
    """The first iteration with a loss of at most the target; the last one if there is none."""
    return next((float(i) for i, loss in zip(*curve, strict=True) if loss <= target), float(curve[0][-1]))
