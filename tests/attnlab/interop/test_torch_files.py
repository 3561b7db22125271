import argparse
import collections
import dataclasses
import datetime as dt
import fractions
import json
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from attnlab.interop.torch_files import StateDictFileError, read_state_dict
from tests.attnlab.interop.torch_pickles import (
    Code,
    call,
    contiguous,
    dump,
    name,
    ordered_dict,
    storage,
    tensor,
    write,
)

DATA = Path(__file__).parent / "data"
SIX = np.arange(6, dtype=np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def six(size=(6,), stride=(1,), offset=0, length=6):
    return tensor(storage("FloatStorage", "0", length), size, stride, offset)


def refusal(path, tree, storages=None, key=None, **options):
    """The message with which a file is refused."""
    write(path, tree, {"0": SIX.tobytes()} if storages is None else storages, **options)
    with pytest.raises(StateDictFileError) as error:
        read_state_dict(path, key=key)
    assert str(error.value).startswith(str(path))
    return str(error.value).removeprefix(f"{path}: ")


def test_a_file_that_pytorch_wrote():
    got = read_state_dict(DATA / "torch_made.pt", key="model")
    with np.load(DATA / "torch_made_expected.npz") as expected:
        assert list(got) == expected.files
        for official in expected.files:
            np.testing.assert_array_equal(got[official].astype(expected[official].dtype), expected[official])
            assert got[official].shape == expected[official].shape
    assert got["bf16"].dtype == ml_dtypes.bfloat16
    assert got["float8"].dtype == ml_dtypes.float8_e4m3fn
    assert got["0.weight"].dtype == np.float32
    assert got["1.num_batches_tracked"].dtype == np.int64
    assert np.shares_memory(got["transposed"], got["slice"])


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("DoubleStorage", np.float64),
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("ComplexFloatStorage", np.complex64),
        ("BoolStorage", np.bool_),
    ],
)
def test_every_kind_of_storage(path, kind, dtype):
    array = (np.arange(6).reshape(2, 3) % 2 + 1).astype(dtype)
    got = read_state_dict(write(path, {"w": contiguous(kind, "0", array)}, {"0": array.tobytes()}))
    np.testing.assert_array_equal(got["w"], array)
    assert got["w"].dtype == dtype


