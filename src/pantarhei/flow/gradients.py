"""Samples as differentiable functions of the noise, the condition and the weights they come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import as_condition
from pantarhei.flow.endings import Final, carried
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.flow import ConditionLike, Flow
from pantarhei.flow.grids import Grid, GridName
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.reparameterisation import Reparameterisation, Variables
from pantarhei.flow.transforms import FieldTransform, Guidance
from pantarhei.flow.updates import PathMethod, path_step
from pantarhei.solve.gradient import Given, Report, Through, differentiable
from pantarhei.solve.methods import METHODS, MethodName, as_step
from pantarhei.solve.steps import Step
from pantarhei.solve.unknowns import constant, parameters_of


def differentiable_sample(
    flow: Flow,
    x0: Tensor,
    *,
    condition: ConditionLike = None,
    parameters: Given = None,
    through: Through = "checkpoint",
    variables: Variables | None = None,
    steps: int | Grid | None = 30,
    method: MethodName | PathMethod | Step = "auto",
    grid: GridName | Callable[[float], float] = "uniform",
    shift: float = 1.0,
    guidance: float | Guidance = 1.0,
    transforms: Sequence[FieldTransform] = (),
    final: Final = "auto",
    decode: bool = True,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    every: int | Literal["sqrt"] = 1,
    offload: bool = False,
    truncate: int | None = None,
    report: Report | None = None,
) -> Tensor:
    """Samples of the ODE, at memory that does not grow with its steps; `backward()` what is made of them (2307.10711).

    Gradients reach x0 and the condition where these need them, and the named parameters; all other weights are constants. By
    default they are the exact ones of the sampler as it is (see `solve.THROUGH`). The network runs in evaluation mode.

    Args:
        flow: whose samples.
        x0: unit source draws (B, *shape).
        condition, method, grid, shift, guidance, transforms, final, decode: as in `Flow.sample`.
        parameters: weights to differentiate with respect to: the network, or some of its tensors.
        through, rtol, atol, every, offload, truncate, report: as of `solve.differentiable`.
        variables: solve in the variables of a `Reparameterisation`, by a method that does not know the path ("auto" is
            Heun's then). The continuous adjoint of a curved path wants "flow".
        steps: number of steps, a grid, or None for error control.

    Returns:
        (B, *shape), or the codec's output shape.

    Raises:
        ValueError: settings that do not go together, a network that depends on something else that needs gradients.
    """
    flow.require_ode()
    report = report if report is not None else Report()
    named = parameters_of(parameters)

    def carry(x: Tensor, times: tuple[float, float], **how: Any) -> Tensor:
        rows = as_condition(how["condition"], flow.null, x.shape[0])
        rows = None if rows is None else rows.to(x.device)
        nodes: Any = flow.nodes(how["steps"], times, grid, shift)
        options: dict[str, Any] = {"rtol": rtol, "atol": atol, "every": every, "offload": offload}
        options |= {"truncate": truncate, "report": report, "condition": rows, "parameters": named or None}
        options |= {"constants": list(flow.parameters()), "through": through}
        if variables is None:
            step = path_step(how["method"], flow.path, times[-1])
            field = flow.field(guidance, transforms)
            before = field.number_steps(None) if transforms and nodes is not None else None
            return differentiable(
                _evaluating(flow, field), x, times, method=step, steps=nodes, before_step=before, **options
            )
        if not isinstance(flow.path, AffinePath):
            raise ValueError("variables: another equation is known for affine paths only")
        turned = Reparameterisation(variables, flow.path, flow.interval)
        estimates = Estimates(flow, guidance, transforms)
        if transforms and nodes is not None:
            options["before_step"] = estimates.field.number_steps(None)
        clocks = turned.grid(nodes if nodes is not None else times)
        y = differentiable(
            _evaluating(flow, turned.field(estimates)),
            turned.encode(x, times[0]),
            (clocks[0], clocks[-1]),
            method=_free(how["method"]),
            steps=clocks if nodes is not None else None,
            **options,
        )
        return turned.decode(y, times[-1])

    with constant(flow.parameters(), named.values()), evaluation_mode(flow.network):
        x = carried(
            flow,
            flow.first_sigma * x0,
            carry,
            condition=condition,
            final=final,
            steps=steps,
            method=method,
            grid=grid,
            shift=shift,
            guidance=guidance,
            transforms=transforms,
        )
        return flow.decode(x) if decode else x


def _free(method: Any) -> Step:
    """A method that does not know the path."""
    if method == "auto":
        return as_step("heun")
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method: {method} knows the path; with variables of its own take {', '.join(METHODS)}")
    return as_step(method)


def _evaluating(flow: Flow, field: Any) -> Any:
    """The field with the network in evaluation mode, on the way back, too."""

    def value(x: Tensor, t: Tensor, *condition: Any) -> Tensor:
        with evaluation_mode(flow.network):
            return field(x, t, *condition)

    return value


@torch.no_grad()
def keep_norm(x0: Tensor, like: Tensor) -> Tensor:
    """Noise scaled, row by row, to the norm of other noise: optimised noise stays where Gaussian noise is."""
    dims = tuple(range(1, x0.ndim))
    wanted = torch.linalg.vector_norm(like, dim=dims, keepdim=True)
    return x0 * wanted / torch.linalg.vector_norm(x0, dim=dims, keepdim=True).clamp_min(1e-12)
