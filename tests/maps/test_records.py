"""Sparse paths and results of fits: equal by their fields, and the same after they were saved."""

import copy
import dataclasses
import json
import pickle
import re

import numpy as np
import paths
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.maps import files
from lineas.maps.path import SparsePath
from lineas.maps.records import Record


def sparse_path():
    rng = np.random.default_rng(0)
    source = {"b": rng.normal(size=(20, 5)), "a": rng.normal(size=(20, 3)).astype(np.float32)}
    target = {name: x + rng.normal(size=x.shape[1]) for name, x in source.items()}
    return lineas.sparse_path(source, target, held_out=(target, source), n_penalties=4)


def path_of_one_array():
    return lineas.sparse_path(np.eye(4, dtype=np.float32), 2 * np.eye(4, dtype=np.float32), n_penalties=2)


def end_to_end_path():
    pytest.importorskip("torch")
    base = paths.path(3, 8, points=5, metadata={"method": "sparse path end to end"})
    kept = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.init}
    history = {"point": np.arange(3), "loss": np.array([1.0, np.nan, 2.0]), "kept": np.array([True, False, True])}
    return lineas.EndToEndPath(
        **kept, penalized_loss=base.loss, refitted=np.arange(5) > 2, history=history, passes=7, stopped="interrupted"
    )


def fit_result(**changes):
    pytest.importorskip("torch")
    maps = SteeringMaps({"b.x": AffineMap([2.0, 1.0], [0.0, 3.0]), "a": AffineMap([1.5], [0.5])}, {"method": "m"})
    settings = {
        "maps": maps,
        "history": {"loss": np.array([3.0, np.nan]), "layer_loss": np.ones((2, 2)), "held_out_loss": np.zeros(0)},
        "best_step": 1,
        "stopped": "not finite at step 2: …",
        "held_out_loss": np.float64(1.25),
        "passes": np.int64(6),
        "held_out_task_loss": {"a": 1.0, "b": 2.0},
        "best_strength": 1,
    }
    return lineas.FitResult(**settings | changes)


def gaussian_map():
    return lineas.GaussianMap(np.array([[1.0, 0.5], [0.0, 2.0]]), np.ones(2))


MAKE = [
    gaussian_map,
    sparse_path,
    path_of_one_array,
    end_to_end_path,
    fit_result,
    lambda: fit_result(held_out_task_loss=None),
]


@pytest.mark.parametrize("make", MAKE)
def test_a_record_is_the_same_after_it_was_saved(make, tmp_path):
    record, file = make(), tmp_path / "record.safetensors"
    record.save(file)
    back = lineas.load(file)
    assert type(back) is type(record) and back == record and repr(back) == repr(record)
    for field in dataclasses.fields(record):
        value, found = getattr(record, field.name), getattr(back, field.name)
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype and found.tobytes() == value.tobytes(), field.name
        else:
            assert type(found) is type(value) or isinstance(found, float | int), field.name
    bytes_of = file.read_bytes()
    for _ in range(10):
        back.save(file)
        assert file.read_bytes() == bytes_of
    if not isinstance(record, lineas.GaussianMap):
        metadata = (record.maps if hasattr(record, "maps") else record).metadata
        assert (back.maps if hasattr(back, "maps") else back).metadata == metadata


def test_a_path_gives_the_same_maps_after_it_was_saved(tmp_path):
    path = sparse_path()
    path.save(tmp_path / "path.safetensors")
    back = lineas.load(tmp_path / "path.safetensors")
    between = float(np.sqrt(path.penalties[1] * path.penalties[2]))
    for ask in ({"support": 3}, {"penalty": between}, {"index": -1}, {"best": True}):
        assert back.at(**ask) == path.at(**ask) and back.at(**ask).metadata == path.at(**ask).metadata


@pytest.mark.parametrize("make", [sparse_path, path_of_one_array, end_to_end_path])
def test_arrays_of_a_path_are_read_only(make, tmp_path):
    path, file = make(), tmp_path / "path.safetensors"
    path.save(file)
    for twin in (path, lineas.load(file), copy.deepcopy(path), pickle.loads(pickle.dumps(path)), copy.copy(path)):
        assert twin == path
        fields = [getattr(twin, field.name) for field in dataclasses.fields(twin)]
        arrays = [value for value in fields if isinstance(value, np.ndarray)]
        arrays += [*(twin.moments or []), *getattr(twin, "history", {}).values()]
        assert len(arrays) >= 6
        for array in arrays:
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 7
    if path.moments is not None:
        assert path.at(penalty=float(path.penalties[:2].mean())).support >= 0  # solved from the read-only moments


