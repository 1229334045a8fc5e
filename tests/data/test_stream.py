"""The endless stream: its order is a function of (seed, number), shared by ranks, resumable."""

from itertools import chain, islice

import pytest
import torch

from pantarhei.data import TensorSource
from pantarhei.data.stream import Stream


def source(n=10):
    return TensorSource({"x1": torch.arange(n, dtype=torch.float32)[:, None], "label": torch.arange(n)}, "numbers")


def labels(stream, count):
    return [batch["label"].tolist() for batch in islice(stream, count)]


def test_every_epoch_holds_every_item_once_in_a_new_order():
    rows = list(chain(*labels(Stream(source(), 4, seed=3), 10)))  # 40 items, 4 epochs, batches straddle epochs
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_depends_on_the_seed_only_and_resumes_anywhere():
    whole = labels(Stream(source(), 4, seed=3), 12)
    assert labels(Stream(source(), 4, seed=3), 12) == whole
    assert labels(Stream(source(), 4, seed=3, start=7), 5) == whole[7:]
    assert labels(Stream(source(), 4, seed=4), 12) != whole


def test_ranks_share_the_same_global_batches():
    whole = labels(Stream(source(), 6, seed=1), 5)
    parts = [labels(Stream(source(), 6, seed=1, rank=rank, world=3), 5) for rank in range(3)]
    assert [list(chain(*shares)) for shares in zip(*parts, strict=True)] == whole


def test_workers_change_nothing():
    assert labels(Stream(source(), 4, seed=3, start=2, workers=1), 4) == labels(Stream(source(), 4, seed=3, start=2), 4)


def test_augmentations_are_reproducible_after_a_resume():
    def noisy(batch, generator):
        return {**batch, "x1": batch["x1"] + torch.randn(batch["x1"].shape, generator=generator)}

    whole = [b["x1"] for b in islice(Stream(source(), 4, seed=3, augment=noisy), 5)]
    again = [b["x1"] for b in islice(Stream(source(), 4, seed=3, augment=noisy, start=3), 2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], again, strict=True))
    assert not torch.equal(whole[0] % 1, whole[1] % 1)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    labels(Stream(source(), 4), 3)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_that_ranks_cannot_share_are_refused():
    with pytest.raises(ValueError, match="multiple of the number of processes, 3"):
        Stream(source(), 4, world=3)
