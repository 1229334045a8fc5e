"""Inversion in a few steps, and edits by it: interpolation between two items, translation to another condition.

Lee, Lin, Fanti 2405.20320, section 5: a straightened flow runs backwards as cheaply as forwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.flow import Flow, evaluation_mode
from pantarhei.flow.flow import ConditionLike
from pantarhei.flow.grids import Grid
from pantarhei.straighten.first_order import clean_end

INVERSION_EDGE = 1e-3
Inverter = Literal["auto", "euler", "heun-euler", "ddim"]  # auto: ddim where the path is curved, else euler


def slerp(a: Tensor, b: Tensor, weight: float | Tensor) -> Tensor:
    """Spherical interpolation between rows, over all their elements: sin((1-w) o) / sin o a + sin(w o) / sin o b.

    Noise keeps its length on the way, which straight interpolation shortens. Rows in one direction are mixed linearly.

    Args:
        a, b: (B, ...).
        weight: of b, a number or (B,).
    """
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine)
    w = torch.as_tensor(weight, dtype=a.dtype, device=a.device).expand(len(a))
    near = torch.sin(angle) < 1e-6
    safe = torch.where(near, torch.ones_like(angle), torch.sin(angle))
    first = torch.where(near, 1 - w, torch.sin((1 - w) * angle) / safe)
    second = torch.where(near, w, torch.sin(w * angle) / safe)
    return (first[:, None] * flat_a + second[:, None] * flat_b).reshape(a.shape)


def inversion_grid(flow: Flow, evaluations: int, method: Inverter = "auto") -> Grid:
    """Falling times of an inversion with so many evaluations: even, but starting a little inside the data end.

    Raises:
        ValueError: for evaluations < 1, or an even number with "heun-euler".
    """
    if evaluations < 1:
        raise ValueError(f"evaluations: must be at least 1, got {evaluations}")
    if method == "heun-euler" and evaluations % 2 == 0:
        raise ValueError(f"evaluations: Heun with a last Euler step takes an odd number, got {evaluations}")
    steps = (evaluations + 1) // 2 if method == "heun-euler" else evaluations
    low, high = flow.interval
    first = min(high, 1 - INVERSION_EDGE)
    return (first, *(high - (high - low) * i / steps for i in range(1, steps)), low)


@torch.no_grad()
def invert_quickly(
    flow: Flow,
    x: Tensor,
    evaluations: int,
    *,
    condition: ConditionLike = None,
    method: Inverter = "auto",
    grid: Grid | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The unit source draw of data, in a few evaluations.

    The data are mixed with a little noise, one part in a thousand on the linear path, so that the field is asked where it
    has been trained.

    Args:
        flow: best a straightened one.
        x: data in the flow's space (B, *shape).
        evaluations: of the field.
        condition: what the data are.
        method: "auto" (DDIM's steps, which on the linear path are Euler's), either by name, or "heun-euler" (an odd number
            of evaluations; for the linear path).
        grid: falling times instead, from a little inside the data end to the flow's first time.
        noise: the admixed unit noise, drawn where it is not given.
        generator: draws it.
    """
    times = grid or inversion_grid(flow, evaluations, method)
    if noise is None:
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    first = torch.tensor(times[0], dtype=torch.float64)
    alpha, sigma = float(flow.path.alpha(first)), float(flow.path.sigma(first))
    with evaluation_mode(flow.network):
        end = flow.transport(
            alpha * x + sigma * noise, (times[0], times[-1]), steps=times, method=method, condition=condition
        )
    return end.x / flow.first_sigma


