"""Gates beside maps: what they compute on arrays, what maps do with them, and how they are kept in files."""

import copy
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

import lineas

D = 3
FLOATS = st.floats(-4, 4, width=32)


def vector(values=FLOATS):
    return hnp.arrays(np.float32, D, elements=values)


scalars = st.builds(
    lineas.Gate,
    vector(),
    FLOATS,
    context=st.sampled_from(["token", "mean"]),
    site=st.sampled_from([None, "a", "elsewhere"]),
    auroc=st.none() | st.floats(0, 1),
    accuracy=st.none() | st.floats(0, 1),
    left_alone=st.none() | st.floats(0, 1),
)
neurons = st.builds(
    lineas.NeuronGate,
    vector(),
    vector(),
    vector(),
    closed=st.none() | hnp.arrays(bool, D),
    auroc=st.none() | hnp.arrays(np.float64, D, elements=st.floats(0, 1)),
    left_alone=st.none() | st.floats(0, 1),
)
either = scalars | neurons


def affine(seed=0):
    rng = np.random.default_rng(seed)
    return lineas.AffineMap(rng.normal(1, 0.5, D).astype(np.float32), rng.normal(0, 1, D).astype(np.float32))


MAPS = lineas.SteeringMaps({"a": affine(0), "b": affine(1)}, {"method": "linear", "calibration": {"strength": 2.0}})
GATE = lineas.Gate(np.array([1.0, -1.0, 0.5], np.float32), 0.25, auroc=0.8)
NEURON = lineas.NeuronGate([1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1], closed=[False, False, True], auroc=[0.9, 0.6, 0.2])
GATED = MAPS.gated({"a": GATE, "b": NEURON})


# --- a gate alone -----------------------------------------------------------------------------------------------------


@given(either)
def test_values_are_from_0_to_1_and_keep_the_other_axes(gate):
    z = np.random.default_rng(0).normal(0, 3, (2, 5, D)).astype(np.float32)
    found = gate.values(z)
    assert found.dtype == np.float32
    assert found.shape == (2, 5, 1 if isinstance(gate, lineas.Gate) else D)
    assert ((found >= 0) & (found <= 1)).all()


def test_values_by_hand():
    z = np.random.default_rng(0).normal(size=(2, 4, D))
    logit = z @ GATE.weight + 0.25
    np.testing.assert_allclose(GATE.values(z)[..., 0], 1 / (1 + np.exp(-logit)), rtol=1e-12)
    means = lineas.Gate(GATE.weight, 0.25, context="mean")
    read = np.stack([z[:, : t + 1].mean(axis=1) for t in range(4)], axis=1)
    np.testing.assert_allclose(means.values(z)[..., 0], 1 / (1 + np.exp(-(read @ GATE.weight + 0.25))), rtol=1e-12)
    expected = 1 / (1 + np.exp(-np.stack([z[..., 0] ** 2, z[..., 1], np.zeros((2, 4))], axis=-1)))
    expected[..., 2] = 0
    np.testing.assert_allclose(NEURON.values(z), expected, rtol=1e-12)
    np.testing.assert_allclose(NEURON.values(z.swapaxes(0, 2), axis=0), expected.swapaxes(0, 2), rtol=1e-12)
    np.testing.assert_allclose(GATE.values(z.swapaxes(1, 2), axis=1)[:, 0], GATE.values(z)[..., 0], rtol=1e-12)


def test_extreme_activations_open_and_close_without_a_warning():
    z = np.array([[1e30, 0, 0], [-1e30, 0, 0]], np.float32)
    np.testing.assert_array_equal(GATE.values(z), [[1], [0]])


@given(either)
def test_copies_pickles_and_equality(gate):
    assert copy.copy(gate) is gate
    assert copy.deepcopy(gate) is gate
    other = pickle.loads(pickle.dumps(gate))
    assert other == gate
    assert repr(other) == repr(gate)
    assert gate != affine()


