"""Evaluations, calibrations and diagnoses of maps with gates look at the maps as they act: with the gates."""

import copy

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import language_model
from evaluations import FIELDS, NEUTRAL, PROMPTS, QUIET, TOKENIZER, price

import lineas
from lineas.evaluation import points
from lineas.evaluation.controls import random_maps


def gate(bias=0.0, context="token", seed=0):
    weight = np.random.default_rng(seed).normal(0, 1, zoo.WIDTH).astype(np.float32)
    return lineas.Gate(weight if bias == 0 else 0 * weight, bias, context=context)


MODEL, MAPS = language_model("llama")
OPEN, CLOSED = (MAPS.gated(dict.fromkeys(MAPS, gate(bias))) for bias in (1e4, -1e4))
HALF = MAPS.gated(dict.fromkeys(MAPS, gate(context="mean")))


def test_the_price_is_that_of_the_gated_maps():
    whole, opened, half, none = (price(MODEL, maps) for maps in (MAPS, OPEN, HALF, CLOSED))
    np.testing.assert_allclose(opened, whole, rtol=1e-5, atol=1e-6)
    assert (none[1, :, FIELDS.index("kl")] == 0).all()
    assert not np.allclose(half[1], whole[1])
    assert not np.allclose(half[1], none[1])


def test_texts_are_generated_with_the_gates():
    def texts(maps):
        settings = {"tokenizer": TOKENIZER, "prompts": PROMPTS, "strengths": [1.0], "max_new_tokens": 4, **QUIET}
        return [point.tolist() for point in np.array(lineas.evaluate(MODEL, maps, **settings).continuations)]

    assert texts(CLOSED)[1] == texts(CLOSED)[0]
    assert texts(OPEN) == texts(MAPS)


def test_calibration_keeps_the_gates_and_finds_another_strength():
    found = {}
    for name, maps in (("whole", MAPS), ("half", HALF)):
        calibration = maps.calibrate(MODEL, neutral=NEUTRAL, max_kl=0.05, tokenizer=TOKENIZER, **QUIET)
        found[name] = calibration.strength
        assert calibration.maps.gates == maps.gates
    assert found["half"] != found["whole"]


def test_points_with_other_gates_are_other_points():
    def identity(maps):
        return points.Point("a", 1.0, maps).identity()

    known = [identity(maps) for maps in (MAPS, OPEN, CLOSED, HALF)]
    assert len(set(known)) == 4
    assert identity(copy.deepcopy(HALF)) == known[-1]


def test_random_maps_have_the_gates():
    assert random_maps(HALF).gates == HALF.gates


def test_diagnoses_look_at_gated_maps():
    settings = {"tokenizer": TOKENIZER, "progress": False, "neutral": zoo.texts(12, seed=7)}
    sets = zoo.texts(12), zoo.texts(12, seed=5)
    whole, none, half = (maps.diagnose(MODEL, *sets, **settings).modules for maps in (MAPS, CLOSED, HALF))
    assert (whole["change"] > 0).all()
    assert (none["change"] == 0).all()
    assert (none["own_change"] == 0).all()
    assert ((half["change"] > 0) & (half["change"] != whole["change"])).all()
    assert np.isnan(half["own_change"]).all()  # single rows have no texts


@pytest.mark.parametrize("what", ["fold", "to_peft_lora"])
def test_what_is_affine_only_is_refused(what, tmp_path):
    if what == "to_peft_lora":
        pytest.importorskip("peft")
    before = {name: x.clone() for name, x in MODEL.state_dict().items()}
    arguments = (MODEL, tmp_path) if what == "to_peft_lora" else (MODEL,)
    with pytest.raises(ValueError, match=rf"{what}: these maps have gates.*maps.gated\(None\) takes the gates off"):
        getattr(HALF, what)(*arguments)
    assert all(torch.equal(x, before[name]) for name, x in MODEL.state_dict().items())
    assert not list(tmp_path.iterdir())
