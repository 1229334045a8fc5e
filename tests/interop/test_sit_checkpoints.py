"""Checkpoints of SiT: both directions, both layouts, and refusals that say what was expected."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.flow import Provenance
from pantarhei.interop import sit
from pantarhei.networks import SiT, SiTConfig

# Heads of 64 features, as in all published sizes, so that their number is told by the width.
SMALL = {"size": 4, "patch": 2, "channels": 4, "width": 64, "depth": 2, "heads": 1, "classes": 3}


def random_flow(provenance=None, **settings):
    torch.manual_seed(0)
    config = SiTConfig(**{**SMALL, **settings})
    network = SiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    null = {"label": config.classes} if config.classes else None
    return pr.Flow(network.eval(), shape=(config.channels, config.size, config.size), null=null, provenance=provenance)


def saved(content, path):
    torch.save(content, path)
    return path


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", ["weights", "train"])
@pytest.mark.parametrize("settings", [{}, {"learn_sigma": False, "mlp": 2.5}, {"patch": 1, "depth": 1, "channels": 3}])
def test_round_trip(layout, settings, tmp_path):
    flow = random_flow(**settings)
    back = pr.load(sit.write(flow, tmp_path / "SiT.pt", layout=layout))
    assert back.network.config == flow.network.config
    assert same(back.network.state_dict(), flow.network.state_dict())
    assert back.null == {"label": 3}
    assert back.shape == flow.shape
    assert not back.network.training
    assert all(parameter.requires_grad for parameter in back.network.parameters())
    x0 = torch.randn(2, *flow.shape)
    options = {"x0": x0, "steps": 2, "condition": torch.tensor([0, 2]), "guidance": 1.5}
    assert torch.equal(back.sample(**options), flow.sample(**options))
    # Independent noise, Gaussian source: there is a score.
    assert back.score(x0, torch.tensor(0.5), torch.tensor([0, 3])).shape == x0.shape


def test_published_weights_are_a_state_dict_of_ours(tmp_path):
    flow = random_flow()
    content = torch.load(sit.write(flow, tmp_path / "SiT.pt"), weights_only=True)
    assert same(content, flow.network.state_dict())
    save_file(content, tmp_path / "SiT.safetensors")
    assert same(pr.load(tmp_path / "SiT.safetensors").network.state_dict(), content)


def test_training_file_is_what_their_script_saves(tmp_path):
    flow = random_flow()
    raw = {name: value + 1 for name, value in flow.network.state_dict().items()}
    path = sit.write(flow, tmp_path / "0050000.pt", layout="train", raw=raw)
    with torch.serialization.safe_globals([Namespace]):
        content = torch.load(path, weights_only=True)
    assert content.keys() == {"model", "ema", "opt", "args", "pantarhei"}
    assert same(content["ema"], flow.network.state_dict())
    assert content["args"].num_classes == 3
    assert content["args"].path_type == "Linear"
    # The optimiser counts every tensor, the frozen positions too.
    parameters = [torch.nn.Parameter(value) for value in content["ema"].values()]
    torch.optim.AdamW(parameters).load_state_dict(content["opt"])
    assert same(pr.load(path).network.state_dict(), flow.network.state_dict())
    assert same(pr.load(path, averaged=False).network.state_dict(), raw)
    assert pr.load(path).provenance.notes["weights"] == "average"


def test_a_file_of_theirs_opens(tmp_path):
    state = random_flow().network.state_dict()
    args = Namespace(model="SiT-own", path_type="GVP", prediction="noise", num_classes=3, data_path="x")
    path = saved({"model": state, "ema": state, "opt": {}, "args": args}, tmp_path / "t.pt")
    flow = pr.load(path)
    assert flow.path.spec()["name"] == "cosine"
    assert flow.prediction.spec()["name"] == "noise"
    for change, said in (({"path_type": "Cubic"}, "known: Linear, GVP, VP"), ({"prediction": "x"}, "known: velocity")):
        saved({"model": state, "ema": state, "args": Namespace(**change)}, path)
        with pytest.raises(ValueError, match=said):
            pr.load(path)
    saved({"model": state}, path)
    with pytest.raises(ValueError, match="no 'ema' in this file; ask for the raw weights"):
        pr.load(path)
    assert same(pr.load(path, averaged=False).network.state_dict(), state)
    # Half precision is widened.
    saved({name: value.half() for name, value in state.items()}, path)
    assert pr.load(path).dtype == torch.float32


def test_unconditional_networks(tmp_path):
    flow = random_flow(classes=0)
    state = flow.network.state_dict()
    path = sit.write(flow, tmp_path / "SiT.pt")
    # Their code always has a table; its only row stands for no class.
    assert torch.load(path, weights_only=True)["y_embedder.embedding_table.weight"].shape == (1, 64)
    back = pr.load(path)
    assert back.network.config.classes == 0
    assert back.null == {}
    assert same(back.network.state_dict(), state)
    # A row that was trained acts on every sample alike.
    row = torch.randn(1, 64)
    theirs = pr.load(saved({**state, "y_embedder.embedding_table.weight": row}, tmp_path / "other.pt"))
    with_table = SiT(SiTConfig(**{**SMALL, "classes": 1})).eval()
    with_table.load_state_dict({**state, "y_embedder.embedding_table.weight": row.expand(2, 64)})
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.7])
    assert torch.allclose(theirs.velocity(x, t), with_table(x, t), atol=1e-5)
    assert same(pr.load(saved(state, tmp_path / "own.pt")).network.state_dict(), state)


def test_heads_that_the_weights_do_not_tell(tmp_path):
    flow = random_flow(heads=4)
    for layout, other in (("weights", 1), ("train", 4)):
        path = sit.write(flow, tmp_path / "SiT.pt", layout=layout)
        assert pr.load(path).network.config.heads == other
        assert pr.load(path, heads=4).network.config == flow.network.config
        assert pr.load(path, heads=2).network.config.heads == 2
    with pytest.raises(ValueError, match="multiple of 4 and of the 3 heads"):
        pr.load(path, heads=3)
    bare = sit.write(random_flow(width=48), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"heads: .* no published size \(2 blocks of width 48\)"):
        pr.load(bare)
    # The published sizes by depth and width; XL's width alone would allow 16 and 18.
    for size in ("S", "B", "L", "XL"):
        config = SiTConfig.named(f"{size}/4", classes=10)
        with torch.device("meta"):
            state = SiT(config).state_dict()
        assert sit.infer_config(state, "file") == config


def test_provenance_is_told_or_kept(tmp_path):
    flow = random_flow(Provenance(coupling="independent", rectified=1, data="flowers"))
    path = sit.write(flow, tmp_path / "SiT.pt", layout="train")
    x, t = torch.randn(1, 4, 4, 4), torch.tensor(0.5)
    with pytest.raises(ValueError, match="rectified 1x"):
        pr.load(path).score(x, t)
    assert pr.load(path).provenance.data == "flowers"
    bare = sit.write(flow, tmp_path / "bare.pt")
    assert pr.load(bare).provenance.rectified == 0
    assert pr.load(bare, rectified=2).provenance.rectified == 2
    student = pr.load(bare, rectified=1, distilled=1)
    with pytest.raises(ValueError, match="distilled to 1 steps"):
        student.log_prob(x)
    with pytest.raises(ValueError, match="rectified: must be at least 0"):
        pr.load(bare, rectified=-1)


def test_latents_and_codec(tmp_path):
    class Doubles:
        def encode(self, x):
            return x / 2

        def decode(self, z):
            return 2 * z

    path = sit.write(random_flow(), tmp_path / "SiT.pt")
    x0 = torch.randn(1, 4, 4, 4)
    plain = pr.load(path).sample(x0=x0, steps=1)
    assert torch.equal(pr.load(path, codec=Doubles()).sample(x0=x0, steps=1), 2 * plain)


def damaged(state, how):
    changes = {
        "shape": {"blocks.1.attn.qkv.weight": torch.zeros(3, 64)},
        "odd positions": {"pos_embed": torch.zeros(1, 5, 64)},
        "width of positions": {"pos_embed": torch.zeros(1, 4, 32)},
        "values": {"final_layer.linear.weight": torch.zeros(17, 64)},
        "dimensions": {"x_embedder.proj.weight": torch.zeros(64, 16)},
        "extra": {"blocks.0.attn.q_norm.weight": torch.zeros(64)},
        "patches": {"x_embedder.proj.weight": torch.zeros(64, 4, 2, 3)},
        "nan": {"blocks.1.mlp.fc1.bias": torch.full((256,), float("nan"))},
        "integers": {"blocks.1.mlp.fc1.bias": torch.zeros(256, dtype=torch.int8)},
        "gap": {"blocks.3.attn.qkv.weight": torch.zeros(3, 64)},
        "no numbers": {"blocks.x.attn.qkv.weight": torch.zeros(3, 64)},
    }
    missing = {
        "missing": "blocks.1.attn.proj.bias",
        "no patches": "x_embedder.proj.weight",
        "no positions": "pos_embed",
    }
    return {name: value for name, value in {**state, **changes.get(how, {})}.items() if name != missing.get(how)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "blocks.1.attn.proj.bias is missing"),
        ("no patches", "x_embedder.proj.weight is missing; expected a tensor of shape"),
        ("no positions", "pos_embed is missing"),
        ("shape", r"blocks.1.attn.qkv.weight has shape \(3, 64\)"),
        ("odd positions", "5 positions; expected a square"),
        ("width of positions", "pos_embed has shape"),
        ("values", "17 values a patch; expected 16, or 32"),
        ("dimensions", r"has shape \(64, 16\), expected \(width, channels, patch, patch\)"),
        ("extra", "q_norm.weight is not part of the network"),
        ("patches", "x_embedder.proj.weight has shape"),
        ("nan", "NaN"),
        ("integers", "int8"),
        ("gap", "blocks.2.attn.qkv.weight is missing"),
        ("no numbers", "blocks"),
    ],
)
def test_refusals(how, said, tmp_path, capsys):
    path = saved(damaged(random_flow().network.state_dict(), how), tmp_path / "SiT.pt")
    with pytest.raises(ValueError, match=said):
        pr.load(path)
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "SiT.pt" in message
    assert not (tmp_path / "out").exists()


def test_a_size_that_does_not_fit_is_refused(tmp_path):
    path = sit.write(random_flow(), tmp_path / "SiT.pt")
    assert pr.load(path, size=4).network.config.size == 4
    with pytest.raises(ValueError, match=r"size: .* is for side 4 \(2 patches of 2\), got 32"):
        pr.load(path, size=32)


def test_flows_without_a_place(tmp_path):
    network = random_flow().network
    with pytest.raises(TypeError, match="only a SiT has a place"):
        sit.write(pr.Flow(torch.nn.Identity()), tmp_path / "x.pt")
    for settings in ({"path": "cosine"}, {"predicts": "noise"}):
        with pytest.raises(ValueError, match="velocity of the linear path"):
            sit.write(pr.Flow(network, **settings), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        sit.write(random_flow(), tmp_path / "x.pt", layout="trained")
    assert not (tmp_path / "x.pt").exists()


def test_other_names_are_not_taken_for_it():
    assert not sit.recognise({"joint_blocks.0.x_block.adaLN_modulation.1.weight": torch.zeros(1)})
    assert not sit.recognise({"model": {"module.all_modules.0.W": torch.zeros(1)}, "ema": {"shadow_params": []}})
    with pytest.raises(ValueError, match="expected weights named blocks"):
        sit.read("x.pt", {"ema": {"a": torch.zeros(1)}})


def test_code_in_a_file_is_still_refused(tmp_path):
    path = saved({"blocks.0.adaLN_modulation.1.weight": torch.zeros(1), "args": pytest.approx}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="refused"):
        pr.load(path)


def test_convert_both_ways(tmp_path, capsys):
    flow = random_flow(heads=2)
    path = sit.write(flow, tmp_path / "SiT.pt")
    folder = str(tmp_path / "folder")
    assert main(["convert", str(path), "--out", folder, "--heads", "2"]) == 0
    assert pr.load(folder).network.config == flow.network.config
    assert main(["convert", folder, "--to", "sit", "--out", str(tmp_path / "back.pt")]) == 0
    assert same(*(torch.load(p, weights_only=True) for p in (path, tmp_path / "back.pt")))
    assert main(["convert", folder, "--to", "sit-train", "--out", str(tmp_path / "train.pt")]) == 0
    assert pr.load(tmp_path / "train.pt").network.config.heads == 2
    assert main(["convert", str(tmp_path / "train.pt"), "--to", "sit", "--out", str(tmp_path / "bare.pt")]) == 0
    capsys.readouterr()
    for bad, said in (
        (["--to", "sit", "--out", str(tmp_path / "x.ckpt")], "the sit layout is a .pth or .pt file, got x.ckpt"),
        (["--to", "score-sde", "--out", str(tmp_path / "x.pth")], "only an NCSN++"),
        (["--heads", "2", "--out", str(tmp_path / "again")], "only a checkpoint file needs them"),
    ):
        assert main(["convert", folder, *bad]) == 2
        message = capsys.readouterr().err
        assert said in message
        assert message.count("\n") == 1
