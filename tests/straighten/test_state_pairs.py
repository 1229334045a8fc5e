"""Pairs kept as noise states and PNG samples: made, killed, shared, read in the reference's layout, refused."""

import csv
import json
import pickle
import re
import shutil
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pantarhei as pr
from pantarhei.data.stream import Stream
from pantarhei.flow import Flow
from pantarhei.networks import MLP, MLPConfig
from pantarhei.straighten import (
    Solver,
    StatePairs,
    check_pairs,
    distillation_task,
    inspect_pairs,
    make_pairs,
    open_pairs,
    pair_folder,
    reflow_task,
)
from pantarhei.straighten.noise_states import noise_from_states, numbered_state
from pantarhei.straighten.pairs import pair_stream
from pantarhei.straighten.state_files import pair_name
from pantarhei.straighten.state_parts import StateParts

FLOOR = (2 / 255) ** 2 / 12  # mean square of rounding [-1, 1] to 8 bits
QUIET = {"progress": False, "tensorboard": False}


class Shrinks(nn.Module):
    """dx/dt = (mean of the label - x) 3: noise ends near a constant image, well inside [-1, 1]."""

    def __init__(self, rate=3.0, classes=4):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([rate]))
        self.classes = classes

    def forward(self, x, t, label=None):
        level = 0.0 if label is None else (label.float() / self.classes - 0.5).view(-1, 1, 1, 1)
        return self.rate * (level - x)


def teacher(shape=(3, 8, 8), labels=True, rate=3.0):
    named = {"null": {"label": 4}} if labels else {}
    return Flow(Shrinks(rate), shape=shape, **named)


