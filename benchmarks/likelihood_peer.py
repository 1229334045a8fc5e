"""Log-likelihood against `flow_matching`: the same network, exact divergence, the same error reached.

1,000 points of an 8-dimensional mixture (the field is exact, and so is the density it is compared with), and 1,000 digits
of 8x8 pixels as points (a perceptron trained for a moment; compared with a solve in float64 at 1e-5). Each side first tries
its methods and tolerances, and is timed at the setting that is quickest among those that reach the error.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness import Bound, Record, compare, peer, seconds, use_threads
from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, GaussianMixture, MixtureField
from pantarhei.images import open_images
from pantarhei.networks import MLP, MLPConfig
from pantarhei.reproduce.training import fit
from peers import flow_matching_solver

Work = Callable[[], Tensor]


def run(quick: bool = False) -> list[Record]:
    """Two records: seconds for the points."""
    use_threads(1)
    count = 100 if quick else 1000
    return [_record(*case, quick) for case in (_mixture(count), _digits(count, quick))]


def _mixture(count: int) -> tuple[str, nn.Module, Tensor, Tensor, float]:
    draws = seeded(0, 1)
    means = 2 * torch.randn(5, 8, generator=draws)
    roots = torch.randn(5, 8, 8, generator=draws) / 8**0.5
    mixture = GaussianMixture(torch.ones(5), means, roots @ roots.mT + 0.2 * torch.eye(8))
    x = mixture.sample(count, draws)
    exact = GaussianMixture(*(part.double() for part in (mixture.weights, mixture.means, mixture.covariances)))
    return "mixture in 8 dimensions", MixtureField(mixture), x, exact.log_prob(x.double()), 1e-3


def _digits(count: int, quick: bool) -> tuple[str, nn.Module, Tensor, Tensor, float]:
    x = open_images("digits").fetch(torch.arange(count))["x1"].flatten(1)
    x = x + torch.rand(x.shape, generator=seeded(0, 2)) / 8  # levels are 1/8 apart
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = Flow(MLP(MLPConfig(64, 128, 2)), shape=(64,))
    flow = fit(flow, x, seed=0, iterations=20 if quick else 500)
    network = flow.network.requires_grad_(False)
    wanted = Flow(network.double(), shape=(64,)).log_prob(x.double(), rtol=1e-5, atol=1e-5)
    return "digits 8x8", network.float(), x, wanted, 0.1


def _record(case: str, network: nn.Module, x: Tensor, wanted: Tensor, error: float, quick: bool) -> Record:
    flow = Flow(network, shape=tuple(x.shape[1:]))
    solver = flow_matching_solver()(velocity_model=lambda x, t: network(x, t.expand(len(x))))

    def normal(x0: Tensor) -> Tensor:
        return -0.5 * (x0.square() + 1.8378770664093453).sum(dim=1)

    def ours(method: Any, tolerance: float) -> Work:
        return lambda: flow.log_prob(x, method=method, rtol=tolerance, atol=tolerance)

    def theirs(method: str, tolerance: float) -> Work:
        options = {"method": method, "atol": tolerance, "rtol": tolerance, "exact_divergence": True, "step_size": None}
        return lambda: solver.compute_likelihood(x, log_p0=normal, **options)[1]

    tolerances = (3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)
    settings = {
        "ours": _quickest(ours, ("bosh3", "dopri5", "tsit5"), tolerances, wanted, error),
        "theirs": _quickest(theirs, ("bosh3", "dopri5"), tolerances, wanted, error),
    }
    (mine, mine_at, mine_error), (other, other_at, other_error) = settings["ours"], settings["theirs"]
    return compare(
        "likelihood",
        case,
        seconds(mine),
        seconds(other),
        peer=peer("flow_matching"),
        work=f"log-likelihood of {len(x)} points, exact divergence, mean error at most {error:g} nats",
        counted="seconds",
        unit="s",
        rounds=1 if quick else 3,
        warmup=0,
        bound=Bound("at most", 1.0),
        details={"ours": mine_at, "theirs": other_at, "errors": [mine_error, other_error]},
    )


def _quickest(
    make: Callable[[Any, float], Work],
    methods: tuple[str, ...],
    tolerances: tuple[float, ...],
    wanted: Tensor,
    most: float,
) -> tuple[Work, str, float]:
    """The quickest setting with a mean error below `most`: of each method, the loosest tolerance that reaches it."""
    found = []
    for method in methods:
        for tolerance in tolerances:
            work = make(method, tolerance)
            began = time.perf_counter()
            error = float((work().double() - wanted).abs().mean())
            if error <= most:
                found.append((time.perf_counter() - began, work, f"{method} at {tolerance:g}", error))
                break
    if not found:
        raise RuntimeError(f"no setting of {list(itertools.product(methods, tolerances))} reaches {most} nats")
    return min(found, key=lambda each: each[0])[1:]
