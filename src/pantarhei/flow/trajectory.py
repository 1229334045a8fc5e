"""`TrajectoryModel`: a flow that also jumps, from any time to any later one, in one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.flow.affine import AffinePath
from pantarhei.flow.conditions import Condition, as_condition
from pantarhei.flow.flow import ConditionLike, Flow
from pantarhei.flow.grids import Grid, GridName, solver_grid
from pantarhei.flow.heads import Head, HeadName, MeanVelocity, OuterVariance, build_head
from pantarhei.flow.jumps import Move, gamma_moves, renoised
from pantarhei.flow.modes import evaluation_mode
from pantarhei.flow.paths import Linear
from pantarhei.flow.predictions import as_rows, check_times
from pantarhei.flow.transforms import Guidance

VISIBLE = 0.005  # noise at a path's end that samples had better not keep


class TrajectoryModel(Flow):
    """A network of (x, t, s) that knows the trajectories of a flow: where the state x of time t is at any time s >= t.

    Consistency trajectory models (Kim et al. 2310.02279), consistency models (Song et al. 2303.01469) and mean velocities
    (MeanFlow, Geng et al. 2505.13447; flow maps, Boffi et al. 2406.07507) differ in the head only. At s = t the network is
    the flow's own: `velocity`, `denoise`, `score`, `log_prob`, `invert` and `transport` are those of any `Flow`.

    Args:
        network: a module `network(x, t, s=..., **conditions)`; t and s (B,), as the prediction labels them. The head
            "consistency" takes one without s. `networks.with_second_time` gives ours the second time.
        head: "ctm", "consistency", "mean-velocity", or a `Head`.
        options: path (affine), predicts (with "mean-velocity": of the mean velocity), source, shape, null, conditions,
            codec, interval, starts_scaled and provenance, as a `Flow` takes them.

    Raises:
        ValueError: the path is not affine, or the prediction does not go with the head.
    """

    def __init__(self, network: nn.Module, *, head: HeadName | Head | str | dict[str, Any] = "ctm", **options: Any):
        super().__init__(network, **options)
        self.head = build_head(head)
        if not isinstance(self.path, AffinePath):
            raise ValueError("path: jumps are along an affine path")
        self.prediction = self.head.prediction(self.prediction)
        ends = torch.tensor(self.interval, dtype=torch.float64)
        if isinstance(self.prediction, OuterVariance) and not (
            self.path.alpha(ends[0]) > 0 and self.path.sigma(ends[1]) > 0
        ):
            raise ValueError(
                "outer: forms other than 'euler' need a path that is never pure noise nor clean, such as EDM's"
            )

    def spec(self) -> dict[str, Any]:
        """Everything but the network and the codec, as data (JSON/YAML)."""
        return {**super().spec(), "head": self.head.spec()}

    def settings(self) -> dict[str, Any]:
        """The arguments that make such a model around another network."""
        return {**super().settings(), "head": self.head}

    def like(self, network: nn.Module, *, path: AffinePath | None = None, **changes: Any) -> Flow:
        """The same model around another network, see `Flow.like`.

        Raises:
            ValueError: mean velocities on another path, where the way between two times has another mean.
        """
        if path is not None and path != self.path and isinstance(self.head, MeanVelocity):
            raise ValueError("path: mean velocities are of one path; a model with head='ctm' goes along any")
        return super().like(network, path=path, **changes)

    # The field: the network at s = t

    def output(self, x: Tensor, t: Tensor, condition: ConditionLike = None) -> Tensor:
        """The network's raw output at (x, t, t).

        Raises:
            ValueError: of a consistency model, whose output says nothing about the way.
        """
        self.require_ode()
        return self.raw(x, t, t, as_condition(condition, self.null, x.shape[0]))

    def raw(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        """The network's raw output at (x, t, s)."""
        seen, label = self.prediction.inputs(self.path, x, t)
        named: dict[str, Tensor] = {} if condition is None else dict(condition)
        if self.head.anywhere:
            named["s"] = as_rows(self.prediction.inputs(self.path, x, s)[1], x)
        return self.network(seen, as_rows(label, x), **named)

    def require_ode(self) -> None:
        """Check that there is a velocity.

        Raises:
            ValueError: of a consistency model, which knows the ends of trajectories only.
        """
        if not self.head.anywhere:
            raise ValueError("a consistency model knows where trajectories end, not their velocity: sample it by jumps")
        super().require_ode()

    def require_field(self) -> None:
        """As `require_ode`, and as of any flow."""
        self.require_ode()
        super().require_field()

    def require_score(self) -> None:
        """As of any flow; a consistency model has none."""
        self.require_ode()
        super().require_score()

    # Jumps

    def jump(
        self,
        x: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        condition: ConditionLike = None,
        guidance: float | Guidance = 1.0,
    ) -> Tensor:
        """The state at s of the trajectory through x at t; gradients flow through it.

        Args:
            x: states (B, *shape).
            t, s: times in the flow's interval, 0-d or (B,), s >= t; at s = t the state itself comes back.
            condition, guidance: as in `sample`; guidance acts on the jump, one evaluation (or two of half the rows).

        Raises:
            ValueError: times outside the interval, s < t, or an s that is not the end where the head knows no other.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        start, end = (torch.as_tensor(time, dtype=wide, device=x.device) for time in (t, s))
        for time in (start, end):
            check_times(self.interval, time, "the jump")
        if bool((end < start - 1e-6).any()):
            raise ValueError(
                "s: jumps lead towards the data, s >= t; go back by noise, or by the ODE (transport, invert)"
            )
        if not self.head.anywhere and bool((end < self.interval[1] - 1e-6).any()):
            raise ValueError(f"s: a consistency model jumps to the end, s = {self.interval[1]:g}, only")
        return self.land(x, start, end, as_condition(condition, self.null, x.shape[0]), guidance)

    def land(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        condition: Condition | None = None,
        guidance: float | Guidance = 1.0,
        finish: bool = False,
    ) -> Tensor:
        """`jump` without its checks, for training; `finish` gives the data instead of the last, slightly noisy state."""
        if not isinstance(guidance, Guidance):
            guidance = Guidance(float(guidance))
        if guidance.scale == 1.0:
            return self._landed(x, t, s, condition, finish)

        def field(x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
            twice = s.ndim and s.shape[0] != x.shape[0]  # both rows of guidance in one call
            return self._landed(x, t, torch.cat([s, s]) if twice else s, condition, finish)

        return guidance(field, x, t, condition, None)

    def _landed(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None, finish: bool) -> Tensor:
        rule = self.head.finish if finish else self.head.jump
        return rule(self.prediction, self.path, x, t, s, self.raw(x, t, s, condition))

    @torch.no_grad()
    def jumps(
        self,
        x: Tensor,
        moves: Sequence[Move],
        *,
        condition: ConditionLike = None,
        guidance: float | Guidance = 1.0,
        generator: torch.Generator | None = None,
        noise: Callable[[int, Tensor], Tensor] | None = None,
        control: Callable[[Tensor, float, int], Tensor] | None = None,
        finish: bool = False,
        start: float | None = None,
    ) -> Tensor:
        """Jump after jump, each followed by noise that leads back to an earlier time.

        Args:
            x: states (B, *shape) at the first time.
            moves: where each jump lands, and the time to which noise leads back (see `gamma_moves`).
            condition, guidance: as in `sample`.
            generator: draws the noise.
            noise: gives it instead: `noise(number, x)`, standard normal and like x, for the move of a number.
            control: changes the state after each move, given (x, t, number): a projection on what is known of the data, or
                steps along a score (see `langevin`).
            start: the time of x, the flow's first by default.
            finish: let the last jump give the data estimate instead of the state, where the path leaves noise at its end.

        Raises:
            ValueError: moves that do not lead on, or noise where noise and data are not independent.
        """
        here = self.interval[0] if start is None else start
        self._check(moves, here)
        named = as_condition(condition, self.null, x.shape[0], x.device)
        for number, move in enumerate(moves):
            if finish and number + 1 == len(moves):
                t, s = (
                    x.new_full((), time, dtype=torch.promote_types(x.dtype, torch.float32)) for time in (here, move.to)
                )
                x = self.land(x, t, s, named, guidance, finish=True)
            else:
                x = self.jump(x, here, move.to, named, guidance)
            if move.back < move.to:
                if noise is None:
                    drawn = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                else:
                    drawn = noise(number, x)
                x = renoised(self.path, x, move, drawn)
            here = move.back
            if control is not None:
                x = control(x, here, number)
        return x

    def _check(self, moves: Sequence[Move], here: float) -> None:
        if not moves or any(move.back > move.to for move in moves):
            raise ValueError("moves: at least one is needed, each with back <= to")
        for move in moves:
            if move.to < here - 1e-6 or move.to > self.interval[1] + 1e-6:
                raise ValueError(
                    f"moves: jumps lead towards the data, to {self.interval[1]:g} at most, got {move.to:g}"
                )
            if not self.head.anywhere and move.to < self.interval[1] - 1e-6:
                raise ValueError(f"moves: a consistency model jumps to the end, {self.interval[1]:g}, only")
            here = move.back
        if any(move.back < move.to for move in moves):
            reason = self.provenance.why_not_marginal()
            if reason is None and not getattr(self.source, "gaussian", False):
                reason = "its source is not Gaussian"
            if reason is not None:
                raise ValueError(
                    f"gamma: noise cannot be renewed on the way, {reason}; sample with one jump, or gamma = 0"
                )

    def jumps_with(self, method: str = "auto", **options: Any) -> bool:
        """Whether `sample` with these options jumps, and does not solve the ODE or SDE of the score."""
        return method in ("auto", "jump") and options.get("epsilon") is None

    def draws_noise(self, **options: Any) -> bool:
        """Whether `sample` with these options draws noise on the way, beyond x0."""
        if not self.jumps_with(options.get("method", "auto"), epsilon=options.get("epsilon")):
            return super().draws_noise(**options)
        gamma = options.get("gamma")
        return options.get("moves") is not None or (not self.head.anywhere if gamma is None else gamma > 0)

    @torch.no_grad()
    def sample(
        self,
        count: int | None = None,
        *,
        x0: Tensor | None = None,
        condition: ConditionLike = None,
        generator: torch.Generator | None = None,
        method: str = "auto",
        decode: bool = True,
        **options: Any,
    ) -> Tensor:
        """Draw samples by jumps (gamma-sampling, 2310.02279, section 3.4), or by the ODE or SDE of its own score.

        Args:
            count, x0, condition, generator, decode: as of any flow.
            method: "auto" or "jump"; any other is a method of `Flow.sample` for the velocity at s = t, which a consistency
                model has not.
            options: of other methods, see `Flow.sample`, where `epsilon` makes it the SDE; of jumps, see `plan` (steps,
                gamma, moves, grid, shift) and `jumps` (guidance, noise, control).

        Returns:
            (B, *shape), or the codec's output shape.
        """
        common: dict[str, Any] = {"x0": x0, "condition": condition, "generator": generator}
        if not self.jumps_with(method, **options):
            left = [name for name in ("gamma", "moves", "control") if options.get(name) is not None]
            if left:
                raise ValueError(f"{left[0]}: goes with jumps, not with method {method!r}")
            options = {name: value for name, value in options.items() if name not in ("gamma", "moves", "control")}
            self.require_ode()
            method = "auto" if method == "jump" else method
            return super().sample(count, method=method, decode=decode, **common, **options)
        if options.pop("final", "auto") not in ("auto", "state"):
            raise ValueError("final: the last jump is the sample; only methods of the ODE end otherwise")
        options.pop("epsilon", None)
        given = [name for name in ("guidance", "noise", "control") if name in options]
        how: dict[str, Any] = {name: options.pop(name) for name in given}
        moves, how["finish"] = self.moves(**options)
        x = self.first_sigma * self.draw(count, condition, generator, x0=x0)
        with evaluation_mode(self.network):
            x = self.jumps(x, moves, condition=condition, generator=generator, **how)
        return self.decode(x) if decode else x

    def moves(self, **options: Any) -> tuple[list[Move], bool]:
        """The moves of samples, from the options of `plan`, and whether the last is to leave the path's last noise out.

        Raises:
            ValueError: an option that jumps do not take, or moves that do not lead on.
        """
        left = sorted(set(options) - {"steps", "gamma", "moves", "grid", "shift"})
        if left:
            raise ValueError(f"{left[0]}: jumps do not take it; methods of the ODE do, such as method='heun'")
        moves = self.plan(**options)
        self._check(moves, self.interval[0])
        return moves, self.last_sigma > VISIBLE and moves[-1].to >= self.interval[1] - 1e-6

    def plan(
        self,
        steps: int | Grid = 1,
        gamma: float | None = None,
        *,
        moves: Sequence[Move] | None = None,
        grid: GridName | Callable[[float], float] | None = None,
        shift: float = 1.0,
        start: float | None = None,
    ) -> list[Move]:
        """The moves of a sampler.

        Args:
            steps: number of jumps, or the times from the first to the last.
            gamma: share of noise after each jump but the last: 0 jumps from time to time, without any noise; 1 always to the
                end and back, as consistency models are sampled, and their only way. By default 0 where the head allows it.
            moves: the moves themselves, instead of all else.
            grid, shift: spacing of the times, see `make_grid`: uniform on the linear path, else EDM's.
            start: the time of the first jump, where it is not the flow's first.

        Raises:
            ValueError: settings that do not go together, or times that do not lead from the first one to the last.
        """
        if moves is not None:
            if steps != 1 or gamma is not None:
                raise ValueError("moves: say all; leave steps and gamma out")
            return list(moves)
        if steps is None:
            raise ValueError("steps: jumps have no error control; give a number")
        if gamma is None:
            gamma = 0.0 if self.head.anywhere else 1.0
        grid = grid or ("uniform" if isinstance(self.path, Linear) else "edm")
        low, high = self.interval
        if start is not None:
            check_times(self.interval, torch.tensor(start, dtype=torch.float64), "start")
            low = start
        nodes = solver_grid(self.path, steps, (low, high), grid, shift)
        if any(abs(a - b) > 1e-6 for a, b in zip((nodes[0], nodes[-1]), (low, high), strict=True)):
            raise ValueError(f"steps: times must lead from {low:g} to {high:g}, got {nodes[0]:g} to {nodes[-1]:g}")
        if gamma != 1.0 and len(nodes) > 2 and not self.head.anywhere:
            raise ValueError(f"gamma: a consistency model always jumps to the end, gamma = 1, got {gamma:g}")
        return gamma_moves(self.path, nodes, gamma)
