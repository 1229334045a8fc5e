"""Fewer steps: pair store, reflow, straightness."""

from pantarhei.straighten.pairs import PairReport, Solver, inspect_pairs, make_pairs
from pantarhei.straighten.reflow import reflow, reflow_task
from pantarhei.straighten.straightness import COSTS, Straightness, straightness

__all__ = [
    "COSTS",
    "PairReport",
    "Solver",
    "Straightness",
    "inspect_pairs",
    "make_pairs",
    "reflow",
    "reflow_task",
    "straightness",
]
