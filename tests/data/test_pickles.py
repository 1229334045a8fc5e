import argparse
import contextlib
import io
import os
import pickle
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pantarhei.data import load_weights, restricted_load

PLAIN = {
    "numbers": [1, -2, 10**40, 1.5, True, None, 2j],
    "text": ("é", b"", b"\x00\xff", bytearray(b"\x01\xff")),
    "sets": [{1, 2}, frozenset({"a"})],
    "nested": {"a": [{"b": ((1,), [2])}]},
}
ARRAYS = {
    "c": np.arange(6.0).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "turned": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "stride": np.arange(10, dtype=np.int16)[::3],
    "big endian": np.arange(4, dtype=">i4"),
    "bool": np.array([True, False]),
    "complex": np.array([1j], dtype=np.complex64),
    "half": np.array([0.5], dtype=np.float16),
    "bytes": np.arange(256, dtype=np.uint8),
    "0-d": np.array(3.0),
    "empty": np.empty((0, 2), dtype=np.float32),
    "text": np.array(["ab", "é"]),
    "raw text": np.array([b"ab"]),
    "objects": np.array([["a", None], [1, (2, 3)]], dtype=object),
    "records": np.array([(1, 2.5, [7, 8])], dtype=[("a", "<i4"), ("b", ">f8"), ("c", "u1", (2,))]),
    "scalar": np.float32(2.5),
    "dtype": np.dtype("<u2"),
}


class Attack:
    """Pickles into a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Call:
    """Pickles into any call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refusal(content):
    with pytest.raises(ValueError) as caught:
        restricted_load(content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_come_back_as_they_were(protocol):
    loaded = restricted_load(pickle.dumps(PLAIN, protocol=protocol))
    assert loaded == PLAIN
    assert [type(entry) for entry in loaded["text"]] == [str, bytes, bytes, bytearray]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back_as_they_were(protocol, kind):
    array = ARRAYS[kind]
    loaded = restricted_load(pickle.dumps({"a": [array]}, protocol=protocol))["a"][0]
    assert type(loaded) is type(array)
    if isinstance(array, np.ndarray):
        assert loaded.dtype == array.dtype
        assert loaded.shape == array.shape
        assert loaded.flags.writeable
        assert (loaded == array).all()
    else:
        assert loaded == array


@pytest.mark.parametrize("protocol", range(6))
def test_shared_and_circular_references_are_kept(protocol):
    array, ring = np.arange(3), []
    ring.append(ring)
    loaded = restricted_load(pickle.dumps({"a": array, "b": [array], "ring": ring}, protocol=protocol))
    assert loaded["a"] is loaded["b"][0]
    assert loaded["ring"][0] is loaded["ring"]


def test_ordered_dicts_become_dicts():
    loaded = restricted_load(pickle.dumps(OrderedDict([("b", 1), ("a", np.ones(2))])))
    assert type(loaded) is dict
    assert list(loaded) == ["b", "a"]


def python2_pickle():
    # What Python 2 wrote for {'data': array([[1, 200]], dtype=uint8), 'name': 'caf\xe9'}: 8-bit strings (opcode U).
    def text(raw):
        return b"U" + bytes([len(raw)]) + raw

    dtype = (
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    array = empty + b"(K\x01K\x01K\x02\x86" + dtype + b"\x89" + text(b"\x01\xc8") + b"tb"
    return b"\x80\x02}(" + text(b"data") + array + text(b"name") + text(b"caf\xe9") + b"u."


def test_pickles_of_python_2_are_read():
    loaded = restricted_load(python2_pickle())
    assert loaded["data"].tolist() == [[1, 200]]
    assert loaded["data"].dtype == np.uint8
    assert loaded["name"] == "café"
    raw = restricted_load(python2_pickle(), encoding="bytes")
    assert raw[b"data"].tolist() == [[1, 200]]
    assert raw[b"name"] == b"caf\xe9"
    with pytest.raises(ValueError, match="cannot read the given bytes"):
        restricted_load(python2_pickle(), encoding="utf-8")


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_run(tmp_path, protocol):
    victim, file = tmp_path / "victim", tmp_path / "evil.pkl"
    content = pickle.dumps({"a": 1, "b": Attack(f"touch {victim}")}, protocol=protocol)
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        restricted_load(file)
    assert not victim.exists()
    assert f"refused: the pickle asks to run {os.name}.system ({file})" in str(caught.value)
    pickle.loads(content)  # it would have worked
    assert victim.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (Call(eval, "1"), "builtins.eval"),
        (Call(getattr, [], "append"), "builtins.getattr"),
        (Call(__import__, "os"), "builtins.__import__"),
        (Call(subprocess.getoutput, "true"), "subprocess.getoutput"),
        (Call(np.load, "x.npy"), "numpy.load"),
        (Call(np.fromfile, "x"), "numpy.fromfile"),
        (defaultdict(list), "collections.defaultdict"),
        (np.ma.masked_array([1.0]), "numpy.ma"),
        (torch.zeros(1), "torch._utils"),
        (range(3), "builtins.range"),
        (print, "builtins.print"),
        (ValueError("x"), "builtins.ValueError"),
    ],
)
def test_every_other_name_is_refused_by_its_name(content, named):
    assert refusal(pickle.dumps(content)).startswith(f"refused: the pickle asks to run {named}")


