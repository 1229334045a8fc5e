"""Fewer steps: pairs, reflow, distillation; Schroedinger bridges; straightness, and what rectifying does to a coupling."""

from pantarhei.straighten.analysis import Balance, MarginalCheck, balance, check_marginals
from pantarhei.straighten.distillation import check_teacher, distil, distillation_task
from pantarhei.straighten.pairs import PairReport, Solver, inspect_pairs, make_pairs
from pantarhei.straighten.reflow import check_reflow, reflow, reflow_task
from pantarhei.straighten.schroedinger import Bridge, bridge_flow
from pantarhei.straighten.schroedinger_imf import Entropic, markovian_fitting
from pantarhei.straighten.schroedinger_maxmin import BentLine, MaxMin, maxmin_bridge
from pantarhei.straighten.stores import (
    ArrayPairs,
    OnlinePairs,
    PairSource,
    check_pairs,
    find_pairs,
    open_pairs,
    pair_folder,
    write_array_pairs,
)
from pantarhei.straighten.straightness import COSTS, Straightness, straightness, transport_costs

__all__ = [
    "COSTS",
    "ArrayPairs",
    "Balance",
    "BentLine",
    "Bridge",
    "Entropic",
    "MarginalCheck",
    "MaxMin",
    "OnlinePairs",
    "PairReport",
    "PairSource",
    "Solver",
    "Straightness",
    "balance",
    "bridge_flow",
    "check_marginals",
    "check_pairs",
    "check_reflow",
    "check_teacher",
    "distil",
    "distillation_task",
    "find_pairs",
    "inspect_pairs",
    "make_pairs",
    "markovian_fitting",
    "maxmin_bridge",
    "open_pairs",
    "pair_folder",
    "reflow",
    "reflow_task",
    "straightness",
    "transport_costs",
    "write_array_pairs",
]
