"""The second time of every network: it changes nothing at first, is learned, and is refused where there is none."""

import copy

import pytest
import torch

from pantarhei.networks import Pair, PairConfig, build, spec_of
from pantarhei.networks.lora import add_lora
from pantarhei.networks.second_time import last_layer, with_second_time

EDM = {"size": 8, "width": 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,), "classes": 3, "dropout": 0.0}
KINDS = {
    "mlp": {"name": "mlp", "width": 16, "layers": 2, "classes": 3},
    "unet": {"name": "unet", "width": 16, "blocks": 1, "classes": 3},
    "sit": {"name": "sit", "size": 8, "width": 16, "depth": 1, "heads": 2, "classes": 3, "channels": 3},
    "ncsnpp": {"name": "ncsnpp", **EDM, "embedding": "fourier", "time_floor": 1e-3, "divide": True},
    "songunet": {"name": "songunet", **EDM, "augment_dim": 0},
    "adm": {"name": "adm", **EDM, "width": 32, "head": 16},
    "adm that adds": {"name": "adm", **EDM, "width": 32, "head": 16, "adaptive": False, "groups": 8},
}
LAST = {
    "mlp": "outputs.weight",
    "unet": "head.weight",
    "sit": "final_layer.linear.weight",
    "ncsnpp": "up.1.head.conv.weight",
    "songunet": "dec.8x8_aux_conv.weight",
    "adm": "dec.8x8_block1.conv1.weight",
    "adm that adds": "dec.8x8_block1.conv1.weight",
}


def filled(spec, dtype=torch.float32):
    """A small network all of whose layers have weight."""
    torch.manual_seed(0)
    network = build(spec)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.to(dtype).eval()


def points(kind, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *((2,) if kind == "mlp" else (3, 8, 8)), generator=generator, dtype=torch.float64).to(dtype)
    t, s = torch.tensor([[0.1, 0.4, 0.7], [0.5, 0.8, 0.9]], dtype=dtype)
    return x, t, s


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_starts_as_the_network_and_learns_to_differ(kind):
    network = filled(KINDS[kind])
    before = copy.deepcopy(network.state_dict())
    x, t, s = points(kind)
    label = torch.tensor([0, 2, 3])
    grown = with_second_time(network)
    with torch.no_grad():
        expected = network(x, t, label)
        assert torch.equal(grown(x, t, label), expected)
        assert torch.equal(grown(x, t, label, s=s), expected)
        random = with_second_time(network, initial="random")
        assert torch.equal(random(x, t, label), expected)
        other, third = random(x, t, label, s=s), random(x, t, label, s=s + 0.1)
        assert (other - expected).abs().max() > 1e-4
        assert (third - other).abs().max() > 1e-5
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    # Gradients reach the last layers of the branch at once, and all of it after a step.
    for lr in (0.1, 0.0):
        grown.zero_grad()
        grown(x, t, label, s=s).square().sum().backward()
        reached = {name for name, p in grown.named_parameters() if p.grad is not None and p.grad.any()}
        added = {name for name, _ in grown.named_parameters()} - set(before)
        assert added & reached if lr else added <= reached
        with torch.no_grad():
            for parameter in grown.parameters():
                parameter -= lr * parameter.grad / (1e-9 + parameter.grad.norm()) if parameter.grad is not None else 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_built_from_its_spec_and_old_specs_are_without(kind):
    network = filled(KINDS[kind])
    grown = with_second_time(network, initial="random")
    again = build(spec_of(grown))
    again.load_state_dict(grown.state_dict())
    assert again.config.second_time
    old = {name: value for name, value in spec_of(network).items() if name != "second_time"}
    assert build(old).config == network.config
    names = [list(dict(n.named_parameters()))[-1] for n in (network, grown)]
    assert names[0] == names[1]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_branch_s_is_refused(kind):
    network = filled(KINDS[kind])
    x, t, s = points(kind)
    with pytest.raises(ValueError, match="s: this network was built without a second time"):
        network(x, t, s=s)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_along_both_times(kind):
    network = with_second_time(filled(KINDS[kind], torch.float64), initial="random").requires_grad_(False)
    x, t, s = points(kind, torch.float64)
    assert next(network.parameters()).dtype == torch.float64
    one, step = torch.ones_like(t), 1e-6
    _, pushed = torch.func.jvp(lambda t, s: network(x, t, s=s), (t, s), (one, -2 * one))
    difference = (network(x, t + step, s=s - 2 * step) - network(x, t - step, s=s + 2 * step)) / (2 * step)
    assert torch.allclose(pushed, difference, atol=1e-5 * float(pushed.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_compiles_without_a_break(kind):
    network = with_second_time(filled(KINDS[kind]), initial="random")
    x, t, s = points(kind)
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend="eager")(x, t, s=s)
        assert torch.allclose(compiled, network(x, t, s=s), atol=1e-6)


def test_labels_enter_both_branches_of_a_songunet_and_the_first_of_an_adm():
    for kind, both in (("songunet", True), ("adm", False)):
        network = with_second_time(filled(KINDS[kind]), initial="random")
        for name, parameter in network.named_parameters():
            if ".affine." in name:
                torch.nn.init.zeros_(parameter)
        x, t, s = points(kind)
        with torch.no_grad():
            labels = [network(x, t, torch.full((3,), i), s=s) for i in (0, 1)]
            assert torch.equal(labels[0], labels[1]) != both
            assert torch.equal(network(x, t, s=s), network(x, t + 1, s=s))


def test_settings_of_the_original_adm():
    network = filled({**KINDS["adm"], "groups": 32, "time_scale": 1000.0, "head": 8})
    x, t, _ = points("adm")
    again = filled({**KINDS["adm"], "groups": 32, "head": 8})
    assert {m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)} == {32}
    assert network.dec["4x4_in0"].heads == 8
    with torch.no_grad():
        assert torch.equal(network(x, t), again(x, 1000 * t))
    with pytest.raises(ValueError, match="32 feature channels do not split into 24 groups; take a multiple of 24"):
        build({**KINDS["adm"], "groups": 24})
    with pytest.raises(ValueError, match="head: must be at least 1, got 0"):
        build({**KINDS["adm"], "head": 0})


