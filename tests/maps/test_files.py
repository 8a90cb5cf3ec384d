import json
import os
import pathlib
import stat
import struct

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.maps import files


@pytest.fixture
def maps(rng):
    return SteeringMaps(
        {
            "z.last": AffineMap(*rng.normal(size=(2, 4))),  # not in alphabetical order
            "a.first": AffineMap(*rng.normal(size=(2, 3)).astype(np.float32)),
        },
        {"method": "linear", "settings": {"l1": 0.1, "text": "naïve ✓"}, "history": [1.5, 2]},
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "maps.safetensors"


def header_of(maps, **changes):
    """What a sound file of `maps` has in its header, changed; None takes an entry out."""
    header = {
        "format": "lineas",
        "version": "1",
        "modules": json.dumps(list(maps)),
        "metadata": json.dumps(maps.metadata),
    } | changes
    return {key: value for key, value in header.items() if value is not None}


def tensors_of(maps):
    return {f"{name}.{part}": np.array(getattr(one, part)) for name, one in maps.items() for part in ("weight", "bias")}


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_round_trip(maps, path, kind):
    maps.save(kind(path))
    back = lineas.load(kind(path))
    assert back == maps and list(back) == list(maps) and back.metadata == maps.metadata
    assert [one.dtype for one in back.values()] == [np.float64, np.float32]
    assert not back["a.first"].weight.flags.writeable


def test_round_trip_keeps_every_bit(path):
    odd = np.array([-0.0, 1e-45, 3.4e38, 1.0000001], np.float32)
    maps = SteeringMaps({"a": AffineMap(odd, odd)})
    maps.save(path)
    assert lineas.load(path)["a"].weight.tobytes() == odd.tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.norm",
        "a/b\\c",
        "..",
        "naïve.日本.🙂",
        "with space\nand line",
        "x.weight",
        "__metadata__",
        '"{}[]',
        " ",
    ],
)
def test_module_names_round_trip(path, name):
    maps = SteeringMaps({name: AffineMap.identity(2), "x": AffineMap.identity(3), "x.bias": AffineMap.identity(1)})
    maps.save(path)
    assert lineas.load(path) == maps


def test_a_name_that_is_no_unicode(path):
    maps = SteeringMaps({"bad\udc80": AffineMap.identity(2)})
    with pytest.raises(ValueError, match=r"cannot save the tensor name 'bad\\udc80\.weight': it is not valid Unicode"):
        maps.save(path)
    assert not path.exists()


def test_the_file_is_plain_safetensors(maps, path):
    from safetensors.numpy import load_file

    maps.save(path)
    assert np.array_equal(load_file(path)["z.last.weight"], maps["z.last"].weight)


def test_what_is_saved_again_gives_the_same_bytes(maps, path, rng):
    source, target = rng.normal(size=(2, 9, 4))
    values = [maps, lineas.sparse_path({"ä": source}, {"ä": target}), lineas.bures_map(source, target)]
    for value in values:
        saved = set()
        for _ in range(20):  # the order of one of five entries is random to safetensors
            value.save(path)
            saved.add(path.read_bytes())
        assert len(saved) == 1
        assert (8 + struct.unpack("<Q", path.read_bytes()[:8])[0]) % 8 == 0  # the arrays are aligned
    back = lineas.load(path)
    back.save(path)
    assert path.read_bytes() in saved
    save_file(tensors_of(maps), path, header_of(maps))  # as it was written before, in any order
    assert lineas.load(path) == maps


def test_save_replaces_and_leaves_nothing_else(maps, path):
    path.write_bytes(b"old")
    maps.save(path)
    assert lineas.load(path) == maps
    assert os.listdir(path.parent) == [path.name]