@dataclass(frozen=True)
class Reconstruction:
    """Data, the noise they were inverted to, and what the noise leads back to.

    Attributes:
        x, x0, again: data, noise and data again, (B, *shape).
        evaluations: of the way there and of the way back.
    """

    x: Tensor
    x0: Tensor
    again: Tensor
    evaluations: tuple[int, int]

    @property
    def error(self) -> float:
        """Mean squared error per element."""
        return float((self.again - self.x).double().square().mean())

    @property
    def shell_distance(self) -> float:
        """Kolmogorov-Smirnov distance of |x0|^2 to the chi-square law that true noise has."""
        from scipy.stats import chi2

        size = self.x0[0].numel()
        norms = self.x0.double().flatten(1).square().sum(1).sort().values.cpu()
        law = torch.from_numpy(chi2(size).cdf(norms.numpy()))
        count = len(norms)
        steps = torch.arange(count + 1, dtype=torch.float64) / count
        return float(torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max())


def reconstruct(
    flow: Flow,
    x: Tensor,
    evaluations: tuple[int, int] = (4, 4),
    *,
    condition: ConditionLike = None,
    method: Inverter = "auto",
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Reconstruction:
    """To noise and back, in a few evaluations each way.

    Args:
        flow, x, condition, method, noise, generator: as in `invert_quickly`.
        evaluations: there, and back.
    """
    x0 = invert_quickly(flow, x, evaluations[0], condition=condition, method=method, generator=generator, noise=noise)
    return Reconstruction(x, x0, decode(flow, x0, evaluations[1], condition, method), evaluations)


def decode(
    flow: Flow,
    x0: Tensor,
    evaluations: int,
    condition: ConditionLike = None,
    method: str = "auto",
    guidance: float = 1.0,
) -> Tensor:
    """Data of noise in so many evaluations; "reinterpolate" keeps the noise, which edits want."""
    steps = (evaluations + 1) // 2 if method == "heun-euler" else evaluations
    options = {"steps": steps, "method": method, "guidance": guidance, "final": clean_end(flow)}
    return flow.sample(x0=x0, condition=condition, decode=False, **options)


def interpolate(
    flow: Flow,
    a: Tensor,
    b: Tensor,
    count: int = 8,
    *,
    evaluations: tuple[int, int] = (8, 8),
    condition: tuple[ConditionLike, ConditionLike] = (None, None),
    method: Inverter = "auto",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Items between two, through their noises on the sphere.

    Args:
        flow: the flow.
        a, b: the two ends, (B, *shape) each.
        count: how many, both ends included.
        evaluations: there, and back.
        condition: of a and of b; the nearer one's holds in between.
        method, generator: see `invert_quickly`.

    Returns:
        (B, count, *shape).

    Raises:
        ValueError: for count < 2.
    """
    if count < 2:
        raise ValueError(f"count: at least both ends are needed, got {count}")
    starts = [
        invert_quickly(flow, x, evaluations[0], condition=c, method=method, generator=generator)
        for x, c in zip((a, b), condition, strict=True)
    ]
    rows = []
    for i in range(count):
        weight = i / (count - 1)
        rows.append(decode(flow, slerp(starts[0], starts[1], weight), evaluations[1], condition[weight > 0.5], method))
    return torch.stack(rows, dim=1)


def translate(
    flow: Flow,
    x: Tensor,
    source: ConditionLike,
    target: ConditionLike,
    *,
    evaluations: tuple[int, int] = (4, 2),
    method: Inverter = "auto",
    keep_noise: bool = True,
    guidance: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the items would be under another condition: to noise under theirs, and back under the other.

    Args:
        flow: a conditional flow.
        x: items (B, *shape).
        source, target: conditions of the way there and of the way back.
        evaluations: there, and back (the paper turns lions into tigers with 4 + 2).
        method: of the way there.
        keep_noise: re-interpolate with the noise on the way back (see `flow.updates.Reinterpolation`).
        guidance: on the way back.
        generator: see `invert_quickly`.

    Raises:
        ValueError: the flow has no condition.
    """
    if not flow.conditions:
        raise ValueError("flow: it was trained without conditions, so there is nothing to translate to")
    x0 = invert_quickly(flow, x, evaluations[0], condition=source, method=method, generator=generator)
    options: dict[str, Any] = {"method": "reinterpolate" if keep_noise else "ddim", "final": clean_end(flow)}
    return flow.sample(x0=x0, steps=evaluations[1], condition=target, guidance=guidance, decode=False, **options)
