"""Variants: low-rank additions, and what a pair's noise is where the noisiest state still holds data."""

from __future__ import annotations

from pantarhei.networks.lora import size_of
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_diffusion.teachers import RING, Schedule, few, teach
from pantarhei.straighten import LowRank
from pantarhei.straighten.students import make_student

ITERATIONS = 1500


def low_rank(settings: Settings) -> dict[str, float]:
    """Additions of rank 4 against all weights, in one step."""
    taught = teach(RING, settings)
    students = {"full": taught.rectify(ITERATIONS), "low_rank": taught.rectify(ITERATIONS, low_rank=LowRank(4))}
    found: dict[str, float] = {}
    for name, flow in {"teacher": taught.flow, **students}.items():
        x = few(flow, taught.x0, 1)
        found |= {f"{name}_error": taught.error(x), f"{name}_distance": taught.distance(x)}
    for figure in ("error", "distance"):
        gain = found[f"teacher_{figure}"] - found[f"full_{figure}"]
        found[f"share_of_gain_{figure}"] = (found[f"teacher_{figure}"] - found[f"low_rank_{figure}"]) / gain
    trained, total = size_of(make_student(taught.flow, low_rank=LowRank(4)).network)
    found["trained_share"] = trained / total
    return found


def anchors(settings: Settings) -> dict[str, float]:
    """A pair's x0 as the noise in the noisiest state (as published), or as that state itself."""
    found: dict[str, float] = {}
    schedules: tuple[Schedule, ...] = ("sd", "scaled")
    for schedule in schedules:
        taught = teach(RING, settings, schedule)
        for anchor in ("noise", "state"):
            student = taught.rectify(ITERATIONS, anchor=anchor)
            for steps in (1, 2, 4):
                x = few(student, taught.x0, steps)
                found[f"{schedule}_{anchor}_{steps}_error"] = taught.error(x)
                found[f"{schedule}_{anchor}_{steps}_distance"] = taught.distance(x)
    return found
