"""What a trajectory model knows: jumps between any two times, the score, the likelihood; and how guidance steers it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import ClassifierGuidance, Flow, TrajectoryModel, gamma_moves, langevin, make_grid
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.consistency_trajectory_models.teachers import MODES, SPREAD, Ring, ring, usual

NODES = 9
LIKELIHOODS = 500
JUMPS, LANGEVIN = 16, 10  # guided jumps, and Langevin steps after each


def jumps(settings: Settings) -> dict[str, float]:
    """Errors of jumps over all pairs of times, and of the score at s = t, against the exact flow."""
    taught, model = ring(settings.seed, settings.quick), usual(settings.seed, settings.quick).model
    times = make_grid(NODES - 1, model.interval)
    fine = make_grid(40 * (NODES - 1), model.interval)
    x0 = taught.x0[:2000]
    start = taught.teacher.first_sigma * x0
    states = taught.teacher.transport(start, times, steps=fine, method="edm").xs
    errors = torch.full((NODES - 1, NODES - 1), torch.nan)
    with torch.no_grad():
        for i in range(NODES - 1):
            for j in range(i + 1, NODES):
                landed = model.jump(states[i], times[i], times[j])
                moved = (states[j] - states[i]).square().mean()
                errors[i, j - 1] = ((landed - states[j]).square().mean() / moved).sqrt()
        denoisers = []
        for t, x in zip(times, states, strict=True):
            at = torch.tensor(t)
            exact = taught.teacher.denoise(x, at)
            denoisers.append(float((model.denoise(x, at) - exact).square().mean() / taught.data.square().mean()) ** 0.5)
    known = errors[~errors.isnan()]
    found = {
        "jump_error_median": float(known.median()),
        "jump_error_worst": float(known.max()),
        "jump_error_longest": float(errors[0, -1]),
        "denoiser_error_worst": max(denoisers),
        "denoiser_error_mean": sum(denoisers) / len(denoisers),
        "jump_error_share_above_tenth": float((known > 0.1).double().mean()),
    }
    if settings.pictures:
        levels = [f"{float(model.path.sigma(torch.tensor(t))):.2g}" for t in times]
        picture = draw.heat_map(
            errors,
            rows=levels[:-1],
            columns=levels[1:],
            xlabel="noise level at s",
            ylabel="noise level at t",
            title="error of the jump / length of the way",
            log=True,
        )
        picture.savefig(settings.pictures / "jumps.png", dpi=110)
    return found


def likelihood(settings: Settings) -> dict[str, float]:
    """Negative log-likelihood of fresh data by the score at s = t, against the exact density."""
    taught = ring(settings.seed, settings.quick)
    x = taught.truth[: settings.size(LIKELIHOODS)]
    arms: dict[str, Flow] = {
        # The exact flow's own value differs: the ODE ends at the noise level 0.002, and starts at 80.
        "exact_flow": taught.teacher,
        "model": usual(settings.seed, settings.quick).model,
        "adaptive": usual(settings.seed, settings.quick, adaptive=True).model,
    }
    exact = float(-taught.law.log_prob(x).mean() / 2)
    found = {"exact": exact}
    for name, flow in arms.items():
        found[name] = float(-flow.log_prob(x, rtol=1e-3, atol=1e-3).mean() / 2)
        found[f"{name}_gap"] = abs(found[name] - exact)
    return found


def guidance(settings: Settings) -> dict[str, float]:
    """Samples of a wanted mode: by Langevin steps between jumps, and by guiding the ODE of the score."""
    taught, model = ring(settings.seed, settings.quick), usual(settings.seed, settings.quick).model
    x0 = taught.x0[:4000]
    wanted = torch.arange(len(x0)) % MODES
    classifier = partial(_log_posterior, taught, model, wanted)
    nodes = make_grid(JUMPS, model.interval, kind="edm", path=model.path)
    found: dict[str, float] = {}
    shown = {}
    for gamma in (0.0, 0.5, 1.0):
        for scale in (0.0, 1.0, 3.0):
            noise = seeded(settings.seed, 97)
            guide = classifier if scale else None
            control = langevin(model, guide, scale=scale, snr=0.3, steps=LANGEVIN, generator=noise)
            x = model.jumps(
                model.first_sigma * x0, gamma_moves(model.path, nodes, gamma), generator=noise, control=control
            )
            name = f"scale_{scale:g}_gamma_{gamma:g}"
            found |= {f"{name}_{key}": value for key, value in _modes(taught, x, wanted).items()}
            shown[f"scale {scale:g}, gamma {gamma:g}"] = x[wanted == 1][:500]
    transform = ClassifierGuidance(classifier, model.path)
    x = model.sample(x0=x0, steps=17, method="edm", grid="edm", transforms=[transform])
    found |= {f"ode_{key}": value for key, value in _modes(taught, x, wanted).items()}
    found["purity_gain"] = found["scale_1_gamma_0.5_purity"] / found["scale_0_gamma_0.5_purity"]
    if settings.pictures:
        draw.scatter_2d(shown, columns=3, limits=(-1, 1)).savefig(settings.pictures / "guidance.png", dpi=110)
    return found


def _modes(taught: Ring, x: Tensor, wanted: Tensor) -> dict[str, float]:
    """Share of samples nearest to the wanted mode, modes that are reached, and their spread over the data's."""
    means = taught.law.means
    nearest = torch.cdist(x, means).argmin(dim=1)
    counts = torch.bincount(nearest, minlength=MODES).double() / len(x)
    off = (x - means[nearest]).square().mean().sqrt()
    return {
        "purity": float((nearest == wanted).double().mean()),
        "modes_reached": float((counts > 0.02).sum()),
        "spread": float(off / SPREAD),
    }


def _log_posterior(taught: Ring, model: TrajectoryModel, wanted: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """log p(mode | x_t), exact."""
    sigma = model.path.sigma(t)
    squares = torch.cdist(x, taught.law.means).square()
    logits = -squares / (2 * (SPREAD**2 + sigma**2))
    return logits.log_softmax(dim=1).gather(1, wanted[: len(x), None])[:, 0]