def test_strides_offsets_scalars_and_empty_tensors(path):
    tree = ordered_dict(
        {
            "transposed": six((3, 2), (1, 3)),
            "part": six((2, 2), (3, 1), 1),
            "repeated": six((4, 2), (0, 1)),
            "scalar": six((), (), 5),
            "empty": six((0, 3), (3, 1)),
        }
    )
    got = read_state_dict(write(path, tree, {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(got["transposed"], SIX.reshape(2, 3).T)
    np.testing.assert_array_equal(got["part"], [[1, 2], [4, 5]])
    np.testing.assert_array_equal(got["repeated"], [[0, 1]] * 4)
    assert got["scalar"].shape == () and got["scalar"] == 5
    assert got["empty"].shape == (0, 3)


def test_untyped_storages_and_parameters(path):
    where, hooks = storage("UntypedStorage", "0", 24, "torch.storage"), call(name("collections", "OrderedDict"))
    untyped = call(
        name("torch._utils", "_rebuild_tensor_v3"), where, 1, (5,), (1,), False, hooks, name("torch", "float32"), None
    )
    parameter = call(name("torch._utils", "_rebuild_parameter"), untyped, True, hooks)
    got = read_state_dict(write(path, {"w": untyped, "p": parameter}, {"0": SIX.tobytes()}))
    np.testing.assert_array_equal(got["w"], SIX[1:])
    np.testing.assert_array_equal(got["p"], SIX[1:])


def test_key_finds_the_state_dict_and_errors_list_the_keys(path):
    tree = {"state": {"model": ordered_dict({"w": six()})}, "ema": {"w": six()}, "epoch": 3}
    write(path, tree, {"0": SIX.tobytes()})
    np.testing.assert_array_equal(read_state_dict(path, key=("state", "model"))["w"], SIX)
    np.testing.assert_array_equal(read_state_dict(path, key="ema")["w"], SIX)
    says = "state dicts stand under key='ema' (all keys: 'state', 'ema', 'epoch')"
    assert refusal(path, tree) == f"the file holds more than tensors: 'state', 'ema', 'epoch'; {says}"
    assert refusal(path, tree, key="model") == f"the file has no key 'model'; {says}"
    assert refusal(path, tree, key=("state", "m")) == (
        "the file['state'] has no key 'm'; state dicts stand under key='model' (all keys: 'model')"
    )
    assert refusal(path, tree, key="epoch") == "the file['epoch'] is not a state dict; it is of type int"
    assert refusal(path, six()) == "the file is not a state dict; it is of type tensor"


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_commands_is_refused_and_runs_none(path, tmp_path, protocol):
    marker = tmp_path / "marker"
    pickled = pickle.dumps({"w": Malicious(marker)}, protocol)
    assert f"asks for {os.name}.system, which is refused" in refusal(path, pickled)
    assert not marker.exists()
    pickle.loads(pickled)  # the same bytes do run it: this test can fail
    assert marker.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("builtins", "eval"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.serialization", "load"),
        ("numpy.core.multiarray", "scalar"),
        ("argparse", "Namespace"),
        ("collections", "OrderedDict.fromkeys"),
        ("torch", "load"),
    ],
)
def test_every_other_name_is_refused(path, module, attribute):
    message = refusal(path, {"w": six(), "extra": call(name(module, attribute), "1")}, key=None)
    assert message.startswith(f"the pickle asks for {module}.{attribute}, which is refused: no tensor needs it.")


@dataclasses.dataclass
class Settings:
    """What a script keeps beside its model."""

    path: Path
    rates: list


LAYOUTS = {
    "deit": {"epoch": 3, "args": argparse.Namespace(lr=1e-3, output_dir=Path("a")), "scaler": {"scale": 2.0}},
    "swin": {"max_accuracy": np.float64(81.4), "config": Settings(Path("b"), [1.0])},
    "scheduler": {"milestones": collections.Counter({30: 1}), "state": collections.defaultdict(int, a=1)},
    "numpy": {"rng": (np.arange(3), np.random.default_rng(0).bit_generator.state, {1, 2}, slice(1, 2), 1j)},
    "lists": {"history": [{"loss": np.float32(1)}, {"loss": None}], "ema": Settings},
    "dates": {"when": dt.datetime(2024, 5, 1), "version": (fractions.Fraction(1, 3), frozenset({"a"}))},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_beside_the_state_dict_is_passed_over(path, layout):
    write(path, LAYOUTS[layout] | {"model": {"w": six()}}, {"0": SIX.tobytes()})
    np.testing.assert_array_equal(read_state_dict(path, key="model")["w"], SIX)
    with pytest.raises(StateDictFileError, match="state dicts stand under key='model'"):
        read_state_dict(path)


def test_parameters_with_attributes(path):
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    arguments = (storage("FloatStorage", "0", 6), 0, (6,), (1,), False, {})
    tree = {
        "with_state": call(name("torch._utils", "_rebuild_parameter_with_state"), six(), True, {}, {"tag": 1}),
        "subclass": call(name("torch._tensor", "_rebuild_from_type_v2"), rebuild, name("a", "B"), arguments, {}),
    }
    write(path, tree, {"0": SIX.tobytes()})
    for array in read_state_dict(path).values():
        np.testing.assert_array_equal(array, SIX)
    wrong = {"w": call(name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), None, ("true",), {})}
    assert "a tensor is made by 'os.system', which is refused" in refusal(path, wrong)


def test_stand_ins_cannot_be_changed_by_a_pickle(path):
    rebuild = name("torch._utils", "_rebuild_tensor_v2").opcodes
    for state in ({"call": 1}, (None, {"call": 1}), (None, {"__call__": 1})):
        read_or_refuse(write(path, {"w": Code(rebuild + dump(state) + b"b")}, {}))
        write(path, {"w": six()}, {"0": SIX.tobytes()})
        np.testing.assert_array_equal(read_state_dict(path)["w"], SIX)


def read_or_refuse(path):
    try:
        return read_state_dict(path)
    except StateDictFileError:
        return None


@pytest.mark.parametrize(
    ("opcodes", "says"),
    [
        (b"\x80\x02\x82\x01.", "opcode EXT1, which is refused"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "numbers an object 2147483647"),
        (b"\x80\x02}", "data.pkl is broken"),
        (b"", "data.pkl is broken"),
        (b"\x80\x02X\x05\x00\x00\x00abcdeQ.", "refers to 'abcde', which is not a storage"),
        (b"\x80\x02]\x940.", "data.pkl is broken"),
    ],
)
def test_broken_pickles_are_refused(path, opcodes, says):
    assert says in refusal(path, opcodes)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (six((7,)), "tensor 'w' reaches element 6 of a storage of 6"),
        (six((2, 3), (4, 1)), "tensor 'w' reaches element 6 of a storage of 6"),
        (six((2,), (1,), 5), "tensor 'w' reaches element 6 of a storage of 6"),
        (six((2,), (1,), -1), "impossible geometry: offset -1"),
        (six((-2,), (1,)), "impossible geometry"),
        (six((2,), (-1,), 3), "impossible geometry"),
        (six((2,), (1, 1)), "impossible geometry"),
        (six((2**63,), (0,)), "impossible geometry"),
        (six((True,), (1,)), "impossible geometry"),
        (six(6, 1), "impossible geometry"),
        (six(length=5), "storage '0' has 24 bytes where 20 were announced"),
        (six(length=7), "storage '0' has 24 bytes where 28 were announced"),
        (tensor(storage("FloatStorage", "9", 6), (6,), (1,)), "the entry 'archive/data/9' is missing"),
        (tensor(storage("FloatStorage", "../x", 6), (6,), (1,)), "the entry 'archive/data/../x' is missing"),
        (tensor(Code(dump("no")), (6,), (1,)), "tensor 'w' has no storage"),
        (tensor(storage("UntypedStorage", "0", 24), (6,), (1,)), "names no dtype"),
        (tensor(storage("FloatStorage", "0", 6), (6,), (1,), 0, {"neg": True}), "conjugate or negative view"),
    ],
)
def test_tensors_outside_their_storage_are_refused(path, wrong, says):
    assert says in refusal(path, {"good": six(), "w": wrong})


