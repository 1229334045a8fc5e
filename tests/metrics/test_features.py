import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pantarhei.data import TensorSource
from pantarhei.metrics import FeatureExtractor, extract


class Corners:
    """Features by hand: the four corner pixels of the first channel."""

    name = "corners"

    def __init__(self):
        self.batches, self.device = [], None

    def __call__(self, images):
        self.batches.append(len(images))
        return images[:, 0, :: images.shape[2] - 1, :: images.shape[3] - 1].flatten(1)

    def to(self, device):
        self.device = device


images = torch.rand(7, 2, 5, 5, generator=torch.Generator().manual_seed(0))
expected = images[:, 0, ::4, ::4].flatten(1)


@pytest.mark.parametrize(
    "source",
    [
        images,
        TensorSource({"x1": images, "label": torch.arange(7)}),
        TensorDataset(images, torch.arange(7)),
        [{"x1": image} for image in images],
        DataLoader(TensorDataset(images, torch.arange(7)), batch_size=3),
        iter([{"x1": images[:3]}, {"x1": images[3:6]}, {"x1": images[6:]}]),
    ],
    ids=["tensor", "source", "dataset", "list", "loader", "iterator"],
)
def test_every_kind_of_source_gives_the_same_features(source):
    extractor = Corners()
    assert torch.equal(extract(extractor, source, batch_size=3, device="cpu"), expected)
    assert extractor.batches == [3, 3, 1]
    assert extractor.device == "cpu"


def test_an_extractor_is_anything_with_a_name_that_can_be_called():
    assert isinstance(Corners(), FeatureExtractor)
    assert not isinstance(torch.relu, FeatureExtractor)


def test_bad_sources_are_refused():
    with pytest.raises(ValueError, match="no images"):
        extract(Corners(), images[:0])
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        extract(Corners(), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="batch_size"):
        extract(Corners(), images, batch_size=0)
    with pytest.raises(TypeError, match="x1"):
        extract(Corners(), iter([{"y": images}]))
