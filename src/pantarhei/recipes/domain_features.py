"""Features of a domain and heads that classify them, with readers."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pantarhei.files import read_tensors


@dataclass(frozen=True)
class Features:
    """Features of one domain.

    Attributes:
        features: (N, D), N >= 2, finite; kept as float32.
        labels: (N,) whole numbers from 0, kept as int64; None where they are not known.
        name: what tables and messages call the domain.

    Raises:
        TypeError: one is no tensor, or of the wrong kind of numbers.
        ValueError: wrong shapes, negative labels, or features that are not finite.
    """

    features: Tensor
    labels: Tensor | None = None
    name: str = "features"

    def __post_init__(self) -> None:
        x, y = self.features, self.labels
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{self.name}: features must be a tensor of real floating point numbers, got {got}")
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
            raise ValueError(f"{self.name}: features must have shape (N, D) with N >= 2, got {tuple(x.shape)}")
        bad = int((~torch.isfinite(x)).any(dim=1).sum())
        if bad:
            raise ValueError(f"{self.name}: {bad} of {len(x)} features hold NaN or infinity; drop or repair them")
        object.__setattr__(self, "features", x.detach().float())
        if y is None:
            return
        if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{self.name}: labels must be a tensor of whole numbers, got {got}")
        if y.shape != x.shape[:1]:
            raise ValueError(f"{self.name}: labels must have shape ({len(x)},), one a row, got {tuple(y.shape)}")
        if int(y.min()) < 0:
            raise ValueError(f"{self.name}: labels must count classes from 0, the smallest is {int(y.min())}")
        object.__setattr__(self, "labels", y.detach().to(x.device, torch.int64))

    def __len__(self) -> int:
        return len(self.features)


def read_features(path: str | Path) -> Features:
    """Read the features of one domain.

    Args:
        path: .npz or .safetensors with `features` (N, D), and `labels` (N,) where they are known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, TypeError: another format, a damaged file, a missing key, or content that `Features` refuses.
    """
    path = Path(path)
    found = _read_arrays(path)
    if "features" not in found:
        raise ValueError(f"{path}: has no key 'features' (N, D), only {sorted(found)}; 'labels' (N,) is optional")
    return Features(found["features"], found.get("labels"), path.name)


def read_head(path: str | Path) -> LinearHead:
    """Read a linear classifier head: `weight` (C, D) and `bias` (C,) of a .npz or .safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another format, a damaged file, a missing key or a wrong shape.
    """
    path = Path(path)
    found = _read_arrays(path)
    missing = [key for key in ("weight", "bias") if key not in found]
    if missing:
        raise ValueError(
            f"{path}: has no key {missing[0]!r}, only {sorted(found)}; weight (C, D), bias (C,) are needed"
        )
    weight, bias = found["weight"].float(), found["bias"].float()
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        got = f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"{path}: weight and bias must have shapes (C, D) and (C,), got {got}")
    return LinearHead(weight, bias)


@dataclass(frozen=True)
class LinearHead:
    """Logits `x weight^T + bias`: weight (C, D), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) to (N, C)."""
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(f"head: made for {self.weight.shape[1]} features, got {features.shape[1]}")
        return features @ self.weight.to(features).T + self.bias.to(features)


def linear_head(features: Tensor, labels: Tensor, classes: int | None = None) -> LinearHead:
    """A logistic regression on standardised features (scikit-learn, L2 penalty of strength 1).

    Args:
        features: (N, D).
        labels: (N,), whole numbers in [0, classes).
        classes: number of classes; the largest label plus one by default. One without a label is never predicted.

    Raises:
        ValueError: labels outside of the classes, or of a single class.
    """
    from sklearn.linear_model import LogisticRegression

    classes = int(labels.max()) + 1 if classes is None else classes
    present = labels.unique()
    if int(labels.min()) < 0 or int(labels.max()) >= classes or len(present) < 2:
        got = f"{len(present)} classes in {int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"labels: at least two classes in 0..{classes - 1} are needed for a head, got {got}")
    x = features.double().cpu()
    mean, scale = x.mean(dim=0), nonzero(x.std(dim=0))
    found = LogisticRegression(max_iter=2000).fit(((x - mean) / scale).numpy(), labels.cpu().numpy())
    rows, biases = torch.from_numpy(found.coef_), torch.from_numpy(found.intercept_)
    if len(present) == 2:  # scikit-learn keeps the second class only; the first one's logit is 0
        rows, biases = torch.cat([0 * rows, rows]), torch.cat([0 * biases, biases])
    weight, bias = torch.zeros(classes, x.shape[1], dtype=x.dtype), torch.full((classes,), -1e9, dtype=x.dtype)
    weight[present.cpu()] = rows / scale
    bias[present.cpu()] = biases - (rows / scale) @ mean
    return LinearHead(weight.float(), bias.float())


def _read_arrays(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: features are read from .npz or .safetensors files, got {path.suffix or 'no suffix'}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in arrays.files}
    except (ValueError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: is damaged, or not a .npz file of plain numbers ({error})") from error


def nonzero(scale: Tensor) -> Tensor:
    """Deviations to divide by: 1 for coordinates that never change (units of a network that are always off)."""
    return torch.where(scale > 1e-8, scale, torch.ones_like(scale))
