"""Checkpoints of EDM and rectified flow++: every layout, snapshots of whole objects that are never run, and refusals."""

import io
import os
import pickle
import struct
import subprocess
import sys
import types
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pantarhei as pr
from pantarhei.cli.main import main
from pantarhei.data.pickled_arrays import Builder
from pantarhei.data.pickled_modules import ModuleRecord, read_modules
from pantarhei.flow import Provenance
from pantarhei.interop import edm
from pantarhei.interop.edm_sizes import PUBLISHED
from pantarhei.networks import ADMConfig, SongUNetConfig, build, spec_of
from pantarhei.networks.songunet import DDPMPP, FACES

SONG = SongUNetConfig(size=8, width=16, multipliers=(1, 2), blocks=1, attention=(8,), augment_dim=4, dropout=0.0)
GUIDED = ADMConfig(size=8, width=64, multipliers=(1, 2), blocks=1, attention=(8,), classes=5, dropout=0.0)
CONFIGS = {
    "songunet": SONG,
    "plain": replace(SONG, embedding="positional", encoder="standard", filter=(1, 1), noise_multiplier=1, classes=3),
    "one resolution": replace(SONG, multipliers=(2,), attention=(), encoder="standard"),
    "adm": GUIDED,
    "no attention": replace(GUIDED, width=32, multipliers=(1, 1), attention=(), classes=0, blocks=2),
}


def random_flow(config=SONG, path="linear", provenance=None, **settings):
    torch.manual_seed(0)
    network = build({"name": "songunet" if isinstance(config, SongUNetConfig) else "adm", **config.__dict__})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shape, null = (config.channels, config.size, config.size), {"label": config.classes} if config.classes else None
    settings = {"predicts": "edm", "shape": shape, "null": null, **settings}
    return pr.Flow(network.eval(), path=path, provenance=provenance, **settings)


def saved(content, path):
    torch.save(content, path)
    return path


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# Flat state dicts


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_of_weights(kind, suffix, tmp_path):
    flow = random_flow(CONFIGS[kind], path="edm")
    back = pr.load(edm.write(flow, tmp_path / f"teacher{suffix}"))
    assert back.network.config == flow.network.config
    assert same(back.network.state_dict(), flow.network.state_dict())
    assert (back.null, back.shape) == (flow.null, flow.shape)
    assert not back.network.training
    assert all(parameter.requires_grad for parameter in back.network.parameters())
    x0 = torch.randn(2, *flow.shape)
    assert torch.equal(back.sample(x0=x0, steps=2), flow.sample(x0=x0, steps=2))


@pytest.mark.parametrize("config", PUBLISHED)
def test_published_configurations_are_read_off_their_weights(config):
    name = "songunet" if isinstance(config, SongUNetConfig) else "adm"
    with torch.device("meta"):
        network = build({"name": name, **config.__dict__})
    # Numbers are looked at in the filter only.
    state = {k: torch.empty(v.shape) if k.endswith("resample_filter") else v for k, v in network.state_dict().items()}
    kernel = edm.filter_of(getattr(config, "filter", (1, 1)))
    state = {k: kernel if k.endswith("resample_filter") else v for k, v in state.items()}
    assert edm.infer_config(state, "file") == config
    assert edm.infer_config(state, "file", dropout=0.3).dropout == 0.3
    assert {FACES, DDPMPP} <= set(PUBLISHED)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "module._orig_mod.model."])
def test_what_stands_before_the_names_does_not_matter(prefix, tmp_path):
    state = random_flow().network.state_dict()
    save_file({prefix + name: value for name, value in state.items()}, tmp_path / "net.safetensors")
    assert same(pr.load(tmp_path / "net.safetensors", dropout=0.0).network.state_dict(), state)


