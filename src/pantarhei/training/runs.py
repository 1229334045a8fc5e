"""Run folders: `config.yaml`, `checkpoints/`, `metrics.jsonl`, `samples/`, `report.html`, `README.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pantarhei.files import is_leftover, write_atomically

VERSION = 1
CONFIG = "config.yaml"
# What a straightening puts into the folder of its run before that begins.
MADE_BEFORE = ("pairs", "inverted")


class Run:
    """A run folder on disk.

    Use `Run.create` to start one and `Run.open` to read one.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder = folder
        self.config = config

    @staticmethod
    def create(folder: str | Path, config: Mapping[str, Any]) -> Run:
        """Make a new run folder, or take one that holds the same run and no checkpoint yet.

        Raises:
            ValueError: if the folder already holds a run with checkpoints, or other files.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out: {folder} is a file, not a folder")
        if (folder / CONFIG).is_file():
            if any((folder / "checkpoints").glob("[0-9]*")):
                raise ValueError(f"{folder} already holds a run; go on with --resume, or choose another --out")
        elif folder.is_dir() and any(p.name not in MADE_BEFORE and not is_leftover(p) for p in folder.iterdir()):
            raise ValueError(f"{folder} is not empty and not a run folder; choose another --out")
        run = Run(folder, {"version": VERSION, **config})
        run.write_config()
        return run

    @staticmethod
    def open(folder: str | Path) -> Run:
        """Read a run folder.

        Raises:
            FileNotFoundError: there is no such folder, or it is not a run folder.
            ValueError: its configuration cannot be read, or is of a newer version.
        """
        import yaml

        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no run folder {folder}")
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} is not a run folder: it has no {CONFIG}")
        try:
            config = yaml.safe_load((folder / CONFIG).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / CONFIG} is not valid YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(config, dict) or "version" not in config:
            raise ValueError(f"{folder / CONFIG} is not the configuration of a run: it has no version")
        if config["version"] > VERSION:
            raise ValueError(
                f"{folder} was written by a newer pantarhei (run version {config['version']}); upgrade to read it"
            )
        return Run(folder, config)

    def write_config(self) -> None:
        """Write `config.yaml`."""
        import yaml

        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        write_atomically(self.folder / CONFIG, text.encode())

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of the pictures made while training."""
        return self.folder / "samples"

    def metrics(self) -> list[dict[str, Any]]:
        """The logged lines, in order."""
        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = []
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a line cut by a crash is the last one
        return lines
