"""Where the gain comes from: the same student and steps on matched pairs, on shuffled ones, and on real data."""

from __future__ import annotations

import copy

import torch

from pantarhei.flow import Flow, FlowMatching
from pantarhei.report import figures as draw
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import BATCH, DIGITS, MOONS, RING, Taught, adam, few, teach
from pantarhei.reproduce.training import run
from pantarhei.straighten.rectified_diffusion import LOSSES, own_times
from pantarhei.training import FlowTask

ITERATIONS = 500


def ring(settings: Settings) -> dict[str, float]:
    """On the ring of eight modes."""
    return _pairings(RING, settings)


def moons(settings: Settings) -> dict[str, float]:
    """On two moons."""
    return _pairings(MOONS, settings)


def digits(settings: Settings) -> dict[str, float]:
    """On 8 x 8 digits."""
    return _pairings(DIGITS, settings)


def _pairings(kind: str, settings: Settings) -> dict[str, float]:
    taught = teach(kind, settings)
    flows = {
        "teacher": taught.flow,
        "matched": taught.rectify(ITERATIONS),
        "shuffled": taught.rectify(ITERATIONS, pairs=taught.pairs.shuffled(settings.seed)),
        "real": _on_real_data(taught, settings.size(ITERATIONS)),
    }
    found: dict[str, float] = {}
    samples = {name: few(flow, taught.x0, 1) for name, flow in flows.items()}
    for name, x in samples.items():
        found[f"{name}_1_step"] = taught.error(x)
    # Where an ideal teacher's first step leads to, but for the little that the noisiest state tells of the data.
    found["mean_of_data"] = taught.error(taught.ends.mean(dim=0, keepdim=True).expand_as(taught.ends))
    best = min(found["shuffled_1_step"], found["real_1_step"])
    found["matched_gain"] = best / found["matched_1_step"]
    found["unmatched_over_teacher"] = best / found["teacher_1_step"]
    found["unmatched_over_mean"] = best / found["mean_of_data"]
    if settings.pictures:
        shown = {"solved": taught.ends, **samples}
        if kind == DIGITS:
            rows = torch.cat([x[:16] for x in shown.values()])
            save_image_grid(rows, settings.pictures / f"pairings-{kind}.png", columns=16)
        else:
            figure = draw.scatter_2d(shown, limits=(-3.2, 3.2))
            figure.savefig(settings.pictures / f"pairings-{kind}.png", dpi=110)
    return found


def _on_real_data(taught: Taught, iterations: int) -> Flow:
    """The same student, loss and times with real data and fresh noise: the teacher's own training goes on."""
    objective = FlowMatching(times=own_times(taught.flow), terms=(LOSSES["data-huber"],))
    student = taught.flow.like(copy.deepcopy(taught.flow.network).requires_grad_(True))
    task = FlowTask(student, objective, taught.data, optimization=adam(taught.kind), average=0.99)
    return run(task, taught.seed, iterations, BATCH[taught.kind])
