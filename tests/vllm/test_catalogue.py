"""The maps that an engine is started with."""

import numpy as np
import pytest

import lineas
from lineas.export.vllm.catalogue import VARIABLE, Catalogue, paths


def maps_of(value, metadata=None):
    return lineas.SteeringMaps({"norm": lineas.AffineMap(np.full(3, value), np.ones(3))}, metadata)


@pytest.fixture
def saved(tmp_path):
    def save(value, name="maps"):
        path = tmp_path / f"{name}.safetensors"
        value.save(path)
        return str(path)

    return save


def test_paths_come_from_the_environment_and_the_configuration(monkeypatch):
    monkeypatch.setenv(VARIABLE, "detox=/a.safetensors, polite = user/maps ,")
    assert paths(None) == paths({}) == {"detox": "/a.safetensors", "polite": "user/maps"}
    assert paths({"lineas": {"maps": {"calm": "c"}}, "other": 1})["calm"] == "c"
    monkeypatch.delenv(VARIABLE)
    assert paths({"other": 1}) == {}


@pytest.mark.parametrize("text", ["detox", "=path", "detox="])
def test_a_variable_of_another_form_is_an_error(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match="LINEAS_VLLM_MAPS must be name=path pairs with commas between them, got"):
        paths(None)


def test_a_name_that_is_given_twice_is_an_error(monkeypatch):
    monkeypatch.setenv(VARIABLE, "detox=a,detox=b")
    with pytest.raises(ValueError, match="LINEAS_VLLM_MAPS names maps 'detox' twice"):
        paths(None)
    monkeypatch.setenv(VARIABLE, "detox=a")
    with pytest.raises(ValueError, match="names maps 'detox' as well"):
        paths({"lineas": {"maps": {"detox": "b"}}})


@pytest.mark.parametrize(
    "config",
    [3, {}, {"detox": "a"}, {"maps": ["a"]}, {"maps": {"a": 3}}, {"maps": {"": "a"}}, {"maps": {}, "other": 1}],
)
def test_a_configuration_of_another_form_is_an_error(monkeypatch, config):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(TypeError, match="additional_config\\['lineas'\\]"):
        paths({"lineas": config})


def test_maps_are_read_by_name(saved):
    found = Catalogue({"detox": saved(maps_of(2.0), "a"), "polite": saved(maps_of(3.0), "b")})
    assert list(found) == ["detox", "polite"]
    assert found["polite"] == maps_of(3.0)


def test_what_cannot_be_applied_is_refused_with_its_name(saved, tmp_path):
    gated = maps_of(2.0).gated({"norm": lineas.Gate(np.ones(3), 0.0)})
    with pytest.raises(ValueError, match="maps 'detox': they have gates"):
        Catalogue({"detox": saved(gated)})
    with pytest.raises(ValueError, match="maps 'detox': they were fitted for tokens='generated'"):
        Catalogue({"detox": saved(maps_of(2.0, {"tokens": "generated"}))})
    with pytest.raises(OSError, match="maps 'detox'"):
        Catalogue({"detox": str(tmp_path / "none.safetensors")})
    (tmp_path / "text.safetensors").write_text("no maps")
    with pytest.raises(ValueError, match=r"maps 'detox': .* is not a sound safetensors file"):
        Catalogue({"detox": str(tmp_path / "text.safetensors")})


def test_the_salt_tells_apart_what_computes_other_activations(saved):
    found = Catalogue({"a": saved(maps_of(2.0), "a"), "b": saved(maps_of(3.0), "b"), "same": saved(maps_of(2.0), "c")})
    salts = [
        found.salt(strengths, salt)
        for strengths, salt in [
            ({"a": 1.0}, None),
            ({"a": 1.0}, "user"),
            ({"a": 0.5}, None),
            ({"b": 1.0}, None),
            ({"a": 1.0, "b": 1.0}, None),
            ({"b": 1.0, "a": 1.0}, None),
        ]
    ]
    assert len(set(salts)) == len(salts)
    assert found.salt({"same": 1.0}, None) == found.salt({"a": 1.0}, None)
