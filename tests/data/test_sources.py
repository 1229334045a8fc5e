import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from pantarhei.data import DatasetSource, Source, Subset, TensorSource, as_source


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(2)


def at(*indices):
    return torch.tensor(indices, dtype=torch.int64)


def test_a_tensor_source_returns_the_rows_asked_for():
    x = torch.arange(12.0).reshape(6, 2)
    source = TensorSource({"x1": x, "label": torch.arange(6, dtype=torch.int32)}, "six", classes=list("abcdef"))
    assert isinstance(source, Source)
    assert len(source) == 6
    batch = source.fetch(at(4, 0, 4))
    assert torch.equal(batch["x1"], x[[4, 0, 4]])
    assert torch.equal(batch["label"], at(4, 0, 4))
    assert batch["label"].dtype == torch.int64


def test_a_description_survives_json():
    source = TensorSource({"x1": torch.zeros(5, 3, 2), "c": torch.zeros(5, 4)}, "boxes")
    said = json.loads(json.dumps(source.describe()))
    assert (said["name"], said["count"], said["shape"]) == ("boxes", 5, [3, 2])
    assert said["conditions"] == {"c": {"shape": [4], "dtype": "float32"}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_tensors_keep_their_dtype_and_lose_their_graph(dtype):
    x = torch.ones(3, 2, dtype=dtype, requires_grad=True)
    fetched = TensorSource({"x1": x}).fetch(at(0))["x1"]
    assert fetched.dtype == dtype
    assert not fetched.requires_grad


@pytest.mark.parametrize(
    ("tensors", "error", "said"),
    [
        ({"x1": torch.zeros(3, 2), "label": torch.zeros(4)}, ValueError, "differ in length (x1: 3, label: 4)"),
        ({"x1": torch.zeros(0, 2)}, ValueError, "is empty"),
        ({"x": torch.zeros(3, 2)}, ValueError, "'x1' (the data) is missing"),
        ({"x1": torch.zeros(3, 2, dtype=torch.uint8)}, TypeError, "holds integers"),
        ({"x1": [1.0, 2.0]}, TypeError, "is a list"),
        ({"x1": torch.tensor(1.0)}, ValueError, "single number"),
    ],
)
def test_a_tensor_source_refuses_what_is_no_data_set(tensors, error, said):
    with pytest.raises(error) as caught:
        TensorSource(tensors, "mine")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_items_that_are_not_finite_are_counted_and_the_first_is_named():
    x = torch.zeros(10_000, 3)
    x[7000, 2], x[7001, 0], x[9999, 1] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(
        ValueError, match=r"3 of 10000 items of 'x1' in source 'mine' hold NaN or infinity \(first: item 7000\)"
    ):
        TensorSource({"x1": x}, "mine")
    condition = torch.zeros(4)
    condition[1] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 4 items of 'c'.*first: item 1"):
        TensorSource({"x1": torch.zeros(4, 2), "c": condition})


def test_a_subset_is_the_source_at_its_indices():
    source = TensorSource({"x1": torch.arange(10.0)[:, None], "label": torch.arange(10)}, classes=["a"] * 10)
    subset = Subset(source, [9, 3, 3], "some")
    assert isinstance(subset, Source)
    assert len(subset) == 3
    assert subset.fetch(at(0, 2))["x1"].flatten().tolist() == [9.0, 3.0]
    assert subset.labels.tolist() == [9, 3, 3]
    assert (subset.describe()["name"], subset.describe()["count"], subset.describe()["of"]) == ("some", 3, 10)
    assert Subset(subset, at(0)).fetch(at(0))["label"].item() == 9


@pytest.mark.parametrize("indices", [[], [10], [-1], [[1]]])
def test_a_subset_refuses_indices_outside_of_its_source(indices):
    with pytest.raises(ValueError, match="indices of a subset"):
        Subset(TensorSource({"x1": torch.zeros(10, 1)}), indices)


def test_a_dataset_of_tensors_gives_x1():
    source = DatasetSource(Items([torch.full((2,), float(i)) for i in range(4)]), "four")
    assert source.fetch(at(3, 1)).keys() == {"x1"}
    assert source.fetch(at(3, 1))["x1"].tolist() == [[3.0, 3.0], [1.0, 1.0]]
    assert source.describe()["count"] == 4


@pytest.mark.parametrize("label", [3, np.int32(3), torch.tensor(3, dtype=torch.uint8), np.array(3)])
def test_an_integer_second_is_the_label(label):
    batch = DatasetSource(Items([(torch.zeros(2), label)] * 2)).fetch(at(0, 1))
    assert batch["label"].tolist() == [3, 3]
    assert batch["label"].dtype == torch.int64


@pytest.mark.parametrize("condition", [0.5, np.float64(0.5), torch.tensor(0.5, dtype=torch.float64)])
def test_any_other_second_is_the_condition(condition):
    batch = DatasetSource(Items([(torch.zeros(2), condition)])).fetch(at(0))
    assert batch.keys() == {"x1", "condition"}
    assert batch["condition"].dtype == torch.float32
    assert batch["condition"].item() == 0.5


def test_a_vector_of_integers_is_a_condition():
    batch = DatasetSource(Items([(torch.zeros(2), torch.tensor([1, 2, 3]))])).fetch(at(0))
    assert batch["condition"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("name", ["x1", "x", "image"])
def test_a_dict_keeps_its_keys_and_the_data_become_x1(name):
    item = {name: np.ones((2, 2), dtype=">f8")[::-1], "label": 1, "angle": 0.25, "mask": np.array([True, False])}
    batch = DatasetSource(Items([item])).fetch(at(0, 0))
    assert batch.keys() == {"x1", "label", "angle", "mask"}
    assert batch["x1"].shape == (2, 2, 2)
    assert [batch[key].dtype for key in ("x1", "label", "angle", "mask")] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.int64,
    ]


def test_x_beside_x1_stays_a_condition():
    batch = DatasetSource(Items([{"x1": torch.zeros(2), "x": 1.0}])).fetch(at(0))
    assert batch.keys() == {"x1", "x"}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("text", "is a str"),
        ((torch.zeros(2), "cat"), "the second entry of item 0 of 'Items' is a str"),
        ((torch.zeros(2), 1, 2), "tuple of 3"),
        ({"picture": torch.zeros(2)}, "keys ['picture']"),
        ({"x": torch.zeros(2), "image": torch.zeros(2)}, "keys ['image', 'x']"),
        ({"x1": torch.zeros(2), "caption": "a cat"}, "'caption' of item 0 of 'Items' is a str"),
        (torch.zeros(2, dtype=torch.uint8), "holds integers"),
        (None, "is a NoneType"),
    ],
)
def test_other_items_are_type_errors_that_name_the_item(item, said):
    with pytest.raises(TypeError) as caught:
        DatasetSource(Items([item]))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (torch.zeros(3), "'x1' of item 1 of 'Items' has shape (3,), that of item 0 (2,)"),
        ((torch.zeros(2), 1), "item 1 of 'Items' has the keys ['label', 'x1'], item 0 has ['x1']"),
        (torch.tensor([0.0, torch.nan]), "'x1' of item 1 of 'Items' holds NaN or infinity"),
    ],
)
def test_items_that_do_not_fit_item_0_are_named(second, said):
    source = DatasetSource(Items([torch.zeros(2), second]))
    with pytest.raises(ValueError) as caught:
        source.fetch(at(0, 1))
    assert said in str(caught.value)