def made(folder, flow=None, count=40, **options):
    return make_pairs(
        flow or teacher(),
        count,
        folder,
        solver=Solver("heun", 4),
        store="states",
        **{"shard_size": 16, "batch": 16, **options},
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def reference(folder, count=12, shape=(3, 8, 8), labels=True, packed=True, names=None):
    """Pairs in the layout of rectified flow++: one running generator, its state written before each draw."""
    generator = np.random.Generator(np.random.PCG64(5))
    x0, pixels = [], np.random.default_rng(0).integers(0, 256, (count, *shape[1:], shape[0]), dtype=np.uint8)
    (folder / "samples").mkdir(parents=True)
    (folder / "z").mkdir()
    names = names or [f"{i:05d}" for i in range(count)]
    for i, name in enumerate(names):
        for stem in ("samples", "z"):
            (folder / stem / name).parent.mkdir(exist_ok=True)
        state = generator.bit_generator.state["state"]
        (folder / "z" / f"{name}.bin").write_bytes(
            state["state"].to_bytes(16, "big") + state["inc"].to_bytes(16, "big")
        )
        x0.append(generator.standard_normal(shape).astype(np.float32))
        Image.fromarray(pixels[i].squeeze()).save(folder / "samples" / f"{name}.png")
    if labels:
        with (folder / "images_labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([(f"{name}.png", i % 3) for i, name in enumerate(names)])
    if packed:
        pack(folder)
    return torch.from_numpy(np.stack(x0)), pixels


def pack(folder, method=zipfile.ZIP_DEFLATED):
    for stem in ("samples", "z"):
        with zipfile.ZipFile(folder / f"{stem}.zip", "w", method) as archive:
            for path in sorted((folder / stem).rglob("*.*"), reverse=True):  # an archive need not be in order
                archive.write(path, path.relative_to(folder / stem).as_posix())
        shutil.rmtree(folder / stem)


# What is made


def test_pairs_are_the_flow_of_their_noise(tmp_path):
    flow = teacher()
    pairs = made(tmp_path, flow)
    batch = pairs.tensors()
    assert (batch["x0"].shape, batch["x0"].dtype, batch["label"].dtype) == ((40, 3, 8, 8), torch.float32, torch.int64)
    stream = pair_stream(0)
    assert torch.equal(batch["x0"], noise_from_states([numbered_state(stream, i) for i in range(40)], flow.shape))
    assert abs(float(batch["x0"].mean())) < 0.05
    assert abs(float(batch["x0"].std()) - 1) < 0.05
    carried = flow.sample(x0=batch["x0"], condition={"label": batch["label"]}, steps=4, method="heun")
    assert float((batch["x1"] - carried).abs().max()) <= 1 / 255 + 1e-6
    assert float((batch["x1"] - carried).square().mean()) == pytest.approx(FLOOR, rel=0.1)
    assert len(batch["label"].unique()) == 4
    assert sorted(contents(tmp_path)) == ["header.json", "images_labels.csv", "samples.zip", "z.zip"]
    assert not (tmp_path / "parts").exists()
    lines = (tmp_path / "images_labels.csv").read_text().splitlines()
    assert lines[7] == f"00007.png,{int(batch['label'][7])}"
    with zipfile.ZipFile(tmp_path / "z.zip") as archive:
        assert archive.read("00007.bin") == numbered_state(stream, 7)
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def test_a_pair_depends_on_seed_and_number_only(tmp_path):
    made(tmp_path / "a")
    for rank in (1, 0):
        pairs = made(tmp_path / "b", rank=rank, world=2, batch=5)
        assert bool(pairs.missing()) == (rank == 1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    other = made(tmp_path / "c", seed=1)
    assert not torch.equal(other.tensors(4)["x0"], open_pairs(tmp_path / "a").tensors(4)["x0"])
    longer = made(tmp_path / "d", count=50, shard_size=50)
    assert torch.equal(longer.tensors(40)["x0"], open_pairs(tmp_path / "a").tensors()["x0"])


def test_a_store_in_the_making_is_finished_by_whoever_finds_all_parts(tmp_path):
    waiting = made(tmp_path, rank=1, world=3)
    assert waiting.missing() == [0, 2]
    with pytest.raises(ValueError, match="2 parts are missing"):
        waiting.fetch(torch.tensor([0]))
    with pytest.raises(ValueError, match="not finished"):
        check_pairs(waiting, teacher())
    for rank in (0, 2):
        made(tmp_path, rank=rank, world=3)
    assert not waiting.missing()
    assert torch.equal(waiting.fetch(torch.tensor([3]))["x0"], open_pairs(tmp_path).fetch(torch.tensor([3]))["x0"])


@pytest.mark.parametrize("at", ["second part", "merge", "between the archives", "before the parts are removed"])
def test_killed_at_any_moment_it_goes_on(tmp_path, monkeypatch, at):
    made(tmp_path / "whole")
    folder = tmp_path / "killed"
    with monkeypatch.context() as patch:

        def killed(*_, **__):
            raise KeyboardInterrupt

        if at == "second part":
            write = StateParts.write
            patch.setattr(StateParts, "write", lambda self, i, x: killed() if i == 1 else write(self, i, x))
        elif at == "merge":
            copy = StateParts._copy
            patch.setattr(StateParts, "_copy", lambda self, i, *x: killed() if i == 1 else copy(self, i, *x))
        elif at == "between the archives":
            from pantarhei.straighten import state_parts

            replace = state_parts.os.replace
            patch.setattr(state_parts.os, "replace", lambda a, b: killed() if b.name == "z.zip" else replace(a, b))
        else:
            patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            made(folder)
    if at == "between the archives":
        assert StatePairs(folder).missing() == [0, 1, 2]  # all wait to be merged
    # A kill that no handler saw leaves a temporary file behind.
    (folder / ".z.zip.1.tmp").write_bytes(b"half")
    write, written = StateParts.write, []
    monkeypatch.setattr(StateParts, "write", lambda self, i, x: (written.append(i), write(self, i, x)))
    pairs = made(folder)
    assert not pairs.missing()
    assert written == ([1, 2] if at == "second part" else [])
    assert contents(folder) == contents(tmp_path / "whole")
    assert not (folder / "parts").exists()


def test_two_processes_that_merge_at_once_do_not_disturb_each_other(tmp_path):
    made(tmp_path / "whole")
    folder = tmp_path / "shared"
    made(folder, rank=0, world=2)
    parts = StateParts(folder)
    merge = parts.finish
    parts.finish = lambda: False
    for shard in parts.missing():  # as in make_pairs, without the end of it
        whole = StatePairs(tmp_path / "whole").fetch(torch.tensor(list(parts.items(shard))))
        states = b"".join(numbered_state(pair_stream(0), i) for i in parts.items(shard))
        whole["state"] = torch.frombuffer(bytearray(states), dtype=torch.uint8).view(-1, 32)
        parts.write(shard, whole)
    results = []
    threads = [threading.Thread(target=lambda: results.append(merge())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert contents(folder) == contents(tmp_path / "whole")


def test_grey_images_without_labels_and_many_pairs(tmp_path):
    pairs = made(tmp_path, teacher((1, 6, 5), labels=False), count=9)
    assert set(pairs.tensors()) == {"x0", "x1"}
    assert pairs.tensors()["x1"].shape == (9, 1, 6, 5)
    assert pairs.header["conditions"] == []
    assert not (tmp_path / "images_labels.csv").exists()
    assert (pair_name(7, 60_000), pair_name(7, 60_001), pair_name(123_456, 200_000)) == ("00007", "0/00007", "2/123456")


def test_the_header_tells_the_history_and_other_pairs_are_refused(tmp_path):
    pairs = made(tmp_path, teacher="runs/a")
    header = json.loads((tmp_path / "header.json").read_text())
    assert header == pairs.header
    assert (header["kind"], header["store"], header["numpy"]) == ("pairs", "states", np.__version__)
    assert (header["bit_generator"], header["teacher"], header["steps"]) == ("PCG64", "runs/a", 4)
    with pytest.raises(ValueError, match="another seed"):
        made(tmp_path, teacher="runs/a", seed=1)
    with pytest.raises(ValueError, match="another"):
        make_pairs(teacher(), 40, tmp_path, solver=Solver("heun", 4), teacher="runs/a", shard_size=16)
    reference(tmp_path / "foreign")
    with pytest.raises(ValueError, match="not made here"):
        made(tmp_path / "foreign")
    # A newer NumPy may go on, as long as it draws the same noise; one that does not is found out.
    header["numpy"] = "1.0.0"
    (tmp_path / "header.json").write_text(json.dumps(header))
    assert len(made(tmp_path, teacher="runs/a")) == 40
    header["first_noise"] = "0" * 64
    (tmp_path / "header.json").write_text(json.dumps(header))
    for again in (open_pairs, lambda folder: made(folder, teacher="runs/a")):
        with pytest.raises(ValueError, match=rf"begun with NumPy 1\.0\.0; this one, {re.escape(np.__version__)}"):
            again(tmp_path)


def test_what_states_cannot_hold_is_refused(tmp_path):
    points = Flow(MLP(MLPConfig(width=8)), shape=(2,))
    with pytest.raises(ValueError, match=r"samples of shape \(2,\); take store='tensors'"):
        made(tmp_path / "points", points)
    with pytest.raises(ValueError, match="samples of shape"):
        made(tmp_path / "channels", teacher((4, 8, 8)))
    conditioned = Flow(Shrinks(), shape=(3, 8, 8), conditions=("label", "text"))
    with pytest.raises(ValueError, match="no condition but label, this flow has text"):
        made(tmp_path / "text", conditioned, conditions=lambda numbers: {})
    transfer = Flow(Shrinks(), shape=(3, 8, 8), source=pr.flow.sources.Samples(torch.zeros(4, 3, 8, 8)))
    with pytest.raises(ValueError, match="starts from something else"):
        made(tmp_path / "transfer", transfer)
    with pytest.raises(ValueError, match="store: must be 'tensors' or 'states', got 'png'"):
        make_pairs(teacher(), 4, tmp_path / "kind", store="png")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"not an image in \[-1, 1\]"):
        made(tmp_path / "wide", teacher(labels=False, rate=-2.0))
    with pytest.raises(ValueError, match="NaN or infinity"):
        made(tmp_path / "nan", teacher(labels=False, rate=float("nan")))


# What is read


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 6)])
def test_the_reference_layout_is_read(tmp_path, packed, shape):
    x0, pixels = reference(tmp_path, shape=shape, packed=packed)
    pairs = open_pairs(tmp_path)
    assert isinstance(pairs, StatePairs)
    assert pair_folder(pairs) == tmp_path
    assert (len(pairs), pairs.missing(), pairs.header["conditions"], pairs.header["guidance"]) == (
        12,
        [],
        ["label"],
        1.0,
    )
    order = torch.tensor([7, 0, 7, 11])
    batch = pairs.fetch(order)
    assert torch.equal(batch["x0"], x0[order])
    expected = (torch.from_numpy(pixels[order.numpy()]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    assert torch.equal(batch["x1"], expected)
    assert batch["label"].tolist() == [7 % 3, 0, 7 % 3, 11 % 3]
    assert torch.equal(pairs.labels[order], batch["label"])


def test_names_sort_as_the_reference_sorts_them_and_labels_may_lack(tmp_path):
    names = ["1/60001", "0/00003", "1/100000"]
    x0, _ = reference(tmp_path, count=3, names=names, labels=False)
    pairs = StatePairs(tmp_path)
    assert torch.equal(pairs.tensors()["x0"], x0[[1, 2, 0]])
    assert pairs.labels is None
    assert set(pairs.tensors(2)) == {"x0", "x1"}


def test_damage_is_named(tmp_path):
    reference(tmp_path / "whole")
    for number, (name, message) in enumerate(
        [("z.zip", "z.zip is not a zip archive"), ("samples.zip", "samples.zip is not a zip archive")]
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=message):
            open_pairs(folder)
        (folder / name).unlink()
        error = FileNotFoundError if name == "samples.zip" else (FileNotFoundError, ValueError)
        with pytest.raises(error):
            open_pairs(folder)
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "flipped")
    content = bytearray((folder / "samples.zip").read_bytes())
    content[200] ^= 255
    (folder / "samples.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*samples\.zip/.*png"):
        StatePairs(folder).tensors()


def test_files_that_do_not_belong_together_are_named(tmp_path):
    def loose(name, **options):
        reference(tmp_path / name, packed=False, **options)
        return tmp_path / name

    folder = loose("unpaired")
    (folder / "samples" / "00004.png").unlink()
    with pytest.raises(ValueError, match=r"samples lacks 1 of 12 files \(first: 00004\.png\)"):
        open_pairs(folder)
    (folder / "z" / "00004.bin").unlink()
    (folder / "z" / "00005.bin").unlink()
    with pytest.raises(ValueError, match=r"samples holds 11 \.png files for 10 pairs"):
        open_pairs(folder)
    folder = loose("short")
    (folder / "z" / "00003.bin").write_bytes(bytes(31))
    with pytest.raises(ValueError, match=r"00003\.bin has 31 bytes; a PCG64 state is 32"):
        open_pairs(folder).tensors()
    (folder / "z" / "00003.bin").write_bytes(bytes(32))
    with pytest.raises(ValueError, match=r"00003\.bin is no PCG64 state: .*must be odd"):
        open_pairs(folder).tensors()
    folder = loose("size")
    Image.new("RGB", (9, 8)).save(folder / "samples" / "00005.png")
    with pytest.raises(ValueError, match=r"00005\.png has 9x8 pixels, expected 8x8"):
        open_pairs(folder).tensors()
    (folder / "samples" / "00005.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read .*00005\.png"):
        open_pairs(folder).tensors()
    folder = loose("labels")
    labels = folder / "images_labels.csv"
    lines = labels.read_text().splitlines()
    labels.write_text("path,label\n" + "\n".join(lines) + "\n")  # headings are passed over
    assert open_pairs(folder).labels.tolist() == [i % 3 for i in range(12)]
    labels.write_text("\n".join(lines[:-2]))
    with pytest.raises(ValueError, match=r"no label for 2 of 12 images \(first: 00010\.png\)"):
        open_pairs(folder)
    labels.write_text("\n".join([*lines[:-1], "00011.png,cat"]))
    with pytest.raises(ValueError, match=r"line 12: expected name\.png,label, got '00011\.png,cat'"):
        open_pairs(folder)
    with pytest.raises(FileNotFoundError, match="holds no pairs"):
        open_pairs(tmp_path)
    with pytest.raises(FileNotFoundError):
        StatePairs(tmp_path)


def test_a_small_archive_does_not_unpack_to_a_large_file(tmp_path):
    folder = tmp_path / "pairs"
    reference(folder, count=2)
    for declared in (10_000_000, 32):  # what the directory says of the same ten megabytes
        with zipfile.ZipFile(folder / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("00000.bin", bytes(10_000_000))
            archive.writestr("00001.bin", bytes(32))
            archive.filelist[0].file_size = declared
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"00000\.bin(:| has) (10000000 bytes; expected at most 32|wrong size)"):
            open_pairs(folder)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
        tracemalloc.stop()
    (folder / "z.zip").unlink()
    (folder / "z").mkdir()
    (folder / "z" / "00000.bin").write_bytes(bytes(33))
    (folder / "z" / "00001.bin").write_bytes(bytes(32))
    with pytest.raises(ValueError, match=r"00000\.bin has 33 bytes; expected at most 32"):
        open_pairs(folder)


@pytest.mark.parametrize("label", ["\u00b2", "\u0661", "99999999999999999999", "9" * 5000, "-1", ""])
def test_labels_are_plain_numbers(tmp_path, label):
    reference(tmp_path, count=2)
    lines = tmp_path / "images_labels.csv"
    lines.write_text(f"00000.png,0\n00001.png,{label}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2: expected name\.png,label, got '00001\.png,") as caught:
        open_pairs(tmp_path)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"00000.png,0\n\xff\xfe.png,1\n", b"00000.png," + b"1" * 200_000 + b"\n"])
