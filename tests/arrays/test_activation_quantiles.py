"""Streaming quantiles by module: their metadata, their merges, and files of them."""

import json
import os
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lineas
from lineas.arrays.activation_quantiles import size_within
from lineas.maps import files

FACTS = {"model": "m", "layers": "l*", "pooling": "all", "tokens": "last"}


def seen(rng, rows=3000, d=5, dtype=np.float32, size=512):
    found = lineas.Quantiles(size)
    for part in np.array_split(rng.normal(size=(rows, d)).astype(dtype), max(1, rows // 700)):
        found.update(part)
    return found


def of_modules(rng, **sizes):
    return lineas.ActivationQuantiles({name: seen(rng, rows) for name, rows in sizes.items()}, FACTS)


def same(one, other):
    """The same bits, but for the room that is left."""
    assert one.size == other.size and one._state.seen == other._state.seen
    for a, b in zip(one.weighted_sample(), other.weighted_sample(), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    for part in ("mean", "m2", "low", "high", "schedule"):
        assert getattr(one._state, part).tobytes() == getattr(other._state, part).tobytes()


def test_a_dict_with_metadata(rng):
    found = of_modules(rng, b=3000, a=100)
    assert list(found) == ["b", "a"] and found.metadata == FACTS
    assert not found.exact and found.rank_error == found["b"].rank_error > 0 and found["a"].exact
    assert found.nbytes == found["a"].nbytes + found["b"].nbytes
    assert repr(found).startswith("ActivationQuantiles({'b': Quantiles(size=512, count=3000, d=5, rank_error=")
    empty = lineas.ActivationQuantiles({}, {})
    assert empty.exact and empty.rank_error == 0 and empty.nbytes == 0


def test_maps_and_paths_take_over_what_they_tell(rng):
    source, target = of_modules(rng, a=3000), of_modules(rng, a=2000)
    for found in (lineas.fit(source, target), lineas.sparse_path(source, target, n_penalties=2).at(index=1)):
        assert {fact: found.metadata[fact] for fact in FACTS} == FACTS
        assert found.metadata["rank_error"] == max(source.rank_error, target.rank_error)
    arrays = lineas.Activations({"a": rng.normal(size=(9, 5))}, FACTS | {"pooling": "mean"})
    with pytest.raises(ValueError, match=r"^source and target must be collected alike, got pooling 'all' and 'mean'"):
        lineas.fit(source, arrays)


def test_arrays_are_asked_for_where_rows_are_needed(rng):
    source = of_modules(rng, a=30)
    with pytest.raises(TypeError, match=r"^source\['a'\] and target\['a'\] must be arrays here, got Quantiles"):
        lineas.baselines.aura(source, source)
    with pytest.raises(ValueError, match=r"^shrinkage is for arrays, got Quantiles"):
        lineas.fit(source, source, shrinkage="auto")


def test_bad_values(rng):
    with pytest.raises(TypeError, match=r"^quantiles\['a'\] must be a Quantiles, got ndarray"):
        lineas.ActivationQuantiles({"a": np.ones((2, 2))}, {})
    with pytest.raises(ValueError, match=r"^metadata name the tokens 'lsat'"):
        lineas.ActivationQuantiles({"a": seen(rng)}, {"tokens": "lsat"})


def test_copies_go_ways_of_their_own(rng):
    found = of_modules(rng, a=3000)
    other = found.copy()
    same(other["a"], found["a"])
    other["a"].update(np.ones((1, 5), np.float32))
    other.metadata["model"] = "n"
    assert found["a"].count == 3000 and found.metadata == FACTS


def test_modules_are_joined(rng):
    one, other = of_modules(rng, a=10), of_modules(rng, b=20)
    other.metadata["layers"] = "m*"
    both = one | other
    assert type(both) is lineas.ActivationQuantiles and list(both) == ["a", "b"]
    assert both.metadata == FACTS | {"layers": ["l*", "m*"]}
    one |= other
    assert list(one) == ["a", "b"] and one.metadata == both.metadata
    with pytest.raises(TypeError, match=r"^quantiles\['c'\] must be a Quantiles, got ndarray"):
        one | lineas.Activations({"c": np.ones((2, 2))}, FACTS)


def test_merging_is_that_of_every_module(rng):
    one, other = of_modules(rng, a=3000, b=10), of_modules(rng, a=500, b=700)
    expected = {name: one[name].copy().merge(other[name]) for name in one}
    kept = other.copy()
    assert one.merge(other) is one
    for name in one:
        same(one[name], expected[name])
        same(other[name], kept[name])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda found: dict(found), TypeError, "^other must be ActivationQuantiles, got dict"),
        (lambda found: found.metadata.update(tokens="all") or found, ValueError, "collected alike, got tokens 'last'"),
        (lambda found: found.pop("a") and found, ValueError, "^other must have the modules 'a', 'b', got b"),
        (
            lambda found: found.update(b=lineas.Quantiles(1024)) or found,
            ValueError,
            r"^other\['b'\] must have the size",
        ),
        (
            lambda found: found.update(b=lineas.quantiles(np.ones((2, 3)), size=512)) or found,
            ValueError,
            r"^other\['b'\] must have the size and the neurons of Quantiles\(size=512, count=30, d=5",
        ),
    ],
)
def test_a_merge_that_is_refused_takes_nothing_in(rng, change, error, text):
    found = of_modules(rng, a=30, b=30)
    before = found.copy()
    with pytest.raises(error, match=text):
        found.merge(change(of_modules(rng, a=30, b=30)))
    for name in found:
        same(found[name], before[name])


