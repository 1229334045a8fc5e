"""Published checkpoints of rectified flow: both directions, and refusals that say what was expected."""

import pytest
import torch

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.interop import score_sde
from pantarhei.networks import NCSNpp, NCSNppConfig
from pantarhei.networks.ncsnpp_keys import to_reference, trainable

SMALL = {"size": 16, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (16,)}
CASES = {
    "cifar": NCSNppConfig(**SMALL),
    "256 pixels": NCSNppConfig(
        **SMALL,
        embedding="fourier",
        time_floor=1e-3,
        filter=(1, 3, 3, 1),
        input_pyramid=True,
        output_pyramid=True,
        divide=True,
    ),
}


def random_flow(config):
    torch.manual_seed(0)
    network = NCSNpp(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return pr.Flow(network.eval(), shape=(config.channels, config.size, config.size), interval=(1e-3, 1.0))


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    flow = random_flow(CASES[case])
    raw = {k: v + 1 for k, v in flow.network.state_dict().items()}
    raw |= {k: v for k, v in flow.network.state_dict().items() if k == "features.frequencies"}
    path = score_sde.write(flow, tmp_path / "checkpoint_8.pth", raw=raw, iterations=7)
    back = pr.load(path)
    assert back.network.config == flow.network.config
    own = flow.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in back.network.state_dict().items())
    other = pr.load(path, averaged=False).network.state_dict()
    assert all(torch.equal(other[k], raw[k]) for k in raw)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(back.sample(x0=x, steps=2), flow.sample(x0=x, steps=2))
    assert back.interval == (1e-3, 1.0)
    assert back.provenance.notes["iterations"] == 7


def test_file_is_what_the_reference_writes(tmp_path):
    flow = random_flow(CASES["256 pixels"])
    path = score_sde.write(flow, tmp_path / "checkpoint_1.pth")
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"optimizer", "model", "ema", "step", "pantarhei"}
    assert all(name.startswith("module.") for name in content["model"])
    own = to_reference(flow.network.state_dict(), flow.network.config)
    # The random frequencies are a frozen parameter there: counted by the optimiser, not by the average.
    assert "all_modules.0.W" not in trainable(own)
    assert len(content["ema"]["shadow_params"]) == len(own) - 1
    assert len(content["optimizer"]["param_groups"][0]["params"]) == len(own)
    assert content["model"]["module.sigmas"].shape == (2000,)
    assert content["model"]["module.sigmas"].dtype == torch.float64


def test_what_is_not_known_is_not_guessed(tmp_path):
    path = score_sde.write(random_flow(CASES["cifar"]), tmp_path / "c.pth")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    with pytest.raises(ValueError, match="not stated in the file"):
        pr.load(path).score(x, t)
    with pytest.raises(ValueError, match="not stated in the file"):
        pr.load(path).log_prob(x)
    with pytest.raises(ValueError, match="rectified 1x"):
        pr.load(path, rectified=1).score(x, t)
    assert pr.load(path, rectified=0).score(x, t).shape == x.shape


def damaged(content, how):
    del content["pantarhei"]  # as a file of theirs
    names = list(content["model"])
    if how == "missing":
        del content["model"]["module.all_modules.5.Conv_0.weight"]
    elif how == "shape":
        content["model"]["module.all_modules.2.bias"] = torch.zeros(3)
    elif how == "extra":
        content["model"]["module.all_modules.3.Extra.weight"] = torch.zeros(3)
    elif how == "average":
        content["ema"]["shadow_params"] = content["ema"]["shadow_params"][1:]
    elif how == "nan":
        content["ema"]["shadow_params"][0][0] = float("nan")
    elif how == "other":
        content = {"model": {"enc.32x32_conv.weight": torch.zeros(3)}}
    elif how == "truncated list":
        content["model"] = {k: v for k, v in content["model"].items() if k in names[:40]}
        del content["ema"]
    return content


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "all_modules.5"),
        ("shape", r"all_modules.2.bias has shape \(3,\), expected \(8,\)"),
        ("extra", "Extra.weight"),
        ("average", "ema.shadow_params must hold"),
        ("nan", "NaN"),
        ("other", "no checkpoint that is known"),
        ("truncated list", "expected all_modules"),
    ],
)
def test_refusals(how, said, tmp_path, capsys):
    path = score_sde.write(random_flow(CASES["cifar"]), tmp_path / "c.pth")
    content = damaged(torch.load(path, weights_only=True), how)
    torch.save(content, path)
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    with pytest.raises(ValueError, match=said):
        pr.load(path)
    assert not (tmp_path / "out").exists()


def test_convert_both_ways(tmp_path, capsys):
    path = score_sde.write(random_flow(CASES["cifar"]), tmp_path / "c.pth")
    assert main(["convert", str(path), "--out", str(tmp_path / "folder"), "--rectified", "2"]) == 0
    assert pr.load(tmp_path / "folder").provenance.rectified == 2
    assert main(["convert", str(tmp_path / "folder"), "--to", "score-sde", "--out", str(tmp_path / "back.pth")]) == 0
    first, second = (torch.load(p, weights_only=True) for p in (path, tmp_path / "back.pth"))
    assert all(torch.equal(first["model"][k], second["model"][k]) for k in first["model"])
    assert main(["convert", str(tmp_path / "folder"), "--to", "score-sde", "--out", str(tmp_path / "x")]) == 2
    with pytest.raises(TypeError, match="only an NCSN"):
        score_sde.write(pr.Flow(torch.nn.Identity()), tmp_path / "y.pth")


def test_raw_only_file_of_a_larger_image(tmp_path):
    config = NCSNppConfig(size=32, width=8, multipliers=(1, 1), blocks=1, attention=())
    tensors = to_reference(NCSNpp(config).state_dict(), config)
    torch.save({f"module.{k}": v for k, v in tensors.items()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="give the size"):
        pr.load(tmp_path / "w.pth")
    assert pr.load(tmp_path / "w.pth", size=32).network.config == config


@pytest.mark.parametrize("change", [{"filter": (1, 3, 3, 1)}, {"rescale": False}, {"attention": (8,), "size": 32}])
def test_what_the_names_do_not_tell_survives_the_way_back(change, tmp_path):
    flow = random_flow(NCSNppConfig(**{**SMALL, **change}))
    assert pr.load(score_sde.write(flow, tmp_path / "c.pth")).network.config == flow.network.config


def test_distilled_checkpoints_and_odd_names(tmp_path):
    path = score_sde.write(random_flow(CASES["cifar"]), tmp_path / "c.pth")
    student = pr.load(path, rectified=1, distilled=1)
    assert student.provenance.notes["steps"] == 1
    with pytest.raises(ValueError, match="distilled to 1 steps"):
        student.log_prob(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="rectified: must be at least 0"):
        pr.load(path, rectified=-3)
    torch.save({"all_modules.x.w": torch.zeros(2)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd.pth: expected names all_modules.<number>"):
        pr.load(tmp_path / "odd.pth")
