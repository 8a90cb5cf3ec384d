"""GGUF control vectors: what is in the files, and what they cannot hold."""

import warnings

import gguf
import gguf_files
import numpy as np
import pytest

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.export import gguf as export
from lineas.export.gguf import control_vector, read_control_vector

WIDTH = 6


def shifts(*names, seed=0):
    rng = np.random.default_rng(seed)
    return SteeringMaps({name: AffineMap(np.ones(WIDTH), rng.normal(size=WIDTH)) for name in names})


def test_the_file_is_what_llama_cpp_and_repeng_write(tmp_path):
    maps = shifts("model.layers.3", "model.layers.12")
    path = control_vector(maps, tmp_path / "vector.gguf", 0.5, model_hint="llama")
    assert path == tmp_path / "vector.gguf" and list(tmp_path.iterdir()) == [path]
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert [(t.name, t.tensor_type.name, list(t.shape)) for t in reader.tensors] == [
        ("direction.3", "F32", [WIDTH]),
        ("direction.12", "F32", [WIDTH]),
    ]
    assert np.array_equal(reader.tensors[1].data, (0.5 * maps["model.layers.12"].bias).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("model.layers.7", "model.layers.{}"),
        ("layers.7", "layers.{}"),
        ("model.decoder.layers.7", "model.decoder.layers.{}"),
        ("transformer.h.7", "transformer.h.{}"),
        ("gpt_neox.layers.7", "gpt_neox.layers.{}"),
        ("model.language_model.layers.7", "model.language_model.layers.{}"),
        ("model.layers.7.post_feedforward_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    ],
)
def test_a_vector_comes_back(name, layers, tmp_path):
    maps = shifts(name)
    found = read_control_vector(control_vector(maps, tmp_path / "vector.gguf"), layers)
    assert list(found) == [name] and found[name].dtype == np.float32
    assert np.array_equal(found[name].bias, maps[name].bias.astype(np.float32))
    assert (found[name].weight == 1).all()


@pytest.mark.parametrize(
    "name",
    ["model.layers.7.mlp", "vision_tower.encoder.layers.7", "model.encoder.layers.7", "model.layers.7.input_layernorm"],
)
def test_other_modules_are_no_outputs_of_blocks(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: all of it .shifts.: it is no output of a block"):
        control_vector(shifts(name), tmp_path / "vector.gguf")
    assert list(tmp_path.iterdir()) == []


def test_shifts_at_the_same_place_are_added(tmp_path):
    maps = shifts("model.layers.7", "model.layers.7.post_feedforward_layernorm")
    found = read_control_vector(control_vector(maps, tmp_path / "vector.gguf"))
    expected = sum(one.bias for one in maps.values())
    np.testing.assert_allclose(found["model.layers.7"].bias, expected, rtol=1e-6)


def test_the_hint_is_the_model_of_the_metadata(tmp_path):
    maps = SteeringMaps(dict(shifts("model.layers.3")), {"model": "user/name"})
    reader = gguf.GGUFReader(control_vector(maps, tmp_path / "vector.gguf"))
    assert reader.fields["controlvector.model_hint"].contents() == "user/name"


def test_identities_and_zero_shifts_are_no_directions(tmp_path):
    maps = shifts("model.layers.3") + SteeringMaps({"model.layers.4": AffineMap.identity(WIDTH)})
    assert list(read_control_vector(control_vector(maps, tmp_path / "vector.gguf"))) == ["model.layers.3"]


# ---- what does not fit -----------------------------------------------------------------------------------------------

MIXED = SteeringMaps(
    {
        "model.layers.0": AffineMap(np.ones(WIDTH), np.full(WIDTH, 3.0)),
        "model.layers.1": AffineMap(np.ones(WIDTH), np.full(WIDTH, 4.0)),
        "model.layers.2": AffineMap(np.array([1, 1, 1, 1.0, 1.0, 1.6]), np.full(WIDTH, 0.0)),
        "model.layers.2.input_layernorm": AffineMap(np.ones(WIDTH), np.full(WIDTH, 12.0)),
    }
)


def test_what_does_not_fit_is_refused_with_what_would_be_lost(tmp_path):
    with pytest.raises(ValueError) as error:
        control_vector(MIXED, tmp_path / "vector.gguf")
    assert list(tmp_path.iterdir()) == []
    lines = str(error.value).splitlines()
    # Of the lengths 3, 4 and 12, times the root of 6, those of 3 and 12 would go.
    assert lines == [
        "3 of 4 maps do not fit into a control vector, and nothing was written; drop=True leaves out what does not "
        f"(root mean squares over neurons, with {np.sqrt(153 / 169):.1%} of the length of all shifts):",
        "  model.layers.0: all of it (shifts): llama.cpp has no vector for block 0",
        f"  model.layers.2: its slopes, which change an activation by {0.6 / np.sqrt(6):.3g} of itself",
        "  model.layers.2.input_layernorm: all of it (shifts): it is no output of a block",
    ]


def test_what_does_not_fit_is_dropped_where_that_is_asked_for(tmp_path):
    with pytest.warns(UserWarning, match="lacks what it cannot hold of 3 of 4 maps .*95.1% of the length") as caught:
        path = control_vector(MIXED, tmp_path / "vector.gguf", drop=True)
    assert caught[0].filename == __file__
    found = read_control_vector(path)
    assert list(found) == ["model.layers.1"] and (found["model.layers.1"].bias == 4).all()


def test_a_strength_scales_what_is_lost_as_well(tmp_path):
    maps = SteeringMaps({"model.layers.2": AffineMap(np.full(WIDTH, 1.5), np.ones(WIDTH))})
    with pytest.warns(UserWarning, match="its slopes, which change an activation by 0.1 of itself"):
        path = control_vector(maps, tmp_path / "vector.gguf", 0.2, drop=True)
    np.testing.assert_allclose(read_control_vector(path)["model.layers.2"].bias, 0.2)


def test_a_file_without_directions_is_not_written(tmp_path):
    slopes = SteeringMaps({"model.layers.2": AffineMap(np.full(WIDTH, 2.0), np.zeros(WIDTH))})
    for maps, settings in ((shifts("model.layers.3"), {"strength": 0}), (slopes, {"drop": True})):
        with (
            pytest.raises(ValueError, match="would change nothing: there is nothing to write"),
            warnings.catch_warnings(action="ignore"),
        ):
            control_vector(maps, tmp_path / "vector.gguf", **settings)
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_are_errors(tmp_path):
    path, maps = tmp_path / "vector.gguf", shifts("model.layers.3")
    with pytest.raises(TypeError, match="maps must be SteeringMaps, got dict"):
        control_vector(dict(maps), path)
    with pytest.raises(TypeError, match="drop must be True or False, got 1"):
        control_vector(maps, path, drop=1)
    with pytest.raises(TypeError, match="model_hint must be a str, got int"):
        control_vector(maps, path, model_hint=3)
    with pytest.raises(ValueError, match="strength must be finite, got inf"):
        control_vector(maps, path, float("inf"))
    gated = maps.gated({"model.layers.3": lineas.Gate(np.ones(WIDTH), 0.0)})
    with pytest.raises(ValueError, match="a control vector: these maps have gates"):
        control_vector(gated, path)
    with pytest.raises(ValueError, match="tokens='last', and a control vector acts on all tokens alike"):
        control_vector(SteeringMaps(dict(maps), {"tokens": "last"}), path)
    wide = maps + SteeringMaps({"model.layers.4": AffineMap(np.ones(7), np.ones(7))})
    with pytest.raises(ValueError, match=r"has one width: maps before have 6 neurons, 'model\.layers\.4'"):
        control_vector(wide, path)
    large = SteeringMaps({"model.layers.4": AffineMap(np.ones(WIDTH), np.full(WIDTH, 1e300))})
    with pytest.raises(ValueError, match="the shift after block 4 would not be finite in float32"):
        control_vector(large, path)
    with pytest.raises(ValueError, match="output must be a file"):
        control_vector(maps, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- reading ---------------------------------------------------------------------------------------------------------


def written(path, tensors, architecture="controlvector"):
    writer = gguf.GGUFWriter(path, architecture)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    gguf_files.finish(writer)
    return path


def test_files_that_are_no_control_vectors_are_errors(tmp_path):
    ones = np.ones(WIDTH, np.float32)
    with pytest.raises(ValueError, match=r"holds no control vector: its general\.architecture is 'llama'"):
        read_control_vector(written(tmp_path / "a.gguf", {"x": ones}, "llama"))
    for name, x in (
        ("direction.0", ones),
        ("direction.x", ones),
        ("other.1", ones),
        ("direction.1", ones.astype(np.float16)),
        ("direction.1", np.ones((2, WIDTH), np.float32)),
    ):
        with pytest.raises(ValueError, match=f"'{name}' is no direction of a block from 1 on, float32"):
            read_control_vector(written(tmp_path / "b.gguf", {name: x}))
    empty = written(tmp_path / "c.gguf", {"direction.1": ones}).read_bytes()
    (tmp_path / "d.gguf").write_bytes(empty[:-9])
    with pytest.raises(ValueError, match="is not a sound GGUF file"):
        read_control_vector(tmp_path / "d.gguf")
    with pytest.raises(ValueError, match=r"layers must have one \{\} for the number of the block, got 'model'"):
        read_control_vector(tmp_path / "c.gguf", "model")
    with pytest.raises(TypeError, match="layers must be a str, got int"):
        read_control_vector(tmp_path / "c.gguf", 3)


def test_a_file_without_a_direction_is_an_error(tmp_path):
    from lineas.export.gguf.container import GGUFFile

    path = written(tmp_path / "a.gguf", {"direction.1": np.ones(WIDTH, np.float32)})
    with GGUFFile(path) as file:
        header = 24 + len(file.entries)
    data = bytearray(path.read_bytes()[:header])
    data[8:16] = bytes(8)  # no tensors
    path.write_bytes(data)
    with pytest.raises(ValueError, match="has no directions"):
        read_control_vector(path)


def test_everything_public_is_described():
    for name in export.__all__:
        assert len(getattr(export, name).__doc__) > 80, name