def test_broken_archives_are_refused(path, tmp_path):
    tree = {"w": six()}
    assert "compressed entries" in refusal(path, tree, {"0": bytes(24)}, compression=zipfile.ZIP_DEFLATED)
    assert "byte order b'big'" in refusal(path, tree, byteorder="big")
    whole = write(path, tree, {"0": SIX.tobytes()}).read_bytes()
    np.testing.assert_array_equal(read_state_dict(path)["w"], SIX)
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        with pytest.raises(StateDictFileError, match="empty file" if end == 0 else r"cut short|not a file of param"):
            read_state_dict(path)
    at = whole.index(SIX.tobytes())
    path.write_bytes(whole[: at + 5] + b"\xff" + whole[at + 6 :])
    with pytest.raises(StateDictFileError, match=r"entry 'archive/data/0' is broken \(Bad CRC-32"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(StateDictFileError, match=r"a zip file, but not of torch\.save"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(StateDictFileError, match="a TorchScript program"):
        read_state_dict(path)


def test_changed_bytes_never_escape_as_another_error(path):
    rng = np.random.default_rng(0)
    good = b"\x80\x02" + dump({"model": ordered_dict({"a": six(), "b": six((3, 2), (1, 3))})}) + b"."
    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        changed = bytearray(good)
        changed[rng.integers(len(good))] = rng.integers(256)
        write(path, bytes(changed), {"0": SIX.tobytes()})
        try:
            read_state_dict(path, key="model")
            outcomes["read"] += 1
        except StateDictFileError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "before version 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "not a file of parameters known here"),
        (b"", "an empty file"),
    ],
)
def test_other_files_are_named(path, content, says):
    path.write_bytes(content)
    with pytest.raises(StateDictFileError, match=says):
        read_state_dict(path)