def test_a_gate_that_does_something_else_is_another():
    assert lineas.Gate(GATE.weight, 0.25) == GATE  # what was found is no part of what it does
    assert lineas.Gate(GATE.weight, 0.5) != GATE
    assert lineas.Gate(GATE.weight, 0.25, context="mean") != GATE
    assert GATE.at("a") != GATE
    assert lineas.NeuronGate(NEURON.quadratic, NEURON.linear, NEURON.constant) != NEURON
    assert NEURON != GATE


def test_a_gate_is_immutable_and_its_arrays_are_copies():
    weight = np.ones(D, np.float32)
    gate = lineas.Gate(weight, 0.0)
    weight[0] = 5
    assert gate.weight[0] == 1
    with pytest.raises(AttributeError, match="a Gate is immutable: cannot set 'bias'"):
        gate.bias = 1.0
    with pytest.raises(AttributeError, match="a NeuronGate is immutable: cannot delete 'linear'"):
        del NEURON.linear
    with pytest.raises(ValueError, match="read-only"):
        NEURON.closed[0] = True


W = np.ones(D)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lineas.Gate(np.ones((2, 2)), 0.0), r"weight must have shape \[d\] with d >= 1, got shape \(2, 2\)"),
        (lambda: lineas.Gate([1.0, np.nan], 0.0), "weight must be finite, got nan at neuron 1"),
        (lambda: lineas.Gate(W, np.inf), "bias must be finite, got inf"),
        (lambda: lineas.Gate(W, "0"), "bias must be a real number, got str"),
        (lambda: lineas.Gate(W, 0.0, context="text"), "context must be one of 'token', 'mean', got 'text'"),
        (lambda: lineas.Gate(W, 0.0, site=3), "site must be the name of a module, got int"),
        (lambda: lineas.Gate(W, 0.0, site=""), "site must not be empty"),
        (lambda: lineas.Gate(W, 0.0, auroc=1.5), "auroc must be from 0 to 1, got 1.5"),
        (lambda: lineas.Gate(W, 0.0, left_alone=-0.1), "left_alone must be from 0 to 1, got -0.1"),
        (lambda: lineas.NeuronGate(W, W, np.ones(2)), "quadratic, linear and constant must have the same shape"),
        (lambda: lineas.NeuronGate(W, [0, 0, np.inf], W), "linear must be finite, got inf at neuron 2"),
        (lambda: lineas.NeuronGate(W, W, W, closed=[1, 0, 1]), "closed must hold booleans, got dtype int64"),
        (lambda: lineas.NeuronGate(W, W, W, closed=[True]), r"closed must have the shape \(3,\) of quadratic"),
        (lambda: lineas.NeuronGate(W, W, W, auroc=[0.5, 2, 0]), "auroc must be from 0 to 1, got 0 to 2"),
        (lambda: GATE.values(np.ones((2, 2))), r"z must have 3 channels on axis -1, got shape \(2, 2\)"),
        (lambda: GATE.values(np.ones((2, D), int)), "z must be a floating-point array, got dtype int64"),
        (lambda: GATE.values(np.ones((2, D)), axis=1.0), "axis must be an int, got float"),
        (
            lambda: lineas.Gate(W, 0.0, context="mean").values(np.ones((2, D))),
            r"a gate of context 'mean' needs activations \[texts, tokens, 3\], got shape \(2, 3\)",
        ),
    ],
)
def test_bad_gates(make, text):
    with pytest.raises((TypeError, ValueError), match=text):
        make()


# --- maps with gates --------------------------------------------------------------------------------------------------


def test_maps_read_and_give_away_their_gates():
    assert dict(GATED.gates) == {"a": GATE, "b": NEURON}
    assert dict(MAPS.gates) == {}
    assert GATED.gated(None) == MAPS
    assert GATED != MAPS
    with pytest.raises(TypeError):
        GATED.gates["a"] = NEURON
    assert "calibration" not in GATED.metadata  # of maps without these gates
    assert GATED.metadata["method"] == "linear"
    assert list(MAPS.gated({"b": GATE}).gates) == ["b"]


