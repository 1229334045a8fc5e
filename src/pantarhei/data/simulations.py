"""Random dynamics to forecast, simulated: a double well under noise, and a stirred two-dimensional fluid.

A series is a tensor (trajectories, steps, ...) of states saved at equal intervals; trajectories are independent. The
simulators draw on the generator's device, compute in float64 and save float32 unless told otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pantarhei.solve.sde import sde

_COURANT = 0.5  # grid cells that the flow may cross in a step; RK4 on the dealiased waves is stable up to about 1.3


def double_well(
    trajectories: int,
    steps: int,
    *,
    dt: float = 0.5,
    substeps: int = 50,
    temperature: float = 0.4,
    barrier: float = 1.0,
    stiffness: float = 1.0,
    burn_in: float = 5.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A particle that hops between two wells: ``dX = -grad U dt + sqrt(2 temperature) dW`` in the plane.

    ``U(x, y) = barrier (x^2 - 1)^2 + stiffness y^2 / 2`` has its wells at (+-1, 0) and its saddle at the origin; the
    invariant law is exp(-U / temperature), normal in y. With the defaults, states near the saddle are in either well
    one saved step later (a law of two modes), and a series hops about once in 20 saved steps.

    Args:
        trajectories: number of independent series.
        steps: number of saved states of each.
        dt: time between saved states.
        substeps: Euler-Maruyama steps between saved states.
        temperature, barrier, stiffness: of the law above, positive.
        burn_in: time before the first saved state. A series starts in a well that a fair coin picks, normal around it,
            so only the shape within the wells (relaxation time about 1 / (8 barrier)) and y have to settle.
        generator: of all draws.
        dtype: of the result.

    Returns:
        (trajectories, steps, 2).

    Raises:
        ValueError: a count or constant is out of range, or ``substeps`` is too small to be accurate (names one that
            is not).
    """
    _at_least(trajectories=(trajectories, 1), steps=(steps, 1), substeps=(substeps, 1))
    _positive(dt=dt, temperature=temperature, barrier=barrier, stiffness=stiffness)
    _not_negative(burn_in=burn_in)
    # The force's steepest slope: in the well, or as far up the walls as the temperature carries the particle.
    slope = max(8 * barrier, 12 * math.sqrt(barrier * temperature), stiffness)
    needed = math.ceil(dt * slope / 0.25)
    if substeps < needed:
        raise ValueError(f"substeps is {substeps}; steps of dt / substeps are accurate from {needed} on")

    def force(point: Tensor, _: Tensor) -> Tensor:
        x, y = point.unbind(1)
        return torch.stack([4 * barrier * x * (1 - x * x), -stiffness * y], dim=1)

    def advance(point: Tensor) -> Tensor:
        kick = math.sqrt(2 * temperature)
        return sde(force, kick, point, (0.0, dt), steps=substeps, method="euler_maruyama", generator=generator).x

    device = None if generator is None else generator.device
    normal = torch.randn(trajectories, 2, generator=generator, device=device, dtype=torch.float64)
    side = 2.0 * torch.randint(2, (trajectories,), generator=generator, device=device) - 1.0
    x = side + math.sqrt(temperature / (8 * barrier)) * normal[:, 0]
    point = torch.stack([x, math.sqrt(temperature / stiffness) * normal[:, 1]], dim=1)
    for _ in range(math.ceil(burn_in / dt)):
        point = advance(point)
    saved = [point]
    while len(saved) < steps:
        saved.append(advance(saved[-1]))
    return torch.stack(saved, dim=1).to(dtype)