def test_the_size_that_memory_allows():
    assert size_within(4 * 16 * 512, [16]) == size_within(4 * 16 * 512, [3]) == 512  # what a tile holds
    assert size_within(1 << 30, [576] * 30) == (1 << 30) // (4 * 576 * 30)
    assert size_within(1 << 50, [16]) == 1 << 24
    with pytest.raises(ValueError, match=r"^memory must be at least 65536 bytes, for 512 values of each of 19 neurons"):
        size_within(65535, [3, 16])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 511, 513, 20_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantiles_that_were_saved_go_on_to_the_same_bits(rng, tmp_path, rows, dtype):
    found, path = seen(rng, rows, dtype=dtype), tmp_path / "a.safetensors"
    found.save(path)
    back = lineas.load(path)
    assert type(back) is lineas.Quantiles and repr(back) == repr(found)
    same(back, found)
    more = rng.normal(size=(5000, 5)).astype(dtype)
    same(back.update(more), found.update(more))
    assert found.count == rows + 5000


def test_those_of_modules_come_back_with_order_and_metadata(rng, tmp_path):
    found, path = of_modules(rng, z=3000, a=10), tmp_path / "a.safetensors"
    found.save(path)
    first = path.read_bytes()
    back = lineas.load(path)
    assert type(back) is lineas.ActivationQuantiles and list(back) == ["z", "a"] and back.metadata == FACTS
    for name in found:
        same(back[name], found[name])
    assert lineas.fit(back, back)["z"] == lineas.fit(found, found)["z"]
    back.save(path)
    assert path.read_bytes() == first


def test_a_file_holds_no_room_for_more(rng, tmp_path):
    found, path = lineas.Quantiles(1 << 20).update(rng.normal(size=(100, 5))), tmp_path / "a.safetensors"
    found.save(path)
    assert path.stat().st_size < 20_000 < found.nbytes
    same(lineas.load(path), found)


