"""What a flow estimates at (x, t) under guidance and other transforms: all of it from one call of its network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pantarhei.flow.interpolants import Interpolant
from pantarhei.flow.predictions import Ends, Velocity
from pantarhei.flow.transforms import TransformedField

if TYPE_CHECKING:
    from pantarhei.flow.flow import Flow
    from pantarhei.flow.transforms import FieldTransform, Guidance


class Estimates:
    """Velocity, noise and ends of a flow's transformed field.

    The velocity is what is transformed; on a path with a latent, whose fields cannot be told from the velocity alone, all
    stacked fields of the network's output are transformed together.

    Attributes:
        field: the transformed field.
    """

    def __init__(self, flow: Flow, guidance: float | Guidance, transforms: Sequence[FieldTransform]):
        latent = isinstance(flow.path, Interpolant)
        self.field = flow.field(guidance, transforms)
        if latent:
            self.field = TransformedField(flow.output, self.field.transforms)
        self._prediction: Any = flow.prediction if latent else Velocity()
        self._path = flow.path

    def velocity(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """The velocity."""
        return self._prediction.velocity(self._path, x, t, self.field(x, t, condition), **self._known(condition))

    def velocity_and_noise(self, x: Tensor, t: Tensor, condition: Any = None) -> tuple[Tensor, Tensor]:
        """The velocity, and the expected Gaussian noise in x_t: x0, or the latent."""
        value, known = self.field(x, t, condition), self._known(condition)
        prediction, path = self._prediction, self._path
        return prediction.velocity(path, x, t, value, **known), prediction.latent(path, x, t, value, **known)

    def ends(self, x: Tensor, t: Tensor, condition: Any = None) -> Ends:
        """E[x1 | x_t] and E[x0 | x_t]."""
        return self._prediction.ends(self._path, x, t, self.field(x, t, condition), **self._known(condition))

    def drift(self, x: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        """The drift that the network predicts, of the equation with the noise it was trained with."""
        return self._prediction.split(self.field(x, t, condition))["drift"]

    def _known(self, condition: Any) -> dict[str, Tensor]:
        name = getattr(self._prediction, "start", "")
        return {"x0": condition[name]} if name else {}
