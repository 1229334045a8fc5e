"""Integrate a field. Knows no networks, no paths, no data."""

from pantarhei.solve.flow_map import FlowMap, flow_map
from pantarhei.solve.iterate import Rollout, iterate
from pantarhei.solve.methods import METHODS, as_step
from pantarhei.solve.ode import Solution, ode
from pantarhei.solve.sde import sde
from pantarhei.solve.state import CountedField, Field, State
from pantarhei.solve.steps import RungeKutta, Step, StepResult, Tableau, hermite

__all__ = [
    "METHODS",
    "CountedField",
    "Field",
    "FlowMap",
    "Rollout",
    "RungeKutta",
    "Solution",
    "State",
    "Step",
    "StepResult",
    "Tableau",
    "as_step",
    "flow_map",
    "hermite",
    "iterate",
    "ode",
    "sde",
]