@given(st.dictionaries(st.sampled_from(["a", "b"]), either, min_size=1))
def test_gates_go_along(gates):
    maps = MAPS.gated(gates)
    for same in (pickle.loads(pickle.dumps(maps)), copy.copy(maps), copy.deepcopy(maps), maps.gated(maps.gates)):
        assert same == maps
    assert maps.scaled(0.5).gates == maps.gates
    assert (-maps).gates == maps.gates
    renamed = maps.rename(prefix="x.")
    assert list(renamed.gates) == ["x." + name for name in maps.gates]
    for name, gate in maps.gates.items():
        site = renamed.gates[f"x.{name}"].site
        assert site == (None if gate.site is None else f"x.{gate.site}")
    assert renamed.rename(lambda name: name.removeprefix("x.")) == maps
    chosen = maps.select("b")
    assert list(chosen.gates) == [name for name in maps.gates if name == "b"]
    assert f"gates={len(gates)}" in repr(maps)


def test_a_site_without_a_map_can_be_renamed_by_a_mapping():
    maps = MAPS.gated(GATE.at("elsewhere"))
    renamed = maps.rename({"elsewhere": "there", "a": "c"})
    assert {gate.site for gate in renamed.gates.values()} == {"there"}
    assert renamed.gates["c"] is renamed.gates["b"]  # still one


def test_summary_has_a_column_for_gates_where_there_are_some():
    assert "gate" not in MAPS.summary()
    head, first, second, total = GATED.summary().splitlines()
    assert head.split() == ["module", "neurons", "support", "||w-1||", "||b||", "gate"]
    assert first.endswith("token, AUROC 0.80")
    assert second.endswith("2 neurons")
    assert MAPS.gated(GATE.at("a")).summary().splitlines()[1].endswith("token, AUROC 0.80, at a")
    assert len({len(line) for line in (head, first)}) == 1
    assert total.split()[0] == "total"


@given(either.filter(lambda gate: gate.site in (None, "a")), st.floats(-2, 2))
def test_transform_multiplies_the_strength(gate, strength):
    rng = np.random.default_rng(0)
    z = {name: rng.normal(0, 2, (2, 4, D)) for name in MAPS}
    found = MAPS.gated({"b": gate}).transform(z, strength)
    read = z["b" if gate.site is None else "a"]
    expected = z["b"] + strength * gate.values(read) * (MAPS["b"].weight * z["b"] + MAPS["b"].bias - z["b"])
    np.testing.assert_allclose(found["b"], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["a"], MAPS.transform(z, strength)["a"])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "maps", [GATED, MAPS.gated(GATE.at("a")), MAPS.gated({"a": lineas.Gate(W, 0.0, context="mean")})]
)
def test_transform_of_tensors_is_that_of_arrays(maps, dtype):
    torch = pytest.importorskip("torch")
    z = {name: np.random.default_rng(1).normal(size=(2, 4, D)).astype(dtype) for name in MAPS}
    tensors = {name: torch.tensor(x) for name, x in z.items()}
    found, expected = maps.transform(tensors, 0.7), maps.transform(z, 0.7)
    for name in MAPS:
        assert found[name].dtype == tensors[name].dtype
        assert expected[name].dtype == z[name].dtype
        np.testing.assert_allclose(
            found[name].numpy(), expected[name], rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-6
        )


