"""Colour transfer between two photographs: a rectified flow between two clouds of points in colour space."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.seeds import generator as seeded
from pantarhei.flow import Flow
from pantarhei.report import save_image_grid
from pantarhei.reproduce.claims import Settings
from pantarhei.reproduce.rectified_flow.points import sliced
from pantarhei.reproduce.training import fit, small_mlp


def colour_transfer(settings: Settings) -> dict[str, float]:
    """The colours of scikit-learn's photograph of a flower take the law of those of its photograph of a temple."""
    seed, size = settings.seed, settings.size
    first, second = photographs()
    clouds = [image.flatten(1).T.contiguous() for image in (first, second)]
    a, b = (_draw(cloud, size(50_000), seed, i) for i, cloud in enumerate(clouds))
    flow = Flow(small_mlp(seed, dimension=3, width=256, layers=4), shape=(3,), source=a)
    flow = fit(flow, b, seed=seed, iterations=size(4000), batch=1024)
    test, truth = (_draw(cloud, size(10_000), seed, 2 + i) for i, cloud in enumerate(clouds))
    found = {
        "distance": sliced(flow.sample(x0=test, steps=100), truth, seed),
        "untransported": sliced(test, truth, seed),
        "floor": sliced(_draw(clouds[1], size(10_000), seed, 4), truth, seed),
    }
    back = flow.invert(truth, steps=100)
    found["reverse_distance"] = sliced(back, test, seed)
    found["ratio"] = found["distance"] / found["untransported"]
    found["reverse_ratio"] = found["reverse_distance"] / found["untransported"]
    if settings.pictures:
        there = torch.cat([flow.sample(x0=part, steps=25) for part in clouds[0].split(65_536)])
        back = torch.cat([flow.invert(part, steps=25) for part in clouds[1].split(65_536)])
        moved = [pixels.T.reshape(first.shape).clamp(-1, 1) for pixels in (there, back)]
        save_image_grid(torch.stack([first, second, *moved]), settings.pictures / "colours.png", columns=2)
    return found


def photographs() -> tuple[Tensor, Tensor]:
    """The flower and the temple, (3, H, W) in [-1, 1], at half size."""
    from sklearn.datasets import load_sample_image

    images = []
    for name in ("flower.jpg", "china.jpg"):
        pixels = np.asarray(load_sample_image(name), dtype=np.float32)
        image = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
        images.append(torch.nn.functional.avg_pool2d(image[None], 2)[0])
    return images[0], images[1]


def _draw(cloud: Tensor, count: int, seed: int, salt: int) -> Tensor:
    return cloud[torch.randint(len(cloud), (count,), generator=seeded(seed, salt, 65))]
