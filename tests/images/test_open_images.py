import json
import os
import pickle

import pytest
import torch
from image_files import CLASSES, SORTED, as_x1, error, everything, picture, png, write_tree, write_zip

from pantarhei.data import Source, split
from pantarhei.images import open_images


def test_digits_are_embedded():
    source = open_images("digits")
    assert isinstance(source, Source)
    assert (len(source), source.shape, source.classes) == (1797, (1, 8, 8), [str(digit) for digit in range(10)])
    batch = source.fetch(torch.tensor([5, 0]))
    from sklearn.datasets import load_digits

    loaded = load_digits()
    assert torch.equal(batch["x1"][:, 0], torch.from_numpy(loaded.images[[5, 0]]).float() / 8 - 1)
    assert batch["label"].tolist() == loaded.target[[5, 0]].tolist()
    assert batch["x1"].dtype == torch.float32
    x1 = everything(source)["x1"]
    assert (x1.min(), x1.max()) == (-1.0, 1.0)


def test_digits_can_be_enlarged_and_coloured():
    coloured = everything(open_images("digits", channels=3))["x1"]
    assert torch.equal(coloured, everything(open_images("digits"))["x1"].expand(-1, 3, -1, -1))
    large = open_images("digits", size=16)
    assert large.shape == (1, 16, 16)
    small = everything(open_images("digits"))["x1"]
    # not exactly kept: what overshoots at an edge is cut to the range
    assert (everything(large)["x1"].mean() - small.mean()).abs() < 0.03


