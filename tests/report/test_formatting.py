import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pantarhei.metrics import Interval
from pantarhei.report import format_cell, format_interval, format_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.86, "0.860"),
        (1.0, "1.00"),
        (9.996, "10.0"),
        (99.96, "100"),
        (-12.34, "-12.3"),
        (123.4, "123"),
        (4567.8, "4,568"),
        (1797, "1,797"),
        (0, "0"),
        (0.0, "0.00"),
        (0.00123, "0.00123"),
        (1.2e-5, "1.20e-05"),
        (3.4e7, "3.40e+07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


@given(st.floats(min_value=1e-12, max_value=1e12))
def test_three_digits_are_enough_to_come_within_half_a_percent(value):
    assert float(format_number(value).replace(",", "")) == pytest.approx(value, rel=5.01e-3)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((0.8613, 0.7991, 0.9312), "0.86 [0.80, 0.93]"),
        ((0.86, 0.86, 0.86), "0.860"),
        ((0.86123, 0.86120, 0.86125), "0.861 [0.861, 0.861]"),
        ((9.96, 9.1, 10.4), "10.0 [9.1, 10.4]"),
        ((1234.0, 1000.0, 1500.0), "1,234 [1,000, 1,500]"),
        ((0.0, 0.0, 0.0), "0.00"),
        ((2e-5, 1e-5, 3e-5), "2.00e-05 [1.00e-05, 3.00e-05]"),
        ((1.0, math.nan, math.nan), "1.00 [nan, nan]"),
    ],
)
def test_intervals(interval, text):
    assert format_interval(Interval(*interval)) == text


def test_cells_of_every_kind():
    cells = [None, True, False, "a", 3, torch.tensor(0.5), torch.tensor(7), Interval(2.0, 1.0, 3.0)]
    assert [format_cell(cell) for cell in cells] == ["–", "yes", "no", "a", "3", "0.500", "7", "2.0 [1.0, 3.0]"]
