"""Maps that somebody left on a model are seen by what is fitted next."""

import warnings

import models_zoo
import pytest
from attached import language_model

import lineas

LAYERS = models_zoo.NORMS["llama"]
SOURCE, TARGET = models_zoo.texts(3), models_zoo.texts(3, seed=1)
FITS = {
    "fit_end_to_end": {"steps": 1},
    "fit_incremental": {},
    "fit_gates": {},
    "sparse_path_end_to_end": {"n_penalties": 2, "steps": 1},
    "fit_jointly": {"steps": 1},
    "fit_sequence": {"steps": 1},
}


def fit(name, model):
    settings = {"layers": LAYERS, "tokenizer": models_zoo.tokenizer(), "progress": False, **FITS[name]}
    if name in ("fit_jointly", "fit_sequence"):
        return getattr(lineas, name)(model, {"a": (SOURCE, TARGET), "b": (TARGET, SOURCE)}, **settings)
    return getattr(lineas, name)(model, SOURCE, TARGET, **settings)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_warns_of_maps_that_are_on_the_model(name):
    model, maps = language_model("llama")
    message = "maps are attached to '.*' of this model: what is fitted now is fitted on top of them"
    with maps.attach(model), pytest.warns(UserWarning, match=message):
        fit(name, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "maps are attached")
        fit(name, model)
