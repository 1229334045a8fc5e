"""Checkpoints of consistency (trajectory) models: what a file is, every layout there and back, refusals."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.flow import Flow
from pantarhei.flow.heads import Consistency
from pantarhei.flow.trajectory import TrajectoryModel
from pantarhei.interop import consistency, edm
from pantarhei.networks import ADMConfig, SongUNetConfig, adm_keys, build
from pantarhei.networks.adm import GUIDED
from pantarhei.networks.songunet import DDPMPP
from parity import Golden

SONG = replace(
    DDPMPP,
    size=8,
    width=16,
    multipliers=(1, 2),
    blocks=1,
    attention=(8,),
    classes=3,
    augment_dim=0,
    dropout=0.0,
    second_time=True,
)
IMAGENET = replace(
    GUIDED, size=64, width=32, multipliers=(1, 2), blocks=1, attention=(32,), classes=5, head=16, second_time=True
)
GUIDED_OPTIONS = {"heads": 16}


def made(config, head="ctm", **settings):
    """A trajectory model (or, without a head, a denoiser) all of whose layers have weight."""
    torch.manual_seed(0)
    network = build({"name": "songunet" if isinstance(config, SongUNetConfig) else "adm", **config.__dict__}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shape, null = (config.channels, config.size, config.size), {"label": config.classes} if config.classes else None
    settings = {"path": "edm", "predicts": "edm", "shape": shape, "null": null, **settings}
    return Flow(network, **settings) if head is None else TrajectoryModel(network, head=head, **settings)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def ctm(kind):
    return made(SONG) if kind == "songunet" else made(IMAGENET)


# What a file is


def test_every_kind_is_told():
    song, guided = made(SONG), made(IMAGENET)
    plain = made(replace(IMAGENET, second_time=False), None)
    published = adm_keys.to_published(guided.network.state_dict(), IMAGENET)
    teacher = adm_keys.to_published(plain.network.state_dict(), plain.network.config)
    own_adm = made(ADMConfig(size=8, width=64, multipliers=(1,), blocks=1, classes=0), None)
    cases = [
        ({f"model.{k}": v for k, v in song.network.state_dict().items()}, "ctm", "songunet", ""),
        (published, "ctm", "guided-diffusion", ""),
        ({f"module.{k}": v for k, v in published.items()}, "ctm", "guided-diffusion", ""),
        (teacher, "edm-or-cm", "guided-diffusion", "time_embed_s and emb_layers_s"),
        (made(replace(SONG, second_time=False), None).network.state_dict(), "edm", "songunet", "map_layer0_s"),
        (own_adm.network.state_dict(), "edm", "adm", "map_layer0_s"),
        ({"discriminators.deit.mini_discs.0.main.0.weight": torch.zeros(1)}, "discriminator", "", "the weights"),
        (torch.optim.RAdam(song.network.parameters()).state_dict(), "optimizer", "", "the weights"),
        ({"flow.network.stem.weight": torch.zeros(1)}, "ours", "", "open the folder"),
        ({"somebody": torch.zeros(1)}, "unknown", "", ""),
    ]
    for content, kind, layout, missing in cases:
        found = consistency.sniff(content)
        assert (found.kind, found.layout) == (kind, layout)
        assert missing in found.missing
        assert found.words
        assert consistency.recognise(content) == (kind not in ("edm", "unknown"))


def test_files_without_a_model_say_what_they_are(tmp_path):
    path = tmp_path / "opt006000.pt"
    torch.save(torch.optim.RAdam(torch.nn.Linear(2, 2).parameters()).state_dict(), path)
    with pytest.raises(ValueError, match=r"is no model \(state of an optimiser: .*missing: the weights \(in model"):
        pr.load(path)
    path = tmp_path / "d_model006000.pt"
    torch.save({"discriminators.deit.mini_discs.0.main.0.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"is no model .discriminator of a consistency trajectory model"):
        pr.load(path)
    torch.save({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint that is known here"):
        pr.load(path)
    with pytest.raises(ValueError, match=r"is no model .not known here"):
        pr.load(path, kind="ctm")


# There and back


@pytest.mark.parametrize("kind", ["songunet", "guided-diffusion"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_trajectory_model_there_and_back(kind, suffix, tmp_path):
    model = ctm(kind)
    path = consistency.write(model, tmp_path / f"ema_0.999_049000{suffix}")
    if suffix == ".pt":
        names = torch.load(path, weights_only=True)
        assert all(name.startswith("model.") for name in names) == (kind == "songunet")
        assert ("time_embed_s.2.bias" in names) == (kind != "songunet")
    told = GUIDED_OPTIONS if kind != "songunet" and suffix == ".pt" else {}
    back = pr.load(path, dropout=0.0, **told)
    assert isinstance(back, TrajectoryModel)
    assert back.network.config == model.network.config
    assert same(back.network.state_dict(), model.network.state_dict())
    assert (back.head, back.null, back.shape) == (model.head, model.null, model.shape)
    assert not back.network.training
    assert back.provenance.notes["read_from"] == path.name
    assert ("licence" in back.provenance.notes) == (kind == "songunet")
    x, label = torch.randn(2, *model.shape), torch.tensor([0, 2])
    with torch.no_grad():
        assert torch.equal(back.jump(x, 0.2, 0.7, label), model.jump(x, 0.2, 0.7, label))
        assert torch.equal(back.denoise(x, torch.tensor(0.2), label), model.denoise(x, torch.tensor(0.2), label))
    again = consistency.write(back, tmp_path / f"again{suffix}")
    if suffix == ".pt":
        assert same(torch.load(again, weights_only=True), torch.load(path, weights_only=True))
        other = pr.load(path, outer="variance", sigma_data=0.3, sigma_min=0.01, sigma_max=50.0, **told)
        assert (other.head.outer, other.head.floor) == ("variance", 0.01)
        assert (other.path.sigma_min, other.path.sigma_max, other.prediction.spec()["sigma_data"]) == (0.01, 50.0, 0.3)


def test_consistency_models_and_their_teacher_are_told_by_name_or_kind(tmp_path):
    config = replace(IMAGENET, second_time=False)
    model = made(config, Consistency(scaling="boundary"))
    x, label = torch.randn(2, *model.shape), torch.tensor([0, 2])
    for name in ("cd_imagenet64_l2.pt", "ct_imagenet64.pt"):
        back = pr.load(consistency.write(model, tmp_path / name), **GUIDED_OPTIONS)
        assert back.head == Consistency(scaling="boundary")
        assert same(back.network.state_dict(), model.network.state_dict())
        with torch.no_grad():
            assert torch.equal(back.jump(x, 0.2, 1.0, label), model.jump(x, 0.2, 1.0, label))
        with pytest.raises(ValueError, match="a consistency model knows where trajectories end"):
            back.sample(x0=x, steps=2, method="heun", condition=label)
    teacher = made(config, None)
    back = pr.load(consistency.write(teacher, tmp_path / "edm_imagenet64_ema.pt"), **GUIDED_OPTIONS)
    assert type(back) is Flow
    with torch.no_grad():
        assert torch.equal(back.velocity(x, torch.tensor(0.5), label), teacher.velocity(x, torch.tensor(0.5), label))
    path = consistency.write(teacher, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match=r"kind: nothing in .* says whether it is a consistency model or an EDM denoiser"
    ):
        pr.load(path)
    assert type(pr.load(path, kind="edm", heads=16)) is Flow
    assert isinstance(pr.load(path, kind="cm", heads=16), TrajectoryModel)
    # Safetensors keep what the names do not say.
    kept = pr.load(consistency.write(model, tmp_path / "model.safetensors"))
    assert kept.head == Consistency(scaling="boundary")
    assert kept.network.config == config
    # Of EDM's names a consistency model is told by kind only.
    song = made(replace(SONG, second_time=False), Consistency(scaling="boundary"))
    path = consistency.write(song, tmp_path / "song.pt")
    assert type(pr.load(path)) is Flow
    assert same(pr.load(path, kind="edm").network.state_dict(), song.network.state_dict())
    assert pr.load(path, kind="cm").head == Consistency(scaling="boundary")


def test_sizes_that_the_names_do_not_tell(tmp_path):
    path = consistency.write(made(IMAGENET), tmp_path / "ema.pt")
    assert pr.load(path, heads=16).shape == (3, 64, 64)
    other = pr.load(path, heads=32, size=16)
    assert (other.shape, other.network.config.attention, other.network.config.head) == ((3, 16, 16), (8,), 32)
    with pytest.raises(ValueError, match="heads: 64 channels do not split into heads of 48"):
        pr.load(path, heads=48)
    path = consistency.write(made(SONG), tmp_path / "song.pt")
    with pytest.raises(ValueError, match=r"size: the weights of .* tell this"):
        pr.load(path, size=16)


# Refusals


def test_a_plain_consistency_model_is_no_trajectory_model(tmp_path):
    model = made(replace(IMAGENET, second_time=False), Consistency(scaling="boundary"))
    path = consistency.write(model, tmp_path / "ct_imagenet64.pt")
    with pytest.raises(
        ValueError, match=r"time_embed_s is missing .*ct_imagenet64.pt and .* are plain consistency models"
    ) as error:
        pr.load(path, kind="ctm")
    assert "\n" not in str(error.value)
    path = consistency.write(made(replace(SONG, second_time=False), None), tmp_path / "song.pt")
    with pytest.raises(ValueError, match="map_layer0_s, map_layer1_s and affine_s are missing"):
        pr.load(path, kind="ctm")
    path = consistency.write(made(SONG), tmp_path / "ctm.pt")
    with pytest.raises(ValueError, match=r"is a consistency trajectory model .it holds map_layer0_s., not 'cm'"):
        pr.load(path, kind="cm")
    with pytest.raises(ValueError, match="did you mean 'ctm'"):
        pr.load(path, kind="ctmm")
    with pytest.raises(ValueError, match="rectified: no option of this kind of file"):
        pr.load(path, rectified=1)
    with pytest.raises(ValueError, match="sigma_min: must be positive, got -1"):
        pr.load(path, sigma_min=-1)
    with pytest.raises(ValueError, match="outer: unknown outer 'eular'"):
        pr.load(path, outer="eular")
    with pytest.raises(ValueError, match="outer: says how a consistency trajectory model jumps"):
        pr.load(tmp_path / "ct_imagenet64.pt", outer="euler")


@pytest.mark.parametrize("kind", ["songunet", "guided-diffusion"])
def test_damaged_files(kind, tmp_path):
    path = consistency.write(ctm(kind), tmp_path / "ema.pt")
    told = {} if kind == "songunet" else GUIDED_OPTIONS
    whole = torch.load(path, weights_only=True)
    first = next(name for name in whole if name.endswith("conv0.weight") or name.endswith("in_layers.2.weight"))
    branch = next(name for name in whole if "affine_s" in name or "emb_layers_s" in name)
    missing = {name: value for name, value in whole.items() if name != branch}
    changes = [
        ({**whole, first: whole[first] * float("nan")}, "holds NaN or infinity"),
        ({**whole, first: whole[first].long()}, "holds torch.int64; expected finite floating-point numbers"),
        ({**whole, branch: torch.zeros(3)}, r"has shape \(3,\)"),
        ({**whole, "surplus": torch.zeros(3)}, "surplus"),
        (missing, "is missing"),
    ]
    for content, said in changes:
        torch.save(content, path)
        with pytest.raises(ValueError, match=said) as error:
            pr.load(path, **told)
        assert "\n" not in str(error.value)
    torch.save(whole, path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        pr.load(path, **told)
    path = consistency.write(ctm(kind), tmp_path / "ema.safetensors")
    save_file(
        {k: v.contiguous() for k, v in whole.items()}, path, metadata={"pantarhei": '{"flow": {"path": "nowhere"}}'}
    )
    with pytest.raises(ValueError, match=r"the entry 'pantarhei' does not describe a flow"):
        pr.load(path)


def test_what_has_no_place(tmp_path):
    with pytest.raises(TypeError, match="only a SongUNet or an ADM"):
        consistency.write(pr.Flow(torch.nn.Linear(2, 2), path="edm", predicts="edm"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"path: the layout is a \.pt, \.pth or \.safetensors file, got a\.bin"):
        consistency.write(made(SONG), tmp_path / "a.bin")
    with pytest.raises(ValueError, match="the prediction 'edm' on EDM's path"):
        consistency.write(made(SONG, path="linear"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the head 'ctm' with a second time"):
        consistency.write(made(SONG, "consistency"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="have the scaling 'boundary', this one 'jump'"):
        consistency.write(made(replace(SONG, second_time=False), "consistency"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="means groups=32 and time_scale=1000, got 0 and 1"):
        consistency.write(made(replace(IMAGENET, groups=0, time_scale=1.0)), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="EDM's layout has no place for a second time"):
        edm.write(made(SONG), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"its network has groups=32, EDM's 0"):
        edm.write(made(replace(IMAGENET, second_time=False), None), tmp_path / "a.pth")


# The command


def test_info_says_what_a_file_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = replace(IMAGENET, second_time=False, head=64, width=64)
    cases = [
        (
            consistency.write(made(SONG), tmp_path / "ctm.pt"),
            ["consistency trajectory model: it holds map_layer0_s", "ctm, euler"],
        ),
        (
            consistency.write(made(config, None), tmp_path / "edm_imagenet64_ema.pt"),
            ["EDM denoiser, by the name", "time_embed_s"],
        ),
        (consistency.write(made(config, None), tmp_path / "some.pt"), ["missing for jumps", "kind='cm'"]),
        (
            consistency.write(made(replace(SONG, second_time=False), None), tmp_path / "teacher.pt"),
            ["EDM denoiser", "affine_s"],
        ),
    ]
    torch.save(torch.optim.RAdam(torch.nn.Linear(2, 2).parameters()).state_dict(), tmp_path / "opt.pt")
    cases.append((tmp_path / "opt.pt", ["state of an optimiser", "the weights (in model*.pt"]))
    for path, said in cases:
        assert main(["info", str(path)]) == 0
        shown = capsys.readouterr().out
        assert all(part in shown for part in said), shown


# The published files' layouts, by the reference's own weights


@pytest.mark.parity
@pytest.mark.parametrize("name", ["unet_adm", "songunet_ddpmpp"])
@torch.no_grad()
def test_files_of_the_reference_jump_as_it_does(name, tmp_path):
    golden = Golden("consistency-trajectory-models", name)
    c = golden.config
    weights = {key.removeprefix("w."): golden[key].float() for key in golden.names("w.")}
    torch.save(weights, tmp_path / "ema_0.999_000001.pt")
    told = {"sigma_data": c["sigma_data"]}
    if name == "unet_adm":
        told |= {"size": c["image_size"], "heads": c["num_head_channels"]}
    outers = {"euler": "", "variance": "variance.", "mixed": "euler_variance_mixed."}
    x, levels = golden["in.x_t"], [golden[f"in.{key}"].double() for key in ("t", "s")]
    label = golden[c["label_input"]] if c["label_input"] else None
    for outer, place in outers.items():
        if f"out.{place}G" not in golden.tensors:
            continue
        model = pr.load(tmp_path / "ema_0.999_000001.pt", outer=outer, **told)
        t, s = (model.path.time_at(1 / level) for level in levels)
        condition = None if label is None else {"label": label}
        golden.check(f"out.{place}G", model.jump(x.double(), t, s, condition))
        if outer == "euler":
            golden.check("out.denoiser_at_s_eq_t", model.denoise(x.double(), t, condition))
            golden.check("out.G_at_s_eq_t", model.jump(x, t, t, condition)) if name == "unet_adm" else None
    model = pr.load(tmp_path / "ema_0.999_000001.pt", **told)
    again = torch.load(consistency.write(model, tmp_path / "again.pt"), weights_only=True)
    assert same(again, weights)
