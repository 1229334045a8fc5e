"""A Gaussian whose jumps are known in closed form, as a network of any prediction on any affine path."""

import torch
from torch import Tensor, nn

from pantarhei.flow import GaussianMixture
from pantarhei.flow.paths import build_path
from pantarhei.flow.predictions import Ends, build_prediction
from pantarhei.flow.trajectory import TrajectoryModel

MEAN, DEVIATION = (0.6, -0.3), (0.4, 0.9)


class GaussianJumps(nn.Module):
    """The output that makes every jump of a head exact for x1 ~ N(MEAN + label, DEVIATION^2) and standard noise.

    x_t is Gaussian with mean alpha m and variance alpha^2 d^2 + sigma^2, and the flow keeps the whitened state.
    """

    def __init__(self, path, predicts="velocity", head="ctm"):
        super().__init__()
        self.path, self.prediction, self.head = build_path(path), build_prediction(predicts), head
        self.register_buffer("mean", torch.tensor(MEAN, dtype=torch.float64))
        self.register_buffer("deviation", torch.tensor(DEVIATION, dtype=torch.float64))

    def law(self, t: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and deviation of x_t, (B, 2) each."""
        at = self.path.at(t, self.mean.expand(len(t), 2))
        mean = self.mean if label is None else self.mean + label[:, None]
        return at.alpha * mean, torch.sqrt((at.alpha * self.deviation) ** 2 + at.sigma**2)

    def goal(self, x: Tensor, t: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        """Where x at t is at s."""
        (mean, deviation), (new, wide) = self.law(t, label), self.law(s, label)
        return new + wide / deviation * (x - mean)

    def ends(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Ends:
        """E[x1 | x_t] and E[x0 | x_t]."""
        at, (mean, deviation) = self.path.at(t, x), self.law(t, label)
        white = (x - mean) / deviation**2
        own = self.mean if label is None else self.mean + label[:, None]
        return Ends(own + at.alpha * self.deviation**2 * white, at.sigma * white)

    def forward(self, x: Tensor, t: Tensor, s: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        if self.prediction.spec()["name"] == "edm":  # sees x / q and ln(sigma / alpha) / 4
            t, s = (None if time is None else self.path.time_at(torch.exp(-4 * time)) for time in (t, s))
            _, _, q = self.prediction._scale(self.path, x, t)
            x = x * q
        s = t if s is None else s
        same = (s == t)[:, None]
        ends, landed = self.ends(x, t, label), self.goal(x, t, s, label)
        here, to = self.path.at(t, x), self.path.at(s, x)
        if self.head == "mean-velocity":
            length = torch.where(same, torch.ones_like(x[:, :1]), (s - t)[:, None])
            velocity = here.alpha_dot * ends.data + here.sigma_dot * ends.noise
            return torch.where(same, velocity, (landed - x) / length)
        sigma = torch.where(here.sigma > 0, here.sigma, torch.ones_like(here.sigma))
        size = to.alpha - here.alpha * to.sigma / sigma
        data = (landed - to.sigma / sigma * x) / torch.where(same, torch.ones_like(size), size)
        data = torch.where(same, ends.data, data)
        noise = torch.where(same, ends.noise, (x - here.alpha * data) / sigma)
        return self.prediction.target(self.path, noise, data, t)


def exact_model(path="linear", predicts="velocity", head="ctm", **options):
    return TrajectoryModel(
        GaussianJumps(path, predicts, head), path=path, predicts=predicts, head=head, shape=(2,), **options
    )


def data_law():
    """The law of x1."""
    variances = torch.tensor(DEVIATION, dtype=torch.float64) ** 2
    one = torch.ones(1, dtype=torch.float64)
    return GaussianMixture(one, torch.tensor([MEAN], dtype=torch.float64), torch.diag(variances)[None])


def random_times(interval, count, seed=0):
    """Times t < u < s inside an interval, (count,) each."""
    drawn = torch.rand(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = interval
    return (low + (high - low) * drawn.sort(dim=0).values).unbind()
