import math

import numpy as np
import pytest
import torch

from pantarhei.data import SERIES, double_well, kolmogorov_flow, read_series, series_pairs, split_series, velocity_of
from pantarhei.files import write_tensors

CALM = {"viscosity": 0.0, "drag": 0.0, "forcing": 0.0, "noise": 0.0, "burn_in": 0.0, "dtype": torch.float64}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def grid(size=32):
    points = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    return points[None, :], points[:, None]  # x along the last axis, y along the one before


def eddies(trajectories=2, size=32):
    """A smooth random flow."""
    still = {**CALM, "noise_band": (1.0, 3.0)}
    return 3 * kolmogorov_flow(trajectories, 1, size=size, generator=seeded(), **still)[:, 0]


def budget(vorticity, size=32):
    """Energy, enstrophy and palinstrophy of (..., 1, size, size)."""
    waves = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    k2 = waves[:, None] ** 2 + waves**2
    power = torch.fft.fft2(vorticity[..., 0, :, :].double(), norm="forward").abs() ** 2 / 2
    return [(power * weight).sum((-1, -2)) for weight in (1 / k2.clamp(min=1), torch.ones_like(k2), k2)]


# the double well


def test_the_particle_keeps_to_the_invariant_law():
    series = double_well(4000, 3, generator=seeded(), dtype=torch.float64)
    assert series.shape == (4000, 3, 2)
    x = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    law = torch.exp(-((x**2 - 1) ** 2) / 0.4)
    law = law / law.sum()
    for state in series.unbind(1):
        assert abs(float(state[:, 0].mean())) < 4 / math.sqrt(4000)
        assert float(state[:, 0].square().mean()) == pytest.approx(float((law * x**2).sum()), rel=0.05)
        assert float((state[:, 0].abs() < 0.3).double().mean()) == pytest.approx(
            float(law[x.abs() < 0.3].sum()), abs=0.02
        )
        assert float(state[:, 1].var()) == pytest.approx(0.4, rel=0.1)


def test_the_free_coordinate_forgets_at_its_exact_rate():
    y = double_well(4000, 2, stiffness=2.0, generator=seeded(), dtype=torch.float64)[..., 1]
    correlation = float((y[:, 0] * y[:, 1]).mean() / y.var())
    assert correlation == pytest.approx(math.exp(-2.0 * 0.5), abs=0.05)


def test_the_particle_hops_and_the_saddle_leads_to_either_well():
    series = double_well(400, 40, generator=seeded())
    assert series.dtype == torch.float32
    now, then = series[:, :-1, 0], series[:, 1:, 0]
    assert 0.01 < float((now * then < 0).float().mean()) < 0.1
    after = then[now.abs() < 0.15]
    wells, middle = (after.abs() > 0.6).sum(), (after.abs() < 0.3).sum()
    assert wells > 2.5 * middle  # equally wide: two modes
    assert 0.4 < float((after > 0).float().mean()) < 0.6


def test_without_noise_worth_the_name_the_particle_rests_in_a_well():
    series = double_well(100, 2, temperature=1e-6, generator=seeded())
    assert torch.allclose(series[..., 0].abs(), torch.ones(100, 2), atol=0.01)
    assert 20 < int((series[:, 0, 0] > 0).sum()) < 80


# the fluid


def test_a_taylor_green_vortex_decays_at_its_exact_rate():
    x, y = grid()
    start = (2 * torch.cos(3 * x) * torch.cos(3 * y))[None, None]
    calm = {**CALM, "viscosity": 0.05, "drag": 0.1}
    series = kolmogorov_flow(1, 5, initial=start, interval=0.4, **calm)
    times = 0.4 * torch.arange(5, dtype=torch.float64)
    exact = torch.exp(-(18 * 0.05 + 0.1) * times)[None, :, None, None, None] * start
    assert torch.allclose(series, exact, atol=1e-12)


def test_a_shear_flow_reaches_its_laminar_balance():
    _, y = grid()
    # -drag w - viscosity k^2 w = forcing k cos(k y)
    calm = {**CALM, "viscosity": 0.1, "drag": 0.5, "forcing": 0.2}
    series = kolmogorov_flow(1, 30, initial=torch.zeros(1, 1, 32, 32), wave_number=2, **calm)
    laminar = (-0.2 * 2 / (0.5 + 0.1 * 4) * torch.cos(2 * y)).expand(32, 32)
    assert torch.allclose(series[0, -1, 0], laminar, atol=1e-4)