def test_iterable_data_sets_are_refused_with_the_way_out():
    for endless in (Endless(), (torch.zeros(2) for _ in range(3))):
        with pytest.raises(TypeError, match=r"materialise it .* or use a map-style Dataset"):
            as_source(endless)
    with pytest.raises(TypeError, match="materialise it"):
        DatasetSource(Endless())


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="is empty"):
        DatasetSource(Items([]))


def test_as_source_takes_whatever_holds_data():
    x, label = torch.arange(6.0).reshape(3, 2), at(2, 0, 1)
    own = TensorSource({"x1": x})
    assert as_source(own) is own
    for data in (x, x.double().numpy(), {"x1": x}, Items(list(x)), TensorDataset(x), list(x)):
        batch = as_source(data, "mine").fetch(at(2, 0))
        assert torch.equal(batch["x1"], x[[2, 0]])
        assert as_source(data, "mine").name == "mine"
    for data in ({"x1": x.numpy(), "label": label.int().numpy()}, TensorDataset(x, label)):
        assert as_source(data).fetch(at(0, 1))["label"].tolist() == [2, 0]
    assert as_source(x.double()).fetch(at(0))["x1"].dtype == torch.float64


@pytest.mark.parametrize(
    ("data", "said"), [("digits", "open_images"), (Path("x"), type(Path("x")).__name__), (3, "int")]
)
def test_as_source_refuses_the_rest(data, said):
    with pytest.raises(TypeError) as caught:
        as_source(data)
    assert said in str(caught.value)
