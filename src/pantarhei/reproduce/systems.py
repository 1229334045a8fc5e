"""The experiments of every system that has any."""

from __future__ import annotations

from pantarhei.reproduce.adjoint_dpm import EXPERIMENTS as ADJOINT_DPM
from pantarhei.reproduce.claims import Experiment
from pantarhei.reproduce.consistency_trajectory_models import EXPERIMENTS as CONSISTENCY_TRAJECTORY_MODELS
from pantarhei.reproduce.rectified_diffusion import EXPERIMENTS as RECTIFIED_DIFFUSION
from pantarhei.reproduce.rectified_flow import EXPERIMENTS as RECTIFIED_FLOW
from pantarhei.reproduce.rectified_flow_plus_plus import EXPERIMENTS as RECTIFIED_FLOW_PLUS_PLUS
from pantarhei.reproduce.stochastic_interpolants import EXPERIMENTS as STOCHASTIC_INTERPOLANTS

EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "adjoint-dpm": ADJOINT_DPM,
    "consistency-trajectory-models": CONSISTENCY_TRAJECTORY_MODELS,
    "rectified-diffusion": RECTIFIED_DIFFUSION,
    "rectified-flow": RECTIFIED_FLOW,
    "rectified-flow-plus-plus": RECTIFIED_FLOW_PLUS_PLUS,
    "stochastic-interpolants": STOCHASTIC_INTERPOLANTS,
}
