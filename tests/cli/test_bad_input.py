"""Mistakes get a short message and exit status 2, the machine's faults 1, and nothing that existed is lost."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import pantarhei as pr
from pantarhei.cli.main import main

TINY = ["--width", "8", "--blocks", "1", "--batch", "16", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]


def refused(capsys, status, said, *arguments):
    assert main([str(a) for a in arguments]) == status
    error = capsys.readouterr().err
    assert said in " ".join(error.split())
    assert "Traceback" not in error
    return error


def one_line(error):
    return error.startswith("pantarhei: ") and len(error.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "rectified-flow", "--out", str(folder), "--iterations", "6", *TINY]) == 0
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_unknown_names(capsys, tmp_path):
    train = ["train", "rectified-flow", "--out", tmp_path / "out", *TINY]
    assert one_line(refused(capsys, 2, "did you mean digits", *train, "--data", "digit"))
    assert one_line(refused(capsys, 2, "nowhere", *train, "--data", tmp_path / "nowhere"))
    assert one_line(refused(capsys, 2, "did you mean 'rectified-flow'", "train", "rectified-flw", "--out", tmp_path))
    assert one_line(refused(capsys, 2, "did you mean 'sample'", "sampel"))
    assert main(["train", "rectified-flow", "--out", str(tmp_path / "out"), "--iteration", "3"]) == 2
    assert "iterations" in capsys.readouterr().err
    refused(capsys, 2, "did you mean 'flip'", *train, "--augment", "flipp")
    assert not (tmp_path / "out").exists()


def test_bad_images(capsys, tmp_path):
    def train(folder):
        return ["train", "rectified-flow", "--data", folder, "--out", tmp_path / "out", *TINY]

    empty, mixed, broken = (tmp_path / name for name in ("empty", "mixed", "broken"))
    for folder in (empty, mixed, broken):
        folder.mkdir()
    for i, size in enumerate((8, 12)):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(mixed / f"{i}.png")
    whole = broken / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(whole)
    (broken / "1.png").write_bytes(whole.read_bytes()[:90])
    assert one_line(refused(capsys, 2, "empty", *train(empty)))
    assert one_line(refused(capsys, 2, "size", *train(mixed)))
    assert one_line(refused(capsys, 2, "1.png", *train(broken)))
    assert not (tmp_path / "out").exists()


def test_a_malicious_pickle_is_never_run(capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harmed'}",)

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": Evil(), "labels": []}))
    command = ["train", "rectified-flow", "--data", folder, "--out", tmp_path / "out", *TINY]
    assert one_line(refused(capsys, 2, "system", *command))
    assert not (tmp_path / "harmed").exists()


def test_nan_in_data_is_counted():
    data = torch.randn(10, 2)
    data[3] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 10 items .*item 3"):
        pr.FlowTask(pr.Flow(torch.nn.Linear(2, 2), shape=(2,)), data=data)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "rectified-flow", "--out", "NEW", "--iterations", 0], "iterations"),
        (["train", "rectified-flow", "--out", "NEW", "--batch", -1], "batch"),
        (["straighten", "reflow", "RUN", "--out", "NEW", "--pairs", 0], "pairs"),
        (["straighten", "reflow", "RUN", "--out", "NEW", "--pair-steps", 0], "steps"),
        (["sample", "RUN", "--out", "NEW", "--steps", 0], "--steps"),
        (["sample", "RUN", "--out", "NEW", "--count", 0], "--count"),
        (["sample", "RUN", "--out", "NEW", "--label", 10], "0 to 9"),
        (["sample", "RUN", "--out", "NEW", "--checkpoint", "last"], "newest, best"),
        (["sample", "NOWHERE", "--out", "NEW"], "no folder"),
        (["evaluate", "RUN", "--steps", 1, -2], "--steps"),
        (["evaluate", "NOWHERE"], "no folder"),
        (["info", "NOWHERE"], "there is no"),
        (["sample", "EMPTY", "--out", "NEW"], "neither a run folder"),
        (["info", "EMPTY"], "not a run folder"),
    ],
)
def test_impossible_requests(capsys, tmp_path, run, arguments, said):
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "NEW": tmp_path / "new", "NOWHERE": tmp_path / "nowhere", "EMPTY": tmp_path / "empty"}
    before = contents(run)
    assert one_line(refused(capsys, 2, said, *(places.get(a, a) for a in arguments)))
    assert contents(run) == before


def test_a_checkpoint_cut_in_half(capsys, tmp_path, run):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    model = copy / "checkpoints/00000006/model.safetensors"
    model.write_bytes(model.read_bytes()[:1000])
    assert one_line(refused(capsys, 2, "truncated", "sample", copy, "--out", tmp_path / "out"))
    resume = ["train", "rectified-flow", "--out", copy, "--iterations", 9, "--resume", *TINY]
    assert one_line(refused(capsys, 2, "truncated", *resume))


def limited(kilobytes, *arguments):
    """A command under a file size limit, which is how a full disk looks to a write."""
    script = (
        "import resource, sys; from pantarhei.cli.main import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes * 1024},) * 2); sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_a_full_disk_loses_nothing(tmp_path, run):
    before = contents(run / "checkpoints")
    resume = ["train", "rectified-flow", "--out", run, "--iterations", 12, "--resume", *TINY]
    pairs = ["straighten", "reflow", run, "--out", tmp_path / "b", "--pairs", 500, "--pair-steps", 1, "--threads", 1]
    sample = ["sample", run, "--count", 400, "--steps", 1, "--out", tmp_path / "samples"]
    for command in (resume, pairs, sample):
        done = limited(60, *command)
        assert done.returncode == 1, done.stderr
        assert "could not be written" in done.stderr or "too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 3
    assert contents(run / "checkpoints") == before
    assert main([*map(str, resume)]) == 0  # with room again it goes on
    assert (run / "checkpoints/00000012").is_dir()
