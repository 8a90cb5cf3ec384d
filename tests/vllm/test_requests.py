"""What a request may ask for, and what it is told where it asks for something else."""

import json
import math

import pytest

from lineas.export.vllm.requests import plain, read

KNOWN = ("detox", "polite")


@pytest.mark.parametrize(
    ("extra_args", "strengths"),
    [
        (None, {}),
        ({}, {}),
        ({"other": 1}, {}),
        ({"lineas": {"maps": "detox"}}, {"detox": 1.0}),
        ({"lineas": {"maps": "detox", "strength": 0.7}}, {"detox": 0.7}),
        ({"lineas": {"maps": "detox", "strength": 0}}, {}),
        ({"lineas": {"maps": ["polite", "detox"], "strength": 2}}, {"polite": 2.0, "detox": 2.0}),
        ({"lineas": {"maps": ["polite", "detox"], "strength": [0.5, -1]}}, {"polite": 0.5, "detox": -1.0}),
        ({"lineas": {"maps": {"polite": 1.2, "detox": 0.7}}}, {"polite": 1.2, "detox": 0.7}),
        ({"lineas": '{"maps": {"polite": 1.2, "detox": 0.0}}'}, {"polite": 1.2}),
        ({"lineas_maps": "detox"}, {"detox": 1.0}),
        ({"lineas_maps": ["detox", "polite"], "lineas_strength": [1, 0.5]}, {"detox": 1.0, "polite": 0.5}),
    ],
)
def test_every_spelling_is_read_in_the_order_in_which_maps_act(extra_args, strengths):
    assert list(read(extra_args, KNOWN).items()) == list(strengths.items())


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"lineas": 3}, "lineas must be a mapping or the JSON text of one, got int"),
        ({"lineas": "detox"}, "a text must be JSON"),
        ({"lineas": "[1]"}, "lineas must be a mapping or the JSON text of one, got list"),
        ({"lineas": {}}, "'maps' is missing"),
        ({"lineas_strength": 1.0}, "'maps' is missing"),
        ({"lineas": {"maps": "detox", "strenght": 1}}, "unknown key 'strenght'"),
        ({"lineas": {"maps": 5}}, "maps must be a name, a list of names or a mapping, got int"),
        ({"lineas": {"maps": [5]}}, "the name of maps must be a string, got 5"),
        ({"lineas": {"maps": {5: 1.0}}}, "the name of maps must be a string, got 5"),
        ({"lineas": {"maps": "rude"}}, "no maps are called 'rude'; there are 'detox', 'polite'"),
        ({"lineas": {"maps": "rude", "strength": 0}}, "no maps are called 'rude'"),
        ({"lineas": {"maps": ["detox", "detox"]}}, "maps are named twice"),
        ({"lineas": {"maps": "detox", "strength": math.nan}}, "strength of 'detox' must be finite, got nan"),
        ({"lineas": {"maps": {"detox": math.inf}}}, "strength of 'detox' must be finite, got inf"),
        ({"lineas": {"maps": "detox", "strength": "1"}}, "strength of 'detox' must be a real number, got str"),
        ({"lineas": {"maps": "detox", "strength": True}}, "strength of 'detox' must be a real number, got bool"),
        ({"lineas": {"maps": {"detox": 1.0}, "strength": 1.0}}, "give no 'strength' beside 'maps' that have theirs"),
        ({"lineas": {"maps": ["detox", "polite"], "strength": [1.0]}}, "2 maps need as many strengths or one, got 1"),
        ({"lineas": {"maps": "detox"}, "lineas_maps": "detox"}, "give either 'lineas' or 'lineas_maps', not both"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(extra_args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        read(extra_args, KNOWN)


def test_an_engine_without_maps_says_so():
    with pytest.raises(ValueError, match="this engine was started without maps"):
        read({"lineas": {"maps": "detox"}}, ())


def test_the_plain_form_is_read_as_the_same_and_can_be_sent():
    extra_args = {"lineas_maps": ["polite", "detox"], "lineas_strength": [0.5, 1.5], "kv_transfer_params": {"a": 1}}
    strengths = read(extra_args, KNOWN)
    sent = json.loads(json.dumps(plain(extra_args, strengths)))
    assert sent == {"kv_transfer_params": {"a": 1}, "lineas": {"maps": {"polite": 0.5, "detox": 1.5}}}
    assert list(read(sent, KNOWN).items()) == list(strengths.items())
    assert plain(extra_args, {}) == {"kv_transfer_params": {"a": 1}}
