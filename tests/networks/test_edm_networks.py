"""SongUNet and ADM: published sizes, a plain twin, initial values, conditions, precision, derivatives, refusals."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import pantarhei as pr
from pantarhei.networks import ADM, ADMConfig, SongUNet, SongUNetConfig, build, spec_of
from pantarhei.networks.edm_blocks import Conv, Initial
from pantarhei.networks.songunet import FACES
from pantarhei.recipes.backbones import NetworkConfig, build_network

SONG = {"size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,), "augment_dim": 4}
PLUS = {**SONG, "embedding": "positional", "encoder": "standard", "filter": (1, 1), "noise_multiplier": 1}
GUIDED = {"size": 8, "width": 64, "multipliers": (1, 2), "blocks": 1, "attention": (8,), "classes": 5}
KINDS = {"songunet": SONG, "adm": GUIDED}


def small(name="songunet", dtype=torch.float32, **settings):
    """A small network whose layers have all been given weight."""
    torch.manual_seed(0)
    network = build({"name": name, **(settings or KINDS[name])})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.to(dtype).eval()


def points(dtype=torch.float32, rows=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.tensor([-1.5, -0.2, 1.0], dtype=dtype)[:rows]


def plainly(network, x, t, rows=None, augment=None):
    """The networks as EDM's appendix writes them, one operation after another, from the state dict alone."""
    config, w = network.config, network.state_dict()
    adm = isinstance(network, ADM)
    eps, half = (1e-5, 1.0) if adm else (1e-6, math.sqrt(0.5))

    def linear(h, name):
        return h @ w[f"{name}.weight"].t() + w.get(f"{name}.bias", 0)

    def norm(h, name):
        return F.group_norm(h, min(32, h.shape[1] // 4), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def conv(h, name, resample=None, late=False):
        if resample:
            kernel = w[f"{name}.resample_filter"]
            side = kernel.shape[-1]
            pad, tiled = (side - 1) // 2, kernel.repeat(h.shape[1], 1, 1, 1)
            if resample == "up":
                h = F.conv_transpose2d(h, 4 * tiled, stride=2, padding=pad, groups=h.shape[1])
            elif late:
                h = F.conv2d(h, w[f"{name}.weight"], padding=1 + pad)
                h = F.conv2d(h, kernel.repeat(h.shape[1], 1, 1, 1), stride=2, groups=h.shape[1])
                return h + w[f"{name}.bias"][:, None, None]
            else:
                h = F.conv2d(h, tiled, stride=2, padding=pad, groups=h.shape[1])
        if f"{name}.weight" not in w:
            return h
        weight = w[f"{name}.weight"]
        return F.conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def block(h, name):
        resample = next((d for d in ("up", "down") if name.endswith(d)), None)
        start = h
        h = conv(F.silu(norm(h, f"{name}.norm0")), f"{name}.conv0", resample)
        modulation = linear(embedding, f"{name}.affine")[:, :, None, None]
        if adm:
            scale, shift = modulation.chunk(2, dim=1)
            h = norm(h, f"{name}.norm1") * (1 + scale) + shift
        else:
            h = norm(h + modulation, f"{name}.norm1")
        h = conv(F.silu(h), f"{name}.conv1")
        skipped = any(key.startswith(f"{name}.skip.") for key in w)
        h = (h + (conv(start, f"{name}.skip", resample) if skipped else start)) * half
        if f"{name}.qkv.weight" not in w:
            return h
        b, c = h.shape[:2]
        heads = c // 64 if adm else 1
        qkv = conv(norm(h, f"{name}.norm2"), f"{name}.qkv").reshape(b * heads, c // heads, 3, -1)
        q, k, v = qkv.unbind(2)
        weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(q.shape[1])).softmax(dim=2)
        mixed = torch.einsum("nqk,nck->ncq", weights, v).reshape(h.shape)
        return (conv(mixed, f"{name}.proj") + h) * half

    features = config.width * (1 if adm else config.noise_multiplier)
    if not adm and config.embedding == "fourier":
        angles = 2 * math.pi * t[:, None] * w["map_noise.freqs"]
    else:
        last = features // 2 - (0 if adm else 1)
        angles = t[:, None] * torch.tensor([10_000 ** (-i / last) for i in range(features // 2)], dtype=t.dtype)
    parts = (angles.cos(), angles.sin()) if adm else (angles.sin(), angles.cos())
    h = torch.cat(parts, dim=1)
    rows = torch.zeros(len(x), config.classes, dtype=x.dtype) if rows is None else rows
    if not adm and config.classes:
        h = h + linear(rows * math.sqrt(config.classes), "map_label")
    if augment is not None:
        h = h + linear(augment, "map_augment")
    h = linear(F.silu(linear(h, "map_layer0")), "map_layer1")
    if adm and config.classes:
        h = h + linear(rows, "map_label")
    embedding = F.silu(h)

    h = aux = conv(x, f"enc.{config.size}x{config.size}_conv")
    skips, aux = [h], x
    sides = [config.size >> i for i in range(len(config.multipliers))]
    for side in sides:
        if side != config.size:
            h = block(h, f"enc.{side}x{side}_down")
            if not adm and config.encoder == "residual":
                h = aux = (h + conv(aux, f"enc.{side}x{side}_aux_residual", "down", late=True)) * half
            skips.append(h)
        for i in range(config.blocks):
            h = block(h, f"enc.{side}x{side}_block{i}")
            skips.append(h)
    for side in reversed(sides):
        for name in ("in0", "in1") if side == sides[-1] else ("up",):
            h = block(h, f"dec.{side}x{side}_{name}")
        for i in range(config.blocks + 1):
            h = block(torch.cat([h, skips.pop()], dim=1), f"dec.{side}x{side}_block{i}")
    assert not skips
    ends = ("out_norm", "out_conv") if adm else [f"dec.{config.size}x{config.size}_aux_{n}" for n in ("norm", "conv")]
    return conv(F.silu(norm(h, ends[0])), ends[1])


@pytest.mark.parametrize(
    ("config", "millions", "tensors"),
    [(SongUNetConfig(), 56.40, 432), (FACES, 62.76, 563), (ADMConfig(), 295.90, 553)],
)
def test_published_sizes(config, millions, tensors):
    with torch.device("meta"):
        network = (SongUNet if isinstance(config, SongUNetConfig) else ADM)(config)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    assert len(network.state_dict()) == tensors


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("songunet", SONG),
        ("songunet", PLUS),
        ("songunet", {**SONG, "filter": (1, 1), "classes": 3, "multipliers": (2, 1, 1), "blocks": 2}),
        ("songunet", {**PLUS, "filter": (1, 3, 3, 1), "attention": (4,), "classes": 3}),
        ("songunet", {**SONG, "multipliers": (1,)}),
        ("adm", GUIDED),
        ("adm", {**GUIDED, "multipliers": (2, 3), "blocks": 2, "attention": (4,), "augment_dim": 4}),
        ("adm", {**GUIDED, "width": 32, "multipliers": (1, 1)}),
    ],
)
def test_it_is_what_the_paper_writes(name, settings):
    network = small(name, torch.float64, **settings)
    config = network.config
    x, t = points(torch.float64)
    rows = F.one_hot(torch.tensor([0, 2, 1]), config.classes).double() if config.classes else None
    augment = torch.randn(3, config.augment_dim, dtype=torch.float64) if config.augment_dim else None
    with torch.no_grad():
        expected = plainly(network, x, t, rows, augment)
        assert torch.allclose(network(x, t, rows, augment), expected, atol=1e-11)
        assert torch.allclose(network(x, t), plainly(network, x, t), atol=1e-11)
        assert torch.allclose(network(x.contiguous(memory_format=torch.channels_last), t), network(x, t), atol=1e-11)
    assert expected.std() > 0.01


def test_fewer_than_64_channels_have_no_head_in_adm():
    assert not any("qkv" in key for key in small("adm", **{**GUIDED, "width": 32, "multipliers": (1,)}).state_dict())
    assert small("adm").dec["4x4_in0"].heads == 2


@pytest.mark.parametrize("name", KINDS)
def test_initial_values(name):
    torch.manual_seed(0)
    network = build({"name": name, **KINDS[name]})
    x, t = points()
    assert network(x, t).abs().max() < 1e-3
    block = network.enc["8x8_block0"]
    inputs, outputs = block.conv0.in_channels, block.conv0.out_channels
    song = math.sqrt(6 / (9 * (inputs + outputs)))
    bound = song if name == "songunet" else math.sqrt(3 / (9 * inputs)) / math.sqrt(3)
    assert 0.95 * bound < float(block.conv0.weight.detach().abs().max()) <= bound
    assert bool(block.conv0.bias.any()) == (name == "adm")
    for layer in (block.conv1, block.proj):
        assert float(layer.weight.detach().abs().max()) <= 1e-5
        assert not layer.bias.any()
    if name == "songunet":
        bound = math.sqrt(0.2) * math.sqrt(6 / (4 * outputs))
        assert 0.95 * bound < float(block.qkv.weight.detach().abs().max()) <= bound
    else:
        assert float(network.map_label.weight.detach().std()) == pytest.approx(1, abs=0.1)


def test_a_rule_of_initial_values_is_the_variance_it_names():
    torch.manual_seed(0)
    kaiming = Conv(64, 128, 3, Initial("kaiming", 0.5, 2.0))
    assert float(kaiming.weight.detach().var()) == pytest.approx(0.25 / (9 * 64), rel=0.05)
    assert float(kaiming.bias.detach().var()) == pytest.approx(4 / (9 * 64), rel=0.5)


@pytest.mark.parametrize("name", KINDS)
def test_labels(name):
    settings = {**KINDS[name], "classes": 5}
    network = small(name, torch.float64, **settings)
    x, t = points(torch.float64)
    label = torch.tensor([0, 4, 5])
    with torch.no_grad():
        by_index = network(x, t, label)
        assert torch.equal(by_index, network(x, t, F.one_hot(label, 6)[:, :5].double()))
        assert torch.allclose(by_index[2], network(x, t)[2], atol=1e-12)
        assert not torch.allclose(by_index[:2], network(x, t)[:2], atol=1e-3)
        mixed = torch.full((3, 5), 0.2, dtype=torch.float64)
        assert not torch.allclose(network(x, t, mixed), by_index, atol=1e-3)


def test_labels_are_dropped_while_training_only():
    network = small("adm", **{**GUIDED, "label_dropout": 0.5, "dropout": 0.0})
    x, t = (part[:1].expand(64, *part.shape[1:]) for part in points())
    label = torch.full((64,), 3)
    with torch.no_grad():
        kept, null = network(x[:1], t[:1], label[:1]), network(x[:1], t[:1])
        assert torch.allclose(network(x, t, label), kept, atol=1e-4)
        torch.manual_seed(0)
        trained = network.train()(x, t, label)
    found = [(row[None] - kept).abs().max() < (row[None] - null).abs().max() for row in trained]
    assert 16 < sum(map(int, found)) < 48


def test_augmentation():
    network = small()
    x, t = points()
    with torch.no_grad():
        assert torch.equal(network(x, t, augment=torch.zeros(3, 4)), network(x, t))
        assert not torch.allclose(network(x, t, augment=torch.ones(3, 4)), network(x, t), atol=1e-3)


def test_dropout_is_for_training():
    network = small("songunet", **{**SONG, "dropout": 0.5})
    x, t = points()
    with torch.no_grad():
        assert torch.equal(network(x, t), network(x, t))
        network.train()
        assert not torch.equal(network(x, t), network(x, t))


@pytest.mark.parametrize("name", KINDS)
def test_precision_follows_the_weights_and_the_output_x(name):
    network = small(name)
    x, t = points()
    with torch.no_grad():
        exact = network(x, t)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(network).to(dtype)
            out = half(x, t)
            assert out.dtype == torch.float32
            assert half(x.to(dtype), t).dtype == dtype
            assert (out - exact).abs().max() < 0.1 * exact.abs().max()
    # The frequencies of the noise level keep their precision, and come along when the network moves.
    if name == "songunet":
        assert torch.equal(half.map_noise.freqs, network.map_noise.freqs)
        assert half.double().map_noise.freqs.dtype == torch.float64
        assert half.to("meta").map_noise.freqs.is_meta


@pytest.mark.parametrize("name", KINDS)
def test_derivatives_of_both_modes(name):
    network = small(name, torch.float64)
    x, t = points(torch.float64)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    v, dt = torch.randn_like(x), torch.ones_like(t)
    _, pushed = torch.func.jvp(network, (x, t), (v, dt))
    step = 1e-6
    difference = (network(x + step * v, t + step) - network(x - step * v, t - step)) / (2 * step)
    assert torch.allclose(pushed, difference, atol=1e-5 * float(pushed.abs().max()))
    # Along the noise level alone, as consistency and mean-flow training need it.
    _, along = torch.func.jvp(lambda t: network(x, t), (t,), (dt,))
    along_x = torch.func.jvp(lambda x: network(x, t), (x,), (v,))[1]
    assert torch.allclose(along + along_x, pushed, atol=1e-9)
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, t), x, v)
    assert torch.allclose((gradient * v).sum(), (v * along_x).sum(), rtol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_every_parameter(name):
    network = small(name, **{**KINDS[name], "classes": 5, "augment_dim": 4}).train()
    x, t = points()
    network(x, t, torch.tensor([0, 1, 5]), torch.ones(3, 4)).square().mean().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.any(), key


@pytest.mark.parametrize("name", KINDS)
def test_it_compiles_without_a_break(name):
    network = small(name, **{**KINDS[name], "classes": 5})
    x, t = points()
    label = torch.tensor([0, 1, 5])
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")(x, t, label)
        assert torch.allclose(compiled, network(x, t, label), atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_rebuilt_from_its_sizes(name):
    network = small(name)
    again = build(spec_of(network))
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


def test_it_stands_in_a_flow_on_both_paths():
    network = small("adm")
    x = torch.randn(2, 3, 8, 8)
    for path in ("linear", "edm"):
        flow = pr.Flow(network, path=path, predicts="edm", shape=(3, 8, 8), null={"label": 5})
        out = flow.sample(x0=x, steps=2, condition=torch.tensor([1, 5]), guidance=1.5)
        assert out.isfinite().all()


def test_recipes_build_them():
    for name, kind in (("songunet", SongUNet), ("adm", ADM)):
        config = NetworkConfig(architecture=name, width=64, blocks=(1,), dropout=0.2)
        network = build_network(config, (1, 16, 16), 10, seed=0)
        assert isinstance(network, kind)
        assert (network.config.size, network.config.channels, network.config.classes) == (16, 1, 10)
        assert (network.config.dropout, network.config.multipliers) == (0.2, (1, 2))
        assert network.config.attention == ((16,) if name == "songunet" else (16, 8))
        again = build_network(config, (1, 16, 16), 10, seed=0)
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
        with pytest.raises(ValueError, match="square"):
            build_network(config, (1, 16, 8), 10, seed=0)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("songunet", {"size": 9}, "size: 2 resolutions need a side divisible by 2, got 9"),
        ("songunet", {"width": 18}, "width: must be a positive multiple of 4, got 18"),
        ("songunet", {"width": 132}, "132 feature channels do not split into 32 groups"),
        ("songunet", {"embedding": "fourrier"}, "did you mean 'fourier'"),
        ("songunet", {"encoder": "skip"}, "encoder: unknown encoder 'skip'"),
        ("songunet", {"filter": (1, 2, 1)}, "filter"),
        ("songunet", {"dropout": 1.0}, r"dropout: must lie in \[0, 1\)"),
        ("songunet", {"noise_multiplier": 0}, "noise_multiplier"),
        ("adm", {"width": 100, "multipliers": (1, 2)}, "200 channels do not split into 3 heads"),
        ("adm", {"blocks": 0}, "at least 1"),
        ("adm", {"classes": -1}, "classes"),
    ],
)
def test_bad_sizes_are_named(name, settings, said):
    with pytest.raises(ValueError, match=said):
        build({"name": name, **KINDS[name], **settings})


def test_conditions_without_a_place_are_named():
    x, t = points()
    with pytest.raises(ValueError, match="label: this network was built without classes"):
        small()(x, t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"label: rows of numbers must have the shape \(B, 5\), got \(3, 4\)"):
        small("adm")(x, t, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"augment: this network takes rows of shape \(B, 4\), got \(3, 9\)"):
        small()(x, t, augment=torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"augment: this network takes none, got \(3, 9\)"):
        small("adm")(x, t, augment=torch.zeros(3, 9))