def test_dotted_names_and_outside_objects_are_refused():
    # Protocol 4 may ask for an attribute of an attribute.
    content = b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93."
    assert "numpy.ndarray.__class__" in refusal(content)
    assert "outside object" in refusal(b"\x80\x02K\x05Q.")


@pytest.mark.parametrize(
    "content",
    [
        Call(bytearray, 10**12),  # would be filled with zeros
        Call(bytes, 10**12),
        Call(__import__("_codecs").encode, "a", "rot13"),
        Call(np.ndarray, (10**9,)),
        Call(np.dtype, "M8[s]"),
        Call(np.dtype, [("a", "O")]),
        Call(np._core.multiarray._reconstruct, list, (0,), b"b"),
    ],
)
def test_allowed_names_cannot_be_called_for_something_else(content):
    refusal(pickle.dumps(content))


def test_a_state_cannot_be_set_on_a_constructor():
    # BUILD with slots would otherwise overwrite the function behind numpy.dtype for the rest of the process.
    refusal(b"\x80\x04cnumpy\ndtype\nN}\x8c\x04callK\x01s\x86b.")
    refusal(b"\x80\x04cnumpy\ndtype\n}\x8c\x04callK\x01sb.")
    assert restricted_load(pickle.dumps(np.dtype("f4"))) == np.dtype("f4")


class Forged:
    """An array with a state of our making. NumPy believes it, and takes bytes that pass for objects for pointers."""

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        shape, dtype, content = self.state
        return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, content)


@pytest.mark.parametrize(
    ("shape", "dtype", "content"),
    [
        ((1,), np.dtype(object), struct.pack("P", 1)),
        ((1,), np.dtype([("a", object)]), struct.pack("P", 1)),
        ((1000,), np.dtype("f8"), b"\x00" * 8),
        ((-1, -8), np.dtype("u1"), b"\x00" * 8),
        ((2,), np.dtype(object), ["one"]),
    ],
)
def test_forged_array_states_are_refused(shape, dtype, content):
    refusal(pickle.dumps(Forged(shape, dtype, content)))


def test_cut_and_foreign_files_are_one_line(tmp_path):
    whole = pickle.dumps({"a": np.arange(100.0), "b": "text"})
    for length in range(0, len(whole), 7):
        assert refusal(whole[:length]).startswith("cannot read the given bytes: a truncated or damaged pickle")
    assert "cannot read" in refusal(b"PK\x03\x04 this is a zip")
    file = tmp_path / "half.pkl"
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"cannot read .*half\.pkl: a truncated"):
        restricted_load(file)
    with pytest.raises(FileNotFoundError, match=r"no pickle file .*none\.pkl"):
        restricted_load(tmp_path / "none.pkl")
    with pytest.raises(ValueError, match="cannot read batch 1:"):
        restricted_load(whole[:50], name="batch 1")


