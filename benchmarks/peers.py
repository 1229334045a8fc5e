"""The peers' modules, imported with no more than they need."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from harness import peer


def torchdiffeq_odeint() -> Any:
    """`torchdiffeq.odeint`."""
    peer("torchdiffeq")
    from torchdiffeq import odeint

    return odeint


def torchcfm_modules() -> tuple[Any, Any]:
    """torchcfm's `UNetModel` and `ConditionalFlowMatcher`.

    torchcfm is installed without its dependencies. Of these only POT (`ot`) is imported on the way to the two classes,
    for the optimal-transport couplings, which are not compared; where it is missing an empty module stands in.
    (torchdyn and torchvision are asked for by other modules of torchcfm and by its examples only.)
    """
    peer("torchcfm")
    if "ot" not in sys.modules and importlib.util.find_spec("ot") is None:
        sys.modules["ot"] = ModuleType("ot")
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
    from torchcfm.models.unet import UNetModel

    return UNetModel, ConditionalFlowMatcher


def rectified_flow_modules() -> tuple[Any, Any]:
    """rectified-flow's `RectifiedFlow` and `EulerSampler`.

    Its helpers import torchvision, for a grid of pictures that nothing here draws; where it is missing an empty module
    stands in while they are imported, and goes again: other packages ask whether torchvision is there.
    """
    peer("rectified-flow")
    missing = "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None
    if missing:
        sys.modules["torchvision"] = ModuleType("torchvision")
    try:
        from rectified_flow.rectified_flow import RectifiedFlow
        from rectified_flow.samplers import EulerSampler
    finally:
        if missing:
            del sys.modules["torchvision"]
    return RectifiedFlow, EulerSampler


def flow_matching_solver() -> Any:
    """flow_matching's `ODESolver`.

    Its discrete solver, which is imported beside it, asks for tqdm; where that is missing an empty one stands in meanwhile.
    """
    peer("flow_matching")
    missing = "tqdm" not in sys.modules and importlib.util.find_spec("tqdm") is None
    if missing:
        stand_in = ModuleType("tqdm")
        stand_in.tqdm = iter  # type: ignore[attr-defined]
        sys.modules["tqdm"] = stand_in
    try:
        from flow_matching.solver import ODESolver
    finally:
        if missing:
            del sys.modules["tqdm"]
    return ODESolver
