"""Several processes compute what one does, and a killed run goes on as if nothing had been."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killable import finish, start
from two_processes import CASES, exact_points, image_run, images, one_case, parameters

import pantarhei as pr
from pantarhei.training import Run

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
QUICK = ["--width", "8", "--blocks", "1", "--batch", "16", "--threads", "1", "--no-tensorboard", "--preview-every", "0"]


def largest_difference(one, other):
    assert {p: set(one[p]) for p in one} == {p: set(other[p]) for p in other}
    return max(float((one[path][name] - other[path][name]).abs().max()) for path in one for name in one[path])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of two processes joined by gloo; what each of them found is in `found.<rank>.pt`."""
    out = tmp_path_factory.mktemp("machines")
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    script = [sys.executable, str(HERE / "two_processes.py"), str(out)]
    processes = []
    for rank in range(2):
        with (out / f"said.{rank}").open("w") as said:
            env = {**common, "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(script, env=env, stdout=said, stderr=subprocess.STDOUT))
    try:
        for rank, process in enumerate(processes):
            status = process.wait(timeout=90)
            assert status == 0, (out / f"said.{rank}").read_text()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return out


@pytest.fixture(scope="module")
def found(folder):
    return [torch.load(folder / f"found.{rank}.pt", weights_only=True) for rank in range(2)]


def test_processes_hold_the_same_weights(found):
    for case, weights in found[0].items():
        assert largest_difference(weights, found[1][case]) == 0, case


def test_two_processes_compute_the_gradient_of_one(found, tmp_path):
    """With one step of plain gradient descent the gradient is what the weights moved by, up to the learning rate."""
    alone, two = one_case("gradient", tmp_path / "alone")["flow.network"], found[0]["gradient"]["flow.network"]
    for name, before in parameters(exact_points().flow.network).items():
        gradient = before - alone[name]
        assert gradient.abs().max() > 1e-6, name
        assert torch.allclose(before - two[name], gradient, rtol=1e-5, atol=1e-12), name


@pytest.mark.parametrize("case", sorted(set(CASES) - {"gradient"}))
def test_two_processes_train_as_one(found, tmp_path, case):
    """Accumulated and weighted losses, and two optimisers that take turns."""
    alone = one_case(case, tmp_path / "alone")
    assert largest_difference(found[0][case], alone) < 2e-6


def test_sharded_training_agrees_with_ddp_and_with_one_process(found, tmp_path):
    alone = image_run(tmp_path / "alone", 5)
    started = parameters(images().flow.network)
    moved = largest_difference({"flow.network": started}, {"flow.network": alone["flow.network"]})
    assert moved > 1e-3
    assert largest_difference(found[0]["fsdp"], found[0]["ddp"]) < 1e-5
    assert largest_difference(found[0]["fsdp"], alone) < 1e-5


def test_a_sharded_run_resumes_bit_for_bit(found, folder):
    assert largest_difference(found[0]["fsdp"], found[0]["fsdp-parts"]) == 0
    assert (folder / "fsdp/samples/00000005.png").is_file()
    logged = [line["validation"] for line in Run.open(folder / "fsdp").metrics() if "validation" in line]
    assert len(logged) == 3


def test_a_sharded_checkpoint_opens_in_one_process(found, folder, tmp_path):
    for averaged, path in ((False, "flow.network"), (True, "average")):
        flow = pr.load(folder / "fsdp", averaged=averaged)
        prefix = "network." if averaged else ""
        own = {prefix + name: value for name, value in flow.network.state_dict().items()}
        assert largest_difference({path: own}, {path: found[0]["fsdp"][path]}) == 0
    # ... and trains on there, optimiser and all: as the two processes do.
    onward = image_run(folder / "fsdp-parts", 6, resume=True)
    assert largest_difference(onward, image_run(tmp_path / "alone", 6)) < 1e-5


def test_the_command_starts_its_processes(tmp_path):
    command = ["train", "rectified-flow", "--data", "two_moons", "--iterations", "3", "--out", str(tmp_path / "run")]
    machines = ["--devices", "2", "--strategy", "fsdp", "--accelerator", "cpu"]
    process = subprocess.run(
        [sys.executable, "-m", "pantarhei", *command, *QUICK, *machines],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert process.stdout.count("trained 3 iterations") == 1
    assert len(list((tmp_path / "run/checkpoints/00000003").glob("random.*"))) == 2


def training(out, iterations, *more):
    data = ["train", "rectified-flow", "--data", "two_moons", "--iterations", iterations, "--log-every", "1"]
    return [*data, *QUICK, "--out", out, *more]


def model(run, iteration):
    return (run / f"checkpoints/{iteration:08d}/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start(training(run, 24, "--checkpoint-every", 24))) == 0
    return model(run, 24)


def test_killed_before_each_file_operation_a_run_resumes_bit_identical(tmp_path, undisturbed):
    """One run, ended before its first file operation, resumed and ended before its second, and so on.

    The set-up and each checkpoint take about twenty operations, so every gap between two of them is met.
    """
    run = tmp_path / "run"
    command = training(run, 24, "--checkpoint-every", 1, "--keep", 1, "--resume")
    last = 0
    while True:
        last += 1
        status = finish(start(command, last))
        if status != -signal.SIGKILL:
            break
    assert status == 0
    assert last > 30
    assert model(run, 24) == undisturbed
    assert [line["iteration"] for line in Run.open(run).metrics() if "loss" in line] == list(range(1, 25))
    assert [p.name for p in (run / "checkpoints").iterdir()][-1:] == ["00000024"]


def test_killed_at_random_moments_a_run_resumes_bit_identical(tmp_path, undisturbed):
    run, moments = tmp_path / "run", random.Random()
    command = training(run, 24, "--checkpoint-every", 3, "--resume")
    for _ in range(6):
        process = start(command)
        time.sleep(moments.uniform(0.05, 0.6))
        process.kill()
        assert finish(process) in (-signal.SIGKILL, 0)
        if (run / "checkpoints/00000024/state.json").is_file():
            break
    else:
        assert finish(start(command)) == 0
    assert model(run, 24) == undisturbed
