"""The built-in methods: their tableaus and the name table.

Sources: Bogacki & Shampine 1989 (3(2) pair); Dormand & Prince 1980 (5(4) pair) with the continuous extension of
Shampine 1986; Tsitouras 2011 (5(4) pair and its fourth-order interpolant).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.polynomial import polynomial as P

from pantarhei.naming import unknown
from pantarhei.solve.steps import RungeKutta, Step, Tableau

MethodName = Literal["euler", "midpoint", "heun", "rk4", "rk38", "bosh3", "dopri5", "tsit5"]

EULER = Tableau(a=((),), b=(1.0,), c=(0.0,), order=1)
MIDPOINT = Tableau(a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5), order=2)
HEUN = Tableau(a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0), order=2)
RK4 = Tableau(
    a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 0.5, 0.5, 1.0),
    order=4,
)
# Kutta's 3/8 rule, which torchdiffeq calls rk4.
RK38 = Tableau(
    a=((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    b=(1 / 8, 3 / 8, 3 / 8, 1 / 8),
    c=(0.0, 1 / 3, 2 / 3, 1.0),
    order=4,
)
BOSH3 = Tableau(
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    order=3,
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
)


def _dormand_prince_dense(b: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    """Weights b_i(theta): the cubic Hermite polynomial of the step's ends plus theta^2 (1-theta)^2 d_i."""
    d = np.zeros(7)
    d[0] = -12715105075 / 11282082432
    d[2] = 87487479700 / 32700410799
    d[3] = -10690763975 / 1880347072
    d[4] = 701980252875 / 199316789632
    d[5] = -1453857185 / 822651844
    d[6] = 69997945 / 29380423
    theta, rest = [0.0, 1.0], [1.0, -1.0]
    once = P.polymul(theta, rest)
    twice = P.polymul(theta, once)
    rows = []
    for i in range(7):
        first, last = float(i == 0), float(i == 6)
        row = P.polymul([b[i]], theta)
        row = P.polyadd(row, P.polymul([first - b[i]], once))
        row = P.polyadd(row, P.polymul([2 * b[i] - first - last], twice))
        row = P.polyadd(row, P.polymul([d[i]], P.polymul(once, once)))
        rows.append(tuple(float(v) for v in np.pad(row[1:], (0, 5 - len(row)))))
    return tuple(rows)


_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
DOPRI5 = Tableau(
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B[:6],
    ),
    b=_DOPRI5_B,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    order=5,
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    dense=_dormand_prince_dense(_DOPRI5_B),
)


def _tsitouras_dense() -> tuple[tuple[float, ...], ...]:
    def quadratic_times_square(scale: float, p: float, q: float) -> list[float]:  # scale theta^2 (theta-p)(theta-q)
        return [0.0, 0.0, scale * p * q, -scale * (p + q), scale]

    first = P.polymul(
        [0.0, 1.0],
        P.polymul([-1.3299890189751412, 1.0], [0.7139816917074209, -1.4364028541716351, 1.0]),
    )
    rows = [
        (-1.0530884977290216 * first).tolist(),
        [0.0, 0.0, 0.1017 * 1.2949852507374631, 0.1017 * -2.1966568338249754, 0.1017],
        [
            0.0,
            0.0,
            2.490627285651252793 * 1.57803468208092486,
            2.490627285651252793 * -2.38535645472061657,
            2.490627285651252793,
        ],
        quadratic_times_square(-16.54810288924490272, 1.21712927295533244, 0.61620406037800089),
        quadratic_times_square(47.37952196281928122, 1.203071208372362603, 0.658047292653547382),
        quadratic_times_square(-34.87065786149660974, 1.2, 0.666666666666666667),
        quadratic_times_square(2.5, 1.0, 0.6),
    ]
    return tuple(tuple(float(v) for v in row[1:]) for row in rows)


_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
    0.0,
)
TSIT5 = Tableau(
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B[:6],
    ),
    b=_TSIT5_B,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    order=5,
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        0.015151515151515152,
    ),
    dense=_tsitouras_dense(),
)

METHODS: dict[str, RungeKutta] = {
    "euler": RungeKutta("euler", EULER),
    "midpoint": RungeKutta("midpoint", MIDPOINT),
    "heun": RungeKutta("heun", HEUN),
    "rk4": RungeKutta("rk4", RK4),
    "rk38": RungeKutta("rk38", RK38),
    "bosh3": RungeKutta("bosh3", BOSH3),
    "dopri5": RungeKutta("dopri5", DOPRI5),
    "tsit5": RungeKutta("tsit5", TSIT5),
}


def as_step(method: str | Step) -> Step:
    """The step object of a built-in name, or the object itself.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    return METHODS[method]
