import copy
import pickle

import numpy as np
import pytest

import lineas
from lineas import AffineMap, SteeringMaps


@pytest.fixture
def pair():
    return SteeringMaps(
        {
            "layers.0": AffineMap(np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.0, 0.0])),
            "layers.1": AffineMap(np.array([1.0, 1.0], np.float32), np.array([0.0, 3.0], np.float32)),
        },
        {"method": "linear", "settings": {"l1": 0.5}},
    )


# --- AffineMap ---


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, -0.5, 2.0])
def test_transform_is_the_formula(rng, dtype, strength):
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = rng.normal(size=(3, 4, 5)).astype(dtype)
    work = np.float64 if dtype == np.float64 else np.float32
    expected = z + strength * (one.weight * z + one.bias - z)
    out = one.transform(z, strength)
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=4 * np.finfo(dtype).eps, atol=16 * np.finfo(dtype).eps)
    # The same to the last bit as in the working type, rounded once.
    assert np.array_equal(out, one.transform(z.astype(work), strength).astype(dtype))


def test_transform_takes_any_layout(rng):
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = rng.normal(size=(5, 6, 4))
    for view in (z.T, z[:, ::2].transpose(1, 2, 0), np.asfortranarray(z.T), z.T.astype(">f8")):
        np.testing.assert_allclose(one.transform(view), one.weight * view + one.bias, rtol=1e-15)
    frozen = z.T.copy()
    frozen.flags.writeable = False
    assert np.array_equal(one.transform(frozen), one.transform(z.T))
    assert one.transform(np.arange(5.0)).shape == (5,)
    assert one.transform(np.empty((0, 5))).shape == (0, 5)
    assert one.transform([[0.0] * 5]).tolist() == [one.bias.tolist()]


def test_transform_along_an_axis(rng):
    one = AffineMap(*rng.normal(size=(2, 3)))
    z = rng.normal(size=(2, 3, 4, 5))
    expected = one.weight[:, None, None] * z + one.bias[:, None, None]
    np.testing.assert_allclose(one.transform(z, axis=1), expected, rtol=1e-15)
    np.testing.assert_allclose(one.transform(z, axis=-3), expected, rtol=1e-15)


def test_transform_does_not_touch_its_input(rng):
    z = rng.normal(size=(4, 3))
    before = z.copy()
    out = AffineMap.identity(3).transform(z)
    assert out is not z and not np.shares_memory(out, z)
    AffineMap(np.zeros(3), np.ones(3)).transform(z)
    assert np.array_equal(z, before)


def test_transform_of_ml_dtypes_bfloat16(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    one = AffineMap(*rng.normal(size=(2, 5)).astype(np.float32))
    z = rng.normal(size=(7, 5)).astype(ml_dtypes.bfloat16)
    out = one.transform(z, 0.5)
    assert out.dtype == ml_dtypes.bfloat16
    assert np.array_equal(out, one.transform(z.astype(np.float32), 0.5).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_transform_of_torch_tensors(rng, name):
    torch = pytest.importorskip("torch")
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = torch.tensor(rng.normal(size=(2, 5, 3)), dtype=getattr(torch, name))
    out = one.transform(z, 0.5, axis=1)
    assert out.dtype == z.dtype and out.shape == z.shape
    work = z.double() if name == "float64" else z.float()
    expected = torch.from_numpy(one.transform(work.numpy(), 0.5, axis=1)).to(z.dtype)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_transform_of_torch_tensors_is_differentiable(rng):
    torch = pytest.importorskip("torch")
    one = AffineMap(*rng.normal(size=(2, 5)))
    z = torch.tensor(rng.normal(size=(4, 5)), requires_grad=True)
    one.transform(z, 0.5).sum().backward()
    np.testing.assert_allclose(z.grad.numpy(), np.broadcast_to(0.5 + 0.5 * one.weight, (4, 5)), rtol=1e-14)


def test_strength_one_is_the_map_however_small_the_weight():
    one = AffineMap(np.array([1e-30, 0.0, 1.0], np.float32), np.array([0.0, 1e-30, 0.0], np.float32))
    assert one.scaled(1) == one
    out = one.transform(np.ones((1, 3), np.float32))
    assert out.tolist() == [[one.weight[0], one.bias[1], 1.0]]


def test_strength_zero_changes_no_bit(rng):
    one = AffineMap(*rng.normal(size=(2, 64)).astype(np.float32))
    z = np.concatenate([rng.normal(size=(20, 64)), [[np.finfo(np.float32).max] * 64, [1e-45] * 64]]).astype(np.float32)
    assert one.transform(z, 0.0).tobytes() == z.tobytes()
    assert one.scaled(0.0) == AffineMap.identity(64)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 3.0])