def test_teacher_or_student_is_told(tmp_path):
    path = edm.write(random_flow(GUIDED), tmp_path / "imagenet-configF.pth")
    teacher, student = pr.load(path), pr.load(path, rectified=1)
    assert teacher.path.spec()["name"] == "edm"
    assert student.path.spec()["name"] == "linear"
    assert (teacher.provenance.rectified, student.provenance.rectified) == (0, 1)
    for flow in (teacher, student):
        assert flow.prediction.spec()["name"] == "edm"
        assert "CC BY-NC-SA 4.0" in flow.provenance.notes["licence"]
        assert flow.provenance.notes["read_from"] == "imagenet-configF.pth"
    # The two describe one denoiser: at sigma = (1 - t) / t the rescaled state has the same clean estimate.
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 5])
    sigma, edm_path = (1 - t) / t, teacher.path
    root = [float(level) ** (1 / edm_path.rho) for level in (edm_path.sigma_max, edm_path.sigma_min)]
    at = (sigma ** (1 / edm_path.rho) - root[0]) / (root[1] - root[0])
    denoised = teacher.denoise(x / t[:, None, None, None], at, label)
    assert torch.allclose(student.denoise(x, t, label), denoised, atol=1e-3)
    assert teacher.score(x, torch.tensor(0.5), label).shape == x.shape
    with pytest.raises(ValueError, match="rectified 1x"):
        student.score(x, torch.tensor(0.5), label)
    with pytest.raises(ValueError, match="distilled to 2 steps"):
        pr.load(path, distilled=2).log_prob(x)
    own = pr.load(path, sigma_data=0.3, sigma_min=0.01, sigma_max=50.0)
    assert own.prediction.spec()["sigma_data"] == 0.3
    assert (own.path.sigma_min, own.path.sigma_max) == (0.01, 50.0)


def test_safetensors_keep_the_flow(tmp_path):
    provenance = Provenance(rectified=1, data="digits", teacher="ours", notes={"steps": 2})
    flow = random_flow(replace(GUIDED, dropout=0.2, label_dropout=0.1), provenance=provenance)
    path = edm.write(flow, tmp_path / "student.safetensors")
    back = pr.load(path)
    assert back.network.config == flow.network.config
    assert back.path.spec() == flow.path.spec()
    assert (back.provenance.rectified, back.provenance.data, back.provenance.teacher) == (1, "digits", "ours")
    # Anyone can write our entry, so it does not take away the licence under which such weights may be.
    assert back.provenance.notes == {
        "steps": 2,
        "read_from": "student.safetensors",
        "weights": "as stored",
        "licence": edm.LICENCE,
    }
    named = random_flow(GUIDED, provenance=Provenance(notes={"licence": "MIT"}))
    assert pr.load(edm.write(named, tmp_path / "mit.safetensors")).provenance.notes["licence"] == "MIT"
    assert pr.load(path, rectified=0).path.spec()["name"] == "edm"
    save_file(flow.network.state_dict(), path, metadata={"pantarhei": '{"flow": {"path": "nowhere"}}'})
    with pytest.raises(ValueError, match=r"student\.safetensors: the entry 'pantarhei' does not describe a flow"):
        pr.load(path)


# Training states


def test_training_states(tmp_path):
    flow = random_flow(replace(SONG, dropout=0.1), provenance=Provenance(rectified=1))
    raw = {name: value + 1 for name, value in flow.network.state_dict().items() if "filter" not in name}
    raw = {**flow.network.state_dict(), **raw, "map_noise.freqs": flow.network.map_noise.freqs}
    path = edm.write(flow, tmp_path / "training_state_100.pth", layout="train", raw=raw, iterations=100)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"optimizer_state_dict", "model_state_dict", "iter", "pantarhei"}
    # The optimiser goes on from it: it numbers the parameters as the module does.
    torch.optim.Adam(flow.network.parameters()).load_state_dict(content["optimizer_state_dict"])
    trainable = [content["model_state_dict"][f"model.{name}"] for name, _ in flow.network.named_parameters()]
    state = content["optimizer_state_dict"]["state"]
    assert [state[i]["ema"].shape for i in range(len(state))] == [value.shape for value in trainable]
    back = pr.load(path)
    assert same(back.network.state_dict(), flow.network.state_dict())
    assert back.network.config == flow.network.config
    assert back.provenance.notes == {
        "read_from": path.name,
        "weights": "average",
        "iterations": 100,
        "licence": edm.LICENCE,
    }
    assert back.provenance.rectified == 1
    assert same(pr.load(path, averaged=False).network.state_dict(), raw)


