"""PantaRhei: learn, straighten, sample and read flows.

`import pantarhei as pr` loads the core; everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pantarhei import flow, solve
from pantarhei.flow import (
    Condition,
    Flow,
    FlowMatching,
    GaussianMixture,
    Guidance,
    MixtureField,
    Provenance,
    TrajectoryModel,
    couplings,
    objectives,
    paths,
    predictions,
    times,
)

__version__ = "0.1.0"

# What is loaded on first use: name -> (module, attribute or None for the module itself).
_LAZY = {
    "data": ("pantarhei.data", None),
    "images": ("pantarhei.images", None),
    "metrics": ("pantarhei.metrics", None),
    "networks": ("pantarhei.networks", None),
    "report": ("pantarhei.report", None),
    "straighten": ("pantarhei.straighten", None),
    "training": ("pantarhei.training", None),
    "FlowTask": ("pantarhei.training", "FlowTask"),
    "Optimization": ("pantarhei.training", "Optimization"),
    "Task": ("pantarhei.training", "Task"),
    "Update": ("pantarhei.training", "Update"),
    "train": ("pantarhei.training", "train"),
    "load": ("pantarhei.interop", "load"),
}

if TYPE_CHECKING:
    from pantarhei import data, images, metrics, networks, report, straighten, training
    from pantarhei.interop import load
    from pantarhei.training import FlowTask, Optimization, Task, Update, train


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pantarhei' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Condition",
    "Flow",
    "FlowMatching",
    "FlowTask",
    "GaussianMixture",
    "Guidance",
    "MixtureField",
    "Optimization",
    "Provenance",
    "Task",
    "TrajectoryModel",
    "Update",
    "couplings",
    "data",
    "flow",
    "images",
    "load",
    "metrics",
    "networks",
    "objectives",
    "paths",
    "predictions",
    "report",
    "solve",
    "straighten",
    "times",
    "train",
    "training",
]
