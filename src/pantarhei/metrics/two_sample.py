"""Are two sets draws of one law: a classifier's accuracy, and p-values by permutation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pantarhei.metrics.checks import as_pair, positive


def c2st(a: Tensor, b: Tensor, *, folds: int = 5, generator: torch.Generator | None = None) -> float:
    """Classifier two-sample test: how well can a small network tell the sets apart.

    Features are standardised, the network has two hidden layers of 64, accuracy is measured on held-out folds. Rows of
    the larger set are left out at random so that guessing is right half of the time.

    Args:
        a: (N, D).
        b: (M, D).
        folds: number of cross-validation folds, at least 2.
        generator: source of the draws (left-out rows, folds, initial weights, batches).

    Returns:
        Mean accuracy over the folds: 0.5 for indistinguishable sets, 1 for sets that never overlap.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, values that are not finite, fewer than two rows a fold, or `folds` below 2.

    Source: Lopez-Paz & Oquab 2017 (arXiv:1610.06545), section 3.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    a, b = as_pair(a, b, rows=2 * folds)
    import warnings

    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    size = min(a.shape[0], b.shape[0])
    a, b = (x[_permutation(x.shape[0], generator)[:size].to(x.device)] for x in (a, b))
    seed = int(_permutation(2**20, generator)[0])
    network = MLPClassifier((64, 64), batch_size=min(200, size), max_iter=200, tol=1e-3, random_state=seed)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    labels = np.repeat([0, 1], size)
    with warnings.catch_warnings():
        # A network that still improves after 200 epochs is accurate enough for a verdict.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = make_pipeline(StandardScaler(), network)
        scores = cross_val_score(model, torch.cat([a, b]).cpu().numpy(), labels, cv=split, scoring="accuracy")
    return float(scores.mean())


def permutation_test(
    statistic: Callable[[Tensor, Tensor], float],
    a: Tensor,
    b: Tensor,
    permutations: int = 200,
    generator: torch.Generator | None = None,
) -> float:
    """P-value of "a and b are draws of one law" against "the statistic is larger than that allows".

    Rows of the union are dealt anew to two sets of the same sizes; the p-value is the share of deals (the observed one
    counted in, so that it is valid and never 0) whose statistic reaches the observed one.

    Args:
        statistic: a distance of two sets, (N, D), (M, D) -> number; larger means more different.
        a: (N, D).
        b: (M, D).
        permutations: number of deals; the smallest possible p-value is 1 / (permutations + 1).
        generator: source of the deals.

    Returns:
        The p-value in (0, 1].

    Raises:
        TypeError: an argument is no tensor.
        ValueError: wrong shapes, values that are not finite, or fewer than one permutation.

    Source: Phipson & Smyth 2010 (doi:10.2202/1544-6115.1585), equation 2.
    """
    a, b = as_pair(a, b, rows=1)
    positive("permutations", permutations)
    observed = float(statistic(a, b))
    both = torch.cat([a, b])
    reached = 1
    for _ in range(permutations):
        dealt = both[_permutation(both.shape[0], generator).to(both.device)]
        reached += float(statistic(dealt[: a.shape[0]], dealt[a.shape[0] :])) >= observed
    return reached / (permutations + 1)


def _permutation(count: int, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else torch.device("cpu")
    return torch.randperm(count, generator=generator, device=device)