def test_transform_on_another_axis():
    z = {"a": np.random.default_rng(0).normal(size=(2, D, 5)), "b": np.zeros((1, D, 2))}
    found = GATED.transform(z, axis=1)["a"]
    np.testing.assert_allclose(found, GATED.transform({"a": z["a"].swapaxes(1, 2)})["a"].swapaxes(1, 2), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: GATED.inverse(), "inverse: these maps have gates, so their change depends on the activation"),
        (lambda: GATED @ MAPS, r"composition: these maps have gates.*maps.gated\(None\) takes the gates off"),
        (lambda: MAPS @ GATED, "composition: these maps have gates"),
        (lambda: GATED + MAPS, "sum: these maps have gates"),
        (lambda: sum([MAPS, GATED]), "sum: these maps have gates"),
        (lambda: MAPS - GATED, "subtraction: these maps have gates"),
        (lambda: MAPS.gated(GATE), "one gate for all modules must name the module that it reads"),
        (lambda: MAPS.gated({"c": GATE}), "no map for module 'c'"),
        (lambda: MAPS.gated({"a": affine()}), r"gates\['a'\] must be a Gate or a NeuronGate, got AffineMap"),
        (lambda: MAPS.gated([GATE]), "gates must be a mapping from module name to gate, or a Gate, got list"),
        (
            lambda: MAPS.gated({"a": lineas.Gate(np.ones(2), 0.0)}),
            r"gates\['a'\] is for 2 neurons, module 'a' has 3",
        ),
        (
            lambda: MAPS.gated(lineas.Gate(np.ones(2), 0.0, site="b")),
            r"gates\['a'\] is for 2 neurons, module 'b' has 3",
        ),
        (lambda: GATED.transform({"a": np.ones((2, 4))}), r"activations\['a'\]: z must have 3 channels on axis -1"),
        (
            lambda: MAPS.gated(GATE.at("there")).transform({"a": np.ones((2, D))}),
            r"activations\['a'\]: its gate reads the module 'there', of which there are no activations",
        ),
        (
            lambda: MAPS.gated(GATE.at("there")).transform({"a": np.ones((2, D)), "there": np.ones((4, D))}),
            r"activations\['a'\]: its gate has the shape \(4, 1\), the activations \(2, 3\)",
        ),
        (
            lambda: MAPS.gated({"a": lineas.Gate(W, 0.0, context="mean")}).transform({"a": np.ones((2, D))}),
            r"activations\['a'\]: a gate of context 'mean' needs activations \[texts, tokens, 3\]",
        ),
    ],
)
def test_what_gated_maps_refuse(call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call()


# --- files ------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(["a", "b"]), either, min_size=1))
def test_files_keep_gates_with_what_was_found(tmp_path_factory, gates):
    path = tmp_path_factory.mktemp("gates") / "maps.safetensors"
    maps = MAPS.gated(gates)
    maps.save(path)
    found = lineas.load(path)
    assert found == maps
    for name, gate in maps.gates.items():
        for fact in type(gate).__slots__:
            np.testing.assert_array_equal(getattr(found.gates[name], fact), getattr(gate, fact))
            assert getattr(getattr(gate, fact), "dtype", None) == getattr(
                getattr(found.gates[name], fact), "dtype", None
            )


def test_one_gate_is_kept_once(tmp_path):
    path = tmp_path / "maps.safetensors"
    MAPS.gated(GATE.at("a")).save(path)
    found = lineas.load(path)
    assert found.gates["a"] is found.gates["b"]
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == ["a.bias", "a.weight", "b.bias", "b.weight", "gate 0.weight"]
        assert "gates" in file.metadata()


def test_files_without_gates_are_as_they_were(tmp_path):
    MAPS.save(tmp_path / "maps.safetensors")
    with safe_open(tmp_path / "maps.safetensors", "np") as file:
        assert sorted(file.metadata()) == ["format", "metadata", "modules", "sha256", "version"]


def test_a_module_with_the_name_of_a_gates_tensor_is_refused_and_leaves_no_file(tmp_path):
    maps = lineas.SteeringMaps({"gate 0": affine()}).gated({"gate 0": GATE})
    with pytest.raises(ValueError, match=r"cannot save gates beside a module whose tensor is called 'gate 0.weight'"):
        maps.save(tmp_path / "maps.safetensors")
    assert not list(tmp_path.iterdir())


def changed(path, tensors=(), drop=(), **entries):
    """A file with other entries in its header, and without a checksum."""
    with safe_open(path, "np") as file:
        header, found = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    header.pop("sha256")
    header |= {key: json.dumps(value) for key, value in entries.items()}
    found = {name: x for name, x in {**found, **dict(tensors)}.items() if name not in drop}
    save_file(found, path, header)


TOKEN = {"kind": "scalar", "bias": 0.0, "context": "token", "site": None}
TOKEN |= {"auroc": None, "accuracy": None, "left_alone": None}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gates": []}, "'gates' in the header must be a JSON dict, got list"),
        ({"gates": {}}, "'gates' in the header must be an object with 'of', an object, and 'gates', a list"),
        ({"gates": {"of": [], "gates": []}}, "'gates' in the header must be an object with 'of'"),
        ({"gates": {"of": {"a": 0}, "gates": [7]}}, "a gate in the header must be an object with 'kind'"),
        ({"gates": {"of": {"a": 0}, "gates": [{"kind": "odd"}]}}, "a gate in the header must be an object with 'kind'"),
        ({"gates": {"of": {"a": 0}, "gates": [{"kind": []}]}}, "a gate in the header must be an object with 'kind'"),
        ({"gates": {"of": {"a": 0}, "gates": [{"kind": "scalar"}]}}, "a gate in the header does not hold together"),
        ({"gates": {"of": {"a": 0}, "gates": [TOKEN | {"more": 1}]}}, "a gate in the header does not hold together"),
        ({"gates": {"of": {"a": 0}, "gates": [TOKEN | {"bias": "0"}]}}, "bias must be a real number, got str"),
        ({"gates": {"of": {"a": 0}, "gates": [TOKEN | {"context": 1}]}}, "context must be one of"),
        ({"gates": {"of": {"a": 1}, "gates": [TOKEN]}}, "module 'a' has gate 1 of 1"),
        ({"gates": {"of": {"a": -1}, "gates": [TOKEN]}}, "module 'a' has gate -1 of 1"),
        ({"gates": {"of": {"a": True}, "gates": [TOKEN]}}, "module 'a' has gate True of 1"),
        ({"gates": {"of": {"z": 0}, "gates": [TOKEN]}}, "no map for module 'z'"),
        ({"gates": {"of": {"a": 0}, "gates": []}}, "module 'a' has gate 0 of 0"),
        ({"drop": ["gate 0.weight"]}, "a gate in the header does not hold together"),
        ({"tensors": {"gate 1.weight": np.ones(D)}}, "unexpected tensor 'gate 1.weight'"),
        ({"tensors": {"gate 0.site": np.ones(D)}}, "a gate in the header does not hold together"),
        ({"tensors": {"gate 0.weight": np.ones(2)}}, r"gates\['a'\] is for 2 neurons, module 'a' has 3"),
        ({"tensors": {"gate 0.weight": np.full(D, np.nan)}}, "weight must be finite, got nan at neuron 0"),
    ],
)
def test_hostile_files(tmp_path, change, text):
    path = tmp_path / "maps.safetensors"
    MAPS.gated({"a": GATE}).save(path)
    changed(path, **change)
    with pytest.raises(ValueError, match=text) as error:
        lineas.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", [np.array([2, 0, 0], np.uint8), np.zeros(D)])
def test_closed_neurons_in_files_are_0_or_1(tmp_path, value):
    path = tmp_path / "maps.safetensors"
    MAPS.gated({"a": NEURON}).save(path)
    changed(path, {"gate 0.closed": value})
    with pytest.raises(ValueError, match=r"tensor 'gate 0.closed' must be uint8 of 0 and 1"):
        lineas.load(path)


def test_folders_and_cards_keep_gates(tmp_path):
    pytest.importorskip("huggingface_hub")
    GATED.save_pretrained(tmp_path)
    assert lineas.load(tmp_path) == GATED
    assert "2 neurons" in (tmp_path / "README.md").read_text()
