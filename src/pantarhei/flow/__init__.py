"""What a flow is: paths, predictions, times, couplings, conditions, guidance, objectives, likelihood; `Flow`."""

from pantarhei.flow import couplings, objectives, paths, predictions, sources, times
from pantarhei.flow.closed_form import GaussianMixture, MixtureField
from pantarhei.flow.conditions import Condition
from pantarhei.flow.flow import Flow, Provenance, evaluation_mode
from pantarhei.flow.grids import make_grid
from pantarhei.flow.likelihood import Likelihood, log_likelihood
from pantarhei.flow.metrics import Perceptual, PseudoHuber, squared
from pantarhei.flow.objectives import FlowMatching, Objective, Term
from pantarhei.flow.transforms import FieldTransform, Guidance

__all__ = [
    "Condition",
    "FieldTransform",
    "Flow",
    "FlowMatching",
    "GaussianMixture",
    "Guidance",
    "Likelihood",
    "MixtureField",
    "Objective",
    "Perceptual",
    "Provenance",
    "PseudoHuber",
    "Term",
    "couplings",
    "evaluation_mode",
    "log_likelihood",
    "make_grid",
    "objectives",
    "paths",
    "predictions",
    "sources",
    "squared",
    "times",
]
