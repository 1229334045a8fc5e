"""Reads goldens: outputs of reference implementations, with their tolerances.

A golden is `<system>/<name>.json` (what each tensor is, `config`, `tolerance`) and `.safetensors` (`in.*`, `out.*`, `w.*`)
in the folder `$PANTARHEI_GOLDENS`, by default `tests/goldens`. Tests read every size, time and constant from it.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

FOLDER = Path(os.environ.get("PANTARHEI_GOLDENS") or Path(__file__).parent / "goldens")


class Golden:
    """One golden: `config`, tensors by name, and comparison within the stated tolerance."""

    def __init__(self, system: str, name: str):
        base = FOLDER / system / name
        if not base.with_suffix(".json").is_file():
            pytest.skip(f"this copy of the goldens has no {system}/{name}")
        self.description = json.loads(base.with_suffix(".json").read_text())
        self.config = self.description["config"]
        self.tensors = load_file(base.with_suffix(".safetensors"))
        self.compared = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def tolerance(self, name: str) -> dict[str, Any]:
        table = self.description["tolerance"]
        prefixes = [key for key in table if key not in ("default", "relative_to") and name.startswith(key)]
        return table[max(prefixes, key=len)] if prefixes else table["default"]

    def check(self, name: str, value: torch.Tensor | float) -> None:
        """Assert that `value` is the golden `name` within atol + rtol * max |golden| (of each sample where so stated).

        A sample listed in `sample_rtol` has an rtol of its own.
        """
        expected = self.tensors[name].double()
        found = torch.as_tensor(value).detach().double()
        assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, golden {tuple(expected.shape)}"
        limit = self.tolerance(name)
        by_sample = self.description["tolerance"].get("relative_to") == "sample_max_abs" and expected.ndim > 1
        samples: dict[str, float] = limit.get("sample_rtol", {})
        rows, wanted = (x.flatten(1) if by_sample or samples else x.reshape(1, -1) for x in (found, expected))
        largest = wanted.abs().amax(dim=1)
        rtol = torch.full_like(largest, limit["rtol"])
        for index, own in samples.items():
            rtol[int(index)] = own
        allowed = limit["atol"] + rtol * (largest if by_sample else largest.max())
        worst = (rows - wanted).abs().amax(dim=1)
        assert bool((worst <= allowed).all()), f"{name}: differs by {worst.tolist()}, allowed {allowed.tolist()}"
        self.compared.add(name)

    def assert_all_compared(self) -> None:
        """Assert that no output of the golden was left out."""
        left = set(self.names("out.")) - self.compared
        assert not left, f"not compared: {sorted(left)}"
