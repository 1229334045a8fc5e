import math
import re

import pytest
import torch
from safetensors.torch import save_file

from pantarhei.metrics import InceptionFeatures, InceptionV3, inception_score


def random_state(seed=0):
    """Random weights of a scale that keeps signals alive through 94 layers."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in InceptionV3().state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        if key.endswith("running_var") or key.endswith("bn.weight"):
            state[key] = torch.ones(shape)
        elif len(shape) == 4:
            state[key] = torch.randn(shape, generator=g) * math.sqrt(2 / math.prod(shape[1:]))
        else:
            state[key] = torch.zeros(shape)
    return state


@pytest.fixture(scope="module")
def state():
    return random_state()


@pytest.fixture(scope="module")
def path(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def extractor(path):
    return InceptionFeatures(path)


def test_it_is_the_network_of_the_public_file():
    with torch.device("meta"):
        network = InceptionV3()
    # 23,834,568 parameters of the published network with 1000 classes and without auxiliary head, and 8 classes more.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    keys = network.state_dict().keys()
    assert sum(key.endswith("conv.weight") for key in keys) == 94
    assert len(keys) == 94 * 5 + 2
    for key in (
        "Conv2d_1a_3x3.conv.weight",
        "Conv2d_4a_3x3.bn.running_mean",
        "Mixed_5b.branch1x1.conv.weight",
        "Mixed_6e.branch7x7dbl_5.bn.running_var",
        "Mixed_7a.branch7x7x3_4.bn.bias",
        "Mixed_7c.branch3x3dbl_3b.bn.weight",
        "fc.weight",
    ):
        assert key in keys


def test_features_are_finite_and_tell_images_apart(extractor):
    image = torch.rand(1, 3, 32, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = extractor(image)
    assert features.shape == (1, 2048)
    assert bool(torch.isfinite(features).all())
    assert features.std() > 0
    # Rounded to 8 bits, a change of a tenth of a grey level is none.
    assert torch.equal(extractor(((image + 1) * 127.5).round() / 127.5 - 1 + 1e-4), features)


def test_grey_is_three_equal_channels(extractor):
    grey = torch.zeros(1, 1, 16, 16) + torch.linspace(-1, 1, 16)
    seen = []
    extractor.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    extractor(grey)
    assert seen[0].shape == (1, 3, 299, 299)
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])
    assert float(seen[0].min()) == -1


def test_pools_are_those_of_the_tensorflow_graph():
    with torch.device("meta"):
        network = InceptionV3()
    average, maximum = network.Mixed_7b.pool, network.Mixed_7c.pool
    # An average that counted the padding would darken the edge of a constant picture.
    assert torch.equal(average(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    ramp = torch.arange(4.0).expand(1, 1, 1, 4)
    assert maximum(ramp).flatten().tolist() == [1, 2, 3, 3]
    assert average(ramp).flatten().tolist() == [0.5, 1, 2, 2.5]


def test_both_formats_and_batch_counters_are_read(state, path, extractor):
    assert re.fullmatch(r"Inception-v3 pool3 \(weights [0-9a-f]{8}\)", extractor.name)
    other = path.with_suffix(".safetensors")
    save_file({**state, "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}, other)
    loaded = InceptionFeatures(other)
    assert loaded.name != extractor.name
    for key, value in loaded.network.state_dict().items():
        assert torch.equal(value, state[key])


def test_files_that_do_not_fit_are_refused(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="pt_inception"):
        InceptionFeatures(tmp_path / "none.pth")
    small = {key: value for key, value in state.items() if value.ndim < 4}
    file = tmp_path / "weights.pth"
    for change, message in [
        ({}, "lacks 'Conv2d_1a_3x3.conv.weight'"),
        (
            {key: torch.zeros(v.shape, dtype=torch.uint8) for key, v in state.items() if v.ndim == 4}
            | {"aux": torch.ones(1)},
            "'aux'",
        ),
        ({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}, r"shape \(32, 1, 3, 3\)"),
        ({"Conv2d_1a_3x3.conv.weight": 3}, "is a int"),
    ]:
        torch.save(small | change, file)
        with pytest.raises(ValueError, match=message):
            InceptionFeatures(file)
    file.write_bytes(b"not a weight file")
    with pytest.raises(ValueError, match="weights"):
        InceptionFeatures(file)


def test_inception_score_of_known_predictions(extractor):
    sure = 50.0 * torch.eye(4).repeat(25, 1)
    assert inception_score(sure, splits=5).mean == pytest.approx(4.0, rel=1e-6)
    assert inception_score(torch.zeros(100, 4)).mean == pytest.approx(1.0)
    assert inception_score(50.0 * torch.eye(4)[:1].expand(20, 4)).mean == pytest.approx(1.0)
    with pytest.raises(ValueError, match="N >= 10"):
        inception_score(torch.zeros(3, 4))
    assert extractor.logits(torch.rand(2, 2048)).shape == (2, 1008)
