"""Where logged values go: `metrics.jsonl`, TensorBoard, Weights & Biases, or any function."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pantarhei.files import write_atomically


class Logger(Protocol):
    """Takes the values of an iteration."""

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Record them."""

    def close(self) -> None:
        """Flush and end."""


class JsonLines:
    """One JSON object a line. On resume, lines after the checkpoint's iteration are cut off.

    Args:
        path: the file.
        upto: keep lines up to this iteration only.
    """

    def __init__(self, path: Path, upto: int):
        kept = []
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["iteration"] <= upto:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    break  # a line cut by a crash
        write_atomically(path, "".join(line + "\n" for line in kept).encode())
        self._file = path.open("a")

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Append and flush a line."""
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files in `folder`; later events of an interrupted run are purged on resume."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WandB:
    """Weights & Biases (`pip install "pantarhei[wandb]"`); the run's folder name is its name and id."""

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ImportError('logging to Weights & Biases needs wandb: pip install "pantarhei[wandb]"') from error
        self._run = wandb.init(
            project="pantarhei", name=folder.name, dir=str(folder), config=dict(config), resume="allow"
        )

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log scalars."""
        self._run.log(dict(values), step=iteration)

    def close(self) -> None:
        """Finish."""
        self._run.finish()


class Call:
    """A plain function `(iteration, values)` as a logger."""

    def __init__(self, function: Callable[[int, Mapping[str, float]], None]):
        self._function = function

    def log(self, iteration: int, values: Mapping[str, float]) -> None:
        """Call it."""
        self._function(iteration, values)

    def close(self) -> None:
        """Nothing to do."""
