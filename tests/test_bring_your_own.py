"""The documented example runs and does what it says."""

import runpy
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "bring_your_own.py"


def test_own_network_dataset_and_condition(capsys):
    landed = runpy.run_path(str(EXAMPLE))["main"]()
    assert torch.allclose(landed.mean(0), torch.tensor([2.0, 0.0]), atol=0.25)
    assert 0.1 < float(landed.std(0).mean()) < 0.6
    assert "expected" in capsys.readouterr().out