def test_a_path_leaves_the_callers_arrays_as_they_are():
    base = paths.path(3, 8, points=5)
    given = {field.name: getattr(base, field.name) for field in dataclasses.fields(base) if field.init}
    given["weight"] = np.array(base.weight)
    SparsePath(**given)
    given["weight"][:] = 7


def test_equality():
    one, same = sparse_path(), sparse_path()
    assert one == same and one != path_of_one_array() and one != "path"
    for changes in (
        {"loss": one.loss + 1},
        {"kkt_residual": None},
        {"modules": ("b", "c")},
        {"l1_ratio": 0.25},
        {"moments": None},
        {"moments": [one.moments[0], one.moments[1] + 1]},
    ):
        assert dataclasses.replace(one, **changes) != one, changes
    assert dataclasses.replace(one, metadata={}) == one
    assert dataclasses.replace(one, modules=list(one.modules)) == one
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_equality_of_results():
    one = fit_result()
    assert one == fit_result()  # NaN in its history is itself
    maps = SteeringMaps(one.maps, {"other": 1})
    assert fit_result(maps=maps) == one and fit_result(maps=maps.select("a")) != one
    for changes in (
        {"history": {}},
        {"history": one.history | {"loss": np.array([3.0, 1.0])}},
        {"stopped": "finished"},
        {"held_out_task_loss": {"a": 1.0, "b": 3.0}},
        {"held_out_loss": None},
    ):
        assert fit_result(**changes) != one, changes
    assert fit_result(held_out_loss=np.nan) == fit_result(held_out_loss=np.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample(Record):
    FORMAT = "lineas sample"

    scalar: np.ndarray
    nested: dict[str, list[np.ndarray]]
    flags: tuple[bool, ...]
    anything: dict[str, object] | None = None


def test_a_record_of_every_kind_of_field(tmp_path, monkeypatch):
    monkeypatch.setitem(files.FORMATS, "lineas sample", files.Format("a sample", {"fields": dict}, ("x", "Sample")))
    monkeypatch.setattr(files, "lazy_import", lambda module, name: Sample)
    one = Sample(np.array(3, ">i4"), {"a.0": [np.zeros((0, 2)), np.eye(4)[::2]], "": []}, (True, False))
    one.save(tmp_path / "x")
    back = lineas.load(tmp_path / "x")
    assert back == one and back.scalar.shape == () and back.nested["a.0"][0].shape == (0, 2) and back.flags[0] is True


# ---- what is damaged, hostile or of another kind ---------------------------------------------------------------------


def test_a_flipped_byte_is_an_error(tmp_path):
    file = tmp_path / "path.safetensors"
    path_of_one_array().save(file)
    data = file.read_bytes()
    for at in range(0, len(data), 3):
        broken = bytearray(data)
        broken[at] ^= 0xFF
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"path\.safetensors"):
            lineas.load(file)