def test_save_gives_the_permissions_of_any_new_file(maps, path, tmp_path):
    maps.save(path)
    other = tmp_path / "other"
    other.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_save_writes_through_a_link(maps, path, tmp_path):
    link = tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    maps.save(link)
    assert link.is_symlink() and lineas.load(path) == maps


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(maps, path, monkeypatch, step):
    path.write_bytes(b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=r"No space left"):
        maps.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_an_interrupted_save_leaves_nothing(maps, path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        maps.save(path)
    assert os.listdir(path.parent) == []


def test_save_to_bad_places(maps, tmp_path):
    with pytest.raises(ValueError, match=r"^path: the folder of .*nowhere/maps\.safetensors does not exist$"):
        maps.save(tmp_path / "nowhere" / "maps.safetensors")
    with pytest.raises(ValueError, match=rf"^path must be a file, and {tmp_path} is a folder$"):
        maps.save(tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(TypeError, match=r"only SteeringMaps, paths, .* can be saved, got AffineMap"):
        files.save(maps["a.first"], tmp_path / "x")


def test_load_from_bad_places(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors"):
        lineas.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"the folder '{tmp_path}' has no maps\.safetensors"):
        lineas.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing' is no file or folder, nor a hub id such as 'user/name'"):
        lineas.load(tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"str, bytes or os.PathLike"):
        lineas.load(3)


def test_every_truncation_is_an_error(maps, path):
    maps.save(path)
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"maps\.safetensors is not a sound safetensors file: "):
            lineas.load(path)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_flipped_byte_is_an_error(maps, path, checksum):
    """No byte of the file can crash the reader, whatever its value; without a checksum there may be other numbers."""
    maps.save(path)
    if not checksum:
        save_file(tensors_of(maps), path, header_of(maps))
    data = path.read_bytes()
    errors = 0
    for at in range(0, len(data), 3):
        broken = bytearray(data)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        try:
            assert isinstance(lineas.load(path), SteeringMaps) and not checksum
        except ValueError as error:
            assert "maps.safetensors" in str(error)
            errors += 1
    assert errors > len(data) // 10
    assert errors == len(range(0, len(data), 3)) or not checksum


def test_a_file_of_before_checksums(maps, path):
    save_file(tensors_of(maps), path, header_of(maps))
    assert lineas.load(path) == maps and lineas.load(path).metadata == maps.metadata


@pytest.mark.parametrize("changes", [{"modules": '["a.first", "z.last"]'}, {"metadata": "{}"}, {"sha256": "0" * 64}])
def test_a_header_that_was_changed(maps, path, changes):
    maps.save(path)
    with safe_open(path, "np") as file:
        header = file.metadata()
    save_file(tensors_of(maps), path, header)
    assert lineas.load(path) == maps
    save_file(tensors_of(maps), path, header | changes)
    with pytest.raises(ValueError, match=r"maps\.safetensors is damaged: its content is not what was written"):
        lineas.load(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95",  # the start of a pickle
        b"PK\x03\x04" + bytes(100),  # the start of a zip, as torch.save writes
        b"weights" * 100,
        struct.pack("<Q", 2**62) + b"{}",  # a header of 4 EiB
        struct.pack("<Q", 99_000_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"a.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        struct.pack("<Q", 75) + b'{"a.weight":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}',
    ],
)
def test_files_that_are_no_safetensors(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"maps\.safetensors is not a sound safetensors file: "):
        lineas.load(path)


def test_a_hostile_pickle_is_not_run(path, tmp_path):
    import pickle

    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    path.write_bytes(pickle.dumps(Touch()))
    with pytest.raises(ValueError, match=r"not a sound safetensors file"):
        lineas.load(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "pt"}, "is not a file of lineas: its header says format 'pt'"),
        ({"format": None}, "is not a file of lineas: its header says format None"),
        ({"version": "2"}, "has version 2 of the format; this lineas reads versions 1 to 1: update lineas"),
        ({"version": "0"}, "has version 0 of the format"),
        ({"version": "one"}, "'version' in the header is not JSON"),
        ({"version": "1.5"}, "'version' in the header must be a JSON int, got float"),
        ({"version": "true"}, "'version' in the header must be a JSON int, got bool"),
        ({"version": "9" * 5000}, "'version' in the header is not JSON"),
        ({"version": None}, "the header lacks 'version'"),
        ({"modules": None}, "the header lacks 'modules'"),
        ({"modules": "{}"}, "'modules' in the header must be a JSON list, got dict"),
        ({"modules": "["}, "'modules' in the header is not JSON"),
        ({"modules": "[" * 100_000}, "'modules' in the header is not JSON"),
        (
            {"modules": '["z.last", "a.first", ""]'},
            "'modules' in the header must be different names that are not empty",
        ),
        ({"modules": '["z.last", "a.first", 1]'}, "'modules' in the header must be different names that are not empty"),
        ({"modules": '["z.last", ["a.first"]]'}, "'modules' in the header must be different names that are not empty"),
        ({"modules": '["z.last", "z.last"]'}, "'modules' in the header must be different names that are not empty"),
        ({"modules": '["z.last", "a.first", "more"]'}, "lacks tensor 'more.bias'"),
        ({"modules": '["z.last"]'}, "has the unexpected tensor 'a.first.bias'"),
        ({"metadata": None}, "the header lacks 'metadata'"),
        ({"metadata": "[]"}, "'metadata' in the header must be a JSON dict, got list"),
        ({"metadata": '{"x": NaN}'}, "metadata must be something JSON can hold"),
    ],
)
def test_bad_headers(maps, path, changes, text):
    save_file(tensors_of(maps), path, header_of(maps, **changes))
    with pytest.raises(ValueError, match=text) as caught:
        lineas.load(path)
    assert str(path) in str(caught.value)


