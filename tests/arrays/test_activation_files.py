"""Activations in files of other tools against the arrays that were written, and what is said of unsound files."""

import doctest
import importlib
import json
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lineas

FORMATS = ("npz", "compressed.npz", "safetensors", "h5")


def write(path, arrays):
    """Arrays by name in a file, with the writer that the ending asks for."""
    path = str(path)
    if path.endswith("compressed.npz"):
        np.savez_compressed(path, **arrays)
    elif path.endswith(".npz"):
        np.savez(path, **arrays)
    elif path.endswith(".safetensors"):
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            for name, x in arrays.items():
                file[name] = x
    return path


@pytest.fixture
def sides(rng):
    source = {"layers.2": rng.normal(size=(300, 5)), "layers.10": rng.normal(size=(300, 3)).astype(np.float32)}
    return source, {name: (2 * x[:250] + 1).astype(x.dtype) for name, x in source.items()}


def same_bits(found, expected):
    return found.dtype == expected.dtype and np.array_equal(found, expected)


@pytest.mark.parametrize("ending", FORMATS)
def test_files_are_the_arrays_that_were_written(tmp_path, sides, ending):
    source, target = sides
    u = lineas.open_activations(write(tmp_path / f"u.{ending}", source))
    v = lineas.open_activations(Path(write(tmp_path / f"v.{ending}", target)))
    assert isinstance(u, lineas.Activations) and list(u) == ["layers.2", "layers.10"]  # the numbers in order
    for name, x in source.items():
        assert (u[name].shape, u[name].dtype, u[name].nbytes, len(u[name])) == (x.shape, x.dtype, x.nbytes, len(x))
        assert same_bits(np.asarray(u[name]), x)
        for rows in (slice(10, 40), slice(40, 50), slice(0, 1), slice(290, None), slice(3, 90, 7), slice(5, 5)):
            assert same_bits(u[name][rows], x[rows])  # forwards, and back
        assert same_bits(pickle.loads(pickle.dumps(u[name]))[7:9, 1:], x[7:9, 1:])
    found, expected = lineas.fit(u, v), lineas.fit(source, target)
    path, whole = lineas.sparse_path(u, v, n_penalties=5), lineas.sparse_path(source, target, n_penalties=5)
    for name in source:
        assert same_bits(found[name].weight, expected[name].weight) and same_bits(found[name].bias, expected[name].bias)
        assert same_bits(lineas.wasserstein(u[name], v[name]), lineas.wasserstein(source[name], target[name]))
        assert same_bits(lineas.moments(u[name]).mean, lineas.moments(source[name]).mean)
        assert same_bits(lineas.quantiles(u[name]).quantile(0.3), lineas.quantiles(source[name]).quantile(0.3))
    assert "rank_error" not in found.metadata and same_bits(path.loss, whole.loss)
    weights = np.arange(300.0)
    assert lineas.fit(u, v, source_weights=weights) == lineas.fit(source, target, source_weights=weights)
    assert repr(u["layers.10"]).startswith("FileArray([300, 3], float32, ")


@pytest.mark.parametrize("ending", [*FORMATS, "npy"])
def test_shards_are_rows_one_after_another(tmp_path, rng, ending):
    x, cuts = rng.normal(size=(100, 4)).astype(np.float16), [0, 1, 60, 61, 100]
    paths = []
    for k, (start, end) in enumerate(pairwise(cuts)):
        path = tmp_path / f"{k}.{ending}"
        if ending == "npy":
            np.save(path, x[start:end])
        else:
            write(path, {"a": x[start:end], "b": x[start:end, :2]})
        paths.append(path)
    found = lineas.open_activations(paths)
    assert isinstance(found, lineas.FileArray if ending == "npy" else lineas.Activations)
    a = found if ending == "npy" else found["a"]
    assert a.shape == (100, 4) and a.paths == tuple(map(str, paths)) and same_bits(np.asarray(a), x)
    for rows in (slice(0, 1), slice(1, 61), slice(0, 62), slice(59, 99), slice(-3, None), slice(2, 80, 5)):
        assert same_bits(a[rows], x[rows])