def test_training_states_of_theirs(tmp_path):
    network = random_flow().network
    state = {f"module.model.{name}": value for name, value in network.state_dict().items()}
    names = [name for name, _ in network.named_parameters()]
    entries = {i: {"step": 1, "ema": network.get_parameter(name).detach() + 1} for i, name in enumerate(names)}
    del entries[0]  # a parameter that never had a gradient
    optimizer = {"state": entries, "param_groups": [{"lr": 1e-4, "params": list(range(len(names)))}]}
    content = {"optimizer_state_dict": optimizer, "model_state_dict": state, "iter": 7}
    path = saved(content, tmp_path / "t.pth")
    found = pr.load(path, rectified=1, dropout=0.1)
    assert torch.equal(found.network.get_parameter(names[1]), network.get_parameter(names[1]) + 1)
    assert torch.equal(found.network.get_parameter(names[0]), network.get_parameter(names[0]))
    assert same(found.network.state_dict(), {**found.network.state_dict(), "map_noise.freqs": network.map_noise.freqs})
    assert found.network.config.dropout == 0.1
    for change, said in (
        ({"state": {}}, "no moving average .*; ask for the raw weights"),
        ({"param_groups": [{"params": [0, 1]}]}, f"the optimiser has 2 parameters, the network {len(names)}"),
        ({"state": {1: {"ema": torch.zeros(2)}}}, rf"the average of {names[1]} is \(2,\), expected the shape"),
    ):
        saved({**content, "optimizer_state_dict": {**optimizer, **change}}, path)
        with pytest.raises(ValueError, match=said):
            pr.load(path)
    assert pr.load(path, averaged=False).provenance.notes["weights"] == "raw"


# Snapshots of whole objects