def test_tables_that_are_none_are_refused(tmp_path, content):
    reference(tmp_path, count=2)
    (tmp_path / "images_labels.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"images_labels\.csv is no table of name\.png,label"):
        open_pairs(tmp_path)


def test_a_finished_store_that_lost_a_file_is_refused(tmp_path):
    made(tmp_path)
    (tmp_path / "images_labels.csv").rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"no images_labels\.csv, but its pairs have labels"):
        open_pairs(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "images_labels.csv")
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps({**header, "count": 41}))
    with pytest.raises(ValueError, match=r"lacks 1 of 41 files \(first: 00040\.bin\)"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("packed", [True, False])
def test_threads_worker_processes_and_copies_read_the_same(tmp_path, packed):
    reference(tmp_path, count=64, packed=packed)
    pairs = open_pairs(tmp_path)
    whole = pairs.tensors()
    here, there = (iter(Stream(pairs, 16, seed=3, workers=workers)) for workers in (0, 2))  # forked with the map open
    for _ in range(6):
        for (name, a), b in zip(next(here).items(), next(there).values(), strict=True):
            assert torch.equal(a, b), name
    copy = pickle.loads(pickle.dumps(pairs))  # as a spawned worker gets it
    assert torch.equal(copy.tensors()["x1"], whole["x1"])
    wrong = []

    def read(seed):
        for _ in range(10):
            rows = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:16]
            if not all(torch.equal(value, whole[name][rows]) for name, value in pairs.fetch(rows).items()):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# What it is for


def test_students_train_on_it(tmp_path):
    flow = teacher()
    pairs = made(tmp_path / "pairs", flow, count=240, shard_size=128)
    check_pairs(pairs, flow)
    found = inspect_pairs(pairs, flow)
    assert not found.swapped
    assert found.solver_error < 0.1
    task = reflow_task(flow, pairs, start=Shrinks(1.0))
    assert task.held_out is not None
    pr.train(task, tmp_path / "reflow", iterations=4, batch=16, **QUIET)
    assert task.result().provenance.rectified == 1
    distillation_task(flow, pairs)
    with pytest.raises(ValueError, match="made by other weights"):
        check_pairs(pairs, teacher(rate=1.0))


def test_noise_and_pixels_take_an_eighth_of_the_arrays(tmp_path):
    shape, count = (3, 32, 32), 24
    flow = teacher(shape, labels=True, rate=1.0)  # shrunken noise: the hardest images for PNG
    made(tmp_path, flow, count=count)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 0.25 * count * 2 * 4 * 3 * 32 * 32