@pytest.mark.parametrize("ending", FORMATS)
def test_what_does_not_fit_is_read_as_a_stream(tmp_path, rng, monkeypatch, ending):
    """The same steps as for blocks of the array, and memory for some blocks of it, not for the file."""
    monkeypatch.setattr(sys.modules["lineas.arrays.streams"], "_CHUNK", 16 * 4096)
    x, y = rng.normal(size=(120_000, 16)).astype(np.float32), rng.normal(size=(3000, 16)).astype(np.float32)
    u, v = (lineas.open_activations(write(tmp_path / f"{k}.{ending}", {"a": z})) for k, z in enumerate((x, y)))
    memory = 2 * 4 * 16 * 1024
    tracemalloc.start()
    maps = lineas.fit(u, v, memory=memory)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < x.nbytes / 4
    blocks = [iter([z[k : k + 4096] for k in range(0, len(z), 4096)]) for z in (x, y)]
    expected = lineas.fit({"a": blocks[0]}, {"a": blocks[1]}, memory=memory)
    assert maps == expected and maps.metadata["rank_error"] > 0
    np.testing.assert_allclose(maps["a"].weight, lineas.fit(x, y).weight, rtol=0.02)
    seen = lineas.wasserstein(u["a"], v["a"], memory=memory)
    np.testing.assert_allclose(seen, lineas.wasserstein(x, y), rtol=0.1, atol=1e-3)


def test_all_modules_together_are_to_fit(tmp_path, sides):
    """Nothing is left out where each fits by itself, but then the arrays are not held all at once."""
    source, target = sides
    u, v = (lineas.open_activations(write(tmp_path / f"{k}.npz", x)) for k, x in enumerate(sides))
    total = sum(x.nbytes for side in sides for x in side.values())
    expected = lineas.fit(source, target)
    assert lineas.fit(u, v, memory=total) == expected
    streamed = lineas.fit(u, v, memory=total - 1)
    assert "rank_error" not in streamed.metadata
    np.testing.assert_allclose(streamed["layers.2"].weight, expected["layers.2"].weight, rtol=1e-12)
    with pytest.raises(ValueError, match="must be arrays to have row weights, got Quantiles or a stream"):
        lineas.fit(u, v, memory=total - 1, source_weights=np.ones(300))
    with pytest.raises(ValueError, match="shrinkage is for arrays, got Quantiles or a stream"):
        lineas.fit(u, v, memory=total - 1, shrinkage="auto")


