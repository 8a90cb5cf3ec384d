"""Reading and copying GGUF files: the package gguf is the oracle; damaged and hostile files are errors that say why."""

import struct

import gguf
import gguf_files
import numpy as np
import pytest

from lineas.export.gguf.container import GGUFFile, check_output, write_copy
from lineas.maps.files import whole_or_nothing

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")


@pytest.fixture
def path(tmp_path):
    """A file with an entry of every type and a tensor of several ones."""
    path = tmp_path / "made.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 7)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", -0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "ein Wört")
    writer.add_array("a.strings", ["", "x", "\u2581y"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    for k, name in enumerate(QUANTIZED):
        type = gguf.GGMLQuantizationType[name]
        x = rng.normal(size=(2300 if k == 0 else 3, 64)).astype(np.float32)  # more rows than are decoded at a time
        writer.add_tensor(f"t.{name}", gguf.quants.quantize(x, type), raw_dtype=type)
    writer.add_tensor("t.vector", rng.normal(size=5).astype(np.float32))
    writer.add_tensor("t.cube", rng.normal(size=(2, 3, 4)).astype(np.float32))
    gguf_files.finish(writer)
    return path


def fields(path):
    """Names, types and values of the entries of a file, in order, as the package gguf reads them."""
    found = gguf.GGUFReader(path).fields.items()
    return [(name, field.types, field.contents()) for name, field in found if not name.startswith("GGUF.")]


def test_a_header_is_what_the_package_gguf_reads(path):
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        expected = fields(path)
        assert file.keys == [name for name, *_ in expected]
        for name, types, value in expected:
            if types[0] != gguf.GGUFValueType.ARRAY:
                assert file.metadata[name] == value and type(file.metadata[name]) is type(value)
        assert file.version == 3 and file.alignment == 32
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            found = file.tensors[tensor.name]
            assert found.shape[::-1] == tuple(tensor.shape) and found.type == tensor.tensor_type
            assert (found.start, found.bytes) == (tensor.data_offset, tensor.n_bytes)
            values = np.concatenate([block.ravel() for block in file.blocks(tensor.name)])
            assert np.array_equal(values, gguf.quants.dequantize(tensor.data, tensor.tensor_type).ravel())
        assert [len(block) for block in file.blocks("t.Q4_0")] == [1024, 1024, 252]


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_copy_keeps_everything_that_it_is_not_told_to_change(path, tmp_path, alignment):
    if alignment:
        path = realigned(path, tmp_path / "aligned.gguf", alignment)
    values = {"t.vector": np.arange(5, dtype=np.float32), "new.bias": np.array([1.5, -2], np.float32)}
    entries = {"b.text": "what \u2581", "b.number": 3, "b.float": 0.1, "b.texts": ["p", ""]}
    with GGUFFile(path) as file:
        write_copy(file, str(tmp_path / "copy.gguf"), values, entries)
    before, after = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "copy.gguf")
    old, new = fields(path), fields(tmp_path / "copy.gguf")
    assert new[: len(old)] == old
    kinds = gguf.GGUFValueType
    assert [(name, types) for name, types, _ in new[len(old) :]] == [
        ("b.text", [kinds.STRING]),
        ("b.number", [kinds.UINT64]),
        ("b.float", [kinds.FLOAT64]),
        ("b.texts", [kinds.ARRAY, kinds.STRING]),
    ]
    assert {name: value for name, _, value in new[len(old) :]} == entries
    assert [t.name for t in after.tensors] == [*(t.name for t in before.tensors), "new.bias"]
    for one, other in zip(before.tensors, after.tensors, strict=False):
        assert one.tensor_type == other.tensor_type and list(one.shape) == list(other.shape)
        expected = values.get(one.name, one.data)
        assert np.array_equal(np.asarray(other.data).view(np.uint8), np.asarray(expected).view(np.uint8))
        assert other.data_offset % (alignment or 32) == 0
    assert np.array_equal(after.tensors[-1].data, values["new.bias"])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted({path.name, "made.gguf", "copy.gguf"})


def realigned(path, target, alignment):
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_custom_alignment(alignment)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    gguf_files.finish(writer)
    return target


def test_a_copy_is_read_in_pieces(path, tmp_path, monkeypatch):
    from lineas.export.gguf import container

    monkeypatch.setattr(container, "_CHUNK", 100)
    with GGUFFile(path) as file:
        write_copy(file, str(tmp_path / "copy.gguf"), {}, {})
    assert (tmp_path / "copy.gguf").read_bytes() == path.read_bytes()


def test_every_place_where_a_file_can_be_cut_off_is_an_error(path, tmp_path):
    data = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    with GGUFFile(path) as file:
        end = max(tensor.start + tensor.bytes for tensor in file.tensors.values())
        header = min(tensor.start for tensor in file.tensors.values())
    for length in [*range(header), *range(header, end, 997), end - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a"):
            GGUFFile(cut)
    cut.write_bytes(data[:end])  # the padding of the last tensor is nothing
    GGUFFile(cut).__exit__(None, None, None)


@pytest.mark.parametrize("length", [1 << 20, 1 << 63, (1 << 64) - 1])
def test_lengths_that_no_file_can_hold_are_errors_at_once(path, tmp_path, length):
    """Every 8 bytes of the header in turn: none of the numbers may ask for memory or for a loop of that length."""
    data = bytearray(path.read_bytes())
    with GGUFFile(path) as file:
        header = min(tensor.start for tensor in file.tensors.values())
    hostile = tmp_path / "hostile.gguf"
    failed = 0
    for at in range(8, header - 8, 3):
        changed = data.copy()
        changed[at : at + 8] = struct.pack("<Q", length)
        hostile.write_bytes(changed)
        try:
            GGUFFile(hostile).__exit__(None, None, None)
        except ValueError as error:
            assert str(hostile) in str(error)
            failed += 1
    assert failed > 50


def described(columns, rows, number):
    """What a header says of a tensor of two axes."""
    return b"t.Q8_0" + struct.pack("<IQQI", 2, columns, rows, number)


def changed(path, target, replace, by):
    data = path.read_bytes()
    assert data.count(replace) == 1
    target.write_bytes(data.replace(replace, by))
    return target


@pytest.mark.parametrize(
    ("replace", "by", "message"),
    [
        (b"GGUF\x03\x00\x00\x00", b"GGML\x03\x00\x00\x00", "is not a GGUF file: it begins with b'GGML'"),
        (
            b"GGUF\x03\x00\x00\x00",
            b"GGUF\x01\x00\x00\x00",
            "of version 1; lineas reads versions 2 and 3",
        ),
        (b"GGUF\x03\x00\x00\x00", b"GGUF\x00\x00\x00\x03", "of big-endian, version 3; lineas reads"),
        (b"a.int8", b"a.bool", "entry 11 is called 'a.bool', as one before"),
        (b"a.int8", b"\xff.int8", "the name of entry 2 is no UTF-8 text"),
        (b"a.uint8\x00", b"a.uint8\x0d", "the value of 'a.uint8' has the unknown type 13"),
        (b"t.cube", b"t.Q4_0", "there are two tensors 't.Q4_0'"),
        (b"t.cube\x03", b"t.cube\x05", "tensor 't.cube' has 5 axes"),
        (described(64, 3, 8), described(66, 3, 8), "blocks of 32"),
        (described(64, 3, 8), described(64, 3, 99), "the type 99"),
        (described(64, 3, 8), described(64, 4, 8), "of the data, not at"),
    ],
)
def test_what_does_not_hold_together_is_an_error(path, tmp_path, replace, by, message):
    with pytest.raises(ValueError) as error:
        GGUFFile(changed(path, tmp_path / "changed.gguf", replace, by))
    assert message in str(error.value) and "changed.gguf" in str(error.value)


def test_an_alignment_must_be_a_power_of_two(path, tmp_path):
    made = realigned(path, tmp_path / "aligned.gguf", 64)
    key = b"general.alignment" + struct.pack("<II", 4, 64)
    with pytest.raises(ValueError, match=r"general\.alignment must be a power of 2, got 48"):
        GGUFFile(changed(made, tmp_path / "changed.gguf", key, key[:-4] + struct.pack("<I", 48)))


def test_types_that_cannot_be_decoded_are_an_error(path, monkeypatch):
    def unknown(data, type):
        raise NotImplementedError

    with GGUFFile(path) as file:
        monkeypatch.setattr(gguf.quants, "dequantize", unknown)
        with pytest.raises(ValueError, match=r"tensor 't\.Q4_0' is Q4_0, which cannot be decoded"):
            next(file.blocks("t.Q4_0"))


def test_where_the_package_gguf_is_missing_the_error_says_how_to_install_it(path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "lineas\[gguf\]"'):
        GGUFFile(path)


def test_a_file_that_cannot_be_read_is_the_operating_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        GGUFFile(tmp_path / "none.gguf")


def test_an_output_is_whole_or_nothing(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), whole_or_nothing(str(target)) as place:
            with open(place, "wb") as file:
                file.write(b"half")
            raise error
        assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    with whole_or_nothing(str(target)) as place, open(place, "wb") as file:
        file.write(b"new")
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


def test_an_output_is_never_an_input(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    for same in (path, tmp_path / "link", tmp_path / "hard", tmp_path / "folder" / "up" / path.name):
        with pytest.raises(ValueError, match=r"output: .* itself, which is never written to"):
            check_output(same, path)
    with pytest.raises(ValueError, match=r"output must be a file, and .* is a folder"):
        check_output(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"output: the folder of .* does not exist"):
        check_output(tmp_path / "none" / "made.gguf")
    assert check_output(tmp_path / "new.gguf", path) == str(tmp_path / "new.gguf")
