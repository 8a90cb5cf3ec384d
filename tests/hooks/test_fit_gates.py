"""Gates fitted to a model: what is collected of which tokens, which module is read, and what is refused."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import hooks_on, outputs_of

import lineas
from lineas.arrays.gate import GateSettings, Rows, fit_rows

TOKENIZER = zoo.tokenizer()
SOURCE, TARGET = ([text + end for text in zoo.texts(6, seed=seed)] for seed, end in ((1, " bad"), (2, " good")))
LAYERS = zoo.NORMS["llama"]
NAMES = [f"model.layers.{k}.post_attention_layernorm" for k in range(zoo.LAYERS)]
MODEL = zoo.llama()


def fit(source=SOURCE, target=TARGET, model=MODEL, **settings):
    return lineas.fit_gates(
        model, source, target, **{"layers": LAYERS, "tokenizer": TOKENIZER, "progress": False} | settings
    )


def tokens_of(texts, name, model=MODEL):
    """The activations [T, d] of each text, which runs alone."""
    return [
        outputs_of(model, [name], lambda text=text: model(**TOKENIZER(text, return_tensors="pt")))[name][0].numpy()
        for text in texts
    ]


@pytest.mark.parametrize("settings", [{}, {"context": "mean"}, {"kind": "neuron"}, {"components": 3}], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_gates_are_those_of_the_texts_tokens(settings, batch_size):
    found = fit(batch_size=batch_size, **settings)
    assert list(found) == NAMES
    for name, gate in found.items():
        expected = lineas.fit_gate(tokens_of(SOURCE, name), tokens_of(TARGET, name), **settings)
        z = np.concatenate(tokens_of(SOURCE, name))[None]
        np.testing.assert_allclose(gate.values(z), expected.values(z), atol=1e-3)
    assert hooks_on(MODEL) == 0


@pytest.mark.parametrize("settings", [{}, {"kind": "neuron"}, {"site": "auto"}, {"context": "mean"}], ids=str)
def test_activations_that_are_not_finite_name_prompts_and_module(settings):
    model = zoo.llama()
    with torch.no_grad():
        model.get_submodule(NAMES[1]).weight[3] = torch.nan
    with pytest.raises(ValueError, match=rf"^source: {NAMES[1]}: nan at row 0, column 3$"):
        fit(model=model, layers=NAMES[1:], **settings)
    assert hooks_on(model) == 0


def test_selected_tokens_are_samples_and_means_are_over_all():
    name = NAMES[1]
    found = fit(tokens=slice(2, None), context="mean", ridge=0.1)[name]
    sides = []
    for texts in (SOURCE, TARGET):
        tokens = [x for x in tokens_of(texts, name) if len(x) > 2]
        means = [np.cumsum(x, axis=0) / np.arange(1, len(x) + 1)[:, None] for x in tokens]
        sides.append(Rows.of([x[2:] for x in tokens], [x[2:] for x in means]))
    expected = fit_rows(*sides, GateSettings(context="mean", ridge=0.1))
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-2, atol=1e-4)
    assert found.auroc == pytest.approx(expected.auroc, abs=0.01)
    assert found.context == "mean"


def test_one_gate_names_the_module_that_it_reads():
    site = "model.layers.0.input_layernorm"
    found = fit(site=site)
    assert found.site == site
    expected = lineas.fit_gate(tokens_of(SOURCE, site), tokens_of(TARGET, site))
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-2, atol=1e-4)


def test_the_best_early_module_is_chosen():
    late = fit(layers=NAMES[2:], site="auto")
    areas = {name: gate.auroc for name, gate in fit().items()}
    assert late.site == max(areas, key=areas.get)
    assert late.auroc == max(areas.values())
    assert fit(site="auto").site == NAMES[0]  # nothing that is suggested runs before it
    maps = lineas.SteeringMaps({NAMES[2]: lineas.AffineMap(np.ones(zoo.WIDTH), np.ones(zoo.WIDTH))}).gated(late)
    with maps.attach(MODEL), torch.no_grad():
        MODEL(**TOKENIZER(SOURCE[0], return_tensors="pt"))


def test_images_have_gates_of_their_pixels():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU())
    rng = torch.Generator().manual_seed(0)
    source, target = (torch.randn(5, 2, 6, 6, generator=rng) + shift for shift in (1, 0))
    found = lineas.fit_gates(model, source, target, layers="0", progress=False)["0"]
    with torch.no_grad():
        sides = [model[0](x).movedim(1, -1).reshape(5, -1, 4).numpy() for x in (source, target)]
    expected = lineas.fit_gate(*map(list, sides))
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-2, atol=1e-4)
    with pytest.raises(ValueError, match=r"0: a gate of context 'mean' needs an output \[batch, tokens, channels\]"):
        lineas.fit_gates(model, source, target, layers="0", progress=False, context="mean")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"site": 3}, "site must be the name of a module or 'auto', got int"),
        ({"site": "nowhere"}, "no module"),
        ({"site": "auto", "kind": "neuron"}, "site is for gates of kind 'scalar': neurons have their own"),
        ({"kind": "odd"}, "kind must be one of 'scalar', 'neuron', got 'odd'"),
        ({"pooling": "mean"}, "unexpected keyword argument 'pooling'"),
        ({"source": SOURCE[:1]}, r"source of .* must hold at least 2 texts"),
        ({"tokens": "generated"}, "tokens='generated' selects nothing of source"),
        ({"tokenizer": None}, "tokenizer"),
    ],
)
def test_bad_inputs(change, text):
    with pytest.raises((TypeError, ValueError), match=text):
        fit(**change)
    assert hooks_on(MODEL) == 0


def test_settings_are_described_where_they_can_be_given():
    assert "components : int" in lineas.fit_gates.__doc__
    assert "max_length : int" in lineas.fit_gates.__doc__
    assert "pooling :" not in lineas.fit_gates.__doc__