def test_a_steady_stream_carries_waves_along_its_axis():
    # A strong shear w = -cos(y) has u_x = sin(y): a faint row of waves cos(2 x) moves with it for a short time, so its rate
    # of change is -sin(y) d/dx cos(2 x), minus the term of the shear's own gradient: u_y d/dy(-cos y).
    x, y = grid()
    faint, h = 1e-6, 1e-3
    start = (-torch.cos(y) + faint * torch.cos(2 * x))[None, None]
    series = kolmogorov_flow(1, 2, initial=start, interval=h, **CALM)
    change = (series[0, 1, 0] - series[0, 0, 0]) / (h * faint)
    # psi = -cos(2 x) / 4, u_y = d psi / dx = sin(2 x) / 2, and d/dy(-cos y) = sin y
    exact = 2 * torch.sin(y) * torch.sin(2 * x) - torch.sin(2 * x) / 2 * torch.sin(y)
    assert torch.allclose(change, exact, atol=0.01)


def test_advection_keeps_energy_and_enstrophy_and_moves_both():
    series = kolmogorov_flow(2, 5, initial=eddies(), **CALM, substeps=120)
    assert (series[:, -1] - series[:, 0]).std() > 0.3 * series.std()
    energy, enstrophy, palinstrophy = budget(series)
    assert torch.allclose(energy, energy[:, :1].expand(-1, 5), rtol=1e-6)
    assert torch.allclose(enstrophy, enstrophy[:, :1].expand(-1, 5), rtol=1e-6)
    assert (palinstrophy[:, -1] > 1.1 * palinstrophy[:, 0]).all()


def test_drag_takes_energy_and_enstrophy_at_twice_its_rate():
    series = kolmogorov_flow(2, 3, initial=eddies(), **{**CALM, "drag": 0.3}, substeps=40)
    decay = torch.exp(-0.6 * 0.5 * torch.arange(3, dtype=torch.float64))
    for value in budget(series)[:2]:
        assert torch.allclose(value, value[:, :1] * decay, rtol=1e-6)


def test_viscosity_takes_what_the_budget_says():
    nu, interval = 0.05, 0.02
    series = kolmogorov_flow(2, 21, initial=eddies(), interval=interval, **{**CALM, "viscosity": nu})
    energy, enstrophy, palinstrophy = budget(series)
    # dE/dt = -2 nu Z and dZ/dt = -2 nu P, by Simpson's rule
    weights = torch.tensor([1.0, *[4.0, 2.0] * 9, 4.0, 1.0], dtype=torch.float64) * interval / 3
    assert torch.allclose(energy[:, 0] - energy[:, -1], 2 * nu * (enstrophy @ weights), rtol=1e-6)
    assert torch.allclose(enstrophy[:, 0] - enstrophy[:, -1], 2 * nu * (palinstrophy @ weights), rtol=1e-6)


def test_time_steps_converge_with_fourth_order():
    calm = {**CALM, "viscosity": 0.02, "drag": 0.1, "forcing": 1.0}
    fine, *coarse = (kolmogorov_flow(2, 2, initial=eddies(), substeps=n, **calm)[:, 1] for n in (160, 20, 40))
    first, second = (float((series - fine).norm()) for series in coarse)
    assert 12 < first / second < 20


def test_the_random_force_feeds_enstrophy_at_its_stated_rate():
    # Also through the advection of a moving flow, which keeps enstrophy: Z' = noise^2 / 2 - 2 drag Z on average.
    count, drag, noise = 200, 0.4, 1.5
    start = eddies(1, 16).expand(count, -1, -1, -1)
    options = {**CALM, "drag": drag, "noise": noise, "noise_band": (1.0, 3.0), "size": 16}
    series = kolmogorov_flow(count, 3, initial=start, generator=seeded(1), **options)
    enstrophy = budget(series, 16)[1]
    for step in (1, 2):
        kept = math.exp(-2 * drag * 0.5 * step)
        expected = float(enstrophy[0, 0]) * kept + noise**2 / 2 * (1 - kept) / (2 * drag)
        deviation = float(enstrophy[:, step].std()) / math.sqrt(count)
        assert abs(float(enstrophy[:, step].mean()) - expected) < 4 * deviation
        assert deviation < 0.02 * expected
    # the law of the next state has a width of its own: over a unit of time, the noise's
    still = torch.zeros(count, 1, 16, 16)
    added = kolmogorov_flow(count, 2, initial=still, interval=1.0, generator=seeded(2), **{**options, "drag": 0.0})
    assert float(added[:, 1].std()) == pytest.approx(noise, rel=0.03)