class Persistent(torch.nn.Module):
    """A module that pickles as those of NVIDIA's code do: a call with source text, class name and attributes."""

    def __init__(self, kind, source="raise SystemExit", **keywords):
        super().__init__()
        self._kind, self._source = kind, source
        self._init_args, self._init_kwargs = (), keywords

    def __reduce__(self):
        fields = super().__reduce__()
        state = {name: value for name, value in fields[2].items() if name not in ("_kind", "_source")}
        meta = {"type": "class", "version": 6, "module_src": self._source, "class_name": self._kind, "state": state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


class EasyDict(dict):
    """As the one of NVIDIA's utilities."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@pytest.fixture
def theirs(monkeypatch):
    """Stand-ins for the modules that a snapshot names; unpickling with them runs the source text."""
    persistence = types.ModuleType("torch_utils.persistence")
    exec("def _reconstruct_persistent_obj(meta):\n    exec(meta['module_src'])", persistence.__dict__)
    persistence._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    utilities = types.ModuleType("dnnlib.util")
    utilities.EasyDict = EasyDict
    monkeypatch.setattr(EasyDict, "__module__", "dnnlib.util")
    for name, module in (("torch_utils.persistence", persistence), ("dnnlib.util", utilities)):
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))


def mirrored(module, kind=None, **keywords):
    """One of our modules as one of theirs."""
    if isinstance(module, torch.nn.ModuleDict):
        return torch.nn.ModuleDict({name: mirrored(part) for name, part in module.items()})
    made = Persistent(kind or type(module).__name__, **keywords)
    made.skip_scale = np.sqrt(0.5)
    made.register_parameter("unused", None)
    for name, value in module.named_parameters(recurse=False):
        made.register_parameter(name, torch.nn.Parameter(value.detach(), requires_grad=False))
    for name, value in module.named_buffers(recurse=False):
        made.register_buffer(name, value)
    for name, part in module.named_children():
        made.add_module(name, mirrored(part))
    return made


def snapshot(flow, wrapper="EDMPrecond", kind=None, **attributes):
    network, config = flow.network, flow.network.config
    kind = kind or ("SongUNet" if isinstance(config, SongUNetConfig) else "DhariwalUNet")
    whole = Persistent(wrapper, img_resolution=config.size)
    whole.model = mirrored(network, kind, dropout=config.dropout, label_dropout=config.label_dropout)
    for name, value in {"sigma_data": 0.5, "sigma_min": 0, "sigma_max": float("inf"), **attributes}.items():
        setattr(whole, name, value)
    options = EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=True)
    return {
        "ema": whole,
        "loss_fn": Persistent("EDMLoss"),
        "augment_pipe": None,
        "dataset_kwargs": options,
        "numbers": np.arange(3),
    }


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_snapshots(kind, protocol, tmp_path, theirs):
    config = replace(CONFIGS[kind], dropout=0.2, label_dropout=0.1)
    flow = random_flow(config, path="edm")
    path = tmp_path / "edm-cifar10-32x32-uncond-ve.pkl"
    path.write_bytes(pickle.dumps(snapshot(flow, sigma_data=0.25), protocol=protocol))
    back = pr.load(path)
    assert same(back.network.state_dict(), flow.network.state_dict())
    # What bare weights do not tell stands in the snapshot.
    assert back.network.config == config
    assert back.prediction.spec()["sigma_data"] == 0.25
    assert back.path.spec()["name"] == "edm"
    assert "CC BY-NC-SA" in back.provenance.notes["licence"]
    assert pr.load(path, rectified=1, dropout=0.3).network.config.dropout == 0.3
    with pytest.raises(ValueError, match="a snapshot holds the average only"):
        pr.load(path, averaged=False)


def test_no_source_is_run(tmp_path, theirs):
    victim = tmp_path / "victim"
    content = snapshot(random_flow())
    content["ema"]._source = f"open({str(victim)!r}, 'w').close()"
    raw = pickle.dumps(content)
    record = read_modules(raw)["ema"]
    assert (record.class_name, record.keywords) == ("EDMPrecond", {"img_resolution": 8})
    assert "module_src" not in record.state
    assert record.part("model").class_name == "SongUNet"
    assert record.part("nothing") is None
    assert not victim.exists()
    with pytest.raises(SystemExit):  # of the parts
        pickle.loads(raw)
    content["ema"].model = None
    pickle.loads(pickle.dumps({"ema": content["ema"]}))  # it would have worked
    assert victim.exists()


def test_other_wrappers_and_networks_are_refused(tmp_path, theirs):
    path = tmp_path / "net.pkl"
    for wrapper, said in (
        ("VPPrecond", "wrapped as VPPrecond: its noise levels are numbered times of the VP process"),
        ("VEPrecond", "VEPrecond: its network predicts the noise"),
        ("iDDPMPrecond", "iDDPMPrecond: its noise levels are numbered steps"),
        ("Precond", "expected a network wrapped as EDMPrecond, got Precond"),
    ):
        path.write_bytes(pickle.dumps(snapshot(random_flow(), wrapper)))
        with pytest.raises(ValueError, match=said):
            pr.load(path)
    path.write_bytes(pickle.dumps(snapshot(random_flow(), kind="Generator")))
    with pytest.raises(ValueError, match="unknown network 'Generator'; known: SongUNet, DhariwalUNet"):
        pr.load(path)
    path.write_bytes(pickle.dumps({"ema": Persistent("EDMPrecond")}))
    with pytest.raises(ValueError, match="expected a network wrapped as EDMPrecond"):
        pr.load(path)
    path.write_bytes(pickle.dumps({"G_ema": Persistent("Generator")}))
    with pytest.raises(ValueError, match=r"no checkpoint that is known here .* EDM.*first names are G_ema"):
        pr.load(path)
    path.write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match="holds a list; expected a dict with the network as 'ema'"):
        pr.load(path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder or file .*none\.pkl"):
        pr.load(tmp_path / "none.pkl")


class Call:
    """Pickles into any call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refusal(content, match=None):
    with pytest.raises(ValueError, match=match) as caught:
        read_modules(content if isinstance(content, bytes) else pickle.dumps(content))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Call(os.system, "true"), f"{os.name}.system"),
        (Call(eval, "1"), "builtins.eval"),
        (Call(exec, "1"), "builtins.exec"),
        (Call(getattr, [], "append"), "builtins.getattr"),
        (Call(subprocess.getoutput, "true"), "subprocess.getoutput"),
        (Call(torch.load, "x"), "torch.serialization.load"),
        (Call(torch.hub.load, "x", "y"), "torch.hub.load"),
        (torch.nn.functional.silu, "torch.nn.functional.silu"),
        (torch.nn.init.zeros_, "torch.nn.init.zeros_"),
        (np.load, "numpy.load"),
    ],
)
def test_every_other_name_is_refused_by_its_name(content, named):
    inside = {"ema": content}
    said = refusal(inside)
    assert said.startswith("refused: the pickle asks to run ")
    assert named.rsplit(".", 1)[-1] in said


