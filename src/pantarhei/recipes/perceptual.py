"""Perceptual distances by name, for distillation and rectified flow++; only "lpips" needs weight files of the user."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pantarhei.data import Source
from pantarhei.flow import LPIPS, GradientPyramid, Perceptual
from pantarhei.flow.metrics import Premetric
from pantarhei.metrics import train_classifier
from pantarhei.metrics.classifier import SmallClassifier

MetricName = Literal["squared", "gradients", "classifier", "lpips", "lpips-surrogate"]
PerceptualName = Literal["none", "gradients", "classifier", "lpips", "lpips-surrogate"]


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


def build_metric(
    name: MetricName | PerceptualName,
    data: Source | None = None,
    seed: int = 0,
    *,
    vgg: str | Path | None = None,
    linear: str | Path | None = None,
    size: int | None = None,
    divisor: int = 4,
) -> Premetric | None:
    """A distance by name: None for "squared" (the plain loss), a gradient pyramid, features of a classifier, or LPIPS.

    Args:
        name: which. "lpips-surrogate" is the arithmetic of LPIPS on random features, and says so in its name.
        data: labelled images that the classifier is trained on.
        seed: of its training, and of the surrogate's weights.
        vgg, linear: weight files of "lpips": torchvision's VGG16 and the linear weights of LPIPS.
        size: side that LPIPS resizes images to; by default 224, as published, but the surrogate takes them as they are.
        divisor: of the surrogate's channel counts, which are VGG16's.

    Raises:
        FileNotFoundError: a weight file is missing.
        ValueError: the name is unknown, the classifier needs labelled images, LPIPS its two files, or a file is damaged.
    """
    if name in ("squared", "none"):
        return None
    if name == "gradients":
        return GradientPyramid()
    if name == "lpips":
        if vgg is None or linear is None:
            raise ValueError(
                "metric: 'lpips' needs two weight files, torchvision's VGG16 (vgg) and LPIPS' linear weights (linear); "
                "without them take 'lpips-surrogate', which is not LPIPS"
            )
        return LPIPS.from_files(vgg, linear, size=size or 224)
    if name == "lpips-surrogate":
        return LPIPS.surrogate(seed, size=size, divisor=divisor)
    if name != "classifier":
        raise ValueError(f"metric: must be one of {', '.join(get_args(MetricName))}, got {name!r}")
    batch = {} if data is None else data.fetch(torch.arange(min(len(data), 10_000)))
    if "label" not in batch or batch["x1"].ndim != 4:
        raise ValueError("metric: 'classifier' needs labelled images; take 'gradients' or 'squared'")
    trained = train_classifier(batch["x1"], batch["label"], seed=seed, data=data.name if data else "")
    return Perceptual(StageMaps(trained.network, trained.name))
