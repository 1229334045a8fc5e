"""Schedulers of diffusers and what they say about a model: its path and its prediction. The rest is about their samplers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pantarhei.files import read_json
from pantarhei.flow.paths import AffinePath, Linear, Numbered
from pantarhei.flow.predictions import Angular, Data, Elsewhere, Noise, Prediction, Velocity
from pantarhei.naming import unknown
from pantarhei.networks.diffusers_models import BETAS, FLOW_SCHEDULER, ddim_settings, import_diffusers, plain

FILE = "scheduler_config.json"
NUMBERED = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
PREDICTIONS: dict[str, type[Prediction]] = {"epsilon": Noise, "v_prediction": Angular, "sample": Data}


def read_scheduler(where: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings with those that its file leaves to the defaults of its class.

    Args:
        where: the settings, their file, or its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a scheduler that is not known here.
    """
    path = None if isinstance(where, Mapping) else Path(where)
    if path is not None:
        path = path / FILE if path.is_dir() else path
    settings = dict(where) if isinstance(where, Mapping) else read_json(path)  # type: ignore[arg-type]
    name = str(settings.get("_class_name", "(none)"))
    if name not in (*NUMBERED, FLOW_SCHEDULER):
        raise ValueError(f"{path or 'settings'}: {unknown('scheduler', name, (*NUMBERED, FLOW_SCHEDULER))}")
    kind = getattr(import_diffusers(), name)
    taken = kind._get_init_keys(kind)
    scheduler = kind(**{key: value for key, value in settings.items() if key in taken and key != "self"})
    return {**plain(scheduler.config), "_class_name": name}


def path_of(scheduler: Mapping[str, Any]) -> tuple[AffinePath, Prediction]:
    """The path and the prediction of a model that was trained with a scheduler (settings of `read_scheduler`).

    Raises:
        ValueError: a schedule of noise levels, or a prediction, that is not known here.
    """
    if scheduler["_class_name"] == FLOW_SCHEDULER:
        return Linear(), Velocity()
    schedule, prediction = scheduler["beta_schedule"], scheduler.get("prediction_type", "epsilon")
    betas = scheduler.get("trained_betas")
    if schedule not in BETAS and betas is None:
        raise ValueError(unknown("scheduler.beta_schedule", str(schedule), BETAS))
    if prediction not in PREDICTIONS:
        raise ValueError(unknown("scheduler.prediction_type", str(prediction), PREDICTIONS))
    path = Numbered(
        schedule=BETAS.get(schedule, "linear"),  # type: ignore[arg-type]
        beta_min=scheduler["beta_start"],
        beta_max=scheduler["beta_end"],
        count=scheduler["num_train_timesteps"],
        zero_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        betas=None if betas is None else tuple(betas),
    )
    return path, PREDICTIONS[prediction]()


def scheduler_of(path: Any, prediction: Prediction, *, shift: float = 1.0) -> dict[str, Any]:
    """Settings of the scheduler that samples a model as we do: DDIM with trailing steps, or Euler of flow matching.

    Args:
        path, prediction: of the flow; of a network used elsewhere, its own.
        shift: of flow matching's steps.

    Raises:
        ValueError: diffusers has no scheduler for them.
    """
    if isinstance(prediction, Elsewhere):
        path, prediction = prediction.origin, prediction.prediction
    if type(path) is Linear and isinstance(prediction, Velocity):
        return {"_class_name": FLOW_SCHEDULER, "num_train_timesteps": 1000, "shift": shift}
    name = next((name for name, kind in PREDICTIONS.items() if type(prediction) is kind), None)
    if not isinstance(path, Numbered) or name is None:
        raise ValueError(
            f"flow: diffusers has no scheduler for {prediction.spec()['name']} on the path {path.spec()['name']}; it has "
            "noise, data and v on numbered paths, and velocity on the linear path"
        )
    schedule = next(theirs for theirs, ours in BETAS.items() if ours == path.schedule)
    own = {
        "num_train_timesteps": path.count,
        "beta_start": path.beta_min,
        "beta_end": path.beta_max,
        "beta_schedule": schedule,
        "trained_betas": None if path.betas is None else list(path.betas),
        "rescale_betas_zero_snr": path.zero_snr,
        "prediction_type": name,
    }
    return {"_class_name": "DDIMScheduler", **ddim_settings(own)}
