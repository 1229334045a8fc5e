"""The shard store: whole shards or none, resumable, shared by ranks, and a source."""

import pytest
import torch

from pantarhei.data import Source
from pantarhei.data.shards import ShardStore


def items(numbers):
    n = torch.tensor(list(numbers))
    return {"x1": n.float()[:, None] * 2, "label": n}


def finished(folder, count=10, shard_size=4):
    store = ShardStore.create(folder, count, {"kind": "test"}, shard_size=shard_size)
    for shard in store.missing():
        store.write(shard, items(store.items(shard)))
    return store


def test_a_store_is_a_source_of_what_was_written(tmp_path):
    finished(tmp_path / "store")
    store = ShardStore(tmp_path / "store")
    assert isinstance(store, Source)
    assert len(store) == 10
    rows = torch.tensor([9, 0, 4, 3, 9])
    batch = store.fetch(rows)
    assert batch["label"].tolist() == rows.tolist()
    assert torch.equal(batch["x1"][:, 0], rows * 2.0)
    assert store.tensors()["label"].tolist() == list(range(10))
    assert store.tensors(3)["label"].tolist() == [0, 1, 2]
    assert store.describe()["kind"] == "test"


def test_ranks_share_the_shards_and_an_interrupted_job_goes_on(tmp_path):
    store = ShardStore.create(tmp_path, 10, {}, shard_size=2)
    assert store.missing(0, 2) == [0, 2, 4]
    assert store.missing(1, 2) == [1, 3]
    store.write(2, items(store.items(2)))
    again = ShardStore.create(tmp_path, 10, {}, shard_size=2)
    assert again.missing() == [0, 1, 3, 4]
    assert list(again.items(4)) == [8, 9]


def test_another_header_is_refused_and_changes_nothing(tmp_path):
    finished(tmp_path)
    before = (tmp_path / "header.json").read_bytes()
    for count, header in ((12, {"kind": "test"}), (10, {"kind": "other"})):
        with pytest.raises(ValueError, match=r"another (count|kind)"):
            ShardStore.create(tmp_path, count, header, shard_size=4)
    assert (tmp_path / "header.json").read_bytes() == before


def test_bad_rows_are_refused_before_anything_is_written(tmp_path):
    store = ShardStore.create(tmp_path, 4, {}, shard_size=4)
    with pytest.raises(ValueError, match="4 rows"):
        store.write(0, items(range(3)))
    with pytest.raises(ValueError, match="x1 holds NaN"):
        store.write(0, {"x1": torch.full((4, 1), float("nan"))})
    assert store.missing() == [0]


def test_damage_is_named(tmp_path):
    store = finished(tmp_path)
    path = store.path(1)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"00001.safetensors is truncated"):
        ShardStore(tmp_path).fetch(torch.tensor([5]))
    path.unlink()
    with pytest.raises(ValueError, match="shard 1 of 3 is missing"):
        ShardStore(tmp_path).fetch(torch.tensor([5]))
    with pytest.raises(FileNotFoundError, match="not a shard store"):
        ShardStore(tmp_path / "nothing")
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ShardStore(tmp_path)
