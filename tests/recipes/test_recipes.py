"""The rectified-flow recipe, evaluation, and the quickstart in small."""

import json
import re

import pytest
import torch

from pantarhei.flow import Flow
from pantarhei.recipes.backbones import NetworkConfig, build_network, default_multipliers
from pantarhei.recipes.data import DataConfig
from pantarhei.recipes.evaluation import Coordinates, evaluate_flow, make_reference
from pantarhei.recipes.quickstart import QuickstartConfig, quickstart
from pantarhei.recipes.rectified_flow import RectifiedFlowConfig, build_task
from pantarhei.recipes.registry import recipe_in
from pantarhei.recipes.systems import SYSTEMS


def test_a_recipe_is_built_from_its_data_and_seed():
    task, augment = build_task(RectifiedFlowConfig(data=DataConfig(augment=("shift",))), seed=3)
    assert task.flow.shape == (1, 8, 8)
    assert task.flow.null == {"label": 10}
    assert len(task.data) + len(task.held_out) == 1797
    assert task.objective.dropout == 0.1
    assert augment is not None
    again, _ = build_task(RectifiedFlowConfig(), seed=3)
    other, _ = build_task(RectifiedFlowConfig(), seed=4)
    weight = task.flow.network.stem.weight
    assert torch.equal(weight, again.flow.network.stem.weight)
    assert not torch.equal(weight, other.flow.network.stem.weight)


def test_points_get_a_perceptron_and_unlabelled_data_no_labels():
    task, _ = build_task(RectifiedFlowConfig(data=DataConfig("two_moons"), path="vp", predicts="noise"), seed=0)
    assert type(task.flow.network).__name__ == "MLP"
    assert task.flow.conditions == ()
    assert task.flow.path.spec()["name"] == "vp"


def test_recipes_come_back_from_a_run():
    recipe = RectifiedFlowConfig(network=NetworkConfig(width=16, blocks=(1, 2)), data=DataConfig(held_out=0.3), lr=2e-3)
    assert recipe_in({"recipe": recipe.spec()}) == recipe
    with pytest.raises(ValueError, match="unexpected"):
        recipe_in({"recipe": {"colour": 3}})


def test_sizes_follow_the_images():
    assert [default_multipliers(size) for size in (8, 16, 28, 32, 64)] == [
        (1, 2),
        (1, 2),
        (1, 2, 2),
        (1, 2, 2),
        (1, 2, 2, 2),
    ]
    with pytest.raises(ValueError, match="divisible by 4"):
        build_network(NetworkConfig(multipliers=(1, 2, 2)), (3, 30, 30), 0, seed=0)
    for bad in ({"data": "digit"}, {"held_out": 1.5}):
        with pytest.raises((ValueError, FileNotFoundError), match=r"digits|held_out"):
            DataConfig(**bad).open()


def test_samples_that_are_the_data_score_at_the_floor():
    train_set, held_out = DataConfig("eight_gaussians").open()
    reference = make_reference(train_set, held_out, limit=2000)
    assert isinstance(reference.extractor, Coordinates)

    class Copy(torch.nn.Module):
        """Carries noise near the held-out points: v = (target - x) / (1 - t) with a target of each row's own."""

        def forward(self, x, t):
            rows = torch.arange(len(x)) % len(reference.held_out)
            return (reference.held_out[rows] - x) / (1 - t[:, None])

    result = evaluate_flow(Flow(Copy(), shape=(2,)), reference, steps=(1, 3), count=1000, batch=1000)
    assert [row.steps for row in result.rows] == [1, 3]
    assert result.rows[0].frechet.value < 4 * reference.floor + 0.01
    assert result.rows[0].precision > 0.9
    assert result.rows[0].accuracy is None
    assert "held-out" in result.table().text()
    json.dumps(result.data())
    heun = evaluate_flow(Flow(Copy(), shape=(2,)), reference, steps=(2,), count=10, method="midpoint")
    assert heun.rows[0].evaluations == 4
    for options, message in (({"count": 3}, "at least 10"), ({"steps": (0,)}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            evaluate_flow(Flow(Copy(), shape=(2,)), reference, **options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    config = QuickstartConfig(
        recipe=RectifiedFlowConfig(network=NetworkConfig(width=16, blocks=(1, 1)), average=0.9),
        iterations=25,
        batch=32,
        pairs=64,
        pair_steps=3,
        reflow_iterations=10,
        count=60,
    )
    said = []
    return folder, config, quickstart(folder, config=config, progress=False, say=said.append), said


def test_the_quickstart_leaves_runs_figures_and_a_self_contained_page(small):
    folder, _, result, said = small
    assert len(said) == 4
    assert [row.steps for row in result.before.rows] == [1, 2, 4, 8, 50]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 7
    assert not re.search(r'(src|href)="(http|//|/)', page)
    assert "classifier trained on digits" in page
    assert (folder / "samples.png").stat().st_size > 10_000
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["after"]["rows"][0]["frechet"][0] == pytest.approx(result.after.rows[0].frechet.value)
    for run in ("1-rectified-flow", "2-rectified-flow"):
        assert "| training |" in (folder / run / "README.md").read_text()


def test_the_quickstart_does_not_repeat_what_is_done(small):
    folder, config, result, _ = small
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = quickstart(folder, config=config, progress=False, say=lambda line: None)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == stamps
    assert again.after.rows[0].frechet == result.after.rows[0].frechet
    with pytest.raises(ValueError, match="made with seed 0"):
        quickstart(folder, seed=1, config=config, progress=False, say=lambda line: None)


def test_the_sixteen_systems_are_listed_once():
    assert len({system.name for system in SYSTEMS}) == len(SYSTEMS) == 16