def test_quantiles_without_rows_are_not_saved(tmp_path):
    for found in (lineas.Quantiles(), lineas.ActivationQuantiles({"a": lineas.Quantiles()}, {})):
        with pytest.raises(ValueError, match=r"^these quantiles have seen no rows yet"):
            found.save(tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(rng, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    of_modules(rng, a=10).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        of_modules(rng, a=20).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(TypeError, match="not JSON serializable"):
        lineas.ActivationQuantiles({"a": seen(rng)}, FACTS | {"x": object()}).save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("place", [0.3, 0.6, 0.99])
def test_a_damaged_file_is_refused(rng, tmp_path, place):
    path = tmp_path / "a.safetensors"
    of_modules(rng, a=3000).save(path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its content is not what was written"):
        lineas.load(path)
    path.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        lineas.load(path)


def changed(rng, path, tensors, header):
    """A file of quantiles without a checksum, with tensors and the state in its header changed."""
    seen(rng).save(path)
    arrays, state = {name: x.copy() for name, x in load_file(path).items()}, {"size": 512, "seen": 3000}
    for name, change in tensors.items():
        arrays[name] = change(arrays[name])
    arrays = {name: x for name, x in arrays.items() if x is not None}
    state = {name: value for name, value in (state | header).items() if value is not None}
    save_file(arrays, path, {"format": "lineas quantiles", "version": "1", "state": json.dumps(state)})


def put(index, value):
    def change(x):
        x[index] = value
        return x

    return change


@pytest.mark.parametrize(
    ("tensors", "header", "text"),
    [
        ({}, {"size": None}, "must have whole numbers 'size' and 'seen'"),
        ({}, {"seen": "3000"}, "must have whole numbers 'size' and 'seen'"),
        ({}, {"seen": True}, "must have whole numbers 'size' and 'seen'"),
        ({}, {"size": 100}, "size must be at least 512, got 100"),
        ({}, {"size": 1 << 40}, "size must be at most 16777216"),
        ({}, {"size": 1024}, "the state '' must have a size of whole runs and .* rows of keys, got shape"),
        ({}, {"size": 513}, "the state '' must have a size of whole runs and .* rows of keys, got shape"),
        ({}, {"seen": 0}, "the state '' has no schedule, or has seen no rows"),
        ({}, {"seen": 3001}, "the state '' is none"),
        ({}, {"seen": 1 << 70}, "the state '' is none"),
        ({"keys": lambda x: None}, {}, "it lacks the tensor 'keys'"),
        ({"keys": lambda x: x[0]}, {}, "rows of keys, got shape"),
        ({"keys": lambda x: x[:, :-1]}, {}, "rows of keys, got shape"),
        ({"keys": lambda x: np.ascontiguousarray(x[:, :, :8])}, {}, "the state '' is none: keys must have shape"),
        ({"keys": lambda x: x.astype(np.float32)}, {}, "the state '' is none: keys must"),
        ({"mean": lambda x: x[:4]}, {}, "the state '' is none"),
        ({"mean": lambda x: x[None]}, {}, "the state '' is none"),
        ({"mean": put(1, np.nan)}, {}, "the state '' holds a value that is not finite"),
        ({"schedule": lambda x: x[:-1]}, {}, "the state '' has no schedule"),
        ({"schedule": lambda x: x.astype(np.int32)}, {}, "the state '' has no schedule"),
        ({"schedule": put(0, -1)}, {}, "the state '' is none"),
        ({"schedule": put(0, 3)}, {}, "the state '' is none"),
        ({"schedule": put(64, 900)}, {}, "the state '' has an open slot that cannot be"),
        ({"schedule": put(65, 32)}, {}, "the state '' has an open slot that cannot be"),
        ({"schedule": put(66, -1)}, {}, "the state '' is none"),
        ({"schedule": put(66, 0)}, {}, "left values out and promises that it did not"),
        ({"keys": put((0, 0, 0), 1 << 30)}, {}, "the state '' holds values that are not in order"),
        ({"keys": put((0, -1, 0), 0x7F800000)}, {}, "the state '' holds a value that is not finite"),
        ({"extra": lambda x: x}, {}, None),
    ],
)
def test_hostile_files_are_refused(rng, tmp_path, tensors, header, text):
    path = tmp_path / "a.safetensors"
    if text is None:
        seen(rng).save(path)
        arrays = load_file(path) | {"extra": np.ones(1)}
        state = json.dumps({"size": 512, "seen": 3000})
        save_file(arrays, path, {"format": "lineas quantiles", "version": "1", "state": state})
        text = "it has the unexpected tensor 'extra'"
    else:
        changed(rng, path, tensors, header)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{text}"):
        lineas.load(path)


def test_a_file_without_a_change_is_read(rng, tmp_path):
    changed(rng, tmp_path / "a.safetensors", {}, {})
    assert lineas.load(tmp_path / "a.safetensors").count == 3000


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"modules": ["a", "a"]}, "the modules in the header must be different names"),
        ({"modules": [1, 2]}, "the modules in the header must be different names"),
        ({"modules": ["a"]}, "the header must have a state for each of 1 modules, got 2"),
        ({"modules": ["a", "c"]}, r"it lacks the tensor 'c\.mean'"),
        ({"states": [1, 2]}, r"the state 'a\.' in the header must have whole numbers"),
        ({"metadata": {"tokens": "lsat"}}, "metadata name the tokens 'lsat'"),
    ],
)
def test_headers_of_several_modules_that_do_not_hold_together(rng, tmp_path, entries, text):
    path, found = tmp_path / "a.safetensors", of_modules(rng, a=30, b=30)
    found.save(path)
    header = {"modules": ["a", "b"], "states": [{"size": 512, "seen": 30}] * 2, "metadata": FACTS} | entries
    spelled = {name: json.dumps(value) for name, value in header.items()}
    save_file(load_file(path), path, {"format": found.FORMAT, "version": "1"} | spelled)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {text}"):
        lineas.load(path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    found = lineas.ActivationQuantiles({"layer": lineas.quantiles(np.ones((3, 2)))}, {})
    for one in (found, found["layer"]):
        with pytest.raises(ValueError, match=r"path: the folder of .*x.safetensors does not exist"):
            one.save(tmp_path / "none" / "x.safetensors")
