"""Flows whose trajectories are known exactly, and small networks for teachers."""

import math

import torch
from torch import Tensor, nn

from pantarhei.flow import Flow, GaussianMixture, MixtureField
from pantarhei.flow.paths import EDM, Linear, build_path
from pantarhei.networks import MLP, MLPConfig

SCALE, SHIFT = (0.7, 1.6), (1.0, -0.5)


class FirstOrder(nn.Module):
    """The noise x0 in x_t when x1 = a x0 + b: first-order on any path, so one step goes anywhere on it exactly.

    With `classes`, b of the class c is shifted by c. As "edm" it sees scaled states and noise labels (sigma_data = 0.5).
    """

    def __init__(self, path, predicts="noise", classes=0):
        super().__init__()
        self.path, self.predicts, self.classes = build_path(path), predicts, classes
        self.register_buffer("a", torch.tensor(SCALE, dtype=torch.float64))
        self.register_buffer("b", torch.tensor(SHIFT, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        b = self.b.to(x) if label is None else self.b.to(x) + label[:, None].to(x)
        if self.predicts == "edm":
            sigma = torch.exp(4 * t)[:, None].to(x)
            q = torch.sqrt(sigma**2 + 0.25)
            noise = (x * q - b) / (self.a.to(x) + sigma)
            return (sigma * (self.a.to(x) * noise + b) - 0.25 * noise) / (0.5 * q)
        c = self.path.at(t, x)
        noise = (x - c.alpha * b) / (c.alpha * self.a.to(x) + c.sigma)
        data = self.a.to(x) * noise + b
        if self.predicts == "velocity":
            return c.alpha_dot * data + c.sigma_dot * noise
        return noise if self.predicts == "noise" else data


def goal(x0: Tensor, label: Tensor | None = None) -> Tensor:
    """What `FirstOrder` carries x0 to."""
    x1 = torch.tensor(SCALE).to(x0) * x0 + torch.tensor(SHIFT).to(x0)
    return x1 if label is None else x1 + label[:, None].to(x0)


def arrival(flow: Flow, x0: Tensor) -> Tensor:
    """Where a first-order flow carries unit draws: it starts from sigma x0, in which it may see some data already."""
    start = torch.tensor(flow.interval[0], dtype=torch.float64)
    return goal(FirstOrder(flow.path)(flow.path.sigma(start).to(x0) * x0, start.expand(len(x0))))


def first_order_flow(path="linear", predicts=None, classes=0):
    predicts = predicts or ("velocity" if path == "linear" else "noise")
    null = {"label": classes} if classes else None
    return Flow(FirstOrder(path, predicts, classes), path=path, predicts=predicts, shape=(2,), null=null)


def ring(deviation=0.15, dtype=torch.float64):
    angles = torch.arange(8, dtype=dtype) * math.pi / 4
    means = torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(torch.ones(8, dtype=dtype), means, torch.full((8,), deviation**2, dtype=dtype))


class MixtureEnds(nn.Module):
    """A mixture's exact estimates as a network of a prediction; of "edm" it sees scaled states and noise labels."""

    def __init__(self, target, path="linear", predicts="velocity", sigma_data=0.5):
        super().__init__()
        self.path, self.predicts, self.sigma_data = build_path(path), predicts, sigma_data
        self.field = MixtureField(target, path=EDM() if predicts == "edm" else self.path)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.predicts == "edm":
            sigma, sd = torch.exp(4 * t)[:, None].to(x), self.sigma_data
            q = torch.sqrt(sigma**2 + sd**2)
            data = self.field.denoise(x * q, self.field.path.time_at(1 / sigma[:, 0]))
            return (q**2 * data - sd**2 * (x * q)) / (sigma * sd * q)
        c = self.path.at(t, x)
        data = self.field.denoise(x, t)
        noise = (x - c.alpha * data) / c.sigma
        values = {
            "velocity": c.alpha_dot * data + c.sigma_dot * noise,
            "data": data,
            "noise": noise,
            "v": c.alpha * noise - c.sigma * data,
        }
        return values[self.predicts]


def mixture_flow(path="linear", predicts="velocity", target=None, **options):
    network: nn.Module = MixtureEnds(target or ring(), path, predicts)
    if predicts == "velocity" and path == "linear":  # regular at the data end too
        network = MixtureField(target or ring(), path=Linear())
    return Flow(network, path=path, predicts=predicts, shape=(2,), **options)


def small_mlp(seed=0, width=24, classes=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(MLPConfig(width=width, layers=3, classes=classes)).to(dtype)


def noise(count, *shape, seed=0, dtype=torch.float64):
    return torch.randn(count, *(shape or (2,)), generator=torch.Generator().manual_seed(seed), dtype=dtype)