def test_names_within_names_and_lazy_imports_are_refused():
    refusal(b"\x80\x04\x8c\x1atorch.nn.modules.container\x8c\x13ModuleDict.__init__\x93.", "refused")
    refusal(b"\x80\x04\x8c\x05torch\x8c\x09_inductor\x93.", "refused: the pickle asks to run torch._inductor")
    for name in (b"os", b"zeros", b"tensor"):
        refusal(b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name + b"\x93.", "refused: .* tensors and networks")
    assert read_modules(pickle.dumps([torch.float16, torch.device("cuda:1"), torch.Size([2])])) == [
        torch.float16,
        "cuda:1",
        (2,),
    ]


def storage(values=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)):
    buffer = io.BytesIO()
    torch.save(torch.tensor(values).storage(), buffer, _use_new_zipfile_serialization=False)
    return Call(torch.storage._load_from_bytes, buffer.getvalue())


def tensor(offset, shape, stride, store=None):
    store = storage() if store is None else store
    return Call(torch._utils._rebuild_tensor_v2, store, offset, shape, stride, False, OrderedDict())


def test_tensors_come_back_as_they_were():
    base = torch.arange(24.0).reshape(2, 3, 4)
    values = {
        "plain": base,
        "turned": base.permute(2, 0, 1),
        "part": base[1, 1:, ::2],
        "half": base.half(),
        "brain": base.bfloat16(),
        "integers": torch.arange(3),
        "truth": torch.tensor([True, False]),
        "0-d": torch.tensor(3.0),
        "empty": torch.empty(0, 2),
        "parameter": torch.nn.Parameter(base),
    }
    for protocol in (2, 4):
        loaded = read_modules(pickle.dumps([values, (values["plain"],)], protocol=protocol))
        assert loaded[0].keys() == values.keys()
        for name, value in values.items():
            assert type(loaded[0][name]) is torch.Tensor
            assert torch.equal(loaded[0][name], value)
            assert loaded[0][name].dtype == value.dtype
            assert loaded[0][name].is_contiguous()
        assert loaded[1][0] is loaded[0]["plain"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((0, (2, 4), (4, 1)), r"a tensor of shape \(2, 4\), stride \(4, 1\) and offset 0 in 6 numbers"),
        ((1, (2, 3), (3, 1)), "offset 1 in 6 numbers"),
        ((0, (2, 2), (5, 1)), "stride"),
        ((0, (10**9,), (0,)), "stride"),
        ((-1, (2,), (1,)), "sizes or strides"),
        ((0, (2,), (-1,)), "sizes or strides"),
        ((0, (-2, -3), (1, 1)), "sizes or strides"),
        ((0, (2,), (1, 1)), "damaged snapshot"),
        ((0, (2.0,), (1,)), "sizes or strides"),
        ((0, (True,), (1,)), "sizes or strides"),
        ((0, "ab", (1,)), "sizes or strides"),
        ((0, (2**62, 2**62), (1, 1)), "stride"),
    ],
)
def test_forged_strides_are_refused(parts, said):
    assert torch.equal(read_modules(pickle.dumps(tensor(1, (2, 2), (3, 1)))), torch.tensor([[2.0, 3.0], [5.0, 6.0]]))
    refusal(tensor(*parts), said)


