"""All methods on one teacher within a budget: every row is there, finished work is kept, the page and the table say it."""

import json
import signal
from dataclasses import replace

import pytest
import torch

import pantarhei as pr
from pantarhei.data.shards import ShardStore
from pantarhei.data.sources import TensorSource
from pantarhei.data.toys import eight_gaussians
from pantarhei.flow import Flow
from pantarhei.networks import MLP, MLPConfig
from pantarhei.recipes import comparison
from pantarhei.recipes.comparison import Budget, compare
from pantarhei.recipes.comparison_page import write_page
from pantarhei.recipes.comparison_rows import file_name
from pantarhei.recipes.evaluation import make_reference
from pantarhei.straighten import Solver

QUIET = {"progress": False, "tensorboard": False}
BUDGET = Budget(0.012, batch=64, lr=1e-3, average=0.9, pairs=300, solver=Solver("heun", 4))
FREE = {
    "DDIM, own grid",
    "Euler, linear path",
    "DPM-Solver++ (2M), own grid",
    "DPM-Solver++ (2M), linear path",
    "tuned grid",
    "Heun (EDM)",
}
TRAINED = {
    "rectified flow (reflow)",
    "rectified flow++",
    "rectified diffusion",
    "phased (4)",
    "consistency distillation",
    "consistency trajectory",
    "consistency training",
    "mean velocity",
    "distilled to 1 step",
}


def ring(count, seed):
    return TensorSource({"x1": eight_gaussians(count, torch.Generator().manual_seed(seed))}, name="ring")


DATA = (ring(2000, 0), ring(500, 1))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Flow(MLP(MLPConfig(width=32)), shape=(2,), provenance=pr.Provenance(data="ring"))
    task = pr.FlowTask(flow, data=DATA[0], optimization=pr.Optimization(lr=4e-3, decay="cosine"), average=0.98)
    pr.train(task, tmp_path_factory.mktemp("teacher"), iterations=200, batch=128, **QUIET)
    return task.result()


@pytest.fixture(scope="module")
def reference():
    return make_reference(*DATA)


@pytest.fixture(autouse=True)
def short_trial(monkeypatch):
    monkeypatch.setattr(comparison, "TRIAL", 0.05)


def run(teacher, reference, out, budget=BUDGET, **options):
    return compare(teacher, DATA, reference, out, budget, **{"evaluations": (1, 4), "count": 100, **QUIET, **options})


@pytest.fixture(scope="module")
def finished(teacher, reference, tmp_path_factory):
    out, before = tmp_path_factory.mktemp("comparison"), comparison.TRIAL
    comparison.TRIAL = 0.05
    said = []
    try:
        result = run(teacher, reference, out, name="rings", say=said.append)
    finally:
        comparison.TRIAL = before
    return out, result, said


def test_every_method_has_its_rows(finished):
    _, result, said = finished
    asked = {(row.arm, row.sampler, row.asked) for row in result.rows}
    assert len(asked) == len(result.rows)
    assert {arm for arm, _, _ in asked} == FREE | TRAINED
    # Each at the numbers of evaluations that it is made for.
    own = {"phased (4)": {4}, "distilled to 1 step": {1}}
    for arm in TRAINED | {"DDIM, own grid", "Euler, linear path"}:
        assert {number for name, _, number in asked if name == arm} == own.get(arm, {1, 4}), arm
    for row in result.rows:
        assert row.frechet.low <= row.frechet.value <= row.frechet.high
        assert row.gap >= 0
        assert 0 <= row.recall <= 1
        assert (row.minutes > 0) == (row.arm in TRAINED)
        assert row.evaluations <= row.asked
    heun = next(row for row in result.rows if row.arm == "Heun (EDM)")
    assert (heun.asked, heun.evaluations) == (4, 3)
    assert result.teacher_evaluations == 8
    assert result.about["pairs"] > 0
    assert result.about["trained_on"] == "ring"
    assert any(line.startswith("pairs: ") for line in said)
    # Without training one Euler step of a curved flow is far from its samples; four tuned ones are nearer.
    gaps = {(row.arm, row.asked): row.gap for row in result.rows if row.sampler != "reinterpolate"}
    assert gaps["Euler, linear path", 1] > 3 * gaps["tuned grid", 4]
    assert gaps["DDIM, own grid", 4] == pytest.approx(gaps["Euler, linear path", 4], rel=1e-4)
    assert set(result.best()) == {1, 4}
    assert result.best()[4].frechet.value == min(row.frechet.value for row in result.rows if row.asked == 4)


def test_the_page_and_the_tables(finished, tmp_path):
    out, result, _ = finished
    page = write_page(result, tmp_path).read_text()
    for name in FREE | TRAINED:
        assert name in page
    assert "rings: which way is fastest?" in page
    assert "Trained on ring; coupling independent, rectified 0 times." in page
    table = (tmp_path / "comparison.md").read_text()
    assert "4 NFE" in table
    assert "held-out data" in table
    written = json.loads((out / "comparison.json").read_text())
    assert len(written["rows"]) == len(result.rows)
    assert written["about"]["skipped"] == {}


