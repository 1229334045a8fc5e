"""Experiments behind the claims of each system's paper, small enough for a CPU: `pantarhei reproduce SYSTEM`."""

from pantarhei.reproduce.claims import Claim, Experiment, Outcome, Settings, reproduce
from pantarhei.reproduce.systems import EXPERIMENTS

__all__ = ["EXPERIMENTS", "Claim", "Experiment", "Outcome", "Settings", "reproduce"]