def test_digits_split_by_class():
    train, rest = split(open_images("digits"), 0.2)
    assert len(train) + len(rest) == 1797
    share = torch.bincount(rest.labels) / torch.bincount(open_images("digits").labels)
    assert (share - 0.2).abs().max() < 0.01
    assert rest.describe()["classes"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_folder_of_classes(tmp_path, cache_bytes):
    write_tree(tmp_path, {**CLASSES, ".hidden/x.png": b"", "cat/.y.png": b"", "notes.txt": b"hello"})
    source = open_images(str(tmp_path), cache_bytes=cache_bytes)
    batch = everything(source)
    assert torch.equal(batch["x1"], as_x1(*SORTED))
    assert batch["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert batch["label"].dtype == torch.int64
    assert (source.classes, source.shape, source.name) == (["cat", "dog"], (3, 6, 6), tmp_path.name)
    assert torch.equal(source.fetch(torch.tensor([4, 4, 0]))["x1"], as_x1(SORTED[4], SORTED[4], SORTED[0]))
    said = json.loads(json.dumps(source.describe()))
    assert (said["count"], said["shape"], said["classes"], said["kind"]) == (6, [3, 6, 6], ["cat", "dog"], "folder")


def test_cached_images_outlive_their_files(tmp_path):
    path = tmp_path / "a.png"
    write_tree(tmp_path, {"a.png": picture()})
    kept, read = open_images(tmp_path), open_images(tmp_path, cache_bytes=3 * 36 - 1)
    path.unlink()
    assert len(everything(kept)["x1"]) == 1
    with pytest.raises(FileNotFoundError):
        everything(read)


def test_a_flat_folder_has_no_labels(tmp_path):
    images = {name: picture() for name in ("b.PNG", "a.bmp", "c.webp")}
    write_tree(tmp_path, images)  # what is inside decides, not the suffix
    source = open_images(tmp_path)
    assert torch.equal(everything(source)["x1"], as_x1(images["a.bmp"], images["b.PNG"], images["c.webp"]))
    assert everything(source).keys() == {"x1"}
    assert source.classes is None
    assert source.labels is None


def test_deeper_folders_belong_to_the_class_of_the_first_level(tmp_path):
    write_tree(tmp_path, {"a/x/1.png": picture(), "b/2.png": picture(), "a/y/z/3.png": picture()})
    source = open_images(tmp_path)
    assert source.classes == ["a", "b"]
    assert everything(source)["label"].tolist() == [0, 0, 1]


def test_folders_called_train_and_test_are_splits(tmp_path):
    tree = {f"{part}/{path}": content for part in ("train", "test") for path, content in list(CLASSES.items())[1:]}
    write_tree(tmp_path, {**tree, "test/dog/9.png": picture()})
    assert len(open_images(tmp_path)) == 5
    source = open_images(tmp_path, split="test")
    assert (len(source), source.classes) == (6, ["cat", "dog"])
    assert f"{tmp_path} has no split 'val'; it has: test, train" in error(ValueError, tmp_path, split="val")


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="links")
def test_linked_folders_are_followed_once(tmp_path):
    write_tree(tmp_path, {"set/a/1.png": picture(), "else/2.png": picture()})
    (tmp_path / "set/b").symlink_to(tmp_path / "else")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    source = open_images(tmp_path / "set")
    assert (len(source), source.classes) == (2, ["a", "b"])


@pytest.mark.parametrize("prefix", ["", "wrapped/", "wrapped/twice/"])
def test_a_zip_is_like_a_folder(tmp_path, prefix):
    tree = {prefix + path: content for path, content in CLASSES.items()}
    archive = write_zip(tmp_path / "set.zip", {**tree, "__MACOSX/cat/1.png": b"", "readme.txt": b""})
    for cache_bytes in (0, 2**20):
        source = open_images(archive, cache_bytes=cache_bytes)
        assert torch.equal(everything(source)["x1"], as_x1(*SORTED))
        if prefix != "wrapped/twice/":
            assert source.classes == ["cat", "dog"]
        assert source.name == "set"
        again = pickle.loads(pickle.dumps(source))  # as workers of a DataLoader get it
        assert torch.equal(everything(again)["x1"], as_x1(*SORTED))


def test_large_files_are_decoded_in_threads_in_order(tmp_path):
    images = {f"{number:02d}.png": picture(80, 80) for number in range(20)}
    write_tree(tmp_path, images)
    source = open_images(tmp_path, cache_bytes=0)
    assert source._threaded
    assert torch.equal(everything(source)["x1"], as_x1(*images.values()))
    assert torch.equal(everything(open_images(tmp_path))["x1"], as_x1(*images.values()))


def test_size_and_channels_make_images_alike(tmp_path):
    write_tree(tmp_path, {"a.png": picture(8, 12), "b.png": picture(20, 9, 1)})
    source = open_images(tmp_path, size=4)
    assert everything(source)["x1"].shape == (2, 3, 4, 4)
    assert open_images(tmp_path, size=4, channels=1).shape == (1, 4, 4)
    assert everything(source)["x1"].abs().max() <= 1.0


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_mixed_sizes_name_both_files_and_the_way_out(tmp_path, cache_bytes):
    write_tree(tmp_path, {"a.png": picture(8, 12), "b.png": picture(8, 12), "c.png": picture(6, 5)})
    with pytest.raises(ValueError) as caught:
        everything(open_images(tmp_path, cache_bytes=cache_bytes))
    said = str(caught.value)
    assert f"{tmp_path / 'a.png'} is 12x8, {tmp_path / 'c.png'} is 5x6" in said
    assert "--size N" in said


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_truncated_image_is_named(tmp_path, cache_bytes):
    whole = picture(20, 20)
    write_tree(tmp_path, {"a.png": whole, "b.png": png(whole)[:600]})
    with pytest.raises(ValueError, match=r"cannot read image .*b\.png: "):
        everything(open_images(tmp_path, cache_bytes=cache_bytes))
    archive = write_zip(tmp_path / "set.zip", {"a.png": whole, "b.png": b"no image"})
    assert "b.png: not an image" in error(ValueError, archive)


def test_bad_folders_and_archives(tmp_path):
    (tmp_path / "empty").mkdir()
    write_tree(tmp_path, {"text/a.txt": b"", "mixed/a.png": picture(), "mixed/b/c.png": picture()})
    assert f"no images in {tmp_path / 'empty'}; files that end in .png, .jpg" in error(ValueError, tmp_path / "empty")
    assert "no images in" in error(ValueError, tmp_path / "text")
    assert "1 of 2 images" in error(ValueError, tmp_path / "mixed")
    assert "beside the class folders (first: a.png)" in error(ValueError, tmp_path / "mixed")
    assert "no images in" in error(ValueError, write_zip(tmp_path / "none.zip", {"a.txt": b""}))
    archive = write_zip(tmp_path / "whole.zip", CLASSES).read_bytes()
    for content in (b"", b"no zip", archive[: len(archive) // 2]):
        (tmp_path / "cut.zip").write_bytes(content)
        assert f"{tmp_path / 'cut.zip'} is not a zip archive, or is cut short" in error(
            ValueError, tmp_path / "cut.zip"
        )


def test_damage_inside_a_zip_is_named(tmp_path):
    archive = write_zip(tmp_path / "set.zip", {"a.png": picture(), "b.png": picture()})
    content = bytearray(archive.read_bytes())
    content[content.rindex(b"IDAT") + 6] ^= 0xFF  # in b.png; its checksum in the archive does not fit any more
    archive.write_bytes(content)
    assert "cannot read image" in error(ValueError, archive)
    assert "b.png" in error(ValueError, archive)


def test_unknown_data_say_what_is_near_and_what_there_is(tmp_path):
    (tmp_path / "flowers").mkdir()
    said = error(FileNotFoundError, "digit")
    assert said.startswith("no data 'digit': neither a name nor a path that exists; did you mean digits?")
    for kind in ("digits", "folder", ".zip", ".parquet", "CIFAR-10", "hf:NAME"):
        assert kind in said
    assert f"did you mean {tmp_path / 'flowers'}?" in error(FileNotFoundError, tmp_path / "flower")
    assert "did you mean" not in error(FileNotFoundError, "something else")
    write_tree(tmp_path, {"a.png": picture(), "notes.txt": b"x"})
    assert "is a single image; give the folder" in error(ValueError, tmp_path / "a.png")
    assert "file of no known kind; data may be: digits" in error(ValueError, tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 0}, "size is 0"),
        ({"channels": 4}, "channels is 4; give 1 (greyscale) or 3 (RGB)"),
        ({"cache_bytes": -1}, "cache_bytes is -1"),
        ({"split": "test"}, "digits has no split 'test': it is one set"),
    ],
)
def test_options_out_of_range(options, said):
    assert said in error(ValueError, "digits", **options)