def test_deep_nesting_is_refused():
    deep = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    assert "nested too deeply" in refusal(deep)


def doubled(doublings, leaf=b"]"):
    """A tuple of twice a tuple of twice ...: 2^doublings entries in a few bytes."""
    return leaf + b"2\x86" * doublings


@pytest.mark.parametrize(
    "around",
    [
        (b"", b"Q."),  # a persistent id
        (b"cnumpy\ndtype\n", b"\x85R."),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00a", b"\x86R."),
        (b"cbuiltins\nset\n", b"\x85R."),
        (b"}", b"K\x01s."),  # a key, which is hashed
        (b"}(", b"K\x01u."),
        (b"(", b"K\x01d."),
        (b"\x8f(", b"\x90."),
        (b"(", b"\x91."),
        (b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R(K\x03", b"NNNtb."),  # a byte order
        (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01", b"NNC\x00tb."),  # a shape
        (b"", b"."),
    ],
)
def test_what_is_shared_does_not_grow(around):
    for leaf in (b"]", b")"):
        said = refusal(b"\x80\x04" + around[0] + doubled(25, leaf) + around[1])
        assert len(said) < 300


def test_no_number_of_doublings_takes_longer():
    for doublings in (60, 10_000):
        refusal(b"\x80\x04cnumpy\ndtype\n" + doubled(doublings) + b"\x85R.")
        refusal(b"\x80\x04}" + doubled(doublings, b")") + b"K\x01s.")


def test_shared_entries_stay_shared():
    part = ["x"]
    for _ in range(10):
        part = [part, part]
    loaded = restricted_load(pickle.dumps(part))
    assert loaded == part
    assert loaded[0] is loaded[1]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04Nr" + struct.pack("<I", 30_000_000) + b".",  # the C unpickler makes a table of that many entries
        b"\x80\x05\x96" + struct.pack("<Q", 10**9) + b".",  # a byte array
        b"\x80\x04B" + struct.pack("<I", 10**9) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 10**9) + b"N.",  # a frame
    ],
)
def test_announced_sizes_are_not_believed(content):
    tracemalloc.start()
    with contextlib.suppress(ValueError):  # but the first, which is nothing else wrong with
        assert restricted_load(content) is None
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_a_few_bytes_are_not_copied_many_times():
    raw, times = b"x" * 100_000, 1000
    dtype = pickle.dumps(np.dtype("u1"), protocol=2)[2:-1] + b"q\xc80"
    head = b"\x80\x04" + dtype + b"B" + struct.pack("<I", len(raw)) + raw + b"q\xc90("
    size = struct.pack("<i", len(raw))
    calls = {
        "bytearray": b"cbuiltins\nbytearray\nh\xc9\x85R",
        "set": b"cbuiltins\nset\nh\xc9\x85R",
        "array": b"cnumpy._core.numeric\n_frombuffer\n(h\xc9h\xc8J" + size + b"\x85X\x01\x00\x00\x00CtR",
    }
    for name, call in calls.items():
        assert len(restricted_load(head + call * 3 + b"t.")) == 3, name
        assert "many times the memory of the file" in refusal(head + call * times + b"t.")
    # NumPy makes entries without a byte one byte long: this would be a gigabyte of nothing.
    refusal(pickle.dumps(Forged((10**9,), np.dtype("S0"), b"")))


def test_names_in_messages_stay_one_line():
    said = refusal(b"\x80\x04\x8c\x03a\nb\x8d" + struct.pack("<Q", 10**5) + b"c" * 10**5 + b"\x93.")
    assert said.startswith("refused: the pickle asks to run ")
    assert len(said) < 400


