"""Perceptual distances by name, for distillation: none of them needs weights that are not at hand."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pantarhei.data import Source
from pantarhei.flow import GradientPyramid, Perceptual
from pantarhei.flow.metrics import Premetric
from pantarhei.metrics import train_classifier
from pantarhei.metrics.classifier import SmallClassifier

MetricName = Literal["squared", "gradients", "classifier"]


class StageMaps(nn.Module):
    """Feature maps of a small classifier at the end of each of its resolutions."""

    def __init__(self, network: SmallClassifier, name: str):
        super().__init__()
        self.layers = network.convolutions.requires_grad_(False)
        self.name = name

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) to one (B, F, h, w) a resolution."""
        maps = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            elif isinstance(layer, nn.AdaptiveAvgPool2d):
                break
            x = layer(x)
        return maps


def build_metric(name: MetricName, data: Source | None = None, seed: int = 0) -> Premetric | None:
    """A distance by name: None for "squared" (the plain loss), a gradient pyramid, or features of a classifier.

    Args:
        name: which.
        data: labelled images that the classifier is trained on.
        seed: of its training.

    Raises:
        ValueError: the classifier needs labelled images.
    """
    if name == "squared":
        return None
    if name == "gradients":
        return GradientPyramid()
    batch = {} if data is None else data.fetch(torch.arange(min(len(data), 10_000)))
    if "label" not in batch or batch["x1"].ndim != 4:
        raise ValueError("metric: 'classifier' needs labelled images; take 'gradients' or 'squared'")
    trained = train_classifier(batch["x1"], batch["label"], seed=seed, data=data.name if data else "")
    return Perceptual(StageMaps(trained.network, trained.name))
