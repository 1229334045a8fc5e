"""SiT: published sizes, initial state, conditions, precision, derivatives of both modes, and a plain twin."""

import math

import pytest
import torch
from torch.nn import functional as F

from pantarhei.flow.conditions import Condition
from pantarhei.flow.transforms import Guidance
from pantarhei.networks import SiT, SiTConfig, build, spec_of
from pantarhei.networks.attention import attend
from pantarhei.networks.sit import PATCHES, SIZES

TINY = {"size": 6, "patch": 2, "channels": 3, "width": 24, "depth": 2, "heads": 3}


def tiny(dtype=torch.float32, **settings):
    """A small network whose zero layers have been given weight."""
    torch.manual_seed(0)
    network = SiT(SiTConfig(**{**TINY, **settings}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.to(dtype).eval()


def points(dtype=torch.float32, rows=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, 6, 6, generator=generator).to(dtype), torch.tensor([0.1, 0.5, 0.9])[:rows].to(dtype)


def plainly(network, x, t, label=None):
    """The network as the papers write it, one operation after another."""
    config, w = network.config, network.state_dict()
    b, c, p, side = x.shape[0], config.channels, config.patch, config.size // config.patch

    def linear(h, name):
        return h @ w[f"{name}.weight"].t() + w[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def silu(h):
        return h * h.sigmoid()

    angles = t[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
    condition = linear(silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    if config.classes:
        condition = condition + w["y_embedder.embedding_table.weight"][label]
    patches = x.reshape(b, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, c * p * p)
    h = patches @ w["x_embedder.proj.weight"].flatten(1).t() + w["x_embedder.proj.bias"] + w["pos_embed"]
    for i in range(config.depth):
        parts = linear(silu(condition), f"blocks.{i}.adaLN_modulation.1")[:, None].chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        q, k, v = (
            part.reshape(b, side * side, config.heads, -1).transpose(1, 2)
            for part in linear(norm(h) * (1 + scale1) + shift1, f"blocks.{i}.attn.qkv").chunk(3, -1)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        h = h + gate1 * linear((weights @ v).transpose(1, 2).reshape(h.shape), f"blocks.{i}.attn.proj")
        inner = F.gelu(linear(norm(h) * (1 + scale2) + shift2, f"blocks.{i}.mlp.fc1"), approximate="tanh")
        h = h + gate2 * linear(inner, f"blocks.{i}.mlp.fc2")
    shift, scale = linear(silu(condition), "final_layer.adaLN_modulation.1")[:, None].chunk(2, -1)
    out = linear(norm(h) * (1 + scale) + shift, "final_layer.linear").reshape(b, side, side, p, p, -1)
    return torch.einsum("bhwpqc->bchpwq", out).reshape(b, -1, config.size, config.size)[:, :c]


@pytest.mark.parametrize(
    "settings", [{}, {"classes": 4}, {"learn_sigma": False}, {"mlp": 1.5, "patch": 3}, {"patch": 1}]
)
def test_it_is_what_the_papers_write(settings):
    network = tiny(torch.float64, **settings)
    x, t = points(torch.float64)
    label = torch.tensor([0, 4, 2]) if network.config.classes else None
    with torch.no_grad():
        assert torch.allclose(network(x, t, label), plainly(network, x, t, label), atol=1e-11)


def test_published_sizes():
    with torch.device("meta"):
        largest = SiT(SiTConfig.named("SiT-XL/2", classes=1000))
    # Counted with the table of positions, which is a frozen parameter in the reference.
    assert sum(value.numel() for value in largest.state_dict().values()) == 675_129_632
    for size in SIZES:
        for patch in PATCHES:
            assert SiTConfig.named(f"{size}/{patch}").name == f"{size}/{patch}"
    assert SiTConfig.named("S/2") == SiTConfig()
    assert SiTConfig(heads=12).name is None
    with pytest.raises(ValueError, match="did you mean 'XL/2'"):
        SiTConfig.named("XL-2")


def test_initial_state():
    torch.manual_seed(0)
    network = SiT(SiTConfig(**TINY, classes=4))
    x, t = points()
    assert not network(x, t).any()
    tokens = torch.randn(3, 9, 24)
    assert torch.equal(network.blocks[0](tokens, torch.randn(3, 24)), tokens)
    for weight in (network.x_embedder.proj.weight, network.blocks[1].mlp.fc1.weight):
        outputs, inputs = weight.flatten(1).shape
        limit = math.sqrt(6 / (inputs + outputs))
        assert 0.9 * limit < float(weight.detach().abs().max()) <= limit
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    assert not network.pos_embed.requires_grad


def test_positions_are_distinct_and_shift_by_a_rotation():
    table = SiT(SiTConfig(**{**TINY, "size": 16})).pos_embed[0].double().reshape(8, 8, 24)
    similarity = torch.einsum("ijc,klc->ijkl", table, table)
    # Dot products of sinusoids depend on the difference of places only; rows and columns play the same part.
    assert torch.allclose(similarity[:-1, :-1, :-1, :-1], similarity[1:, 1:, 1:, 1:], atol=1e-5)
    assert torch.allclose(similarity[0, 0], similarity[0, 0].t(), atol=1e-5)
    assert torch.allclose(similarity.reshape(64, 64).argmax(1), torch.arange(64))
    # The first half encodes the column.
    assert torch.equal(table[2, 5, :12], table[6, 5, :12])


def test_null_class_and_conditions():
    network = tiny(classes=4)
    x, t = points()
    with torch.no_grad():
        out = network(x, t, torch.tensor([0, 1, 2]))
        assert not torch.allclose(network(x, t, torch.tensor([3, 1, 2]))[0], out[0])
        assert not torch.allclose(network(x, t.flip(0), torch.tensor([0, 1, 2]))[0], out[0])
        assert torch.allclose(network(x, t), network(x, t, torch.full((3,), 4)))
        assert torch.allclose(network(x[1:2], t[1:2], torch.tensor([1])), out[1:2], atol=1e-5)
    with pytest.raises(ValueError, match="without classes"):
        tiny()(x, t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"items of shape \(3, 6, 6\), got \(3, 8, 8\)"):
        tiny()(torch.zeros(1, 3, 8, 8), t[:1])
    assert "y_embedder" not in dict(tiny().named_children())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_precision_follows_the_network(dtype):
    network = tiny(dtype)
    x, t = points(dtype)
    with torch.no_grad():
        out = network(x, t)
        exact = tiny(torch.float64)(*points(torch.float64))
    assert out.dtype == dtype
    assert torch.allclose(out.double(), exact, atol={torch.float32: 1e-4, torch.float64: 0, torch.bfloat16: 1}[dtype])
    # A time in single precision is good enough for a network in half precision, and is not rounded to it.
    assert network(x, t.float()).dtype == dtype


def test_derivatives_of_both_modes_agree():
    network = tiny(torch.float64, classes=4)
    x, t = points(torch.float64, rows=2)
    v, w = torch.randn_like(x), torch.randn_like(x)
    label = torch.tensor([1, 4])
    out, pushed = torch.func.jvp(lambda x, t: network(x, t, label), (x, t), (v, torch.ones_like(t)))
    assert torch.allclose(out, network(x, t, label), atol=1e-12)
    (pulled, pulled_t), eps = torch.func.vjp(lambda x, t: network(x, t, label), x, t)[1](w), 1e-5
    assert torch.allclose((pushed * w).sum(), (pulled * v).sum() + pulled_t.sum(), atol=1e-9)
    moved = (network(x + eps * v, t + eps, label) - network(x - eps * v, t - eps, label)) / (2 * eps)
    assert torch.allclose(moved, pushed, atol=1e-6)
    # Batched, nested, and the older interface of forward mode.
    many = torch.func.vmap(lambda v: torch.func.jvp(lambda x: network(x, t, label), (x,), (v,))[1])(torch.stack([v, w]))
    one = torch.func.jvp(lambda x: network(x, t, label), (x,), (w,))[1]
    assert torch.allclose(many[1], one, atol=1e-10)
    energy = torch.func.grad(lambda x: network(x, t, label).square().sum())
    assert torch.func.jvp(energy, (x,), (v,))[1].shape == x.shape
    with torch.autograd.forward_ad.dual_level():
        dual = network(torch.autograd.forward_ad.make_dual(x, w), t, label)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, one, atol=1e-10)


def test_gradients_reach_every_parameter():
    network = tiny(classes=4)
    x, t = points()
    network(x, t, torch.tensor([0, 1, 4])).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.any(), name


def test_fused_and_plain_attention_agree():
    q, k, v = torch.randn(3, 2, 4, 9, 5, dtype=torch.float64)
    plain = torch.func.vmap(lambda q: attend(q[None], k[:1], v[:1])[0])(q[:1])
    assert torch.allclose(attend(q[:1], k[:1], v[:1]), plain, atol=1e-12)


def test_it_compiles_without_a_break():
    network = tiny(classes=4)
    x, t = points()
    label = torch.tensor([0, 1, 4])
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")(x, t, label)
        assert torch.equal(compiled, network(x, t, label))


def test_it_is_rebuilt_from_its_sizes():
    network = tiny(classes=4, mlp=2.0)
    again = build(spec_of(network))
    again.load_state_dict(network.state_dict())
    assert again.config == network.config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"patch": 4}, "patch: must divide the size 6, got 4"),
        ({"heads": 5}, "multiple of 4 and of the 5 heads"),
        ({"width": 6}, "multiple of 4"),
        ({"depth": 0}, "at least 1"),
        ({"classes": -1}, "classes"),
        ({"mlp": 0.0}, "mlp"),
    ],
)
def test_bad_sizes_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        build({"name": "sit", **TINY, **settings})


def test_guidance_of_some_channels():
    network = tiny(classes=4)
    x, t = points()
    condition = Condition({"label": torch.tensor([0, 1, 2])}, {"label": 4})

    def field(x, t, condition):
        return network(x, t, **condition)

    with torch.no_grad():
        guided = Guidance(2.0)(field, x, t, condition, None)
        conditional = field(x, t, condition)
        for batched in (True, False):
            partly = Guidance(2.0, batched=batched, channels=2)(field, x, t, condition, None)
            assert torch.allclose(partly[:, :2], guided[:, :2], atol=1e-5)
            assert torch.allclose(partly[:, 2:], conditional[:, 2:], atol=1e-5)
        assert torch.allclose(Guidance(2.0, channels=3)(field, x, t, condition, None), guided)
        late = Guidance(2.0, interval=(0.4, 1.0), channels=2)(field, x, t, condition, None)
        assert torch.allclose(late[0], conditional[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance on 4 channels, but states are \(3, 6, 6\)"):
        Guidance(2.0, channels=4)(field, x, t, condition, None)
    with pytest.raises(ValueError, match="at least one channel, got 0"):
        Guidance(2.0, channels=0)
