"""Vector fields as pictures."""

import pytest
import torch

from pantarhei.report.vector_fields import _vorticity, vector_fields


def turning(side=12):
    at = torch.arange(side) - side / 2.0
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([-y, x])[None]


def test_rows_of_fields(tmp_path):
    figure = vector_fields(
        {"truth": turning().repeat(3, 1, 1, 1), "sample": turning(40)}, places=torch.tensor([[1, 2]]), columns=2
    )
    assert len(figure.axes) == 4
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["truth", "", "sample", ""]
    figure.savefig(tmp_path / "fields.png")
    assert torch.allclose(_vorticity(turning().double()), torch.full((1, 12, 12), 2.0).double())


def test_refused_fields():
    with pytest.raises(ValueError, match=r"\(N, 2, H, W\) is needed"):
        vector_fields({"images": torch.zeros(1, 3, 8, 8)})
    with pytest.raises(ValueError, match=r"\(N, 2, H, W\) is needed"):
        vector_fields({"line": torch.zeros(1, 2, 1, 8)})
