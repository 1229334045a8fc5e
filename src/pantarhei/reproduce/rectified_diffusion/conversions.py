"""The "one-step advantage" of keeping a diffusion model's form, against two ways of making a flow of it."""

from __future__ import annotations

import torch

from pantarhei.flow import Flow, on_path
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import DIGITS, RING, Taught, few, teach

STEPS = (1, 2, 8)
ARMS = ("kept", "reused", "wrapped")


def ring(settings: Settings) -> dict[str, float]:
    """On the ring, after few and after many iterations."""
    return _compare(RING, (300, 1500), settings)


def digits_early(settings: Settings) -> dict[str, float]:
    """On digits, after few iterations."""
    return _compare(DIGITS, (300,), settings)


def digits_late(settings: Settings) -> dict[str, float]:
    """On digits, after many."""
    return _compare(DIGITS, (1500,), settings)


def _compare(kind: str, budgets: tuple[int, ...], settings: Settings) -> dict[str, float]:
    taught = teach(kind, settings)
    found: dict[str, float] = {}
    rows = [taught.ends[:16]]
    for steps in STEPS:
        x = few(taught.flow, taught.x0, steps)
        found[f"teacher_{steps}"] = taught.error(x)
    for budget in budgets:
        for arm in ARMS:
            student = _student(arm, taught, budget)
            for steps in STEPS:
                x = few(student, taught.x0, steps)
                found[f"{arm}_{budget}_{steps}"] = taught.error(x)
                if steps == 1:
                    rows.append(x[:16])
                    if kind == RING:
                        found[f"{arm}_{budget}_1_distance"] = taught.distance(x)
        for steps in STEPS:
            kept = found[f"kept_{budget}_{steps}"]
            found[f"kept_over_reused_{budget}_{steps}"] = kept / found[f"reused_{budget}_{steps}"]
            found[f"kept_over_wrapped_{budget}_{steps}"] = kept / found[f"wrapped_{budget}_{steps}"]
    if settings.pictures and kind == DIGITS:
        save_image_grid(torch.cat(rows), settings.pictures / f"conversions-{budgets[0]}.png", columns=16)
    return found


def _student(arm: str, taught: Taught, budget: int) -> Flow:
    """One of three: the model as it is, its weights told that they are a velocity, its exact velocity."""
    if arm == "kept":
        return taught.rectify(budget)
    if arm == "wrapped":
        return taught.rectify(budget, flow=on_path(taught.flow), loss="velocity")
    # InstaFlow's way: the network has to find out by itself that its times, states and output mean something else now.
    reused = Flow(taught.flow.network, path="linear", predicts="velocity", shape=taught.flow.shape)
    return taught.rectify(budget, flow=reused, loss="velocity")
