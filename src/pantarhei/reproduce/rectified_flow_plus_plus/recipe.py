"""The parts of the recipe on the ring: U-shaped times against uniform ones, pseudo-Huber against the squared error."""

from __future__ import annotations

from pantarhei.flow import PseudoHuber
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow_plus_plus.setups import data_distance, setup, student
from pantarhei.straighten import huber_transition


def ring(settings: Settings) -> dict[str, float]:
    """One-step errors on the ring, one part of the recipe added after another."""
    made = setup("ring", settings)
    found = {"teacher_distance": data_distance(made, made.goal)}
    for name in ("A", "A_u", "B", "C", "D"):
        flow = student("ring", name, settings)
        found[f"{name}_error"] = made.error(flow)
        found[f"{name}_distance"] = data_distance(made, flow.sample(x0=made.x0, steps=1))
    for label, new, old in (("u_vanilla", "A_u", "A"), ("u", "C", "B"), ("huber", "D", "C")):
        for figure in ("error", "distance"):
            found[f"{label}_{figure}_ratio"] = found[f"{new}_{figure}"] / found[f"{old}_{figure}"]
    found["huber_transition"] = huber_transition(student("ring", "D", settings), made.pairs, PseudoHuber())
    return found