def test_scaled_is_transform_at_a_strength(rng, strength):
    one, z = AffineMap(*rng.normal(size=(2, 8))), rng.normal(size=(10, 8))
    np.testing.assert_allclose(one.scaled(strength).transform(z), one.transform(z, strength), rtol=1e-13)


def test_inverse_undoes(rng):
    one, z = AffineMap(*rng.normal(size=(2, 8))), rng.normal(size=(10, 8))
    np.testing.assert_allclose(one.inverse().transform(one.transform(z)), z, rtol=1e-10)
    assert one.inverse().dtype == np.float64


def test_inverse_of_zero_weight():
    one = AffineMap(np.array([1.0, 0.0, 2.0, 0.0]), np.zeros(4))
    with pytest.raises(ValueError, match=r"the map has no inverse: weight is 0 at neuron 1 and 1 other$"):
        one.inverse()


def test_inverse_that_overflows():
    one = AffineMap(np.array([1.0, 1e-45], np.float32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"the inverse is too large for float32 at neuron 1$"):
        one.inverse()


def test_composition_is_applying_twice(rng):
    first, second = (AffineMap(*rng.normal(size=(2, 8))) for _ in range(2))
    z = rng.normal(size=(10, 8))
    np.testing.assert_allclose((second @ first).transform(z), second.transform(first.transform(z)), rtol=1e-12)
    assert (second @ AffineMap.identity(8)) == second == (AffineMap.identity(8) @ second)


def test_composition_promotes():
    wide, narrow = AffineMap.identity(2, np.float64), AffineMap.identity(2)
    assert (wide @ narrow).dtype == np.float64 and (narrow @ narrow).dtype == np.float32


def test_composition_of_other_widths():
    with pytest.raises(ValueError, match=r"cannot compose maps of 2 and 3 neurons"):
        AffineMap.identity(2) @ AffineMap.identity(3)
    with pytest.raises(TypeError, match=r"'AffineMap' does not support ufuncs"):
        AffineMap.identity(2) @ np.eye(2)


def test_properties():
    one = AffineMap(np.array([1.0, 2.0, 1.0, 1.0]), np.array([0.0, 0.0, -1.0, -0.0]))
    assert (one.d, len(one), one.support, one.dtype) == (4, 4, 2, np.float64)
    assert repr(one) == "AffineMap(d=4, support=2, dtype=float64)"
    assert AffineMap.identity(3).support == 0 and AffineMap.identity(3).dtype == np.float32


def test_equality():
    one = AffineMap(np.array([2.0]), np.array([1.0]))
    assert one == AffineMap(np.array([2.0], np.float32), np.array([1.0], np.float32))
    assert one != AffineMap(np.array([2.0]), np.array([0.0]))
    assert one != AffineMap(np.array([2.0, 1.0]), np.array([1.0, 0.0]))
    assert one != "map"
    with pytest.raises(TypeError, match=r"unhashable"):
        hash(one)


def test_a_map_is_immutable():
    weight = np.ones(3)
    one = AffineMap(weight, np.zeros(3))
    weight[0] = 7
    assert one.weight[0] == 1
    with pytest.raises(ValueError, match=r"read-only"):
        one.weight[0] = 7
    with pytest.raises(AttributeError, match=r"an AffineMap is immutable: cannot set 'weight'"):
        one.weight = weight
    with pytest.raises(AttributeError, match=r"an AffineMap is immutable: cannot delete 'bias'"):
        del one.bias
    for twin in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert twin == one and not twin.weight.flags.writeable


def test_mixed_dtypes_become_float64():
    one = AffineMap(np.ones(2, np.float32), np.zeros(2, np.float64))
    assert one.weight.dtype == one.bias.dtype == np.float64


def test_a_map_from_tensors():
    torch = pytest.importorskip("torch")
    one = AffineMap(torch.nn.Parameter(torch.ones(3)), torch.zeros(3))
    assert one == AffineMap.identity(3)
    with pytest.raises(TypeError, match=r"weight must be float32 or float64, got dtype bfloat16"):
        AffineMap(torch.ones(3, dtype=torch.bfloat16), torch.zeros(3))


@pytest.mark.parametrize(
    ("weight", "bias", "error", "text"),
    [
        (np.ones(2), np.zeros(3), ValueError, r"weight and bias must have the same shape, got \(2,\) and \(3,\)"),
        (np.ones((1, 2)), np.zeros(2), ValueError, r"weight must have shape \[d\] with d >= 1, got shape \(1, 2\)"),
        (np.ones(2), np.float64(1), ValueError, r"bias must have shape \[d\] with d >= 1, got shape \(\)"),
        (np.ones(0), np.zeros(0), ValueError, r"weight must have shape \[d\] with d >= 1, got shape \(0,\)"),
        (np.array([1, np.nan]), np.zeros(2), ValueError, "weight must be finite, got nan at neuron 1"),
        (np.ones(2), np.array([-np.inf, 0]), ValueError, "bias must be finite, got -inf at neuron 0"),
        (np.ones(2, np.float16), np.zeros(2), TypeError, "weight must be float32 or float64, got dtype float16"),
        (np.ones(2, int), np.zeros(2), TypeError, "weight must be float16, .* got dtype int64"),
        (np.ones(2), np.zeros(2, complex), TypeError, "bias must be float16, .* got dtype complex128"),
        (np.ones(2), ["a", "b"], TypeError, "bias must be float16, .* got dtype <U1"),
        (np.ma.ones(2), np.zeros(2), TypeError, "weight must be a plain array, got a masked array"),
    ],
)
def test_bad_parameters(weight, bias, error, text):
    with pytest.raises(error, match=text):
        AffineMap(weight, bias)


@pytest.mark.parametrize(
    ("z", "axis", "error", "text"),
    [
        (np.ones((2, 4)), -1, ValueError, r"z must have 3 channels on axis -1, got shape \(2, 4\)"),
        (np.ones((3, 2)), -1, ValueError, r"z must have 3 channels on axis -1, got shape \(3, 2\)"),
        (np.ones((2, 3)), 2, ValueError, r"z must have 3 channels on axis 2, got shape \(2, 3\)"),
        (np.float64(1), -1, ValueError, r"z must have 3 channels on axis -1, got shape \(\)"),
        (np.ones((2, 3), int), -1, TypeError, "z must be float16, bfloat16, float32 or float64, got dtype int64"),
        (np.ones((2, 3), bool), -1, TypeError, "z must be .* got dtype bool"),
        (np.ones((2, 3), np.uint16), -1, TypeError, "z must be .* got dtype uint16"),
        (np.ones((2, 3), np.longdouble), -1, TypeError, "z must be .* got dtype (float128|longdouble)"),
        (None, -1, TypeError, "z must be .* got dtype object"),
    ],
)
def test_bad_activations(z, axis, error, text):
    with pytest.raises(error, match=text):
        AffineMap.identity(3).transform(z, axis=axis)


def test_bad_tensors():
    torch = pytest.importorskip("torch")
    one = AffineMap.identity(3)
    with pytest.raises(ValueError, match=r"z must have 3 channels on axis -1, got shape \(2, 4\)"):
        one.transform(torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"got torch.int64"):
        one.transform(torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("use", ["transform", "AffineMap.scaled", "SteeringMaps.scaled"])
@pytest.mark.parametrize(
    ("strength", "error", "text"),
    [
        (np.nan, ValueError, "strength must be finite, got nan"),
        (np.inf, ValueError, "strength must be finite, got inf"),
        ("1", TypeError, "strength must be a real number, got str"),
        (None, TypeError, "strength must be a real number, got NoneType"),
        (np.ones(2), TypeError, "strength must be a real number, got ndarray"),
    ],
)
def test_bad_strength(use, strength, error, text):
    one = AffineMap.identity(3)
    call = {
        "transform": lambda: one.transform(np.ones((1, 3)), strength),
        "AffineMap.scaled": lambda: one.scaled(strength),
        "SteeringMaps.scaled": lambda: SteeringMaps({"a": one}).scaled(strength),
    }[use]
    with pytest.raises(error, match=text):
        call()


# --- SteeringMaps ---


def test_a_mapping_in_the_given_order(pair):
    assert list(pair) == ["layers.0", "layers.1"] and len(pair) == 2
    assert "layers.1" in pair and "layers.2" not in pair
    assert pair["layers.0"].d == 3 and pair.get("nothing") is None
    assert dict(pair) == {"layers.0": pair["layers.0"], "layers.1": pair["layers.1"]}
    assert (pair.support, pair.d) == (3, 5)
    assert repr(pair) == "SteeringMaps(modules=2, d=5, support=3, method='linear')"
    assert repr(SteeringMaps({"a": AffineMap.identity(1)})) == "SteeringMaps(modules=1, d=1, support=0)"


def test_a_missing_module_lists_near_names(pair):
    with pytest.raises(KeyError, match=r"no map for module 'layers.2'; similar names: layers.0, layers.1"):
        pair["layers.2"]


def test_steering_maps_are_immutable(pair):
    with pytest.raises(TypeError, match=r"does not support item assignment"):
        pair["layers.0"] = AffineMap.identity(3)
    pair.metadata["settings"]["l1"] = 7
    assert pair.metadata == {"method": "linear", "settings": {"l1": 0.5}}
    twin = pickle.loads(pickle.dumps(pair))
    assert twin == pair and twin.metadata == pair.metadata
    assert copy.deepcopy(pair) == pair


def test_equality_of_steering_maps(pair):
    assert pair == SteeringMaps(dict(pair))  # metadata does not count
    assert pair != SteeringMaps(dict(reversed(list(pair.items()))))  # order does
    assert pair != dict(pair) and pair != pair.select("layers.0")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_transform_of_several(pair, rng, strength):
    z = {"layers.1": rng.normal(size=(4, 2)), "layers.0": rng.normal(size=(5, 3)).astype(np.float32)}
    out = pair.transform(z, strength)
    assert list(out) == ["layers.1", "layers.0"]
    for name in z:
        assert np.array_equal(out[name], pair[name].transform(z[name], strength))
    images = {"layers.1": rng.normal(size=(4, 2, 3))}
    assert np.array_equal(
        pair.transform(images, axis=1)["layers.1"], pair["layers.1"].transform(images["layers.1"], axis=1)
    )


def test_errors_of_transform_name_the_module(pair):
    with pytest.raises(ValueError, match=r"no map for module 'layers.7'; similar names: layers.0"):
        pair.transform({"layers.7": np.ones((1, 3))})
    with pytest.raises(
        ValueError, match=r"activations\['layers.1'\]: z must have 2 channels on axis -1, got shape \(1, 3\)"
    ):
        pair.transform({"layers.1": np.ones((1, 3))})
    with pytest.raises(TypeError, match=r"activations\['layers.1'\]: z must be .* got dtype int64"):
        pair.transform({"layers.1": np.ones((1, 2), int)})
    with pytest.raises(TypeError, match=r"activations must be a mapping from module name to array, got ndarray"):
        pair.transform(np.ones((1, 3)))


def test_inverse_of_several(pair, rng):
    z = {"layers.0": rng.normal(size=(5, 3)), "layers.1": rng.normal(size=(5, 2))}
    back = pair.inverse().transform(pair.transform(z))
    for name in z:
        np.testing.assert_allclose(back[name], z[name], rtol=1e-6)
    assert pair.inverse().metadata == {"method": "inverse", "parts": [pair.metadata]}
    flat = SteeringMaps({"a": AffineMap(np.zeros(2), np.zeros(2))})
    with pytest.raises(ValueError, match=r"module 'a': the map has no inverse: weight is 0 at neuron 0 and 1 other"):
        flat.inverse()


def test_scaled(pair, rng):
    z = {"layers.0": rng.normal(size=(5, 3))}
    np.testing.assert_allclose(
        pair.scaled(0.5).transform(z)["layers.0"], pair.transform(z, 0.5)["layers.0"], rtol=1e-14
    )
    assert pair.scaled(0.5).metadata == {"method": "scaled", "strength": 0.5, "parts": [pair.metadata]}


def test_composition_of_several(pair):
    other = SteeringMaps({"layers.1": AffineMap.identity(2).scaled(0), "layers.2": AffineMap.identity(4)}, {"x": 1})
    both = other @ pair
    assert list(both) == ["layers.0", "layers.1", "layers.2"]
    assert both["layers.0"] == pair["layers.0"] and both["layers.1"] == pair["layers.1"]
    assert both["layers.2"] == AffineMap.identity(4)
    assert both.metadata == {"method": "composition", "parts": [pair.metadata, {"x": 1}]}
    with pytest.raises(ValueError, match=r"module 'layers.0': cannot compose maps of 2 and 3 neurons"):
        SteeringMaps({"layers.0": AffineMap.identity(2)}) @ pair
    with pytest.raises(TypeError, match=r"unsupported operand"):
        pair @ pair["layers.0"]


def test_composition_applies_the_right_side_first():
    double, shift = AffineMap(np.array([2.0]), np.array([0.0])), AffineMap(np.array([1.0]), np.array([1.0]))
    both = SteeringMaps({"a": double}) @ SteeringMaps({"a": shift})
    assert both.transform({"a": np.array([[1.0]])})["a"].item() == 4


def test_rename(pair):
    wrapped = pair.rename(prefix="base_model.model.")
    assert list(wrapped) == ["base_model.model.layers.0", "base_model.model.layers.1"]
    assert wrapped.metadata == pair.metadata
    assert wrapped.rename(lambda name: name.removeprefix("base_model.model.")) == pair
    assert list(pair.rename({"layers.1": "head"})) == ["layers.0", "head"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "rename takes either change or prefix"),
        ({"change": str, "prefix": "a"}, TypeError, "rename takes either change or prefix"),
        ({"prefix": 3}, TypeError, "prefix must be a string, got int"),
        ({"change": "a"}, TypeError, "change must be a callable or a mapping, got str"),
        ({"change": {"layers.9": "x"}}, ValueError, "no map for module 'layers.9'; similar names: layers.0"),
        ({"change": {"layers.0": "layers.1"}}, ValueError, "two modules would get the name 'layers.1'"),
        ({"change": lambda name: "x"}, ValueError, "two modules would get the name 'x'"),
        ({"change": lambda name: None}, ValueError, "two modules would get the name None"),
        ({"change": {"layers.0": 5}}, TypeError, "a module name must be a string, got 5"),
    ],
)
def test_bad_rename(pair, arguments, error, text):
    with pytest.raises(error, match=text):
        pair.rename(**arguments)


