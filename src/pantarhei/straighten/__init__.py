"""Fewer steps: pairs, reflow, distillation; Schroedinger bridges; straightness, and what rectifying does to a coupling."""

from pantarhei.straighten.adversarial import Adversarial
from pantarhei.straighten.analysis import Balance, MarginalCheck, balance, check_marginals
from pantarhei.straighten.convention import ConventionCheck, WrongConvention, check_convention
from pantarhei.straighten.distillation import check_teacher, distil, distillation_task
from pantarhei.straighten.editing import (
    Reconstruction,
    decode,
    interpolate,
    invert_quickly,
    reconstruct,
    slerp,
    translate,
)
from pantarhei.straighten.first_order import FirstOrder, first_order, segment_ends
from pantarhei.straighten.jump_times import JumpTimes, jump_times
from pantarhei.straighten.mean_flow import MeanFlow
from pantarhei.straighten.pairs import PairReport, Solver, inspect_pairs, make_pairs
from pantarhei.straighten.phased import PhasedObjective, Phases, phased_task
from pantarhei.straighten.real_pairs import MixedPairs, invert_data
from pantarhei.straighten.rectified_diffusion import PlainNoiseLoss, StateAnchor, rectified_diffusion_task
from pantarhei.straighten.rectified_flow_plus_plus import huber_transition, plus_plus_task
from pantarhei.straighten.reflow import check_reflow, reflow, reflow_task
from pantarhei.straighten.schroedinger import Bridge, bridge_flow
from pantarhei.straighten.schroedinger_imf import Entropic, markovian_fitting
from pantarhei.straighten.schroedinger_maxmin import BentLine, MaxMin, maxmin_bridge
from pantarhei.straighten.state_pairs import StatePairs
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
from pantarhei.straighten.students import LowRank
from pantarhei.straighten.trajectory_matching import TrajectoryMatching
from pantarhei.straighten.trajectory_students import distil_trajectory, trajectory_student, trajectory_task
from pantarhei.straighten.trajectory_task import TrajectoryTask
from pantarhei.straighten.tuned_grids import tuned_grid

__all__ = [
    "COSTS",
    "Adversarial",
    "ArrayPairs",
    "Balance",
    "BentLine",
    "Bridge",
    "ConventionCheck",
    "Entropic",
    "FirstOrder",
    "JumpTimes",
    "LowRank",
    "MarginalCheck",
    "MaxMin",
    "MeanFlow",
    "MixedPairs",
    "OnlinePairs",
    "PairReport",
    "PairSource",
    "PhasedObjective",
    "Phases",
    "PlainNoiseLoss",
    "Reconstruction",
    "Solver",
    "StateAnchor",
    "StatePairs",
    "Straightness",
    "TrajectoryMatching",
    "TrajectoryTask",
    "WrongConvention",
    "balance",
    "bridge_flow",
    "check_convention",
    "check_marginals",
    "check_pairs",
    "check_reflow",
    "check_teacher",
    "decode",
    "distil",
    "distil_trajectory",
    "distillation_task",
    "find_pairs",
    "first_order",
    "huber_transition",
    "inspect_pairs",
    "interpolate",
    "invert_data",
    "invert_quickly",
    "jump_times",
    "make_pairs",
    "markovian_fitting",
    "maxmin_bridge",
    "open_pairs",
    "pair_folder",
    "phased_task",
    "plus_plus_task",
    "reconstruct",
    "rectified_diffusion_task",
    "reflow",
    "reflow_task",
    "segment_ends",
    "slerp",
    "straightness",
    "trajectory_student",
    "trajectory_task",
    "translate",
    "transport_costs",
    "tuned_grid",
    "write_array_pairs",
]
