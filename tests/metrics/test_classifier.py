import pytest
import torch
from sklearn.datasets import load_digits

from pantarhei.metrics import ClassifierFeatures, SmallClassifier, extract, train_classifier


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


@pytest.fixture(scope="module")
def trained(digits):
    return train_classifier(*digits[0], iterations=200, held_out=digits[1], data="digits")


def test_it_learns_digits_and_says_so(trained, digits):
    accuracy = trained.accuracy(*digits[1])
    assert accuracy >= 0.975
    assert trained.name == f"classifier trained on digits (1,437 images, held-out accuracy {100 * accuracy:.1f} %)"


def test_features_are_the_layer_before_the_logits(trained, digits):
    images = digits[1][0][:9]
    features = trained(images)
    assert features.shape == (9, 64)
    assert not features.requires_grad
    torch.testing.assert_close(trained.network.head(features), trained.classify(images))
    torch.testing.assert_close(extract(trained, images, batch_size=4), features, rtol=1e-4, atol=1e-5)


def test_a_seed_fixes_the_weights_and_nothing_global_moves(digits):
    images, labels = digits[0][0][:100], digits[0][1][:100]

    def weights(seed):
        network = train_classifier(images, labels, classes=10, iterations=3, seed=seed).network
        return torch.cat([p.flatten() for p in network.parameters()])

    before = torch.random.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 28, 28), (3, 8, 13)])
def test_other_shapes_work(shape):
    network = SmallClassifier(shape[0], shape[1:], 5)
    assert network(torch.zeros(2, *shape)).shape == (2, 5)
    assert network.features(torch.zeros(2, *shape)).shape == (2, 64)


def test_saved_and_loaded_it_answers_the_same(trained, digits, tmp_path):
    trained.save(tmp_path / "classifier.safetensors")
    loaded = ClassifierFeatures.load(tmp_path / "classifier.safetensors")
    assert loaded.name == trained.name
    assert torch.equal(loaded(digits[1][0][:5]), trained(digits[1][0][:5]))
    assert [path.name for path in tmp_path.iterdir()] == ["classifier.safetensors"]


def test_damaged_files_are_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="no classifier"):
        ClassifierFeatures.load(tmp_path / "none.safetensors")
    whole = tmp_path / "whole.safetensors"
    trained.save(whole)
    (tmp_path / "half.safetensors").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="no saved classifier"):
        ClassifierFeatures.load(tmp_path / "half.safetensors")


def test_bad_input_is_refused(trained):
    images, labels = torch.zeros(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    for call, message in [
        (lambda: train_classifier(images, labels, iterations=0), "iterations"),
        (lambda: train_classifier(images, labels, classes=2), r"0\.\.1"),
        (lambda: train_classifier(images, labels[:5]), "labels"),
        (lambda: train_classifier(images[0], labels), r"\(N, C, H, W\)"),
        (lambda: train_classifier(images * float("nan"), labels), "NaN"),
        (lambda: train_classifier(images[..., :4, :4], labels), "at least 8"),
        (lambda: trained(torch.zeros(2, 3, 8, 8)), r"\(B, 1, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="floating"):
        train_classifier(images.to(torch.uint8), labels)