def test_the_flow_is_steady_in_law_free_of_mean_and_resolved():
    series = kolmogorov_flow(6, 24, generator=seeded())
    assert series.shape == (6, 24, 1, 32, 32)
    assert series.dtype == torch.float32
    assert float(series.mean((-1, -2)).abs().max()) < 1e-5
    assert float(series[:, :8].std()) == pytest.approx(float(series[:, -8:].std()), rel=0.2)
    power = torch.fft.fft2(series[..., 0, :, :].double()).abs() ** 2
    waves = torch.fft.fftfreq(32, 1 / 32).abs()
    length = torch.maximum(waves[:, None], waves)
    assert float(power[..., length > 10].sum() / power.sum()) < 1e-10  # cut off by the 2/3 rule
    assert float(power[..., length == 10].sum() / power.sum()) < 0.01
    change = float((series[:, 1:] - series[:, :-1]).std() / series.std())
    assert 0.3 < change < 1.0


def test_a_flow_repeats_with_its_generator_only():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    small = {"size": 8, "wave_number": 2, "burn_in": 0.5}
    one, again, other = (kolmogorov_flow(2, 2, generator=seeded(s), **small) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(double_well(2, 2, generator=seeded(1)), double_well(2, 2, generator=seeded(1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_too_long_time_steps_are_refused_with_a_number_that_works():
    with pytest.raises(ValueError, match=r"substeps is 2; at the velocity .* an interval of 0.5 needs (\d+)") as caught:
        kolmogorov_flow(2, 2, initial=eddies(), **CALM, substeps=2)
    enough = int(str(caught.value).split()[-1])
    assert kolmogorov_flow(2, 2, initial=eddies(), **CALM, substeps=enough).isfinite().all()
    with pytest.raises(ValueError, match=r"substeps is 3; .* from (\d+) on") as caught:
        double_well(2, 2, substeps=3)
    assert double_well(2, 2, substeps=int(str(caught.value).split()[-2]), generator=seeded()).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, "size is 9; give an even"),
        ({"size": 4}, "size is 4; give a whole number of at least 8"),
        ({"wave_number": 11}, "wave_number is 11; 32 grid points carry up to 10"),
        ({"viscosity": -1.0}, "viscosity is -1.0"),
        ({"interval": 0.0}, "interval is 0.0"),
        ({"substeps": 0}, "substeps is 0"),
        ({"noise_band": (4.13, 4.2)}, "noise_band"),
        ({"initial": torch.zeros(2, 32, 32)}, r"initial has shape \(2, 32, 32\)"),
        ({"initial": torch.ones(2, 1, 32, 32)}, "initial has the mean 1"),
        ({"initial": torch.full((2, 1, 32, 32), math.nan)}, "initial holds NaN"),
    ],
)
def test_fluids_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kolmogorov_flow(2, 2, **options)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"dt": -1.0}, {"barrier": math.nan}, {"burn_in": -1.0}])
def test_wells_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        double_well(2, 2, **options)
    with pytest.raises(ValueError, match="trajectories is 0"):
        double_well(0, 2)


# series


def test_pairs_are_neighbours_in_time():
    series = torch.arange(24.0).reshape(3, 4, 2)
    pairs = series_pairs(series, lag=2)
    assert torch.equal(pairs["past"], series[:, :2].reshape(6, 2))
    assert torch.equal(pairs["x1"], pairs["past"] + 4)  # two states of two numbers on


