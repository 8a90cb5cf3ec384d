"""Maps of steering vectors: what they add, and to which modules."""

import re

import numpy as np
import pytest

import lineas
from lineas import SteeringMaps

V = np.array([3.0, 4.0])


def test_a_vector_is_added(rng):
    maps = SteeringMaps.from_vector(V, ["b.6", "a"], scale=2.0)
    assert list(maps) == ["b.6", "a"]
    z = rng.normal(size=(5, 2))
    for z_steered in maps.transform({"a": z, "b.6": z}).values():
        np.testing.assert_array_equal(z_steered, z + 2 * V)
    assert all((one.weight == 1).all() for one in maps.values())
    facts = {"layers": ["b.6", "a"], "scale": 2.0, "normalize": False}
    assert maps.metadata == {"method": "vector", "version": lineas.__version__, **facts}


def test_a_direction_has_the_length_of_the_scale():
    maps = SteeringMaps.from_vector(V, "a", scale=-10, normalize=True)
    np.testing.assert_allclose(maps["a"].bias, [-6, -8], rtol=1e-15)


def test_a_vector_for_each_module():
    vectors = {"a": V, "b": -V, "c": [1, 0, 0]}
    maps = SteeringMaps.from_vector(vectors)
    assert list(maps) == ["a", "b", "c"] and [one.bias.tolist() for one in maps.values()] == [
        [3, 4],
        [-3, -4],
        [1, 0, 0],
    ]
    assert list(SteeringMaps.from_vector(vectors, ["c", "a"])) == ["c", "a"]
    assert SteeringMaps.from_vector(vectors, ["b"]) == SteeringMaps.from_vector({"b": -V})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int64", "bfloat16"])
def test_types(dtype):
    expected = np.float64 if dtype in ("float64", "int64") else np.float32
    arrays = []
    if dtype == "bfloat16":
        arrays.append(V.astype(pytest.importorskip("ml_dtypes").bfloat16))
    else:
        arrays.append(V.astype(dtype))
    torch = pytest.importorskip("torch")
    arrays.append(torch.tensor(V, requires_grad=True).to(getattr(torch, dtype)))
    for x in arrays:
        (one,) = SteeringMaps.from_vector(x, "a").values()
        assert one.dtype == expected and one.bias.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("vector", "options", "error", "text"),
    [
        (V, {}, TypeError, "layers must be given where vector is one array"),
        (V, {"layers": []}, ValueError, "layers: there are none"),
        (V, {"layers": ["a", "b", "a"]}, ValueError, "layers: module 'a' is given twice"),
        ({"a": V}, {"layers": ["a", "a"]}, ValueError, "layers: module 'a' is given twice"),
        (V, {"layers": "a.*"}, ValueError, "layers: 'a.*' can only be looked up with model="),
        (V, {"layers": [5]}, ValueError, "layers: 5 can only be looked up with model="),
        (V, {"layers": re.compile("a")}, ValueError, "layers: re.compile('a') can only be looked up with model="),
        ({5: V}, {"layers": "a"}, ValueError, "vector: 5 can only be looked up with model="),
        (V, {"layers": 5.0}, TypeError, "layers: a layer that is no name must be an int, got float"),
        (V, {"layers": [True]}, TypeError, "layers: a layer that is no name must be an int, got bool"),
        ({"a": V}, {"layers": ["a", "b.1"]}, ValueError, "vector: there is none for module 'b.1'; this has a"),
        (V[None], {"layers": "a"}, ValueError, "vector must have shape [d] with d >= 1, got shape (1, 2)"),
        ({"a": [1.0, np.nan]}, {}, ValueError, "vector['a'] must be finite, got nan at neuron 1"),
        ({"a": [True]}, {}, TypeError, "vector['a'] must be float16, bfloat16, float32, float64 or an integer type"),
        ([0.0, 0.0], {"layers": "a", "normalize": True}, ValueError, "vector: zeros have no direction to normalize"),
        (V, {"layers": "a", "scale": np.inf}, ValueError, "scale must be finite, got inf"),
        (V, {"layers": "a", "scale": "1"}, TypeError, "scale must be a real number, got str"),
        (V, {"layers": "a", "normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        (V.astype("f4"), {"layers": "a", "scale": 1e39}, ValueError, "bias must be finite, got inf at neuron 0"),
    ],
)
def test_bad_vectors(vector, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        SteeringMaps.from_vector(vector, **options)


# ---- with a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("transformers")
    import models_zoo

    return models_zoo.llama()


BLOCKS = ["model.layers.0", "model.layers.1", "model.layers.2"]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (1, BLOCKS[1:2]),
        ([-1, 0], [BLOCKS[0], BLOCKS[2]]),
        (range(3), BLOCKS),
        (np.arange(1, 3), BLOCKS[1:]),
        ("model.layers.*", BLOCKS),
        (["model.norm", 2, re.compile(r".*\.0\.mlp")], ["model.layers.0.mlp", BLOCKS[2], "model.norm"]),
        (["model.layers.*", "**.[02]", BLOCKS[1]], BLOCKS),
    ],
)
def test_layers_of_a_model(llama, layers, names):
    maps = SteeringMaps.from_vector(np.ones(16), layers, model=llama)
    assert list(maps) == names and "model" in maps.metadata
    assert maps.metadata["layers"] is not None