def test_mode_types_and_what_learns_are_kept():
    network = filled(KINDS["unet"], torch.bfloat16).train()
    network.stem.requires_grad_(False)
    grown = with_second_time(network)
    assert grown.training
    assert {p.dtype for p in grown.parameters()} == {torch.bfloat16}
    assert not grown.stem.weight.requires_grad
    assert grown.head.weight.requires_grad
    assert grown.time_s.layers[0].weight.requires_grad
    again = with_second_time(grown)
    assert again is not grown
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), grown.parameters(), strict=True))


def test_low_rank_additions_are_merged():
    network = add_lora(filled(KINDS["unet"]), 2)
    for name, parameter in network.named_parameters():
        if name.endswith(".up"):
            torch.nn.init.normal_(parameter)
    x, t, s = points("unet")
    grown = with_second_time(network)
    assert "lora" not in spec_of(grown)
    with torch.no_grad():
        assert torch.allclose(grown(x, t, s=s), network(x, t), atol=1e-5)
    assert network.lora is not None


def test_a_generator_decides_the_branch_and_the_global_one_is_left_alone():
    network = filled(KINDS["songunet"])
    state = torch.random.get_rng_state()
    made = [with_second_time(network, generator=torch.Generator().manual_seed(i)) for i in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, second, third = (n.map_layer0_s.weight for n in made)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_other_networks_must_take_it_themselves():
    with pytest.raises(TypeError, match="a Linear gets no second time here; it must take one itself"):
        with_second_time(torch.nn.Linear(2, 2))
    small = {"name": "mlp", "width": 8}
    with pytest.raises(TypeError, match="a Pair gets no second time"):
        with_second_time(Pair(PairConfig(small, small)))
    with pytest.raises(ValueError, match="initial: must be zero or random, got 'none'"):
        with_second_time(filled(KINDS["mlp"]), initial="none")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer(kind):
    network = filled(KINDS[kind])
    assert last_layer(network) is dict(network.named_parameters())[LAST[kind]]
    grown = with_second_time(network)
    assert last_layer(grown) is dict(grown.named_parameters())[LAST[kind]]


def test_the_last_layer_of_others_and_of_those_that_learn_in_part():
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    assert last_layer(network) is network[0].weight
    with pytest.raises(ValueError, match="LayerNorm has no parameter of two or more dimensions"):
        last_layer(network[1])
    adapted = add_lora(filled(KINDS["unet"]), 2)
    x, t, _ = points("unet")
    chosen = last_layer(adapted)
    assert chosen.requires_grad
    (gradient,) = torch.autograd.grad(adapted(x, t).square().sum(), chosen)
    assert gradient.abs().max() > 0
    frozen = filled(KINDS["unet"]).requires_grad_(False)
    assert last_layer(frozen) is frozen.head.weight