def test_bfloat16(tmp_path, rng):
    """By ml_dtypes, the values; NumPy has no such type of itself."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = rng.normal(size=(50, 3)).astype(ml_dtypes.bfloat16)
    header = {"a": {"dtype": "BF16", "shape": [50, 3], "data_offsets": [0, 300]}}
    header["b"] = {"dtype": "BF16", "shape": [25, 6], "data_offsets": [300, 600]}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + 2 * x.tobytes())
    found = lineas.open_activations(tmp_path / "x.safetensors")
    assert same_bits(np.asarray(found["a"]), x.astype(np.float32))
    assert same_bits(found["b"][3:7], x.reshape(25, 6)[3:7].astype(np.float32))
    code = (  # without ml_dtypes, which teaches NumPy the type
        "import sys, lineas; x = lineas.open_activations(sys.argv[1]); print(lineas.moments(x['a']).count, "
        "any(name in sys.modules for name in ('ml_dtypes', 'torch', 'dask', 'h5py')))"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "x.safetensors")]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() == ["50", "False"]


def test_npy_files(tmp_path, rng):
    x = rng.normal(size=(80, 4))
    for saved in (x, np.asfortranarray(x), x.astype(">f4")):
        np.save(tmp_path / "x.npy", saved)
        found = lineas.open_activations(tmp_path / "x.npy")
        assert same_bits(np.asarray(found), saved) and same_bits(found[10:30], saved[10:30])
        assert lineas.fit(found, x + 1) == lineas.fit(saved, x + 1)
        np.testing.assert_allclose(lineas.moments(found, chunk_rows=7).mean, saved.mean(0), rtol=1e-6)


def test_an_npz_by_columns(tmp_path, rng):
    x = np.asfortranarray(rng.normal(size=(80, 4)))
    found = lineas.open_activations(write(tmp_path / "x.npz", {"a": x}))["a"]
    assert same_bits(np.asarray(found), x)
    with pytest.raises(
        ValueError, match=r"x.npz: 'a': rows 0 to 7 cannot be read: an .npz keeps it by columns \(Fortran"
    ):
        lineas.moments(found, chunk_rows=7)


def test_names(tmp_path, rng):
    x = {name: rng.normal(size=(4, 2)) for name in ("layers.0.mlp", "layers.0.norm", "layers.1.mlp")}
    x["input_ids"] = np.zeros((4, 9), np.int64)
    path = write(tmp_path / "x.safetensors", x)
    for names, expected in (
        ("layers.*.mlp", ["layers.0.mlp", "layers.1.mlp"]),
        (["layers.1.mlp", "layers.0.*"], ["layers.1.mlp", "layers.0.mlp", "layers.0.norm"]),
    ):
        found = lineas.open_activations(path, names=names)
        assert list(found) == expected and all(same_bits(np.asarray(found[name]), x[name]) for name in found)
    for names, error, text in (
        ("layers.0.mpl", ValueError, r"x.safetensors holds no array 'layers.0.mpl'; similar names: layers.\*.mlp"),
        ([], ValueError, "names must hold at least one name"),
        ([3], TypeError, r"names must be a string or a sequence of strings, got \[3\]"),
        (None, TypeError, "'input_ids' must be float16, bfloat16, float32 or float64, got dtype I64; names= chooses"),
    ):
        with pytest.raises(error, match=text):
            lineas.open_activations(path, names=names)


def test_hdf5(tmp_path, rng):
    h5py, path = pytest.importorskip("h5py"), tmp_path / "x.hdf5"
    x = rng.normal(size=(5000, 8)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file.create_dataset("model/layer.10", data=x, chunks=(700, 3), compression="gzip", compression_opts=1)
        file.create_dataset("model/layer.2", data=x[:, :2])
        file["texts"], file["empty"], file["ids"] = ["a", "b"], h5py.Empty("f4"), np.arange(6).reshape(2, 3)
        file["elsewhere"] = h5py.SoftLink("/model/layer.2")
        file.create_group("nothing")
    found = lineas.open_activations(path, names="model/**")
    assert list(found) == ["model/layer.2", "model/layer.10"] and found["model/layer.10"].chunks == (700, 3)
    assert same_bits(np.asarray(found["model/layer.10"]), x)
    assert lineas.moments(found["model/layer.10"]).count == 5000
    with h5py.File(path) as file:  # a dataset itself is read by slices as well
        blocks = iter([x[k : k + 4900] for k in (0, 4900)])  # seven whole chunks of rows, as many as 5242 rows hold
        expected = lineas.fit(blocks, x + 1, memory=2**16)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["lineas.arrays.streams"], "_CHUNK", 8 * 5242)
            assert lineas.fit(file["model/layer.10"], x + 1, memory=2**16) == expected
        assert lineas.fit(file["model/layer.10"], x + 1) == lineas.fit(x, x + 1)
    for names, error, text in (
        ("model", TypeError, r"x.hdf5: 'model' must be a dataset, got a group; it holds layer.10, layer.2"),
        ("nothing", TypeError, "'nothing' must be a dataset, got a group; it is empty"),
        ("texts", TypeError, "'texts' must be float16, .* got dtype of strings or references; names="),
        ("ids", TypeError, "'ids' must be float16, .* got dtype int64; names="),
        ("empty", ValueError, r"'empty' must have shape \[n, d\], got shape \(\)"),
        ("elsewhere", ValueError, "x.hdf5 holds no array 'elsewhere'"),
    ):
        with pytest.raises(error, match=text):
            lineas.open_activations(path, names=names)
    with h5py.File(path, "w") as file:
        file.create_group("nothing")
    with pytest.raises(ValueError, match=r"x.hdf5 holds no array$"):
        lineas.open_activations(path)


def test_hdf5_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "x.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'HDF5 files need h5py: pip install "lineas\[hdf5\]"'):
        lineas.open_activations(tmp_path / "x.h5")


def test_shards_that_do_not_fit(tmp_path, rng):
    x = rng.normal(size=(4, 3))
    first = write(tmp_path / "0.npz", {"a": x, "b": x})
    np.save(tmp_path / "x.npy", x)
    for arrays, error, text in (
        ({"a": x}, ValueError, "1.npz must have the arrays of .*0.npz: it lacks 'b'"),
        ({"a": x, "b": x, "c": x}, ValueError, "1.npz must have the arrays of .*0.npz: it also has 'c'"),
        ({"a": x[:, :2], "b": x}, ValueError, "1.npz: 'a' must have 3 columns as in .*0.npz, got 2"),
        ({"a": x.astype("f4"), "b": x}, ValueError, "1.npz: 'a' must have dtype float64 as in .*0.npz, got float32"),
        ({"a": x[:0], "b": x}, ValueError, r"1.npz: 'a' must have at least 1 row and 1 column, got shape \(0, 3\)"),
    ):
        second = write(tmp_path / "1.npz", arrays)
        with pytest.raises(error, match=text):
            lineas.open_activations([first, second])
    assert len(lineas.open_activations([first, write(tmp_path / "1.npz", {"a": x, "c": x})], names="a")["a"]) == 8
    with pytest.raises(ValueError, match=r"paths must be all .npy files or none, got .*0.npz, .*x.npy"):
        lineas.open_activations([first, tmp_path / "x.npy"])
    with pytest.raises(ValueError, match=r"names is for files with named arrays: .*x.npy holds one that has no name"):
        lineas.open_activations([tmp_path / "x.npy"], names="a")


@pytest.mark.parametrize(
    ("array", "error", "text"),
    [
        (np.arange(6).reshape(2, 3), TypeError, "'a' must be float16, .* got dtype int64; names= chooses"),
        (np.array([["x", "y"]]), TypeError, "'a' must be float16, .* got dtype <U1; names= chooses"),
        (np.array([[None, 1]]), TypeError, "'a' must be float16, .* got Python objects, which are never unpickled"),
        (np.ones((2, 2), np.complex64), TypeError, "'a' must be float16, .* got dtype complex64"),
        (np.ones(4), ValueError, r"'a' must have shape \[n, d\], got shape \(4,\)"),
        (np.ones((2, 3, 4)), ValueError, r"'a' must have shape \[n, d\], got shape \(2, 3, 4\)"),
        (np.ones((2, 0)), ValueError, r"'a' must have at least 1 row and 1 column, got shape \(2, 0\)"),
    ],
)
def test_arrays_that_are_no_activations(tmp_path, array, error, text):
    with pytest.raises(error, match=text):
        lineas.open_activations(write(tmp_path / "x.npz", {"a": array}))
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(error, match=text.replace("'a'", "x.npy").replace("; names= chooses", "$")):
        lineas.open_activations(tmp_path / "x.npy")


def test_functions_that_do_not_stream_read_all(tmp_path, sides):
    u, v = (lineas.open_activations(write(tmp_path / f"{k}.npz", x)) for k, x in enumerate(sides))
    for fit in (lineas.baselines.mean, lineas.baselines.aura):
        assert fit(u, v) == fit(*sides)


def test_the_examples_in_docstrings():
    result = doctest.testmod(importlib.import_module("lineas.arrays.activation_files"))
    assert result.attempted > 0 and result.failed == 0


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([[Bomb()]], dtype=object), allow_pickle=True)
    np.save(tmp_path / "x.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    (tmp_path / "y.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TypeError, match="got Python objects, which are never unpickled"):
        lineas.open_activations(tmp_path / "x.npz", names="a")
    with pytest.raises(TypeError, match=r"x.npy must be .* got Python objects, which are never unpickled"):
        lineas.open_activations(tmp_path / "x.npy")
    with pytest.raises(ValueError, match=r"y.npy is not a sound .npy file: the magic string is not correct"):
        lineas.open_activations(tmp_path / "y.npy")


@pytest.mark.parametrize(
    ("paths", "error", "text"),
    [
        ([], ValueError, "paths must hold at least one file"),
        (3, TypeError, "paths must be a path or a sequence of paths, got int"),
        (["x.npy", 3], TypeError, "paths must be a path or a sequence of paths, got list of str, int"),
        ("missing.npy", FileNotFoundError, "missing.npy"),
        (".", ValueError, r"\. is a folder: pass the files in it"),
        ("x.pt", ValueError, r"x.pt must end with one of .safetensors, .npy, .npz, .h5, .hdf5"),
    ],
)
def test_paths_that_are_none(tmp_path, monkeypatch, paths, error, text):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.ones((2, 2)))
    with pytest.raises(error, match=text):
        lineas.open_activations(paths)


def test_a_path_is_no_activations(tmp_path):
    x = np.ones((4, 2))
    for path in ("x.npy", tmp_path / "x.npy", ["x.npy", "y.npy"]):
        for name, use in (
            ("source", lambda path=path: lineas.fit(path, x)),
            ("target", lambda path=path: lineas.sparse_path(x, path)),
            (r"source\['a'\]", lambda path=path: lineas.fit({"a": path}, {"a": x})),
            ("v", lambda path=path: lineas.wasserstein(x, path)),
            ("data", lambda path=path: lineas.moments(path)),
            ("data", lambda path=path: lineas.quantiles(path)),
        ):
            with pytest.raises(
                TypeError, match=f"^{name} must be float16, .*; files are opened by lineas.open_activations"
            ):
                use()


@pytest.mark.parametrize("ending", [*FORMATS, "npy"])
def test_files_cut_off_anywhere(tmp_path, rng, ending):
    """An error when it is opened or read, never other values."""
    path, x = tmp_path / f"x.{ending}", rng.normal(size=(60, 3))
    if ending == "npy":
        np.save(path, x)
    else:
        write(path, {"a": x})
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 60, 100, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"x.{ending}( is not a sound|: 'a': rows 0 to 60 cannot be read)"):
            np.asarray(lineas.open_activations(path)["a"] if ending != "npy" else lineas.open_activations(path))


def test_an_npz_with_another_byte(tmp_path, rng):
    """The checksum of the archive is looked at when the last row is read."""
    for ending in ("npz", "compressed.npz"):
        path = Path(write(tmp_path / f"x.{ending}", {"a": rng.normal(size=(5000, 8))}))
        found, data = lineas.open_activations(path)["a"], bytearray(path.read_bytes())
        data[len(data) // 2] ^= 64
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"x.*npz: 'a': rows .* cannot be read: "):
            lineas.quantiles(found, chunk_rows=1000)


def test_files_that_were_changed(tmp_path, rng):
    for ending in (*FORMATS, "npy"):
        path = tmp_path / f"x.{ending}"
        np.save(path, rng.normal(size=(90, 3))) if ending == "npy" else write(path, {"a": rng.normal(size=(90, 3))})
        found = lineas.open_activations(path)
        found = found if ending == "npy" else found["a"]
        np.save(path, np.ones((9, 3))) if ending == "npy" else write(path, {"a": np.ones((9, 3))})
        with pytest.raises(ValueError, match=r"cannot be read|was changed since it was opened"):
            found[50:80]
        path.unlink()
        with pytest.raises(FileNotFoundError):
            found[50:80]


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


def test_hostile_headers(tmp_path):
    huge = "{'descr': '<f8', 'fortran_order': False, 'shape': (%d, %d), }\n"
    (tmp_path / "x.npy").write_bytes(npy_header(huge % (2**40, 2**40)) + bytes(64))
    with pytest.raises(
        ValueError, match=r"x.npy is not a sound .npy file: it is cut off: .* bytes of values expected, got 64"
    ):
        lineas.open_activations(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("a.npy", npy_header(huge % (2**40, 2**40)) + bytes(64))
    with pytest.raises(ValueError, match=r"x.npz is not a sound .npz file: 'a' must have .* bytes of values, got 64"):
        lineas.open_activations(tmp_path / "x.npz")
    for text in (
        "(" * 9000,
        "{'descr': '<f8'}\n",
        "__import__('os')\n",
        "{'descr': 7, 'fortran_order': False, 'shape': ()}\n",
    ):
        (tmp_path / "x.npy").write_bytes(npy_header(text))
        with pytest.raises(ValueError, match=r"x.npy is not a sound .npy file: "):
            lineas.open_activations(tmp_path / "x.npy")
    for shape, offsets in (([2, 2], [0, 31]), ([2, 2], [8, 40]), ([-2, 2], [0, 32]), ([2**40, 2**40], [0, 32])):
        header = json.dumps({"a": {"dtype": "F64", "shape": shape, "data_offsets": offsets}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(32))
        with pytest.raises(ValueError, match=r"x.safetensors is not a sound safetensors file: "):
            lineas.open_activations(tmp_path / "x.safetensors")


def test_values_that_are_not_finite(tmp_path, rng):
    x = rng.normal(size=(50, 3))
    x[33, 1] = np.nan
    u = lineas.open_activations(write(tmp_path / "x.npz", {"a": x}))
    with pytest.raises(ValueError, match=r"source\['a'\]: nan at row 33, column 1"):
        lineas.fit(u, {"a": x[:20]})
    with pytest.raises(ValueError, match=r"source\['a'\]: nan at row 33, column 1"):
        lineas.fit(u, {"a": x[:20]}, memory=1)
    with pytest.raises(ValueError, match=r"data\[30:40\]: nan at row 3, column 1"):
        lineas.moments(u["a"], chunk_rows=10)


def test_slices(tmp_path, rng):
    x = rng.normal(size=(9, 3))
    found = lineas.open_activations(write(tmp_path / "x.npz", {"a": x}))
    part = found.rows(slice(2, 5))
    assert isinstance(part, lineas.Activations) and same_bits(part["a"], x[2:5])
    with pytest.raises(TypeError, match=r"takes a slice of rows, and one of columns, got ndarray: use np.asarray"):
        found.rows([1, 2])
    with pytest.raises(ValueError, match="an array in files is read forwards, got a slice of step -1"):
        found["a"][::-1]