WEIGHTS = {"layer.weight": torch.arange(200.0).reshape(10, 20), "layer.bias": torch.ones(20, dtype=torch.bfloat16)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt", ".bin"])
def test_weights_come_back_and_half_a_file_does_not(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(WEIGHTS, path) if suffix == ".safetensors" else torch.save(WEIGHTS, path)
    loaded = load_weights(path)
    assert loaded.keys() == WEIGHTS.keys()
    assert all(torch.equal(loaded[key], WEIGHTS[key]) for key in WEIGHTS)
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError) as caught:
            load_weights(path)
        assert str(caught.value).startswith(f"cannot read {path}: truncated")
        assert "\n" not in str(caught.value)


def test_half_a_file_of_the_old_torch_format_is_no_attack(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert load_weights(path).keys() == WEIGHTS.keys()
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 97):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="cannot read"):
            load_weights(path)


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_weight_files_with_code_are_refused(tmp_path, form):
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    content = {"weight": torch.ones(2) if form != "plain" else 1, "code": Attack(f"touch {victim}")}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError) as caught:
        load_weights(path)
    assert not victim.exists()
    assert str(caught.value).startswith("refused: ")
    assert f"{os.name}.system" in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saves_comes_back(tmp_path, zipped):
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    base = torch.arange(24.0).reshape(2, 3, 4)
    marked = torch.ones(2)
    marked.mark = "attribute"
    content = {
        "model": layer.state_dict(),  # an ordered dict with attributes
        "optimizer": optimizer.state_dict(),
        "parameters": list(layer.parameters()),
        "kinds": {
            str(dtype): torch.ones(3, dtype=dtype)
            for dtype in (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
            )
        },
        "more": [torch.tensor([True, False]), torch.tensor([1j]), torch.tensor(2), torch.empty(0, 3), base.byte()],
        "views": (base, base.permute(2, 0, 1), base[1, 1:, ::2], base[1]),
        "unsigned": torch.ones(3, dtype=torch.uint16),  # of no storage of its own
        "marked": marked,
        "args": argparse.Namespace(steps=3, rate=(1e-3, None)),
        "numbers": {
            "array": np.arange(3),
            "counter": Counter("aab"),
            "size": torch.Size([2, 3]),
            "dtype": torch.float16,
        },
        "device": torch.device("cpu"),
    }
    path = tmp_path / "whole.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = load_weights(path)

    def same(a, b, where):
        if isinstance(b, torch.Tensor):
            assert isinstance(a, torch.Tensor), where
            assert a.dtype == b.dtype, where
            assert torch.equal(a, b), where
        elif isinstance(b, np.ndarray):
            assert (a == b).all(), where
        elif isinstance(b, dict):
            assert type(a) is dict, where
            assert list(a) == list(b), where
            for key in b:
                same(a[key], b[key], f"{where}.{key}")
        elif isinstance(b, (list, tuple)):
            assert len(a) == len(b), where
            for number, pair in enumerate(zip(a, b, strict=True)):
                same(*pair, f"{where}[{number}]")
        else:
            assert a == (str(b) if isinstance(b, torch.device) else b), where

    same(loaded, content, "")
    assert loaded["views"][0].data_ptr() + 48 == loaded["views"][3].data_ptr()  # they share memory, as they did
    layer.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def old_file(content, storages, keys=None, data=None):
    """A file of the format before PyTorch 1.6 with tensors `Ref(key)` of `storages`: counts by key."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return (
                ("storage", torch.FloatStorage, value.key, "cpu", storages[value.key], None)
                if isinstance(value, Ref)
                else None
            )

    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(part, buffer, protocol=2)
    Writer(buffer, protocol=2).dump(content)
    pickle.dump(list(storages) if keys is None else keys, buffer, protocol=2)
    if data is None:
        data = b"".join(struct.pack(f"<q{n}f", n, *range(n)) for n in storages.values())
    return buffer.getvalue() + data


class Ref:
    """A storage by its key."""

    def __init__(self, key):
        self.key = key


def view(key, shape, stride, offset=0, name="_rebuild_tensor_v2", *more):
    return Call(getattr(torch._utils, name), Ref(key), offset, shape, stride, *(more or (False, OrderedDict())))


def test_old_files_hold_what_they_say(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(old_file({"w": view("a", (2, 2), (1, 2)), "v": view("b", (1,), (1,), 2)}, {"a": 4, "b": 3}))
    loaded = load_weights(path)
    assert loaded["w"].tolist() == [[0.0, 2.0], [1.0, 3.0]]
    assert loaded["v"].tolist() == [2.0]
    # Parameters as before PyTorch 0.4, and tensors as before that.
    oldest = b"ctorch.nn.parameter\nParameter\n"
    plain = old_file({"w": Call(torch._utils._rebuild_tensor, Ref("a"), 0, (2,), (1,))}, {"a": 2})
    start = plain.index(b"ctorch._utils")
    end = plain.index(b"R", plain.index(b"t", plain.index(b"Q"))) + 1
    path.write_bytes(plain[:start] + oldest + plain[start:end] + b"\x88\x86R(\x88\x89}tb" + plain[end:])
    assert load_weights(path)["w"].tolist() == [0.0, 1.0]
    tree = {"w": view("a", (1000,), (1,))}
    for storages, keys, data in (
        ({"a": 1000}, [], b""),  # PyTorch's loader gives memory that nothing was written to
        ({"a": 1000}, ["a"], struct.pack("<q", 1000)),
        ({"a": 1000}, ["a"], struct.pack("<q", 0)),
        ({"a": 10**15}, ["a"], struct.pack("<q", 10**15)),
        ({"a": 999}, None, None),
        ({"a": -1}, ["a"], struct.pack("<q", -1)),
    ):
        path.write_bytes(old_file(tree, storages, keys, data))
        with pytest.raises(ValueError, match=r"cannot read .*old\.pth: truncated, damaged or no weight file") as caught:
            load_weights(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Call(torch.Tensor, 1000), "without numbers"),  # memory that nothing was written to, too
        (Call(torch.FloatStorage, 1000), "asks to run|not callable"),
        (torch.ones(1).to_sparse(), "asks to run torch._utils._rebuild_sparse_tensor"),
        (torch.zeros(1).expand(10**9), "in 1 numbers"),
        (torch.tensor([1j]).conj(), "conjugate"),
        (torch.empty(10**9, device="meta"), "asks to run"),
    ],
)
def test_tensors_that_are_not_in_the_file_are_refused(tmp_path, content, said):
    path = tmp_path / "wide.pth"
    torch.save({"w": content}, path)
    with pytest.raises(ValueError, match=said) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def rewritten(path, change, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in change(entries).items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "method", "said"),
    [
        (lambda e: {n: c[:-1] if "/data/" in n else c for n, c in e.items()}, zipfile.ZIP_STORED, "another size"),
        (lambda e: {n: c for n, c in e.items() if "/data/" not in n}, zipfile.ZIP_STORED, "is not in the file"),
        (lambda e: {n: b"big" if "byteorder" in n else c for n, c in e.items()}, zipfile.ZIP_STORED, "big-endian"),
        (lambda e: {**e, "w/constants.pkl": b""}, zipfile.ZIP_STORED, "TorchScript program"),
        (lambda e: {n: c for n, c in e.items() if "data.pkl" not in n}, zipfile.ZIP_STORED, r"no data\.pkl"),
        (lambda e: e, zipfile.ZIP_DEFLATED, "compressed, which torch.save does not"),
        (lambda e: e, zipfile.ZIP_STORED, None),
    ],
)
def test_archives_that_torch_did_not_write(tmp_path, change, method, said):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.arange(1000.0)}, path)
    rewritten(path, change, method)
    if said is None:
        assert torch.equal(load_weights(path)["w"], torch.arange(1000.0))
        return
    with pytest.raises(ValueError, match=said) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)


def test_the_first_format_says_how_to_go_on(tmp_path):
    path = tmp_path / "first.pth"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(ValueError, match=r"refused: .* tar format .*save it again with torch\.save$"):
        load_weights(path)


def test_whole_modules_and_programs_are_refused(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match=r"refused: .* asks to run torch\.nn\.modules\.linear\.Linear"):
        load_weights(path)


def test_other_weight_files_say_what_is_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file .*x\.pt"):
        load_weights(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"suffix '\.npz'; weight files end in one of \.safetensors, \.pt"):
        load_weights(tmp_path / "x.npz")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor; a dict of weights"):
        load_weights(tmp_path / "tensor.pt")
