"""Transfer of a style between two sets of images: the plain loss against the one weighted by a classifier's features."""

from __future__ import annotations

import torch
from torch import Tensor

from pantarhei.data import Source, TensorSource
from pantarhei.data.seeds import generator as seeded
from pantarhei.data.seeds import mix
from pantarhei.flow import FeatureJacobian, Flow, FlowMatching, Term
from pantarhei.images import open_images
from pantarhei.metrics import train_classifier
from pantarhei.networks import UNet, UNetConfig
from pantarhei.recipes.rectified_flow import domain_features
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.training import run
from pantarhei.training import FlowTask, Optimization


def style_transfer(settings: Settings) -> dict[str, float]:
    """Plain digits to digits under a checkerboard: is the digit kept, and the style taken on?"""
    seed = settings.seed
    plain, styled, test, labels = _sets(seed)
    judge = train_classifier(styled.tensors["x1"], styled.tensors["label"], seed=seed, data="styled digits")
    both = torch.cat([plain.tensors["x1"], styled.tensors["x1"]])
    kinds = torch.cat([torch.zeros(len(plain)), torch.ones(len(styled))]).long()
    # Another seed than that of the features of the loss, so that the judge is not the teacher.
    style = train_classifier(both, kinds, seed=seed + 1000, data="plain and styled digits")
    found = {"judge_on_styled_test": judge.accuracy(stylise(test), labels)}
    pictures = [test[:10]]
    for name, term in (("plain", Term()), ("features", FeatureJacobian(domain_features(plain, styled, seed)))):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(seed, 66))
            network = UNet(UNetConfig(channels=1, width=16, multipliers=(1, 2), blocks=(1, 2)))
        flow = Flow(network, shape=(1, 8, 8), source=plain.tensors["x1"])
        task = FlowTask(
            flow,
            FlowMatching(terms=(term,)),
            {"x1": styled.tensors["x1"]},
            optimization=Optimization(lr=2e-3, decay="cosine", warmup=50),
            average=0.99,
        )
        moved = run(task, seed, settings.size(1200), batch=64).sample(x0=test, steps=50)
        pictures.append(moved[:10])
        found[f"{name}_digit_kept"] = judge.accuracy(moved, labels)
        found[f"{name}_style_taken"] = style.accuracy(moved, torch.ones(len(moved)).long())
        found[f"{name}_distance_to_true"] = float((moved - stylise(test)).square().mean().sqrt())
    found["kept_gain"] = found["features_digit_kept"] - found["plain_digit_kept"]
    if settings.pictures:
        save_image_grid(torch.cat([*pictures, stylise(test[:10])]), settings.pictures / "styles.png", columns=10)
    return found


def stylise(x: Tensor) -> Tensor:
    """The other style: less contrast, under a checkerboard of single pixels."""
    rows, columns = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
    return 0.6 * x + 0.4 * (1 - 2 * ((rows + columns) % 2).to(x))


def _sets(seed: int) -> tuple[TensorSource, TensorSource, Tensor, Tensor]:
    """Two disjoint sets of digits, the second in the other style, and plain ones with labels to test on."""
    data: Source = open_images("digits")
    batch = data.fetch(torch.randperm(len(data), generator=seeded(seed, 67)))
    x, y = batch["x1"], batch["label"]
    third = len(x) * 2 // 5
    plain = TensorSource({"x1": x[:third], "label": y[:third]}, "plain digits")
    styled = TensorSource({"x1": stylise(x[third : 2 * third]), "label": y[third : 2 * third]}, "styled digits")
    return plain, styled, x[2 * third :], y[2 * third :]
