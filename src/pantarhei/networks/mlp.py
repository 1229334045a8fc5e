"""A multilayer perceptron for points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pantarhei.networks.embeddings import ClassEmbedding, TimeEmbedding, check_second_time


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of an `MLP`.

    Attributes:
        dimension: of the points.
        width: of each hidden layer.
        layers: number of hidden layers.
        classes: number of classes, 0 for none; index `classes` is the null class.
        vector: width of a conditioning vector, 0 for none.
        fields: how many fields of the points' dimension are predicted, stacked along dimension 1.
        second_time: there is a branch for a second time.
    """

    dimension: int = 2
    width: int = 128
    layers: int = 3
    classes: int = 0
    vector: int = 0
    fields: int = 1
    second_time: bool = False

    def __post_init__(self) -> None:
        if min(self.dimension, self.width, self.layers, self.fields) < 1:
            raise ValueError(f"network: dimension, width, layers and fields must be at least 1, got {self}")


class MLP(nn.Module):
    """`forward(x, t, label=None, vector=None, s=None)`: points (B, D) to (B, fields * D), t (B,) in [0, 1]; s, a second time
    like t, where the network has a branch for it, which is left out without s.

    The time enters as itself and as an embedding that is added to the first hidden layer, as that of s is.
    """

    def __init__(self, config: MLPConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.inputs = nn.Linear(config.dimension + 1, width)
        self.time = TimeEmbedding(width)
        self.time_s = TimeEmbedding(width) if config.second_time else None
        self.classes = ClassEmbedding(config.classes + 1, width) if config.classes else None
        self.vector = nn.Linear(config.vector, width) if config.vector else None
        hidden: list[nn.Module] = []
        for _ in range(config.layers - 1):
            hidden += [nn.SiLU(), nn.Linear(width, width)]
        self.hidden = nn.Sequential(*hidden, nn.SiLU())
        self.outputs = nn.Linear(width, config.fields * config.dimension)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        """The network's output at (x, t) or (x, t, s) under its conditions.

        Raises:
            ValueError: s is given to a network without a branch for it.
        """
        check_second_time(self.time_s, s)
        h = self.inputs(torch.cat([x, t[:, None].to(x.dtype)], dim=1)) + self.time(t)
        if s is not None:
            assert self.time_s is not None
            h = h + self.time_s(s)
        if self.classes is not None:
            null = torch.full((t.shape[0],), self.config.classes, device=t.device)
            h = h + self.classes(null if label is None else label)
        if self.vector is not None and vector is not None:
            h = h + self.vector(vector)
        return self.outputs(self.hidden(h))
