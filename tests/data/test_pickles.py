import os
import pickle
import struct
import subprocess
from collections import OrderedDict, defaultdict

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
