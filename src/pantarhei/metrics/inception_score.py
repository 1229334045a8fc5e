"""The inception score: how surely samples are classified, and into how many classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pantarhei.metrics.checks import positive


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    deviation: float


def inception_score(logits: Tensor, *, splits: int = 10) -> InceptionScore:
    """exp of the mean Kullback-Leibler divergence between p(y | x) and p(y), from 1 (worst) to the number of classes.

    Args:
        logits: of a classifier for samples, (N, classes), N >= splits; in the order of sampling, which the splits follow.
        splits: groups whose scores are averaged; 10 with 50,000 samples is the custom.

    Raises:
        ValueError: wrong shapes, or fewer samples than splits.

    Source: Salimans et al. 2016 (arXiv:1606.03498), section 4.
    """
    positive("splits", splits)
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"logits must have shape (N, classes) with N >= {splits}, got {tuple(logits.shape)}")
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(float(len(part))).log()
        scores.append(float((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp()))
    values = torch.tensor(scores, dtype=torch.float64)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))
