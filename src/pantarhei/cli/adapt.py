"""`pantarhei adapt TRAIN TEST`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from pantarhei.recipes.domain_adaptation import TransportConfig
from pantarhei.recipes.domain_adaptation import adapt as adapt_features
from pantarhei.recipes.domain_features import read_features, read_head


def adapt(
    train: tyro.conf.Positional[Path],
    test: tyro.conf.Positional[Path],
    out: Path,
    head: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    transport: TransportConfig = TransportConfig(),
    regularisation: float = 1.0,
    steps: int = 100,
    method: Literal["euler", "midpoint", "heun", "rk4"] = "euler",
    progress: bool = True,
) -> int:
    """Carry the features of a test domain to those of the train domain, by CORAL and by rectified flows.

    Prints the accuracy of the train domain's head before and after, and writes `adaptation.json` and, for each method and
    seed, the carried features (safetensors: `features`, and `predictions`, `labels` where there are any).

    Args:
        train: features of the domain the classifier was trained on: .npz or .safetensors with `features` (N, D) and, for a
            head, `labels` (N,).
        test: features of the other domain, from the same network; `labels` only serve to measure.
        out: folder to write into.
        head: the classifier's last layer: .npz or .safetensors with `weight` (C, D) and `bias` (C,); by default a logistic
            regression on the train domain's labels.
        seeds: of the flows, such as 0 1 2.
        transport: how each flow is learned.
        regularisation: of CORAL.
        steps: of the flow's sampler.
        method: of the flow's sampler.
        progress: show a progress line a flow.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; give a folder")
    result = adapt_features(
        read_features(train),
        read_features(test),
        head=None if head is None else read_head(head),
        seeds=seeds,
        config=transport,
        regularisation=regularisation,
        steps=steps,
        method=method,
        progress=progress,
    )
    path = result.save(out)
    print(result.table().text())
    print(path)
    return 0