def test_a_file_without_header_metadata(maps, path):
    save_file(tensors_of(maps), path)
    with pytest.raises(ValueError, match=r"is not a file of lineas: its header says format None"):
        lineas.load(path)


def test_header_metadata_that_is_no_text(path):
    header = json.dumps({"__metadata__": {"format": 3}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"maps\.safetensors is not a sound safetensors file: "):
        lineas.load(path)


def test_a_file_without_modules(maps, path):
    save_file({}, path, header_of(maps, modules="[]"))
    with pytest.raises(ValueError, match=r"maps\.safetensors: maps must hold at least one module"):
        lineas.load(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"a.first.bias": np.zeros(3, np.float16)},
            r"module 'a.first': bias must be float32 or float64, got dtype",
        ),
        ({"a.first.weight": np.zeros(3, bool)}, r"module 'a.first': weight must be float16, .* got dtype bool"),
        ({"a.first.bias": np.zeros(4, np.float32)}, r"module 'a.first': weight and bias must have the same shape"),
        ({"a.first.weight": np.ones((3, 1), np.float32)}, r"module 'a.first': weight must have shape \[d\]"),
        ({"a.first.weight": np.ones(0, np.float32)}, r"module 'a.first': weight must have shape \[d\] with d >= 1"),
        ({"a.first.bias": np.array([0, np.nan, 0], np.float32)}, r"module 'a.first': bias must be finite, got nan"),
        ({"a.first.weight": np.array([np.inf, 1, 1], np.float32)}, r"module 'a.first': weight must be finite, got inf"),
        ({"more": np.ones(3)}, "has the unexpected tensor 'more'"),
        ({"a.first.bias": None}, "lacks tensor 'a.first.bias'"),
    ],
)
def test_bad_tensors(maps, path, change, text):
    tensors = {key: value for key, value in (tensors_of(maps) | change).items() if value is not None}
    save_file(tensors, path, header_of(maps))
    with pytest.raises(ValueError, match=text) as caught:
        lineas.load(path)
    assert str(path) in str(caught.value)


