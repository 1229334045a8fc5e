"""The recipes by system: a run's configuration back to the recipe it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pantarhei.naming import unknown
from pantarhei.recipes.backbones import NetworkConfig
from pantarhei.recipes.data import Recipe, read_recipe
from pantarhei.recipes.forecasting import ForecastConfig
from pantarhei.recipes.rectified_flow import RectifiedFlowConfig
from pantarhei.recipes.stochastic_interpolants import StochasticInterpolantsConfig

RECIPES: dict[str, type[Recipe]] = {
    "rectified-flow": RectifiedFlowConfig,
    "stochastic-interpolants": StochasticInterpolantsConfig,
    "forecasting": ForecastConfig,
}


def recipe_in(config: Mapping[str, Any]) -> Recipe | None:
    """The recipe that a run's `config.yaml` names, its own or its teacher's; None where there is none.

    Raises:
        ValueError: of a system that is not known here, or with settings that its recipe does not have.
    """
    if not config.get("recipe"):
        return None
    system = str(config.get("recipe_of", config.get("system", "rectified-flow")))
    if system not in RECIPES:
        raise ValueError(unknown("system", system, RECIPES))
    return read_recipe(RECIPES[system], config["recipe"], network=NetworkConfig)
