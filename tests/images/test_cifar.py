import os
import pickle
import tarfile

import numpy as np
import torch
from image_files import RNG, error, everything

from pantarhei.images import open_images


def write_cifar(folder, protocol=2, count=4):
    folder.mkdir(parents=True)
    images = {}
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        data, labels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8), RNG.integers(0, 3, count).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels, "batch_label": name}, protocol))
        images[name] = data.reshape(-1, 3, 32, 32), labels
    names = {"label_names": ["airplane", "automobile", "bird"], "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol))
    return images


def test_cifar_batches_from_folder_and_archive(tmp_path):
    images = write_cifar(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    train = np.concatenate([images[f"data_batch_{number}"][0] for number in range(1, 6)])
    for path in (tmp_path, tmp_path / "cifar-10-batches-py", tmp_path / "cifar.tar.gz"):
        source = open_images(path)
        assert torch.equal(everything(source)["x1"], torch.from_numpy(train).float() / 127.5 - 1)
        assert source.labels.tolist() == [
            label for number in range(1, 6) for label in images[f"data_batch_{number}"][1]
        ]
        assert source.classes == ["airplane", "automobile", "bird"]
        held = open_images(path, split="test")
        assert torch.equal(everything(held)["x1"], torch.from_numpy(images["test_batch"][0]).float() / 127.5 - 1)
        assert open_images(path, size=16, channels=1).shape == (1, 16, 16)


def test_bad_cifar_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    whole, third = (folder / "data_batch_1").read_bytes(), folder / "data_batch_3"
    assert "has no split 'val'; it has: test, train" in error(ValueError, folder, split="val")

    victim = tmp_path / "victim"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {victim}",)

    third.write_bytes(pickle.dumps({"data": Attack(), "labels": []}))
    said = error(ValueError, folder)
    assert said.startswith(f"refused: the pickle asks to run {os.name}.system")
    assert "data_batch_3" in said
    assert not victim.exists()

    third.write_bytes(whole[:2000])
    assert f"cannot read {folder}: data_batch_3: a truncated" in error(ValueError, folder)
    third.write_bytes(pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}))
    assert "data_batch_3 is no CIFAR-10 batch: 'data'" in error(ValueError, folder)
    third.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}))
    assert "data_batch_3 is no CIFAR-10 batch: 'labels'" in error(ValueError, folder)
    third.unlink()
    assert "lacks data_batch_3 of CIFAR-10" in error(FileNotFoundError, folder)


def test_bad_archives(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    write_cifar(tmp_path / "c")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "c", "c")
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert f"cannot read {path}: not a tar archive, or cut short" in error(ValueError, path)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "c" / "test_batch", "c/test_batch")
    assert "lacks data_batch_1, data_batch_2" in error(FileNotFoundError, path)
