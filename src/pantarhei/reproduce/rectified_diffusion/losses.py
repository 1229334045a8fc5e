"""What the loss compares: data estimates, velocities or noise; and what a v-prediction would bring."""

from __future__ import annotations

from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import RING, Schedule, few, teach

BUDGETS = (300, 1500)


def stable_diffusion(settings: Settings) -> dict[str, float]:
    """On Stable Diffusion's linear schedule, alpha = 0.040 in the noisiest state."""
    return _losses("sd", settings)


def score_sde(settings: Settings) -> dict[str, float]:
    """On the score SDE's VP schedule, alpha = 0.0066 there."""
    return _losses("score-sde", settings)


def _losses(schedule: Schedule, settings: Settings) -> dict[str, float]:
    noise, v = teach(RING, settings, schedule), teach(RING, settings, schedule, "v")
    arms = {"huber": (noise, "data-huber"), "mse": (noise, "noise-mse"), "velocity": (noise, "velocity")}
    arms["v"] = (v, "data-huber")
    found: dict[str, float] = {}
    shown = {"data": noise.truth}
    for name, taught in (("teacher", noise), ("v_teacher", v)):
        x = few(taught.flow, taught.x0, 1)
        found |= {f"{name}_distance": taught.distance(x), f"{name}_error": taught.error(x)}
        found[f"{name}_solved_distance"] = taught.distance(taught.ends)
    for budget in BUDGETS:
        if budget == BUDGETS[-1]:
            shown["teacher"] = few(noise.flow, noise.x0, 1)
        for name, (taught, loss) in arms.items():
            x = few(taught.rectify(budget, loss=loss), taught.x0, 1)
            found |= {f"{name}_{budget}_distance": taught.distance(x), f"{name}_{budget}_error": taught.error(x)}
            shown |= {f"{TITLES[name]}, {budget}": x}
        found[f"huber_over_v_{budget}"] = found[f"huber_{budget}_distance"] / found[f"v_{budget}_distance"]
        found[f"mse_over_v_{budget}"] = found[f"mse_{budget}_distance"] / found[f"v_{budget}_distance"]
        found[f"mse_over_huber_{budget}"] = found[f"mse_{budget}_distance"] / found[f"huber_{budget}_distance"]
    if settings.pictures:
        figure = draw.scatter_2d(shown, columns=5, limits=(-3.2, 3.2))
        figure.savefig(settings.pictures / f"losses-{schedule}.png", dpi=110)
    return found


TITLES = {"huber": "data, Huber", "mse": "noise, MSE", "velocity": "velocity, MSE", "v": "v-prediction"}
