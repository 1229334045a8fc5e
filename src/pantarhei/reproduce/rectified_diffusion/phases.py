"""Phased rectification: more phases, nearer to the teacher; first-order segments against chords."""

from __future__ import annotations

from torch import Tensor

from pantarhei.flow import Flow
from pantarhei.report import figures as draw
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import BATCH, RING, adam, teach
from pantarhei.reproduce.training import run
from pantarhei.straighten import Phases, phased_task

COUNTS, ITERATIONS = (1, 2, 4), 800
SUBSTEPS = 16  # of the teacher over all phases


def phased(settings: Settings) -> dict[str, float]:
    """One, two and four phases in as many steps, by first-order segments and by chords."""
    taught = teach(RING, settings)
    # The last phase ends where the schedule does, with a little noise left: so does the reference.
    ends = taught.flow.sample(x0=taught.x0, steps=100, method="edm", final="state")
    variance = ends.var(dim=0).mean()
    found: dict[str, float] = {}
    shown = {"teacher": ends}
    for count in COUNTS:
        bounds = Phases.of(taught.flow, count).bounds
        x = _sample(taught.flow, taught.x0, bounds, "ddim")
        found[f"teacher_{count}"] = float((x - ends).square().mean() / variance)
        for name, straight in (("first_order", False), ("chords", True)):
            task = phased_task(
                taught.flow,
                taught.data,
                phases=count,
                substeps=SUBSTEPS // count,
                straight=straight,
                optimization=adam(RING),
                average=0.99,
            )
            student = run(task, settings.seed, settings.size(ITERATIONS), BATCH[RING])
            x = _sample(student, taught.x0, bounds, "euler" if straight else "ddim")
            found[f"{name}_{count}"] = float((x - ends).square().mean() / variance)
            shown[f"{'chords' if straight else 'first-order'}, {count}"] = x
            if count == 1 and not straight:
                for steps in COUNTS[1:]:
                    x = _sample(student, taught.x0, Phases.of(taught.flow, steps).bounds, "ddim")
                    found[f"one_phase_in_{steps}"] = float((x - ends).square().mean() / variance)
        found[f"chords_over_first_order_{count}"] = found[f"chords_{count}"] / found[f"first_order_{count}"]
    found["gain_2"] = found["first_order_1"] / found["first_order_2"]
    found["gain_4"] = found["first_order_2"] / found["first_order_4"]
    found["least_gain"] = min(found["gain_2"], found["gain_4"])
    found["least_chords_over_first_order"] = min(found[f"chords_over_first_order_{count}"] for count in COUNTS)
    if settings.pictures:
        figure = draw.scatter_2d(shown, columns=4, limits=(-3.2, 3.2))
        figure.savefig(settings.pictures / "phases.png", dpi=110)
    return found


def _sample(flow: Flow, x0: Tensor, bounds: tuple[float, ...], method: str) -> Tensor:
    """One step a phase."""
    return flow.sample(x0=x0, steps=bounds, method=method, final="state")
