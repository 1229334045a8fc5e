"""Integrate a field. Knows no networks, no paths, no data."""

from pantarhei.solve.adams import Adams
from pantarhei.solve.flow_map import FlowMap, flow_map
from pantarhei.solve.gradient import THROUGH, Gradient, differentiable, gradient
from pantarhei.solve.iterate import Rollout, iterate
from pantarhei.solve.memory import PeakMemory
from pantarhei.solve.methods import METHODS, as_step
from pantarhei.solve.ode import Solution, ode
from pantarhei.solve.reversible import Reversible
from pantarhei.solve.sde import Stochastic, sde
from pantarhei.solve.state import CountedField, Field, State
from pantarhei.solve.steps import RungeKutta, Step, StepResult, Tableau, hermite

__all__ = [
    "METHODS",
    "THROUGH",
    "Adams",
    "CountedField",
    "Field",
    "FlowMap",
    "Gradient",
    "PeakMemory",
    "Reversible",
    "Rollout",
    "RungeKutta",
    "Solution",
    "State",
    "Step",
    "StepResult",
    "Stochastic",
    "Tableau",
    "as_step",
    "differentiable",
    "flow_map",
    "gradient",
    "hermite",
    "iterate",
    "ode",
    "sde",
]
