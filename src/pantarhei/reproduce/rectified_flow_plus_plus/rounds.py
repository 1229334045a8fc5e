"""Why one round suffices: straight paths hardly cross after it, because where they would is no noise."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow, evaluation_mode
from pantarhei.recipes.data import DataConfig
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow.colours import photographs
from pantarhei.reproduce.rectified_flow_plus_plus.setups import (
    DATA,
    STRAIGHT,
    Setup,
    adam,
    data_distance,
    setup,
    student,
)
from pantarhei.reproduce.training import run
from pantarhei.straighten import PairSource, make_pairs, plus_plus_task
from pantarhei.straighten.students import linear_student


@torch.no_grad()
def squared_loss(flow: Flow, x0: Tensor, x1: Tensor, t: float) -> float:
    """E|x1 - x0 - v(x_t, t)|^2 of pairs at one time, summed over elements."""
    time = torch.tensor(t)
    with evaluation_mode(flow.network):
        x_t, slope = flow.path.sample(x0, x1, None, time)
        return float((slope - flow.velocity(x_t, time)).square().flatten(1).sum(1).double().mean())


def crossing(flow: Flow, x0: Tensor, x1: Tensor, nodes: int = 32) -> float:
    """V / E|x1 - x0|^2 of pairs that the flow has not seen, by midpoints.

    With a network in place of E[x1 - x0 | x_t] it holds the network's error as well: an upper bound.
    """
    losses = [squared_loss(flow, x0, x1, (i + 0.5) / nodes) for i in range(nodes)]
    return sum(losses) / nodes / float((x1 - x0).square().flatten(1).sum(1).mean())


def one_round(settings: Settings) -> dict[str, float]:
    """V of the coupling after no, one and two rounds; one step of a 2-RF and of a 3-RF that cost equally many iterations."""
    found: dict[str, float] = {}
    for data in DATA:
        made = setup(data, settings)
        for name, value in _rounds(made).items():
            found[f"{data}_{name}"] = value
    return found


def _rounds(made: Setup) -> dict[str, float]:
    settings, count = made.settings, min(1000, len(made.x0))
    second = student(made.data, "D", settings)
    twice = student(made.data, "D", settings, length=2.0)
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(second, len(made.pairs), folder, seed=settings.seed + 50, solver=STRAIGHT)
        third = _next(made, second, pairs)
    x0 = made.x0[:count]
    real = made.held_out[torch.randint(len(made.held_out), (count,), generator=seeded(settings.seed, 2, 90))]
    couplings = {
        0: (linear_student(made.teacher), real),
        1: (second, made.goal[:count]),
        2: (third, second.sample(x0=x0, steps=40, method="heun")),
    }
    found = {f"crossing_{number}": crossing(flow, x0, x1) for number, (flow, x1) in couplings.items()}
    found["fall"] = found["crossing_0"] / found["crossing_1"]
    for name, flow in (("2_rectified_long", twice), ("3_rectified", third)):
        found[f"{name}_1_step_error"] = made.error(flow)
        found[f"{name}_1_step_distance"] = data_distance(made, flow.sample(x0=made.x0, steps=1))
    found["third_over_second"] = found["3_rectified_1_step_error"] / found["2_rectified_long_1_step_error"]
    found["distance_third_over_second"] = (
        found["3_rectified_1_step_distance"] / found["2_rectified_long_1_step_distance"]
    )
    return found


def _next(made: Setup, flow: Flow, pairs: PairSource) -> Flow:
    """One more round of the same length from a student."""
    sizes, settings = made.sizes, made.settings
    task = plus_plus_task(flow, pairs, optimization=adam(sizes.start_lr), average=sizes.average)
    return run(task, settings.seed + 50, settings.size(sizes.student), sizes.batch)


Limits = tuple[float, float]


def geometry(settings: Settings) -> dict[str, float]:
    """Where two straight paths would have to start that meet half way: z + (x' - x''), for 1,000 real images."""
    found: dict[str, float] = {}
    norms: dict[str, Tensor] = {}
    for name, images in _image_sets(settings).items():
        draws = seeded(settings.seed, 3, 90)
        first, second = (torch.randint(len(images), (settings.size(10_000),), generator=draws) for _ in range(2))
        apart = first != second
        shift = (images[first] - images[second])[apart]
        z = torch.randn(shift.shape, generator=draws)
        limits = _noise_limits(shift.shape[1:], settings)
        for label, factor in (("", 1.0), ("_at_t_0.3", 3 / 7), ("_at_t_0.1", 1 / 9)):
            outside = [_outside(value, limit) for value, limit in zip(_marks(z + factor * shift), limits, strict=True)]
            both = (outside[0] | outside[1]).float().mean()
            found[f"{name}_outside{label}"] = float(both)
            if not label:
                found[f"{name}_outside_by_norm"] = float(outside[0].float().mean())
                found[f"{name}_outside_by_autocorrelation"] = float(outside[1].float().mean())
        found[f"{name}_noise_outside"] = float(
            (_outside(_marks(z)[0], limits[0]) | _outside(_marks(z)[1], limits[1])).float().mean()
        )
        norms |= {f"{name}: noise": _cloud(z), f"{name}: would-be start": _cloud(z + shift)}
    if settings.pictures:
        figure = draw.scatter_2d(norms, columns=2, most=2000)
        for axes in figure.axes:
            axes.set(xlabel="|z|^2 / D", ylabel="lag-1 autocorrelation", aspect="auto")
            axes.autoscale()
        figure.savefig(settings.pictures / "geometry.png", dpi=110)
    return found


def _cloud(z: Tensor) -> Tensor:
    square, lag = _marks(z)
    return torch.stack([square / z[0].numel(), lag], dim=1)


def _image_sets(settings: Settings) -> dict[str, Tensor]:
    """1,000 digits, and 1,000 patches of 32 x 32 pixels from scikit-learn's two photographs."""
    draws = seeded(settings.seed, 4, 90)
    digits = DataConfig("digits").open()[0]
    rows = torch.randperm(len(digits), generator=draws)[:1000]
    patches = []
    for photograph in photographs():
        height, width = photograph.shape[1:]
        tops = torch.randint(height - 31, (500,), generator=draws).tolist()
        lefts = torch.randint(width - 31, (500,), generator=draws).tolist()
        patches += [photograph[:, y : y + 32, x : x + 32] for y, x in zip(tops, lefts, strict=True)]
    return {"digits": digits.fetch(rows)["x1"], "patches": torch.stack(patches)}


def _marks(z: Tensor) -> tuple[Tensor, Tensor]:
    """|z|^2 and the autocorrelation with the neighbours below and to the right, (B,) each."""
    square = z.square().flatten(1).sum(1)
    pairs = (z[..., 1:, :] * z[..., :-1, :]).flatten(1).sum(1) + (z[..., :, 1:] * z[..., :, :-1]).flatten(1).sum(1)
    return square, pairs / (2 * square)


def _noise_limits(shape: torch.Size, settings: Settings) -> tuple[Limits, Limits]:
    """Ends of the central 99.95 % of both marks of noise: together they hold at least 99.9 % of it."""
    from scipy.stats import chi2

    count = int(torch.tensor(shape).prod())
    draws = seeded(settings.seed, 5, 90)
    lags = torch.cat([_marks(torch.randn(1000, *shape, generator=draws))[1] for _ in range(settings.size(50))])
    # Normal in good approximation (a sum of many products): its deviation is known well before its far quantiles are.
    reach = 3.481 * float(lags.std())
    low, high = chi2(count).ppf([0.00025, 0.99975])
    return (float(low), float(high)), (-reach, reach)


def _outside(value: Tensor, limits: Limits) -> Tensor:
    return (value < limits[0]) | (value > limits[1])


def profile(settings: Settings) -> dict[str, float]:
    """The training loss of a vanilla 2-RF by time, on pairs that it has not seen."""
    found: dict[str, float] = {}
    series: dict[str, tuple[list[float], list[float]]] = {}
    times = [(i + 0.5) / 20 for i in range(20)]
    for data in DATA:
        made = setup(data, settings)
        flow = student(data, "A", settings)
        losses = [squared_loss(flow, made.x0, made.goal, t) / made.goal[0].numel() for t in times]
        ends, middle = (losses[0] + losses[-1]) / 2, sum(losses[8:12]) / 4
        found |= {f"{data}_noise_end": losses[0], f"{data}_data_end": losses[-1], f"{data}_middle": middle}
        found[f"{data}_ends_over_middle"] = ends / middle
        found[f"{data}_lower_end_over_middle"] = min(losses[0], losses[-1]) / middle
        series[data] = (times, [value / middle for value in losses])
    if settings.pictures:
        figure = draw.curves(series, xlabel="t", ylabel="loss / loss in the middle", log_y=True)
        figure.savefig(settings.pictures / "profile.png", dpi=110)
    return found