def changed(record, file, change):
    """A file of a record, without its checksum, whose fields and tensors `change` has been at."""
    record.save(file)
    with safe_open(file, "np") as opened:
        header, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    fields = json.loads(header["fields"])
    change(fields, tensors)
    header.pop("sha256")
    save_file(tensors, file, header | {"fields": json.dumps(fields)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f, t: None, None),
        (lambda f, t: f.pop("penalties"), "missing 1 required positional argument: 'penalties'|unexpected tensor"),
        (lambda f, t: f.update(more=3), "the header has the unknown field 'more'"),
        (lambda f, t: f.update(support="support"), "the header has the unknown field 'support'"),
        (lambda f, t: f.update(penalties=None), "'penalties' in the header must be of type ndarray, got 'None'"),
        (lambda f, t: f.update(penalties=[1.0]), r"'penalties' in the header must be of type ndarray, got '\[1\.0\]'"),
        (lambda f, t: f.update(l1_ratio="1"), "'l1_ratio' in the header must be of type float, got '1'"),
        (lambda f, t: f.update(l1_ratio=True), "'l1_ratio' in the header must be of type float, got 'True'"),
        (lambda f, t: f.update(l1_ratio=10**400), "int too large to convert to float"),
        (lambda f, t: f.update(modules="ab"), "'modules' in the header must be of type tuple, got 'ab'"),
        (lambda f, t: f.update(modules=["a"]), r"widths must be a number above 0 for each module, got \(5, 3\)"),
        (lambda f, t: f.update(modules=["a", 3]), r"'modules\.1' in the header must be of type str, got '3'"),
        (lambda f, t: f.update(widths=[5, 0]), r"widths must be a number above 0 for each module, got \(5, 0\)"),
        (lambda f, t: f.update(widths=[]), r"widths must be a number above 0 for each module, got \(\)"),
        (lambda f, t: f.update(widths=[5, 4]), r"weight must have shape \(4, 9\), got \(4, 8\)"),
        (lambda f, t: f.update(metadata=[]), r"'metadata' in the header must be of type dict, got '\[\]'"),
        (lambda f, t: f.update(moments={}), r"'moments' in the header must be of type list, got '\{\}'"),
        (lambda f, t: f.update(moments=["moments.0"]), r"moments must have shape \[5, d\] for each module"),
        (lambda f, t: t.pop("loss"), "it lacks tensor 'loss'"),
        (lambda f, t: t.pop("moments.1"), r"it lacks tensor 'moments\.1'"),
        (lambda f, t: t.update(more=np.ones(3)), "it has the unexpected tensor 'more'"),
        (lambda f, t: t.update(loss=np.ones(3)), r"loss must have shape \(4,\), got \(3,\)"),
        (lambda f, t: t.update(weight=np.ones(4)), r"weight must have shape \(4, 8\), got \(4,\)"),
        (lambda f, t: t.update(module_support=np.ones((4, 1))), r"module_support must have shape \(4, 2\)"),
        (lambda f, t: t.update(penalties=np.array(1.0)), "penalties must be a sequence of numbers, got ndarray"),
        (lambda f, t: t.update(penalties=-t["penalties"]), r"penalties\[0\] must be above 0, got -"),
    ],
)
def test_hostile_paths(tmp_path, change, text):
    file = tmp_path / "path.safetensors"
    changed(sparse_path(), file, change)
    if text is None:  # a file without a checksum can be read
        assert lineas.load(file) == sparse_path()
        return
    with pytest.raises(ValueError, match=text) as caught:
        lineas.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f, t: f.update(maps=["a"]), r"'maps' in the header must be of type SteeringMaps, got"),
        (lambda f, t: f["maps"].pop("modules"), "'modules' in the header must be different names"),
        (lambda f, t: f["maps"].update(modules=["a", "a"]), "'modules' in the header must be different names"),
        (lambda f, t: f["maps"].update(modules=["a"]), r"it has the unexpected tensor 'maps\.b\.x\.bias'"),
        (lambda f, t: f["maps"].update(metadata=3), "metadata must be a dict, got int"),
        (lambda f, t: t.update({"maps.a.bias": np.array([np.nan])}), "module 'a': bias must be finite, got nan"),
        (lambda f, t: f["history"].update(more="x"), r"it lacks tensor 'history\.more'"),
        (
            lambda f, t: f["held_out_task_loss"].update(a=None),
            r"'held_out_task_loss\.a' in the header must be of type float",
        ),
        (lambda f, t: f.update(best_step=1.5), "'best_step' in the header must be of type int, got '1.5'"),
    ],
)
def test_hostile_results(tmp_path, change, text):
    file = tmp_path / "fit.safetensors"
    changed(fit_result(), file, change)
    with pytest.raises(ValueError, match=text):
        lineas.load(file)


def test_what_json_cannot_hold_is_not_saved(tmp_path):
    path = dataclasses.replace(path_of_one_array(), metadata={"x": np.ones(3)})
    with pytest.raises(TypeError, match="ndarray is not JSON serializable"):
        path.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"penalties": np.array([1.0, 2.0, 3.0])}, "penalties must fall, got 1 and then 2 at index 1"),
        ({"loss": np.ones(2)}, "loss must have shape (3,), got (2,)"),
        ({"held_out_loss": np.ones((3, 1))}, "held_out_loss must have shape (3,), got (3, 1)"),
        ({"weight": np.ones((3, 2))}, "weight must have shape (3, 4), got (3, 2)"),
        ({"widths": (2, 3)}, "widths must be a number above 0 for each module, got (2, 3)"),
    ],
)
def test_paths_that_do_not_hold_together(changes, text):
    sound = {
        "penalties": np.array([3.0, 2.0, 1.0]),
        "l1_ratio": 1.0,
        "loss": np.ones(3),
        "held_out_loss": None,
        "modules": None,
        "widths": (4,),
        "weight": np.ones((3, 4)),
        "bias": np.zeros((3, 4)),
    }
    assert SparsePath(**sound).support.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=re.escape(text)):
        SparsePath(**sound | changes)