def test_finished_rows_and_students_are_kept(finished, teacher, reference, monkeypatch):
    out, result, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in (out / "rows").glob("*.json")}
    lost = out / "rows" / f"{file_name('rectified diffusion ddim 4')}.json"
    lost.unlink()

    def trained(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(comparison, "train", trained)
    again = run(teacher, reference, out, name="rings", say=lambda line: None)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items() if path != lost)
    for old, new in zip(result.rows, again.rows, strict=True):
        assert (old.arm, old.sampler, old.asked) == (new.arm, new.sampler, new.asked)
        assert new.frechet.value == pytest.approx(old.frechet.value, rel=1e-3)
        assert new.minutes == pytest.approx(old.minutes, abs=0.02)
    # More numbers of evaluations are scored with the students that are there.
    more = run(teacher, reference, out, evaluations=(2,), methods=("diffusion",), name="rings", say=lambda line: None)
    assert {row.asked for row in more.rows} == {2}


def test_a_killed_comparison_goes_on_where_it_was(finished, teacher, reference, tmp_path, monkeypatch):
    write = ShardStore.write
    monkeypatch.setattr(ShardStore, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    options = {"methods": ("rectified diffusion",), "evaluations": (1,), "say": lambda line: None}
    with pytest.raises(KeyboardInterrupt):
        run(teacher, reference, tmp_path, **options)
    rows = sorted(path.name for path in (tmp_path / "rows").glob("*.json"))
    assert len(rows) == 2  # what needs no pairs is scored already
    monkeypatch.setattr(ShardStore, "write", write)
    found = run(teacher, reference, tmp_path, **options)
    assert [row.arm for row in found.rows] == ["DDIM, own grid", "Euler, linear path", "rectified diffusion"]


class Interrupts(TensorSource):
    """Data that press Ctrl-C when they are fetched the n-th time."""

    def __init__(self, tensors, after):
        super().__init__(tensors, name="ring")
        self.left = after

    def fetch(self, indices):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().fetch(indices)


def interrupted(teacher, reference, out, after):
    data = (Interrupts(DATA[0].fetch(torch.arange(2000)), after), DATA[1])
    options = {"methods": ("phased",), "evaluations": (4,), "count": 100, "say": lambda line: None, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        compare(teacher, data, reference, out, BUDGET, **options)
    return data, options


def test_an_interrupted_student_does_not_count_as_done(teacher, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "_seconds_an_iteration", lambda *_: 0.72 / 40)  # forty iterations
    data, options = interrupted(teacher, reference, tmp_path, 20)
    assert not json.loads((tmp_path / "phased-4.json").read_text())["done"]
    found = compare(teacher, data, reference, tmp_path, BUDGET, **options)
    assert "phased (4)" in {row.arm for row in found.rows}
    assert json.loads((tmp_path / "phased-4.json").read_text()) == {
        "iterations": 40,
        "done": True,
        "minutes": pytest.approx(0.01, abs=0.02),
    }
    assert (tmp_path / "phased-4/checkpoints/00000040").is_dir()


def test_ctrl_c_while_iterations_are_timed_stops(teacher, reference, tmp_path):
    interrupted(teacher, reference, tmp_path, 2)
    assert not (tmp_path / "phased-4.json").is_file()


def test_another_setting_is_refused(finished, teacher, reference):
    out, _, _ = finished
    for options, changed in (
        ({"count": 200}, "count"),
        ({"seed": 1}, "seed"),
        ({"budget": replace(BUDGET, minutes=0.05)}, "budget"),
        ({"budget": replace(BUDGET, solver=Solver("heun", 5))}, "budget"),
    ):
        with pytest.raises(ValueError, match=rf"another {changed}; choose another folder or delete it"):
            run(teacher, reference, out, **options)


def test_another_teacher_is_refused(finished, teacher, reference):
    out, _, _ = finished
    other = teacher.like(MLP(MLPConfig(width=8)))
    with pytest.raises(ValueError, match="another teacher"):
        run(other, reference, out, methods=("phased",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": replace(BUDGET, minutes=0.0)}, "budget: must be positive, got 0 minutes"),
        ({"count": 5}, "count: at least 10 samples are needed, got 5"),
        ({"evaluations": ()}, "evaluations: every number must be at least 1"),
        ({"evaluations": (0, 2)}, r"evaluations: every number must be at least 1, got \[0, 2\]"),
        ({"methods": ("adversarial",)}, "'adversarial' is none of rectified flow"),
    ],
)
def test_arguments_that_cannot_be(teacher, reference, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(teacher, reference, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_teachers_that_cannot_be_compared(teacher, reference, tmp_path):
    from_data = Flow(teacher.network, source=torch.randn(50, 2), shape=(2,))
    with pytest.raises(ValueError, match="the methods compared here start from noise"):
        run(from_data, reference, tmp_path)


def test_what_does_not_apply_is_said(teacher, reference, tmp_path):
    vp = Flow(MLP(MLPConfig(width=8)), path="vp", predicts="noise", shape=(2,))
    options = {"methods": ("distilled",), "evaluations": (1,), "say": lambda line: None, "name": "vp"}
    found = run(vp, reference, tmp_path, **options)
    assert {row.arm for row in found.rows} == {"DDIM, own grid", "Euler, linear path"}
    assert found.about["skipped"] == {"distilled to 1 step": "needs a velocity on the linear path"}
    assert found.about["pairs"] == 0
    assert not (tmp_path / "pairs").exists()
    assert "Not run: distilled to 1 step, which needs a velocity" in write_page(found, tmp_path).read_text()
