"""The experiments of every system that has any."""

from __future__ import annotations

from pantarhei.reproduce.claims import Experiment
from pantarhei.reproduce.rectified_flow import EXPERIMENTS as RECTIFIED_FLOW
from pantarhei.reproduce.stochastic_interpolants import EXPERIMENTS as STOCHASTIC_INTERPOLANTS

EXPERIMENTS: dict[str, tuple[Experiment, ...]] = {
    "rectified-flow": RECTIFIED_FLOW,
    "stochastic-interpolants": STOCHASTIC_INTERPOLANTS,
}
