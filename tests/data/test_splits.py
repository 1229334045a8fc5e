import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pantarhei.data import TensorSource, labels_of, split


class Bare:
    """A source that keeps no labels at hand."""

    name = "bare"

    def __init__(self, labels):
        self._labels = labels

    def __len__(self):
        return len(self._labels)

    def fetch(self, indices):
        return {"x1": indices[:, None].float(), "label": self._labels[indices]}

    def describe(self):
        return {"name": self.name, "count": len(self)}


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    held_out=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
)
def test_a_split_is_a_stratified_partition(labels, held_out, seed):
    classes = torch.tensor(labels)
    source = TensorSource({"x1": torch.arange(len(labels)).float()[:, None], "label": classes})
    train, rest = split(source, held_out, seed)
    assert len(train) > 0
    assert len(rest) > 0
    assert sorted(train.indices.tolist() + rest.indices.tolist()) == list(range(len(labels)))
    assert len(rest) == min(max(round(held_out * len(labels)), 1), len(labels) - 1)
    for label in set(labels):
        share = int((rest.labels == label).sum())
        assert abs(share - held_out * labels.count(label)) < 1 + 1e-9


def test_the_split_depends_on_its_seed_only():
    source = TensorSource({"x1": torch.zeros(100, 1)}, "hundred")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (split(source, 0.3, seed)[1].indices for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.name for part in split(source)] == ["hundred/train", "hundred/held-out"]


def test_labels_are_fetched_where_a_source_does_not_keep_them():
    labels = torch.arange(1100) % 10
    assert torch.equal(labels_of(Bare(labels)), labels)
    assert labels_of(Bare(labels.float())) is None
    rest = split(Bare(labels), 0.1)[1]
    assert torch.bincount(labels[rest.indices]).tolist() == [11] * 10


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_fraction_outside_of_0_to_1_is_refused(held_out):
    with pytest.raises(ValueError, match="held_out is"):
        split(TensorSource({"x1": torch.zeros(10, 1)}), held_out)


def test_one_item_cannot_be_split():
    with pytest.raises(ValueError, match="at least two"):
        split(TensorSource({"x1": torch.zeros(1, 1)}))
