"""What a flow is: paths, predictions, times, couplings, conditions, guidance, objectives, likelihood; `Flow`."""

from pantarhei.flow import couplings, heads, interpolants, objectives, paths, predictions, sources, times
from pantarhei.flow.change_of_path import on_path
from pantarhei.flow.churn import Churn, churned_sample
from pantarhei.flow.closed_form import GaussianMixture, MixtureField
from pantarhei.flow.conditions import Condition
from pantarhei.flow.control import kl_control, loss_gap
from pantarhei.flow.controls import (
    ClassifierGuidance,
    coarse_part,
    grey_part,
    known_part,
    langevin,
    redrawn,
    rejection_sample,
)
from pantarhei.flow.denoising import denoising_steps
from pantarhei.flow.entropic import EntropicField, Potentials, sinkhorn_potentials
from pantarhei.flow.feature_jacobian import FeatureJacobian
from pantarhei.flow.fields import Fields
from pantarhei.flow.flow import Flow
from pantarhei.flow.gammas import Gamma
from pantarhei.flow.gaussian_bridge import GaussianBridge
from pantarhei.flow.gradients import differentiable_sample, keep_norm
from pantarhei.flow.grids import make_grid
from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.interpolation import Interpolation
from pantarhei.flow.jumps import Move, gamma_moves, two_jumps
from pantarhei.flow.likelihood import Likelihood, log_likelihood
from pantarhei.flow.metrics import LPIPS, GradientPyramid, Perceptual, PseudoHuber, squared
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.noise_amounts import fading, noise_amount
from pantarhei.flow.nonparametric import EmpiricalField, NeighbourField
from pantarhei.flow.objectives import FlowMatching, Objective, Term
from pantarhei.flow.observations import Inpainting, Observation, Present, SuperResolution
from pantarhei.flow.path_likelihood import PathLikelihood, path_likelihood
from pantarhei.flow.posterior import Blurred, Masked, Measurement, MeasurementGuidance, Sensors, posterior_sample
from pantarhei.flow.provenance import Provenance
from pantarhei.flow.reparameterisation import Reparameterisation
from pantarhei.flow.stochastic import StiffNoise, transport_sde
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.flow.transforms import FieldTransform, Guidance, Stretched

__all__ = [
    "LPIPS",
    "Blurred",
    "Churn",
    "ClassifierGuidance",
    "Condition",
    "EmpiricalField",
    "EntropicField",
    "FeatureJacobian",
    "FieldTransform",
    "Fields",
    "Flow",
    "FlowMatching",
    "Gamma",
    "GaussianBridge",
    "GaussianMixture",
    "GradientPyramid",
    "Guidance",
    "Inpainting",
    "Interpolant",
    "Interpolation",
    "Likelihood",
    "Masked",
    "Measurement",
    "MeasurementGuidance",
    "MixtureField",
    "Move",
    "NeighbourField",
    "Objective",
    "Observation",
    "PathLikelihood",
    "Perceptual",
    "Potentials",
    "Present",
    "Provenance",
    "PseudoHuber",
    "Reparameterisation",
    "Sensors",
    "StiffNoise",
    "Stretched",
    "SuperResolution",
    "Term",
    "TrajectoryModel",
    "churned_sample",
    "coarse_part",
    "couplings",
    "denoising_steps",
    "differentiable_sample",
    "evaluation_mode",
    "fading",
    "gamma_moves",
    "grey_part",
    "heads",
    "interpolants",
    "keep_norm",
    "kl_control",
    "known_part",
    "langevin",
    "log_likelihood",
    "loss_gap",
    "make_grid",
    "noise_amount",
    "objectives",
    "on_path",
    "path_likelihood",
    "paths",
    "posterior_sample",
    "predictions",
    "redrawn",
    "rejection_sample",
    "sinkhorn_potentials",
    "sources",
    "squared",
    "times",
    "transport_sde",
    "two_jumps",
]
