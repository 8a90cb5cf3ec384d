import copy
import pickle

import numpy as np
import pytest

from lineas import AffineMap, SteeringMaps, __version__
from lineas.maps.metadata import describe


@pytest.fixture
def pair():
    return SteeringMaps(
        {
            "layers.0": AffineMap(np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.0, 0.0])),
            "layers.1": AffineMap(np.array([1.0, 1.0], np.float32), np.array([0.0, 3.0], np.float32)),
        },
        {"method": "linear", "settings": {"l1": 0.5}},
    )


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
    with pytest.raises(TypeError, match=r"activations\['layers.1'\]: z must be .* got dtype bool"):
        pair.transform({"layers.1": np.ones((1, 2), bool)})
    with pytest.raises(TypeError, match=r"activations must be a mapping from module name to array, got ndarray"):
        pair.transform(np.ones((1, 3)))


def test_inverse_of_several(pair, rng):
    z = {"layers.0": rng.normal(size=(5, 3)), "layers.1": rng.normal(size=(5, 2))}
    back = pair.inverse().transform(pair.transform(z))
    for name in z:
        np.testing.assert_allclose(back[name], z[name], rtol=1e-6)
    assert pair.inverse().metadata["version"] == __version__
    assert pair.inverse().metadata == describe("inverse", parts=[pair.metadata])
    flat = SteeringMaps({"a": AffineMap(np.zeros(2), np.zeros(2))})
    with pytest.raises(ValueError, match=r"module 'a': the map has no inverse: weight is 0 at neuron 0 and 1 other"):
        flat.inverse()


def test_scaled(pair, rng):
    z = {"layers.0": rng.normal(size=(5, 3))}
    np.testing.assert_allclose(
        pair.scaled(0.5).transform(z)["layers.0"], pair.transform(z, 0.5)["layers.0"], rtol=1e-14
    )
    assert pair.scaled(0.5).metadata == describe("scaled", strength=0.5, parts=[pair.metadata])


def test_composition_of_several(pair):
    other = SteeringMaps({"layers.1": AffineMap.identity(2).scaled(0), "layers.2": AffineMap.identity(4)}, {"x": 1})
    both = other @ pair
    assert list(both) == ["layers.0", "layers.1", "layers.2"]
    assert both["layers.0"] == pair["layers.0"] and both["layers.1"] == pair["layers.1"]
    assert both["layers.2"] == AffineMap.identity(4)
    assert both.metadata == describe("composition", parts=[pair.metadata, {"x": 1}])
    with pytest.raises(ValueError, match=r"module 'layers.0': cannot compose maps of 2 and 3 neurons"):
        SteeringMaps({"layers.0": AffineMap.identity(2)}) @ pair
    with pytest.raises(TypeError, match=r"unsupported operand"):
        pair @ pair["layers.0"]


def test_composition_applies_the_right_side_first():
    double, shift = AffineMap(np.array([2.0]), np.array([0.0])), AffineMap(np.array([1.0]), np.array([1.0]))
    both = SteeringMaps({"a": double}) @ SteeringMaps({"a": shift})
    assert both.transform({"a": np.array([[1.0]])})["a"].item() == 4


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        ("a b", "a b", "a b"),
        ("a c", "a b c", "a b c"),  # between two that both have
        ("b d", "a b c d e", "a b c d e"),
        ("l.2 l.10", "l.0 l.3 l.11", "l.0 l.2 l.3 l.10 l.11"),  # numbers, not text
        ("l.2.n l.10.n", "l.10.m l.2.m", "l.2.n l.10.n l.10.m l.2.m"),  # not in order themselves
        ("l.0.a l.1.a l.2.a", "l.0.b l.1.b l.2.b", "l.0.a l.0.b l.1.a l.1.b l.2.a l.2.b"),
        ("l.0 norm", "l.1", "l.0 l.1 norm"),
        ("embed l.5", "l.2 l.7", "embed l.2 l.5 l.7"),
        ("l.0 l.1", "norm", "l.0 l.1 norm"),
        ("b a", "c", "b a c"),  # nothing tells: the order of the first
        ("enc.0 enc.5", "dec.2", "enc.0 enc.5 dec.2"),
        ("enc.0 x enc.5", "enc.2 x enc.1", "enc.0 enc.2 x enc.1 enc.5"),  # names of both come before numbers
        ("a b", "b x a y", "a y b x"),  # they contradict each other
        ("m.1.l.1 m.2.l.0", "m.1.l.02 m.10.l.0", "m.1.l.1 m.1.l.02 m.2.l.0 m.10.l.0"),
        ("l." + "1" * 9999, "l." + "1" * 9998, "l." + "1" * 9998 + " l." + "1" * 9999),
    ],
)
def test_combined_maps_are_in_execution_order(first, second, merged):
    one, two = (SteeringMaps({name: AffineMap.identity(1) for name in names.split()}) for names in (first, second))
    assert list(two @ one) == list(one + two) == list(one - two) == merged.split()


def test_a_sum_of_several(pair):
    other = SteeringMaps({"layers.1": AffineMap(np.array([2.0, 1.0]), np.ones(2)), "layers.2": AffineMap.identity(4)})
    other *= 0.5
    both = pair + other
    assert list(both) == ["layers.0", "layers.1", "layers.2"] and both == other + pair
    assert both["layers.0"] == pair["layers.0"] and both["layers.2"] == other["layers.2"]
    assert both["layers.1"] == pair["layers.1"] + other["layers.1"]
    assert both.metadata == describe("sum", parts=[pair.metadata, other.metadata])
    assert (pair - pair).support == 0
    less = pair - other
    assert less["layers.1"] == pair["layers.1"] - other["layers.1"] and less["layers.0"] == pair["layers.0"]
    assert (other - pair)["layers.0"] == -pair["layers.0"]
    assert less.metadata["parts"] == [pair.metadata, (-other).metadata]
    with pytest.raises(ValueError, match=r"module 'layers.0': cannot add maps of 3 and 2 neurons"):
        pair + SteeringMaps({"layers.0": AffineMap.identity(2)})


def test_numbers_scale_several(pair):
    assert 0.5 * pair == pair * 0.5 == np.float32(0.5) * pair == pair.scaled(0.5) and -pair == pair.scaled(-1)
    assert (0.5 * pair).metadata == (pair / 2).metadata == pair.scaled(0.5).metadata and pair / 2 == 0.5 * pair
    assert pair / np.float32(4) == pair.scaled(0.25)
    for use in (lambda: pair / pair, lambda: 2 / pair, lambda: 1 + pair, lambda: pair / "a", lambda: pair + 0):
        with pytest.raises(TypeError, match="unsupported operand"):
            use()
    with pytest.raises(ZeroDivisionError):
        pair / 0
    for use in (lambda: pair * pair, lambda: pair + 1, lambda: pair - "a", lambda: pair * None, lambda: True * pair):
        with pytest.raises(TypeError, match="unsupported operand"):
            use()
    with pytest.raises(TypeError, match=r"unsupported operand|does not support ufuncs"):
        np.ones(3) * pair


def test_sum_is_a_sum_of_several(pair):
    other = pair.rename({"layers.0": "layers.2"})
    assert sum([pair, other]) == pair + other and sum([pair, other]).metadata == (pair + other).metadata
    assert sum([pair]) is pair and sum([pair, other, pair / 2]) == (pair + other) + pair / 2


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
    assert SteeringMaps({"a": AffineMap.identity(1)}).metadata == {}