def test_a_split_shares_no_trajectory():
    series = torch.arange(10.0)[:, None, None].expand(10, 5, 3)
    train, rest = split_series(series, 0.3, seed=1, name="numbers")
    kept, held = (set(part.fetch(torch.arange(len(part)))["past"].unique().tolist()) for part in (train, rest))
    assert kept | held == set(range(10))
    assert not kept & held
    assert (len(train), len(rest)) == (7 * 4, 3 * 4)
    batch = train.fetch(torch.tensor([0, 5]))
    assert batch.keys() == {"past", "x1"}
    assert batch["past"].shape == batch["x1"].shape == (2, 3)
    assert (train.name, rest.name) == ("numbers/train", "numbers/held-out")
    again = split_series(series, 0.3, seed=1)[1]
    assert torch.equal(again.tensors["x1"], rest.tensors["x1"])


def test_the_double_well_is_at_hand_by_name():
    assert set(SERIES) == {"double_well", "kolmogorov"}
    series = SERIES["double_well"](0)
    assert series.shape == (512, 40, 2)
    assert torch.equal(series, SERIES["double_well"](0))
    assert not torch.equal(series, SERIES["double_well"](1))


def test_series_come_back_from_files(tmp_path):
    series = torch.randn(3, 4, 2, generator=seeded())
    np.save(tmp_path / "a.npy", series.double().numpy().astype(">f8"))
    write_tensors(tmp_path / "b.safetensors", {"series": series, "other": torch.zeros(1)})
    write_tensors(tmp_path / "c.safetensors", {"flow": series})
    for name in ("a.npy", "b.safetensors", "c.safetensors"):
        found = read_series(tmp_path / name)
        assert found.dtype == torch.float32
        assert torch.equal(found, series)


def test_bad_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_series(tmp_path / "none.npy")
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "complex.npy", np.zeros((2, 2, 2), dtype=complex))
    hole = np.zeros((2, 3, 1))
    hole[1, 0] = np.nan
    np.save(tmp_path / "hole.npy", hole)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:150])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901")
    (tmp_path / "table.csv").write_text("1,2")
    write_tensors(tmp_path / "two.safetensors", {"a": torch.zeros(2, 2, 1), "b": torch.zeros(2, 2, 1)})
    np.savez(tmp_path / "archive.npz", hole)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name, message in {
        "flat.npy": r"\(3, 4\); give \(trajectories, steps, \.\.\.\)",
        "objects.npy": "expected an array of numbers",
        "words.npy": "expected an array of numbers",
        "complex.npy": "complex",
        "hole.npy": r"NaN or infinity in 1 of 2 trajectories \(first: 1\)",
        "cut.npy": "expected an array of numbers",
        "empty.npy": "expected an array of numbers",
        "archive.npy": "expected an array of numbers",
        "cut.safetensors": "truncated",
        "two.safetensors": "'series'",
        "table.csv": r"\.npy or \.safetensors",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_series(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_series_that_cannot_be_paired_or_split_are_refused():
    series = torch.zeros(2, 3, 1)
    for lag in (0, 3, 1.0):
        with pytest.raises(ValueError, match=r"lags 1\.\.2"):
            series_pairs(series, lag)
    with pytest.raises(ValueError, match="one number a state"):
        series_pairs(series[..., 0])
    with pytest.raises(TypeError, match=r"tensor of floats .* got torch.int64"):
        series_pairs(series.long())
    with pytest.raises(ValueError, match="1 trajectory"):
        split_series(series[:1])
    with pytest.raises(ValueError, match="held_out is 1"):
        split_series(series, 1.0)


def test_velocities_have_the_vorticity_and_no_divergence():
    w = kolmogorov_flow(2, 3, size=16, burn_in=1.0, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = velocity_of(w)
    assert u.shape == (2, 3, 2, 16, 16)
    k = 1j * torch.fft.fftfreq(16, 1 / 16, dtype=torch.float64)
    along_x, along_y = (torch.fft.ifft2(torch.fft.fft2(u) * wave).real for wave in (k, k[:, None]))
    assert torch.allclose(along_x[:, :, 0], -along_y[:, :, 1], atol=1e-10)
    assert torch.allclose(along_x[:, :, 1] - along_y[:, :, 0], w[:, :, 0], atol=1e-10)

    with pytest.raises(ValueError, match=r"vorticity: \(\.\.\., 1, size, size\) is needed"):
        velocity_of(w[0, 0, 0])