def test_a_bfloat16_tensor(path):
    header = json.dumps(
        {
            "__metadata__": {"format": "lineas", "version": "1", "modules": '["a"]', "metadata": "{}"},
            "a.weight": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]},
            "a.bias": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
        }
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(6))
    text = r"module 'a': weight must be float32 or float64, got dtype bfloat16|tensor 'a.weight' of dtype BF16 cannot"
    with pytest.raises(ValueError, match=text):
        lineas.load(path)


# ---- what other rooms write and read ---------------------------------------------------------------------------------

CHECKPOINT = "lineas checkpoint"


def test_arrays_of_every_type_pass_through(path):
    arrays = {
        "none": np.zeros((0, 3)),
        "number": np.array(7, np.int64),
        "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "swapped": np.arange(3, dtype=">f4"),
        "half": np.ones(2, np.float16),
    }
    files.write(path, CHECKPOINT, arrays, {"state": {"step": 3}})
    format, found, entries = files.read(path, CHECKPOINT)
    assert format == CHECKPOINT and entries == {"state": {"step": 3}} and found.keys() == arrays.keys()
    for name, x in arrays.items():
        assert found[name].dtype == x.dtype.newbyteorder("=") and np.array_equal(found[name], x), name
        assert found[name].shape == x.shape


def test_tensors_pass_through(path):
    torch = pytest.importorskip("torch")
    memory = torch.arange(6, dtype=torch.float32)
    tensors = {
        "bfloat16": torch.tensor([1.5, -0.0], dtype=torch.bfloat16, requires_grad=True),
        "random": torch.get_rng_state(),
        "view": memory.view(2, 3).T,
        "same memory": memory,
        "number": torch.tensor(3),
        "none": torch.zeros(0),
        "flag": torch.tensor(True),
    }
    files.write(path, CHECKPOINT, tensors, {"state": {}})
    found = files.read(path, CHECKPOINT, framework="pt")[1]
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x), name
    files.write(path, CHECKPOINT, {"random": tensors["random"], "bool": tensors["flag"]}, {"state": {}})
    arrays = files.read(path)[1]  # the checksum is the same whoever reads
    assert np.array_equal(arrays["random"], tensors["random"].numpy()) and arrays["bool"].dtype == bool


def test_a_type_that_numpy_does_not_know(path):
    torch = pytest.importorskip("torch")
    files.write(path, CHECKPOINT, {"x": torch.ones(2).to(torch.float8_e4m3fn)}, {"state": {}})
    with pytest.raises(ValueError, match=r"maps\.safetensors: tensor 'x' of dtype F8_E4M3 cannot be read"):
        files.read(path, CHECKPOINT)


def test_files_of_another_kind(maps, path):
    files.write(path, CHECKPOINT, {}, {"state": {}})
    with pytest.raises(ValueError, match=r"maps\.safetensors holds the checkpoint of a fit, not steering maps$"):
        files.read(path, "lineas")
    with pytest.raises(ValueError, match=r"holds the checkpoint of a fit, not a sparse path or the result of a fit$"):
        files.read(path, "lineas sparse path", "lineas end-to-end path", "lineas fit")
    with pytest.raises(ValueError, match=r"holds the checkpoint of a fit: pass it as checkpoint= to go on with that"):
        lineas.load(path)
    maps.save(path)
    with pytest.raises(ValueError, match=r"holds steering maps, not the checkpoint of a fit$"):
        files.read(path, CHECKPOINT)


@pytest.mark.parametrize(("version", "text"), [(2, "reads versions 3 to 3$"), (4, "reads .* 3: update lineas$")])
def test_versions_that_are_not_read(path, version, text):
    save_file({}, path, {"format": CHECKPOINT, "version": str(version), "state": "{}"})
    with pytest.raises(ValueError, match=rf"maps\.safetensors has version {version} of the format; this lineas {text}"):
        files.read(path, CHECKPOINT)


def test_entries_that_cannot_be_written(path):
    with pytest.raises(TypeError, match=r"ndarray is not JSON serializable"):
        files.write(path, CHECKPOINT, {}, {"state": np.ones(3)})
    assert not path.exists()