def test_forged_storages_are_refused():
    inner = io.BytesIO()
    torch.save({"a": 1}, inner)
    for content in (b"", b"nothing", pickle.dumps(Call(os.system, "true")), inner.getvalue()):
        refusal(
            tensor(0, (1,), (1,), Call(torch.storage._load_from_bytes, content)), r"cannot read|refused: .*\.system"
        )
    whole = storage().call[1][0]
    for length in range(0, len(whole), 16):
        refusal(tensor(0, (6,), (1,), Call(torch.storage._load_from_bytes, whole[:length])), "cannot read")
    refusal(tensor(0, (1,), (1,), [1.0]), "a tensor without a storage")
    refusal(Call(torch.storage._load_from_bytes, "text"), "a storage from something else than bytes")
    refusal(Call(torch._utils._rebuild_parameter, [1.0], True, OrderedDict()), "a parameter that is no tensor")


def old_storage(count, keys, data=b""):
    """A storage in the format before PyTorch 1.6 that announces `count` numbers, and what the file holds of them."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count, None) if value is Writer else None

    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}):
        pickle.dump(part, buffer, protocol=2)
    Writer(buffer, protocol=2).dump(Writer)
    pickle.dump(keys, buffer, protocol=2)
    return Call(torch.storage._load_from_bytes, buffer.getvalue() + data)


def test_every_number_comes_from_the_file():
    numbers = struct.pack("<qfff", 3, 1.0, 2.0, 3.0)
    whole = read_modules(pickle.dumps(tensor(0, (3,), (1,), old_storage(3, ["0"], numbers))))
    assert whole.tolist() == [1.0, 2.0, 3.0]
    for count, keys, data in (
        (3, [], b""),  # PyTorch's loader gives memory that nothing was written to
        (3, [], numbers),
        (3, ["0", "0"], numbers + numbers),
        (3, ["1"], numbers),
        (3, "0", numbers),
        (4, ["0"], numbers),
        (3, ["0"], numbers[:-1]),
        (10**15, ["0"], struct.pack("<q", 10**15)),
        (-1, ["0"], struct.pack("<q", -1)),
    ):
        refusal(tensor(0, (3,), (1,), old_storage(count, keys, data)), "cannot read")
    refusal(tensor(0, (1,), (1,), Call(torch.Tensor, 1000)), "cannot read|refused")


def test_many_tensors_of_one_storage_are_no_more_than_the_file():
    shared = pickle.dumps(storage([1.0] * 50_000))[:-1] + b"q\x06"  # after those of the storage
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x06K\x00M\x50\xc3\x85K\x01\x85\x89}tR"
    few, many = (b"(" + shared + b"0" + count * view + b"t." for count in (5, 1000))
    few = read_modules(few)
    assert len(few) == 5
    assert len({value.data_ptr() for value in few}) == 1
    assert "many times the memory of the file" in refusal(many)


def test_states_that_share_containers_are_visited_once(theirs):
    shared, count = [list(range(100)) for _ in range(100)], 300
    parts = [Persistent("Part") for _ in range(count)]
    for part in parts:
        part.shared = shared
    raw = pickle.dumps(parts)
    visited = []
    visit = Builder.visit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "visit", lambda self, node: (visited.append(1), visit(self, node))[1])
        found = read_modules(raw)
    assert found[0].state["shared"] is found[-1].state["shared"]
    assert len(visited) < 20_000 + 100 * count  # all states as often as the shared lists would be 3 million


@pytest.mark.parametrize("doublings", [26, 60])
def test_devices_and_names_of_a_few_bytes_stay_small(doublings):
    tree = b"\x80\x04]" + b"2\x86" * doublings
    refusal(b"\x80\x04ctorch\ndevice\n" + tree[2:] + b"\x85R.", "cannot read")
    refusal(b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + tree[2:] + b")tR.", "cannot read")
    assert read_modules(pickle.dumps(torch.device("cuda:1"))) == "cuda:1"


def test_weights_of_stride_0_do_not_grow(tmp_path):
    state = random_flow().network.state_dict()
    wide = {**state, "enc.8x8_block0.conv0.weight": torch.zeros(1).expand(1 << 20, 1 << 14, 1, 1)}
    path = saved(wide, tmp_path / "wide.pth")
    with pytest.raises(
        ValueError, match=r"wide\.pth.*a tensor of shape \(1048576, 16384, 1, 1\).* in 1 numbers"
    ) as caught:
        pr.load(path)
    assert "\n" not in str(caught.value)


def test_states_cannot_be_set_on_answers(theirs):
    persistence = b"\x80\x04\x8c\x17torch_utils.persistence\x8c\x1b_reconstruct_persistent_obj\x93"
    container = b"\x80\x04\x8c\x1atorch.nn.modules.container\x8c\nModuleDict\x93"
    mapping = b"\x80\x04\x8c\x0bdnnlib.util\x8c\x08EasyDict\x93"
    state = b"}\x8c\x01aK\x01s"
    for name in (persistence, container, mapping, b"\x80\x04\x8c\x05torch\x8c\x07float32\x93"):
        refusal(name + state + b"b.", "cannot read")
        refusal(name + b"N" + state + b"\x86b.", "cannot read")
    refusal(mapping + b")\x81" + state + b"b.", "a state is set on a dict")
    refusal(container + b")\x81" + state + b"b" + state + b"b.", "set twice")
    refusal(container + b"K\x01\x85\x81.", "cannot read")
    assert read_modules(container + b")\x81" + state + b"b.").state == {"a": 1}
    for meta in (
        {},
        {"class_name": "A"},
        {"class_name": 1, "state": {}},
        {"type": "module", "class_name": "A", "state": {}},
    ):
        refusal(Call(sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, meta), "cannot read")


def test_odd_modules_are_named(theirs):
    def tensors(**state):
        made = ModuleRecord("Odd", {"_parameters": {}, "_buffers": {}, "_modules": {}, **state})
        return made.tensors()

    passing = {"_buffers": {"a": torch.ones(1), "b": torch.ones(2)}, "_non_persistent_buffers_set": {"a"}}
    assert tensors(**passing).keys() == {"b"}
    with pytest.raises(ValueError, match="a in this snapshot is a int; expected a tensor"):
        tensors(_parameters={"a": 1})
    with pytest.raises(ValueError, match="a in this snapshot is a int; expected a module"):
        tensors(_modules={"a": 1})
    with pytest.raises(ValueError, match="the Odd in this snapshot is no module: it has no _buffers"):
        tensors(_buffers=None)
    # A few modules, each twice in the next, would be a name for every path through them.
    part = ModuleRecord("Part", {"_parameters": {}, "_buffers": {}, "_modules": {}})
    with pytest.raises(ValueError, match="the Part b in this snapshot stands in two places"):
        tensors(_modules={"a": part, "b": part})
    refusal(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested too deeply")


def test_half_a_snapshot_is_one_line(theirs):
    whole = pickle.dumps(snapshot(random_flow()))
    for length in range(0, len(whole), len(whole) // 50):
        assert refusal(whole[:length]).startswith(("cannot read", "refused"))


# Files that do not fit


def damaged(state, how):
    changes = {
        "shape": {"map_layer1.weight": torch.zeros(3, 64)},
        "dimensions": {"enc.8x8_conv.weight": torch.zeros(16, 3)},
        "extra": {"enc.8x8_block0.norm3.weight": torch.zeros(16)},
        "blocks": {"enc.4x4_block1.conv0.weight": torch.zeros(16)},
        "gap": {"enc.3x3_block0.conv0.weight": torch.zeros(16, 16, 3, 3)},
        "multiple": {"enc.4x4_block0.conv0.weight": torch.zeros(24, 16, 3, 3)},
        "nan": {"map_layer1.bias": torch.full((64,), float("nan"))},
        "integers": {"map_layer1.bias": torch.zeros(64, dtype=torch.int8)},
        "skip": {"enc.4x4_aux_skip.weight": torch.zeros(16, 3, 1, 1)},
        "filter": {"dec.8x8_up.skip.resample_filter": torch.ones(1, 1, 4, 4) / 16},
        "zero filter": {"enc.4x4_down.conv0.resample_filter": torch.zeros(1, 1, 4, 4)},
    }
    missing = {"missing": "enc.8x8_block0.conv1.bias", "no embedding": "map_layer0.weight"}
    return {name: value for name, value in {**state, **changes.get(how, {})}.items() if name != missing.get(how)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "enc.8x8_block0.conv1.bias is missing"),
        ("no embedding", "map_layer0.weight is missing"),
        ("shape", r"map_layer1.weight has shape \(3, 64\)"),
        ("dimensions", r"enc.8x8_conv.weight has shape \(16, 3\), expected 4 dimensions"),
        ("extra", "enc.8x8_block0.norm3.weight is not part of the network"),
        ("blocks", "blocks by side; expected the same number"),
        ("gap", "is missing|is not part of the network"),
        ("multiple", "24 feature channels are no multiple of the width 16"),
        ("nan", "NaN"),
        ("integers", "int8"),
        ("skip", "aux_skip belongs to the 'skip' encoder"),
        ("filter", "is another filter than the first"),
        ("zero filter", "no product of one row of taps"),
    ],
)
def test_refusals(how, said, tmp_path, capsys):
    path = saved(damaged(random_flow().network.state_dict(), how), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=said):
        pr.load(path)
    assert main(["convert", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "net.pth" in message
    assert not (tmp_path / "out").exists()


def test_options_are_checked(tmp_path):
    path = edm.write(random_flow(), tmp_path / "net.pth")
    for options, said in (
        ({"rectified": -1}, "rectified: must be at least 0, got -1"),
        ({"distilled": 0}, "distilled: must be at least 1, got 0"),
        ({"sigma_data": 0.0}, "sigma_data: must be positive"),
        ({"rectified": 1, "sigma_max": 50.0}, "sigma_max: a student has the linear path"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"heads": 2}, "heads: the weights of an EDM network tell this; only dropout"),
        ({"dropout": 1.5}, "dropout: must lie in"),
    ):
        with pytest.raises(ValueError, match=said):
            pr.load(path, **options)
    with pytest.raises(ValueError, match="expected weights named enc"):
        edm.read("x.pth", {"model_state_dict": {"a": torch.zeros(1)}})
    assert not edm.recognise({"model": {"module.all_modules.0.W": torch.zeros(1)}})


def test_flows_without_a_place(tmp_path):
    flow = random_flow()
    for other, said in (
        (pr.Flow(torch.nn.Identity()), "only a SongUNet or an ADM"),
        (random_flow(predicts="velocity"), "the prediction 'edm', on EDM's or the linear path"),
        (random_flow(path="cosine"), "the prediction 'edm'"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            edm.write(other, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        edm.write(flow, tmp_path / "x.pth", layout="trained")
    for layout, name in (("weights", "x.pkl"), ("train", "x.safetensors")):
        with pytest.raises(ValueError, match=rf"the {layout} layout is a .* file, got {name}"):
            edm.write(flow, tmp_path / name, layout=layout)
    assert not list(tmp_path.iterdir())


def test_convert_both_ways(tmp_path, capsys, theirs):
    flow = random_flow(GUIDED, path="edm")
    path, folder = tmp_path / "net.pkl", str(tmp_path / "folder")
    path.write_bytes(pickle.dumps(snapshot(flow)))
    assert main(["convert", str(path), "--out", folder]) == 0
    assert spec_of(pr.load(folder).network) == spec_of(flow.network)
    assert same(pr.load(folder).network.state_dict(), flow.network.state_dict())
    assert main(["convert", folder, "--to", "edm", "--out", str(tmp_path / "back.pth")]) == 0
    assert same(pr.load(tmp_path / "back.pth").network.state_dict(), flow.network.state_dict())
    assert main(["convert", str(path), "--rectified", "1", "--out", str(tmp_path / "student")]) == 0
    assert pr.load(tmp_path / "student").path.spec()["name"] == "linear"
    student = str(tmp_path / "student.safetensors")
    assert main(["convert", str(tmp_path / "student"), "--to", "edm", "--out", student]) == 0
    assert pr.load(student).provenance.rectified == 1
    assert "CC BY-NC-SA" in pr.load(student).provenance.notes["licence"]
    assert main(["convert", student, "--to", "edm-train", "--out", str(tmp_path / "state.pth")]) == 0
    assert same(pr.load(tmp_path / "state.pth").network.state_dict(), flow.network.state_dict())
    capsys.readouterr()
    assert main(["convert", folder, "--to", "edm", "--out", str(tmp_path / "x.pkl")]) == 2
    message = capsys.readouterr().err
    assert "got x.pkl" in message
    assert message.count("\n") == 1