def test_a_missing_file(path):
    with pytest.raises(FileNotFoundError):
        read_state_dict(path)


def test_safetensors(tmp_path):
    file = tmp_path / "model.safetensors"
    arrays = {"w": SIX.reshape(2, 3), "i": np.arange(3), "b": np.array([True, False]), "s": np.array(2.5, np.float16)}
    safetensors.numpy.save_file(arrays, file)
    got = read_state_dict(file)
    assert got.keys() == arrays.keys()
    for official, array in arrays.items():
        np.testing.assert_array_equal(got[official], array, strict=True)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(StateDictFileError, match="not a whole safetensors file"):
        read_state_dict(file)
    with pytest.raises(StateDictFileError, match=r"key='model' is for files of torch\.save"):
        read_state_dict(file, key="model")


def test_safetensors_of_bfloat16_and_of_unknown_dtypes(tmp_path):
    file = tmp_path / "model.safetensors"

    def save(kind, content):
        header = json.dumps({"w": {"dtype": kind, "shape": [2], "data_offsets": [0, len(content)]}}).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content)

    want = np.array([1.5, -2], ml_dtypes.bfloat16)
    save("BF16", want.tobytes())
    np.testing.assert_array_equal(read_state_dict(file)["w"], want, strict=True)
    save("F8_E8M0", b"\x01\x02")
    with pytest.raises(StateDictFileError, match=r"'w' has the dtype F8_E8M0; known are F64|not a whole safetensors"):
        read_state_dict(file)


def shards(folder, weight_map, **files):
    for file, arrays in files.items():
        safetensors.numpy.save_file(arrays, folder / f"{file}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_files(tmp_path):
    a, b = {"x": SIX, "z": SIX + 1}, {"y": -SIX}
    index = shards(tmp_path, {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}, a=a, b=b)
    got = read_state_dict(index)
    assert list(got) == ["x", "y", "z"]
    for official, array in (a | b).items():
        np.testing.assert_array_equal(got[official], array)

    index = tmp_path / "pytorch_model.bin.index.json"
    write(tmp_path / "one.bin", {"w": six()}, {"0": SIX.tobytes()})
    index.write_text(json.dumps({"weight_map": {"w": "one.bin"}}))
    np.testing.assert_array_equal(read_state_dict(index)["w"], SIX)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"x": "a.safetensors", "y": "b.safetensors"}, "its file b.safetensors is missing"),
        ({"x": "a.safetensors", "y": "a.safetensors"}, r"missing \['y'\], not listed \[\]"),
        ({}, "an index that lists no files"),
        ({"x": "../a.safetensors"}, "'../a.safetensors' is not the name of a file beside the index"),
        ({"x": "/etc/passwd"}, "is not the name of a file beside the index"),
        ({"x": "model.safetensors.index.json"}, "is an index itself"),
        ({"x": 3}, "3 is not the name of a file"),
        ({"x": ["a"]}, "not an index of files"),
        (["x"], "not an index of files"),
    ],
)
def test_indices_that_do_not_fit_their_files(tmp_path, weight_map, says):
    with pytest.raises(StateDictFileError, match=says):
        read_state_dict(shards(tmp_path, weight_map, a={"x": SIX}))