def test_vectors_by_layer_of_a_model(llama):
    vectors = {2: np.full(16, 2.0), 0: np.zeros(16), "model.norm": np.ones(16)}
    maps = SteeringMaps.from_vector(vectors, model=llama)
    assert list(maps) == [BLOCKS[0], BLOCKS[2], "model.norm"]
    assert [one.bias[0] for one in maps.values()] == [0, 2, 1]
    for vector, layers, text in (
        (vectors, [0, 1], "vector: there is none for module 'model.layers.1'; similar names: model.layers.2"),
        ({0: np.ones(16), BLOCKS[0]: np.ones(16)}, None, "vector: module 'model.layers.0' is given twice"),
        ({0: np.ones(16), "model.layers.*": V}, None, "vector: there are two for module 'model.layers.0'"),
        (np.ones(16), 3, "layers: there is no layer 3, only 0 to 2"),
        ({-4: np.ones(16)}, None, "there is no layer -4, only 0 to 2"),
        (np.ones(16), "model.layer.0", "layers: no module matches 'model.layer.0'; similar names: model.layers.*"),
        (np.ones(16), [], "layers is empty"),
        (np.ones(16), [0, 2, BLOCKS[0]], "layers: module 'model.layers.0' is given twice"),
        (np.ones(16), [1, -2], "layers: module 'model.layers.1' is given twice"),
        (np.ones(16), ["model.norm", "module.model.norm"], "layers: module 'model.norm' is given twice"),
        (np.ones(8), ["model.norm"], "vector: module 'model.norm' has 16 neurons, got 8"),
        (np.ones(8), BLOCKS[1], "vector: module 'model.layers.1' has 16 neurons, got 8"),
        (np.ones(8), [0, "model.norm"], "vector: module 'model.layers.0' has 16 neurons, got 8"),
        (
            {0: np.ones(16), "**.q_proj": np.ones(9)},
            None,
            "vector: module 'model.layers.0.self_attn.q_proj' has 16 neu",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            SteeringMaps.from_vector(vector, layers, model=llama)


def test_attaching_adds_the_vector(llama):
    torch = pytest.importorskip("torch")
    vector = torch.linspace(-1, 1, 16)
    maps = SteeringMaps.from_vector(vector, 1, model=llama, scale=3.0)
    ids, seen = torch.tensor([[5, 6, 7]]), []

    def keep(module, arguments, keywords):
        seen.append(arguments[0] if arguments else keywords["hidden_states"])

    handle = llama.get_submodule(BLOCKS[2]).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        llama(ids)
        with maps.attach(llama):
            llama(ids)
    handle.remove()
    torch.testing.assert_close(seen[1] - seen[0], (3 * vector).expand(1, 3, 16), rtol=0, atol=1e-5)