def test_select(pair):
    assert list(pair.select("layers.1")) == ["layers.1"]
    assert list(pair.select(["layers.1", "**.0"])) == ["layers.0", "layers.1"]  # execution order stays
    assert pair.select("**") == pair and pair.select("**").metadata == pair.metadata
    with pytest.raises(ValueError, match=r"no module matches 'layer.0'; similar names: layers.*"):
        pair.select("layer.0")
    with pytest.raises(ValueError, match=r"no module matches 'blocks.\*'"):
        pair.select(["*.0", "blocks.*"])
    for bad in (3, [], [3], None):
        with pytest.raises(TypeError, match=r"modules must be a glob or a list of globs"):
            pair.select(bad)


def test_summary(pair):
    assert pair.summary().splitlines() == [
        "module    neurons    support  ||w-1||  ||b||",
        "layers.0        3  2 (66.7%)    1.118      1",
        "layers.1        2  1 (50.0%)        0      3",
        "total           5  3 (60.0%)",
    ]


@pytest.mark.parametrize(
    ("maps", "metadata", "error", "text"),
    [
        ([], None, TypeError, "maps must be a mapping from module name to AffineMap, got list"),
        ({}, None, ValueError, "maps must hold at least one module"),
        ({3: AffineMap.identity(1)}, None, TypeError, "maps: a module name must be a string, got 3"),
        ({"": AffineMap.identity(1)}, None, ValueError, "maps: a module name must not be empty"),
        ({"a": np.ones(3)}, None, TypeError, r"maps\['a'\] must be an AffineMap, got ndarray"),
        ({"a": AffineMap.identity(1)}, [], TypeError, "metadata must be a dict, got list"),
        (
            {"a": AffineMap.identity(1)},
            {"x": object()},
            TypeError,
            "metadata must be something JSON can hold: .*object",
        ),
        ({"a": AffineMap.identity(1)}, {"x": np.nan}, TypeError, "metadata must be something JSON can hold: "),
    ],
)
def test_bad_steering_maps(maps, metadata, error, text):
    with pytest.raises(error, match=text):
        SteeringMaps(maps, metadata)


def test_metadata_is_what_json_gives_back():
    maps = SteeringMaps({"a": AffineMap.identity(1)}, {"betas": (0.9, 0.999), "n": 3})
    assert maps.metadata == {"betas": [0.9, 0.999], "n": 3}
    assert lineas.SteeringMaps({"a": AffineMap.identity(1)}).metadata == {}
