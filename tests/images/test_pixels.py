import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pantarhei.images import from_uint8, to_uint8

ALL = torch.arange(256).to(torch.uint8)


def test_every_pixel_survives_the_round_trip():
    values = from_uint8(ALL)
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1.0, 1.0)
    assert torch.equal(values, ALL.float() / 127.5 - 1)
    assert torch.equal(to_uint8(values), ALL)
    assert torch.equal(to_uint8(values.double()), ALL)


@given(st.floats(-1.0, 1.0))
def test_the_nearest_pixel_is_taken(value):
    pixel = int(to_uint8(torch.tensor(value, dtype=torch.float64)))
    assert abs(pixel - 127.5 * (value + 1)) <= 0.5 + 1e-9


def test_halves_round_up():
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1
    # Away from the last bit of the division, which may fall on either side.
    assert torch.equal(to_uint8(halves + 1e-12), ALL[1:])
    assert to_uint8(torch.tensor(0.0)) == 128


def test_values_out_of_range_are_cut():
    values = torch.tensor([-5.0, -1.01, 1.01, torch.inf, -torch.inf, torch.nan])
    assert to_uint8(values).tolist() == [0, 0, 255, 255, 0, 0]


def test_half_precision_keeps_shape():
    assert to_uint8(torch.zeros(2, 3, 4, dtype=torch.bfloat16)).shape == (2, 3, 4)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="pixels have dtype int64; give uint8"):
        from_uint8(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="values have dtype uint8; give floats"):
        to_uint8(ALL)
