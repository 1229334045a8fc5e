import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import SORTED, as_x1, error, everything, png

from pantarhei.images import ImageSource, open_images


def write_parquet(path, pictures, labels=None, paths=None, raw=False, column="image", metadata=None):
    contents = [None if each is None else each if isinstance(each, bytes) else png(each) for each in pictures]
    if raw:
        columns = {column: pa.array(contents, pa.binary())}
    else:
        paths = paths or [None] * len(contents)
        records = [{"bytes": content, "path": name} for content, name in zip(contents, paths, strict=True)]
        columns = {column: pa.array(records, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if labels is not None:
        columns["label"] = pa.array(labels)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)
    return path


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_parquet_of_records_or_bytes(tmp_path, raw, cache_bytes):
    path = write_parquet(tmp_path / "some.parquet", SORTED, [2, 0, 1, 2, 2, 0], raw=raw)
    source = open_images(path, cache_bytes=cache_bytes)
    assert torch.equal(everything(source)["x1"], as_x1(*SORTED))
    assert source.fetch(torch.tensor([3, 1]))["label"].tolist() == [2, 0]
    assert (source.classes, source.name) == (["0", "1", "2"], "some")


def test_parquet_without_labels(tmp_path):
    for labels in (None, [-1] * 6):
        source = open_images(write_parquet(tmp_path / "a.parquet", SORTED, labels, column="img"))
        assert source.classes is None
        assert everything(source).keys() == {"x1"}


def test_names_of_parquet_classes(tmp_path):
    path, labels = tmp_path / "a.parquet", [1, 0, 1, 0, 1, 0]
    open_texts = open_images(write_parquet(path, SORTED, ["dog", "ant", "dog", "ant", "dog", "ant"]))
    assert (open_texts.classes, open_texts.labels.tolist()) == (["ant", "dog"], labels)
    features = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
    named = open_images(write_parquet(path, SORTED, labels, metadata={"huggingface": json.dumps(features)}))
    assert named.classes == ["no", "yes"]
    folders = [f"train/{('ant', 'dog')[label]}/{index}.png" for index, label in enumerate(labels)]
    assert open_images(write_parquet(path, SORTED, labels, folders)).classes == ["ant", "dog"]
    unrelated = [f"train/{index % 3}/{index}.png" for index in range(6)]
    assert open_images(write_parquet(path, SORTED, labels, unrelated)).classes == ["0", "1"]


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", SORTED[:2], [0, 1])
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", SORTED[2:5], [2, 0, 1])
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", SORTED[5:], [3])
    source = open_images(tmp_path)
    assert torch.equal(everything(source)["x1"], as_x1(*SORTED[:5]))
    assert source.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.equal(everything(open_images(tmp_path, split="test"))["x1"], as_x1(SORTED[5]))
    assert "has no split 'val'; it has: test, train" in error(ValueError, tmp_path, split="val")
    one = tmp_path / "data/test-00000-of-00001.parquet"
    assert len(open_images(one)) == len(open_images(one, split="test")) == 1


def test_parquet_files_without_splits_are_one_set(tmp_path):
    write_parquet(tmp_path / "1.parquet", SORTED[:2])
    write_parquet(tmp_path / "0.parquet", SORTED[2:])
    assert torch.equal(everything(open_images(tmp_path))["x1"], as_x1(*SORTED[2:], *SORTED[:2]))
    assert "it is one set" in error(ValueError, tmp_path, split="test")


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    whole = write_parquet(path, SORTED).read_bytes()
    for content in (b"", b"no parquet", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert f"cannot read {path}: not a parquet file, or cut short" in error(ValueError, path)
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    assert f"{path} has the columns text, label; a column 'image' is wanted" in error(ValueError, path)
    pq.write_table(pa.table({"image": ["a"]}), path)
    assert "column 'image'" in error(ValueError, path)
    assert "bytes of image files are wanted" in error(ValueError, path)
    assert "its tables have no rows" in error(ValueError, write_parquet(path, []))
    said = error(ValueError, write_parquet(path, [*SORTED[:2], b"junk"], paths=["x/1.png", "x/2.png", "x/3.png"]))
    assert f"cannot read image {path}: row 2 (x/3.png): not an image" in said
    assert "row 1 holds no bytes of an image" in error(ValueError, write_parquet(path, [SORTED[0], None]))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, None], "label 1 in column 'label' of"),
        ([0.5, 1.5], "is 0.5; an integer from 0 or a name is wanted"),
        ([3, -2], "is -2; labels count from 0"),
    ],
)
def test_bad_labels(tmp_path, labels, said):
    assert said in error(ValueError, write_parquet(tmp_path / "a.parquet", SORTED[:2], labels))


def test_missing_extras_name_the_command(monkeypatch, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", SORTED)
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "pantarhei[images]"' in error(ImportError, path)
    assert error(ImportError, "hf:someone/something").startswith("hf:someone/something needs datasets: pip install")
    assert "names no data set; give hf:NAME" in error(ValueError, "hf:")


def test_cifar10_in_parquet_if_it_is_at_hand():
    folder = Path(os.environ.get("PANTARHEI_DATA", "../shared/data")) / "cifar10"
    if not (folder / "test.parquet").is_file():
        pytest.skip("no CIFAR-10 under $PANTARHEI_DATA")
    source = open_images(folder, split="test", cache_bytes=0)
    assert isinstance(source, ImageSource)
    assert (len(source), source.shape) == (10_000, (3, 32, 32))
    assert source.classes[:3] == ["airplane", "automobile", "bird"]
    assert torch.bincount(source.labels).tolist() == [1000] * 10
    x1 = source.fetch(torch.arange(0, 10_000, 40))["x1"]
    # Mean and deviation of CIFAR-10's pixels are known: 0.473 and 0.251 on 0..1.
    assert abs(float(x1.mean()) / 2 + 0.5 - 0.473) < 0.03
    assert abs(float(x1.std()) / 2 - 0.251) < 0.03
