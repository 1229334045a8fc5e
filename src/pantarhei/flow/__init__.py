"""What a flow is: paths, predictions, times, couplings, conditions, guidance, objectives, likelihood; `Flow`."""

from pantarhei.flow import couplings, objectives, paths, predictions, sources, times
from pantarhei.flow.closed_form import GaussianMixture, MixtureField
from pantarhei.flow.conditions import Condition
from pantarhei.flow.feature_jacobian import FeatureJacobian
from pantarhei.flow.flow import Flow, evaluation_mode
from pantarhei.flow.grids import make_grid
from pantarhei.flow.likelihood import Likelihood, log_likelihood
from pantarhei.flow.metrics import GradientPyramid, Perceptual, PseudoHuber, squared
from pantarhei.flow.nonparametric import EmpiricalField, NeighbourField
from pantarhei.flow.objectives import FlowMatching, Objective, Term
from pantarhei.flow.provenance import Provenance
from pantarhei.flow.stochastic import fading, transport_sde
from pantarhei.flow.transforms import FieldTransform, Guidance, Stretched

__all__ = [
    "Condition",
    "EmpiricalField",
    "FeatureJacobian",
    "FieldTransform",
    "Flow",
    "FlowMatching",
    "GaussianMixture",
    "GradientPyramid",
    "Guidance",
    "Likelihood",
    "MixtureField",
    "NeighbourField",
    "Objective",
    "Perceptual",
    "Provenance",
    "PseudoHuber",
    "Stretched",
    "Term",
    "couplings",
    "evaluation_mode",
    "fading",
    "log_likelihood",
    "make_grid",
    "objectives",
    "paths",
    "predictions",
    "sources",
    "squared",
    "times",
    "transport_sde",
]