def kolmogorov_flow(
    trajectories: int,
    steps: int,
    *,
    size: int = 32,
    viscosity: float = 0.02,
    drag: float = 0.2,
    forcing: float = 1.0,
    wave_number: int = 4,
    noise: float = 2.0,
    noise_band: tuple[float, float] = (2.0, 4.0),
    interval: float = 0.5,
    substeps: int | None = None,
    burn_in: float = 20.0,
    initial: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Vorticity of a stirred two-dimensional fluid on the periodic square [0, 2 pi]^2.

    ``dw + u . grad w dt = (viscosity Lap w - drag w - forcing k cos(k y)) dt + noise dW``: the curl of Navier-Stokes
    with the body force (forcing sin(k y), 0), k the wave number, and a random force that is white in time, so the next
    state given the present one is random. Pseudo-spectral with the 2/3 rule (waves up to (size - 1) // 3 in either
    direction); RK4 with the linear terms exact (integrating factor), between two half kicks of the random force.

    Args:
        trajectories: number of independent flows.
        steps: number of saved states of each.
        size: grid points in either direction, even, at least 8.
        viscosity, drag: at least 0.
        forcing: amplitude of the body force.
        wave_number: k of the body force, at most (size - 1) // 3.
        noise: standard deviation of the vorticity that the random force alone adds in a unit of time (it feeds enstrophy
            at the rate noise^2 / 2); 0 makes the flow deterministic.
        noise_band: the random force drives all waves with a length of the wave vector in this closed interval alike.
        interval: time between saved states.
        substeps: time steps between saved states, refused where the flow crosses a grid cell in one. If left out they
            are chosen anew for every interval from the fastest velocity u, such that (|u_x| + |u_y|) h stays below half
            a grid cell.
        burn_in: time before the first saved state, rounded up to whole intervals.
        initial: vorticity to start from, (trajectories, 1, size, size) with mean 0; its waves beyond the 2/3 rule are
            cut off. A random flow of a unit root mean square if left out.
        generator: of all draws.
        dtype: of the result.

    Returns:
        (trajectories, steps, 1, size, size); the last axis is x, the one before it y. The mean over the square is 0.

    Raises:
        ValueError: a count or constant is out of range, ``initial`` does not fit, or ``substeps`` is too small for the
            velocity that the flow has reached (names a number that is not).

    Source: the flow: Chandler & Kerswell 2013 (doi:10.1017/jfm.2013.122), section 2, with drag and random force; the
    integrating factor: Canuto et al. 2007, "Spectral Methods: Evolution to Complex Geometries", chapter 3.
    """
    _at_least(trajectories=(trajectories, 1), steps=(steps, 1), size=(size, 8), wave_number=(wave_number, 1))
    _positive(interval=interval)
    _not_negative(viscosity=viscosity, drag=drag, noise=noise, burn_in=burn_in)
    if size % 2:
        raise ValueError(f"size is {size}; give an even number of grid points")
    if wave_number > (size - 1) // 3:
        raise ValueError(f"wave_number is {wave_number}; {size} grid points carry up to {(size - 1) // 3}")
    if substeps is not None:
        _at_least(substeps=(substeps, 1))
    device = initial.device if initial is not None else None if generator is None else generator.device
    fluid = _Fluid(size, viscosity, drag, torch.device(device or "cpu"))
    fluid.drive(forcing, wave_number, noise, noise_band)
    w = fluid.enter(initial, trajectories) if initial is not None else fluid.random(trajectories, generator)
    saved = []
    first = math.ceil(burn_in / interval)
    for number in range(first + steps):
        if number > 0:
            w = fluid.advance(w, interval, substeps, generator)
        if number >= first:
            saved.append(torch.fft.irfft2(w, s=(size, size), norm="forward").to(dtype))
    return torch.stack(saved, dim=1)[:, :, None]


def velocity_of(vorticity: Tensor) -> Tensor:
    """The velocity of a two-dimensional flow on the periodic square [0, 2 pi]^2, without divergence and of mean 0.

    Args:
        vorticity: (..., 1, size, size), as `kolmogorov_flow` gives it; waves beyond the 2/3 rule are cut off.

    Returns:
        (..., 2, size, size): along x (the last axis) and along y.

    Raises:
        ValueError: another shape, or a mean that is not 0.
    """
    if vorticity.ndim < 3 or vorticity.shape[-3] != 1 or vorticity.shape[-1] != vorticity.shape[-2]:
        raise ValueError(f"vorticity: (..., 1, size, size) is needed, got {tuple(vorticity.shape)}")
    *rows, _, size, _ = vorticity.shape
    fluid = _Fluid(size, 0.0, 0.0, vorticity.device)
    waves = fluid.enter(vorticity.reshape(-1, 1, size, size), math.prod(rows))
    return fluid.velocity(waves).to(vorticity.dtype).reshape(*rows, 2, size, size)


class _Fluid:
    """Right-hand side and time step of `kolmogorov_flow`, on Fourier coefficients (B, size, size // 2 + 1)."""

    def __init__(self, size: int, viscosity: float, drag: float, device: torch.device) -> None:
        self.size, self.cut = size, (size - 1) // 3
        waves = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64, device=device)
        self.kx, self.ky = waves[: size // 2 + 1].abs(), waves[:, None]
        self.k2 = self.kx**2 + self.ky**2
        # A product of two kept waves reaches up to twice the cut, and what aliases of it lands above the cut.
        self.kept = (self.kx <= self.cut) & (self.ky.abs() <= self.cut) & (self.k2 > 0)
        self.decay = viscosity * self.k2 + drag
        # The velocity is (-d/dy, d/dx) of the stream function, whose Laplacian is w.
        self.to_velocity = 1j * torch.stack([self.ky + 0 * self.kx, -self.kx + 0 * self.ky]) / self.k2.clamp(min=1.0)
        self.force = torch.zeros_like(self.k2)

    def drive(self, forcing: float, wave_number: int, noise: float, band: tuple[float, float]) -> None:
        """Set the forces."""
        self.forcing, self.noise, self.band = forcing, noise, band
        self.force[[wave_number, -wave_number], 0] = -forcing * wave_number / 2  # of -forcing k cos(k y)
        length = self.k2.sqrt()
        # One wave of each pair k, -k; those with kx = 0 have their partner in the same column.
        half = self.kept & ((self.kx > 0) | (self.ky > 0)) & (length >= band[0]) & (length <= band[1])
        self.rows, self.columns = half.nonzero(as_tuple=True)
        if len(self.rows) == 0:
            raise ValueError(
                f"noise_band is {band}; no wave of length up to {self.cut} lies in it, give e.g. (2.0, 4.0)"
            )

    def random(self, count: int, generator: torch.Generator | None) -> Tensor:
        """A flow of the stirred waves with a root mean square of 1."""
        still = torch.zeros(count, *self.k2.shape, dtype=torch.complex128, device=self.k2.device)
        return self.kick(still, 1.0, generator)

    def enter(self, initial: Tensor, count: int) -> Tensor:
        """The coefficients of a given vorticity."""
        shape = (count, 1, self.size, self.size)
        if tuple(initial.shape) != shape:
            raise ValueError(f"initial has shape {tuple(initial.shape)}; (trajectories, 1, size, size) is {shape}")
        grid = initial[:, 0].double()
        if not bool(torch.isfinite(grid).all()):
            raise ValueError("initial holds NaN or infinity; give finite vorticities")
        mean = float(grid.mean((1, 2)).abs().max())
        if mean > 1e-4 * max(float(grid.abs().max()), 1e-30):
            raise ValueError(
                f"initial has the mean {mean:.3g}; vorticity on a periodic square has the mean 0, take it off"
            )
        return torch.fft.rfft2(grid, norm="forward") * self.kept

    def advance(self, w: Tensor, interval: float, substeps: int | None, generator: torch.Generator | None) -> Tensor:
        """Go on by one interval in equal steps: half a kick, the flow, half a kick (Strang splitting)."""
        speed = float(self.velocity(w).abs().sum(1).max())
        # What the forces may add within the interval, so that a fluid at rest does not get one long step.
        gain = abs(self.forcing) * interval + 3 * self.noise * math.sqrt(interval) / max(1.0, self.band[0])
        cells = interval * self.size / (2 * math.pi)  # crossed at unit speed
        needed = max(1, math.ceil((speed + gain) * cells / _COURANT))
        if substeps is not None and speed * cells / substeps > 2 * _COURANT:
            raise ValueError(
                f"substeps is {substeps}; at the velocity {speed:.3g} that the flow has reached, "
                f"an interval of {interval:g} needs {needed}"
            )
        count = needed if substeps is None else substeps
        h = interval / count
        whole, half = torch.exp(-self.decay * h), torch.exp(-self.decay * (h / 2))
        for _ in range(count):
            w = self.kick(w, self.noise * math.sqrt(h / 2), generator)
            # RK4 on exp(decay t) w
            a = self.slope(w)
            b = self.slope(half * (w + h / 2 * a))
            c = self.slope(half * w + h / 2 * b)
            d = self.slope(whole * w + h * half * c)
            w = whole * w + h / 6 * (whole * a + 2 * half * (b + c) + d)
            w = self.kick(w, self.noise * math.sqrt(h / 2), generator)
        if not bool(torch.isfinite(torch.view_as_real(w)).all()):
            raise ValueError(f"the flow grew without bound at {count} substeps an interval; give substeps={4 * count}")
        return w

    def velocity(self, w: Tensor) -> Tensor:
        """(u_x, u_y) on the grid, (B, 2, size, size)."""
        return torch.fft.irfft2(w[:, None] * self.to_velocity, s=(self.size, self.size), norm="forward")

    def slope(self, w: Tensor) -> Tensor:
        """Advection and the steady force. In divergence form: d/dx d/dy (u^2 - v^2) + (d/dy^2 - d/dx^2) (u v)."""
        u, v = self.velocity(w).unbind(1)
        squares, product = torch.fft.rfft2(torch.stack([u * u - v * v, u * v], dim=1), norm="forward").unbind(1)
        flux = (self.kx**2 - self.ky**2) * product - self.kx * self.ky * squares
        return flux * self.kept + self.force

    def kick(self, w: Tensor, deviation: float, generator: torch.Generator | None) -> Tensor:
        """Add a random vorticity of the given standard deviation, spread evenly over the waves of the band."""
        if deviation == 0:
            return w
        device = w.device if generator is None else generator.device
        shape = (len(w), len(self.rows), 2)
        draw = torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(w.device)
        # A wave's two coefficients c and its conjugate give the variance 2 E|c|^2; here E|c|^2 = deviation^2 / (2 waves).
        c = torch.view_as_complex(draw) * (deviation / (2 * math.sqrt(len(self.rows))))
        w = w.clone()
        w[:, self.rows, self.columns] += c
        own = self.columns == 0
        w[:, self.size - self.rows[own], 0] += c[:, own].conj()
        return w


def _at_least(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; give a positive number")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; give a number of at least 0")
