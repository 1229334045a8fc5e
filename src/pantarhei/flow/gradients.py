"""Samples as differentiable functions of the noise, the condition and the weights they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import Condition, as_condition
from pantarhei.flow.endings import Final, carried
from pantarhei.flow.estimates import Estimates
from pantarhei.flow.flow import ConditionLike, Flow
from pantarhei.flow.grids import Grid, GridName, optional_grid
from pantarhei.flow.jumps import Jumping
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.noise_amounts import Epsilon
from pantarhei.flow.reparameterisation import Reparameterisation, Variables
from pantarhei.flow.stochastic import transport_sde
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.flow.transforms import FieldTransform, Guidance
from pantarhei.flow.updates import PathMethod, path_step
from pantarhei.solve import Solution
from pantarhei.solve.gradient import RUNGE_KUTTA_WAYS, Given, Report, Through, differentiable
from pantarhei.solve.methods import METHODS, MethodName, as_step
from pantarhei.solve.sde import Stochastic
from pantarhei.solve.steps import RungeKutta, Step
from pantarhei.solve.unknowns import constant, parameters_of


def differentiable_sample(
    flow: Flow,
    x0: Tensor,
    *,
    condition: ConditionLike = None,
    parameters: Given = None,
    through: Through = "checkpoint",
    variables: Variables | None = None,
    steps: int | Grid | Literal["auto"] | None = "auto",
    method: MethodName | PathMethod | Step | Literal["jump"] = "auto",
    grid: GridName | Callable[[float], float] | None = None,
    shift: float = 1.0,
    guidance: float | Guidance = 1.0,
    transforms: Sequence[FieldTransform] = (),
    final: Final = "auto",
    decode: bool = True,
    epsilon: Epsilon | Literal["trained"] | None = None,
    generator: torch.Generator | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    every: int | Literal["sqrt"] = 1,
    offload: bool = False,
    truncate: int | None = None,
    report: Report | None = None,
    **noisy: Any,
) -> Tensor:
    """Samples, at memory that does not grow with their steps; `backward()` what is made of them (2307.10711).

    Those of the ODE, of the SDE with noise `epsilon`, or of a trajectory model's jumps. Gradients reach x0 and the condition
    where these need them, and the named parameters; all other weights are constants. By default they are the exact ones of
    the sampler as it is (see `solve.THROUGH`), with the noise on its way held fixed. The network runs in evaluation mode.

    Args:
        flow: whose samples.
        x0: unit source draws (B, *shape).
        condition, method, grid, shift, guidance, transforms, final, decode, epsilon: as in `Flow.sample`.
        parameters: weights to differentiate with respect to: the network, or some of its tensors.
        through, rtol, atol, every, offload, truncate, report: as of `solve.differentiable`. Noise on the way, of the SDE or
            between jumps, goes with "checkpoint" and "backprop".
        variables: solve the ODE in the variables of a `Reparameterisation`, by a method that does not know the path ("auto"
            is Heun's then). The continuous adjoint of a curved path wants "flow".
        steps: number of steps, a grid, or None for error control; "auto" is one jump of a trajectory model, else 30.
        generator: draws one number, which all noise on the way follows from; None draws from torch's own generator.
        noisy: of `transport_sde` (cap, last, last_step, noise), or of jumps (gamma, moves, noise).

    Returns:
        (B, *shape), or the codec's output shape.

    Raises:
        ValueError: settings that do not go together, a network that depends on something else that needs gradients.
    """
    named = parameters_of(parameters)
    options: dict[str, Any] = {"rtol": rtol, "atol": atol, "every": every, "offload": offload, "truncate": truncate}
    options |= {"through": through, "report": report if report is not None else Report()}
    options |= {"parameters": named or None, "constants": list(flow.parameters())}
    jumps = isinstance(flow, TrajectoryModel) and flow.jumps_with(
        method if isinstance(method, str) else "", epsilon=epsilon
    )
    if epsilon is None and flow.stochastic:
        epsilon = "trained"
    if variables is not None and (jumps or epsilon is not None):
        raise ValueError("variables: are another form of the ODE; jumps and the SDE have none")
    if noisy and not jumps and epsilon is None:
        raise ValueError(f"{min(noisy)}: goes with noise on the way, epsilon= or a trajectory model's jumps")
    left = set(noisy) - ({"gamma", "moves", "noise"} if jumps else {"cap", "last", "last_step", "noise"})
    if left:
        raise ValueError(f"{min(left)}: does not go with {'jumps' if jumps else 'the SDE'}")
    if truncate is not None and x0.requires_grad:
        raise ValueError("truncate: there is no gradient of x0 then; detach it")
    if isinstance(epsilon, Tensor) and epsilon.requires_grad:
        raise ValueError("epsilon: gradients do not reach the amount of noise; detach it")
    seed = None
    if generator is not None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    how: dict[str, Any] = {
        "condition": condition,
        "guidance": guidance,
        "grid": grid if jumps else grid or "uniform",
        "shift": shift,
    }
    if steps != "auto" or not jumps:
        how["steps"] = 30 if steps == "auto" else steps
    carrier = _Carrier(flow, through, variables, epsilon, seed, noisy, options)
    with constant(flow.parameters(), named.values()), evaluation_mode(flow.network):
        x = flow.first_sigma * x0
        if jumps:
            if final not in ("auto", "state") or transforms:
                raise ValueError("final, transforms: are of the ODE, not of jumps")
            x = carrier.by_jumps(x, **how)
        else:
            how |= {"method": method, "transforms": transforms, "final": final}
            x = carried(flow, x, carrier.by_equation, stochastic=epsilon is not None, **how)
        return flow.decode(x) if decode else x


@dataclass(frozen=True)
class _Carrier:
    """Carries states to the data, differentiably.

    Attributes:
        flow: whose states.
        through, variables, epsilon, seed, noisy: as `differentiable_sample` was told.
        options: of `solve.differentiable`.
    """

    flow: Flow
    through: Through
    variables: Variables | None
    epsilon: Any
    seed: int | None
    noisy: Mapping[str, Any]
    options: Mapping[str, Any]

    def by_equation(self, x: Tensor, times: tuple[float, float], **how: Any) -> Tensor:
        """From one time to another by the ODE, in its own or other variables, or by the SDE."""
        if self.epsilon is not None:
            return self._by_noise(x, times, how)
        self.flow.require_ode()
        options = {**self.options, "condition": self._rows(how["condition"], x)}
        method, transforms = how["method"], how["transforms"]
        grid = (self.flow.path, how["steps"], times, how["grid"], how["shift"])
        if self.variables is None:
            step = path_step(method, self.flow.path, times[-1])
            if method == "auto" and self.through in RUNGE_KUTTA_WAYS and not isinstance(step, RungeKutta):
                step = as_step("heun")  # "auto" knows the path here, and these ways do not
            nodes, field = optional_grid(step, *grid), self.flow.field(how["guidance"], transforms)
            if transforms and nodes is not None:
                options["before_step"] = field.number_steps(None)
            return differentiable(self._evaluating(field), x, times, method=step, steps=nodes, **options)
        if not isinstance(self.flow.path, AffinePath):
            raise ValueError("variables: another equation is known for affine paths only")
        turned, step = Reparameterisation(self.variables, self.flow.path, self.flow.interval), _free(method)
        nodes, estimates = optional_grid(step, *grid), Estimates(self.flow, how["guidance"], transforms)
        if transforms and nodes is not None:
            options["before_step"] = estimates.field.number_steps(None)
        clocks = turned.grid(times if nodes is None else nodes)
        y = differentiable(
            self._evaluating(turned.field(estimates)),
            turned.encode(x, times[0]),
            (clocks[0], clocks[-1]),
            method=step,
            steps=None if nodes is None else clocks,
            **options,
        )
        return turned.decode(y, times[-1])

    def by_jumps(
        self,
        x: Tensor,
        *,
        condition: ConditionLike,
        guidance: float | Guidance,
        **plan: Any,
    ) -> Tensor:
        """From the first time to the last by a trajectory model's jumps; they are numbered where an equation has times."""
        model: Any = self.flow
        noisy = dict(self.noisy)
        noise = noisy.pop("noise", self.seed)
        moves, finish = model.moves(**noisy, **plan)
        here = (model.interval[0], *(move.back for move in moves))

        def land(x: Tensor, number: Tensor, named: Condition | None = None) -> Tensor:
            i = int(number)
            wide: dict[str, Any] = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
            t, s = (torch.tensor(time, **wide) for time in (here[i], moves[i].to))
            return model.land(x, t, s, named, guidance, finish=finish and i + 1 == len(moves))

        return differentiable(
            self._evaluating(land),
            x,
            (0.0, float(len(moves))),
            method=Jumping(model.path, tuple(moves), noise),
            steps=len(moves),
            condition=self._rows(condition, x),
            **self.options,
        )

    def _by_noise(self, x: Tensor, times: tuple[float, float], how: Mapping[str, Any]) -> Tensor:
        method = how["method"]

        def solver(
            drift: Any, diffusion: Any, x: Tensor, times: Sequence[float], *, noise: Any, generator: Any, **given: Any
        ) -> Solution:
            drawn = self.seed if noise is None else _by_time(noise, given["steps"])
            step = Stochastic(diffusion, given.pop("method"), drawn)
            x = x if self.options["truncate"] is None else x.detach()  # a step before this one may have a graph
            end = differentiable(self._evaluating(drift), x, times, method=step, **given, **self.options)
            calls = self.options["report"].forward
            return Solution(end, tuple(times), torch.stack([x, end]), calls, calls * len(x), len(given["steps"]) - 1, 0)

        chosen = {} if method == "auto" else {"method": method}
        ends = None if self.seed is None else torch.Generator(x.device).manual_seed(self.seed)
        how = {name: value for name, value in how.items() if name != "method"}
        return transport_sde(
            self.flow, x, times, self.epsilon, solver=solver, generator=ends, **chosen, **how, **self.noisy
        ).x

    def _rows(self, condition: ConditionLike, x: Tensor) -> Condition | None:
        return as_condition(condition, self.flow.null, x.shape[0], x.device)

    def _evaluating(self, field: Any) -> Any:
        """The field with the network in evaluation mode, on the way back, too."""

        def value(x: Tensor, t: Tensor, *condition: Any) -> Tensor:
            with evaluation_mode(self.flow.network):
                return field(x, t, *condition)

        return value


def _by_time(noise: Any, nodes: Sequence[float]) -> Callable[[float, Tensor], Tensor]:
    """Draws by the number of their step as a function of its time."""
    numbers = {t: i for i, t in enumerate(nodes)}
    return lambda t, x: noise(numbers[t], x) if callable(noise) else noise[numbers[t]]


def _free(method: Any) -> Step:
    """A method that does not know the path."""
    if method == "auto":
        return as_step("heun")
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"method: {method} knows the path; with variables of its own take {', '.join(METHODS)}")
    return as_step(method)


@torch.no_grad()
def keep_norm(x0: Tensor, like: Tensor) -> Tensor:
    """Noise scaled, row by row, to the norm of other noise: optimised noise stays where Gaussian noise is."""
    dims = tuple(range(1, x0.ndim))
    wanted = torch.linalg.vector_norm(like, dim=dims, keepdim=True)
    return x0 * wanted / torch.linalg.vector_norm(x0, dim=dims, keepdim=True).clamp_min(1e-12)
