"""Fits of maps that act on some tokens only, and what is pooled then."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import QUIET, named, prompts, same_maps, short_fit, snapshot

import lineas
from lineas.hooks import modules

TEXTS = zoo.texts(7)
LAYERS = zoo.NORMS["llama"]


def second(tokens):
    """The token at position 1."""
    return tokens.positions == 1


SELECTIONS = [("last", [-1]), ("prompt", slice(None)), (slice(1, 3), slice(1, 3)), (slice(-2, None), slice(-2, None))]
SELECTIONS += [(second, [1])]
REDUCE = {"mean": np.mean, "min": np.min, "max": np.max, "last": lambda x, axis: x[-1], "all": lambda x, axis: x}


def by_hand(model, text, maps=None, part=None):
    """What the modules give for one text, with the maps on the tokens `part` by hand."""
    found, handles = {}, []
    for name in modules.resolve(model, LAYERS):

        def hook(module, args, output, name=name):
            if maps is not None:
                output = output.clone()
                output[:, part] = maps[name].transform(output[:, part])
            found[name] = output[0].numpy()
            return output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        model(**zoo.tokenizer()(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", list(REDUCE))
@pytest.mark.parametrize(("tokens", "part"), SELECTIONS, ids=named)
def test_activations_are_pooled_over_the_selected_tokens(tokens, part, pooling, side):
    model = zoo.llama()
    found = lineas.collect(
        model,
        TEXTS,
        layers=LAYERS,
        tokenizer=zoo.tokenizer(padding_side=side),
        batch_size=4,
        tokens=tokens,
        pooling=pooling,
    )
    alone = [by_hand(model, text) for text in TEXTS]
    for name, value in found.items():
        expected = [np.atleast_2d(REDUCE[pooling](one[name][part], axis=0)) for one in alone]
        np.testing.assert_allclose(value, np.concatenate(expected), atol=1e-5)


def test_a_callable_gets_the_token_ids_and_may_leave_prompts_without_tokens():
    model, texts = zoo.llama(), ["good cat", "the good dog", "bad dog"]
    good = zoo.tokenizer()("good")["input_ids"][0]
    settings = {"layers": "model.norm", "tokenizer": zoo.tokenizer()}
    found = lineas.collect(model, texts, tokens=lambda tokens: tokens.ids == good, pooling="all", **settings)
    every = lineas.collect(model, texts[:2], pooling="all", **settings)
    np.testing.assert_allclose(found["model.norm"], every["model.norm"][[0, 3]], atol=1e-6)
    with pytest.raises(ValueError, match=r"^model.norm: tokens=<lambda> selects none of the 2 tokens of row 2"):
        lineas.collect(model, texts, tokens=lambda tokens: tokens.ids == good, **settings)


def test_batches_without_a_mask_have_no_padding():
    model = zoo.mlp()
    x = torch.randn(3, 4, 5)
    expected = lineas.collect(model, x[:, 1:3], layers="0")["0"]
    np.testing.assert_allclose(lineas.collect(model, x, layers="0", tokens=slice(1, 3))["0"], expected, atol=1e-6)


def fit(model, method, tokens, **settings):
    settings = {"tokens": tokens, "tokenizer": zoo.tokenizer(), **QUIET, **settings}
    source, target = zoo.texts(6, seed=1), zoo.texts(6, seed=2)
    if method == "incremental":
        return lineas.fit_incremental(model, source, target, layers=LAYERS, **settings)
    if method == "path":
        return lineas.sparse_path_end_to_end(model, source, target, layers=LAYERS, n_penalties=2, **settings).at(
            index=1
        )
    settings |= {"lr": 0.05, "steps": 3}
    if method == "joint":
        tasks = {"a": (source, target), "b": (source, zoo.texts(6, seed=3))}
        return lineas.fit_jointly(model, tasks, layers=LAYERS, **settings).maps
    return lineas.fit_end_to_end(model, source, target, layers=LAYERS, **settings).maps


@pytest.mark.parametrize("method", ["end to end", "joint", "incremental", "path"])
@pytest.mark.parametrize("tokens", ["last", slice(1, None), second], ids=named)
def test_maps_say_which_tokens_they_were_fitted_for_and_act_on_them(method, tokens, tmp_path):
    model = zoo.llama()
    before = snapshot(model)
    maps = fit(model, method, tokens)
    assert snapshot(model) == before
    assert maps.support
    maps.save(tmp_path / "maps.safetensors")
    maps = lineas.load(tmp_path / "maps.safetensors")
    if callable(tokens):
        assert maps.metadata["tokens"] == {"callable": "second"}
        with pytest.raises(ValueError, match=r"^these maps were fitted for the tokens that second selects"):
            maps.attach(model)
        return
    with maps.attach(model) as handle:
        assert handle.tokens == tokens
    with maps.inverse().scaled(0.5).attach(model) as handle:
        assert handle.tokens == tokens


@pytest.mark.parametrize(("tokens", "part"), [("last", slice(-1, None)), (slice(1, 3), slice(1, 3))], ids=named)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_last_module_of_an_incremental_fit_comes_to_the_target_at_the_tokens(tokens, part, batch_size):
    model, source, target = zoo.llama(), zoo.texts(6, seed=1), zoo.texts(6, seed=2)
    settings = {"layers": LAYERS, "tokenizer": zoo.tokenizer(), "batch_size": batch_size, "tokens": tokens}
    maps = lineas.fit_incremental(model, source, target, method="gaussian", **settings, **QUIET)
    for name in maps:
        steered = np.stack([by_hand(model, text, maps, part)[name][part].mean(axis=0) for text in source])
        wanted = np.stack([by_hand(model, text)[name][part].mean(axis=0) for text in target])
        np.testing.assert_allclose(steered.mean(axis=0), wanted.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(steered.std(axis=0), wanted.std(axis=0), atol=1e-4)


@pytest.mark.parametrize(("tokens", "part"), [("last", [-1]), (slice(1, 3), slice(1, 3))], ids=named)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_loss_of_an_end_to_end_fit_is_that_of_the_selected_tokens_with_maps_on_them_alone(tokens, part, batch_size):
    model, source, target = zoo.llama(), zoo.texts(6, seed=1), zoo.texts(6, seed=2)
    settings = {"layers": LAYERS, "tokenizer": zoo.tokenizer(), "tokens": tokens, "batch_size": batch_size, **QUIET}
    settings["scaling"] = "layer-mean"
    first = lineas.fit_end_to_end(model, source, target, steps=2, lr=0.05, **settings)
    # The history has the loss before each step: one more fit from these maps tells theirs.
    found = lineas.fit_end_to_end(model, source, target, steps=1, lr=0.05, init=first.maps, **settings)
    expected = []
    for name in first.maps:
        steered = np.stack([by_hand(model, text, first.maps, part)[name][part].mean(axis=0) for text in source])
        wanted = np.stack([by_hand(model, text)[name][part].mean(axis=0) for text in target])
        expected.append(np.square(np.sort(steered, axis=0) - np.sort(wanted, axis=0)).mean(axis=0).sum())
    np.testing.assert_allclose(found.history["layer_loss"][0], expected, rtol=1e-3)
    assert first.history["loss"][1] < first.history["loss"][0]


def test_every_token_of_a_prompt_is_the_same_as_all():
    model = zoo.llama()
    same_maps(fit(model, "end to end", "prompt"), fit(model, "end to end", "all"), atol=1e-5)


def test_a_checkpoint_is_of_one_selection(tmp_path):
    path = tmp_path / "fit.safetensors"
    short_fit(zoo.llama(), tokens="last", checkpoint=path)
    message = r"is that of another fit, of which the tokens differs: it was 'last', and is 'all'"
    with pytest.raises(ValueError, match=message):
        short_fit(zoo.llama(), checkpoint=path)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["end to end", "joint", "incremental", "path"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ("generated", ValueError, r"^tokens='generated' selects nothing of .*source, where every token is of a prompt"),
        ("first", ValueError, r"^tokens must be 'all', 'last', .* got 'first'"),
        (1.5, TypeError, r"^tokens must be 'all', 'last', .* got float"),
        (slice(20, None), ValueError, r"tokens=slice\(20, None, None\) selects none of the \d tokens of row 0"),
    ],
)
def test_selections_that_no_fit_can_use(method, tokens, error, message):
    model = zoo.llama()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fit(model, method, tokens)
    assert snapshot(model) == before


def test_collect_refuses_them_too():
    with pytest.raises(
        ValueError, match=r"^tokens='generated' selects nothing of data, where every token is of a prompt"
    ):
        lineas.collect(zoo.llama(), prompts(2, 0), layers=LAYERS, tokens="generated")


@pytest.mark.parametrize(("model", "data", "layer"), [(zoo.cnn, zoo.images(2), "bn"), (zoo.cnn, zoo.images(2), "head")])
def test_outputs_without_tokens_allow_all_only(model, data, layer):
    with pytest.raises(ValueError, match=rf"^{layer}: tokens='last' needs an output \[batch, tokens, channels\], got"):
        lineas.collect(model(), data, layers=layer, tokens="last")


def test_a_mask_of_another_length_names_the_module():
    batch = {"x": torch.ones(2, 4, 5), "attention_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"^0: the attention mask must have the shape \[2, 4\] .*, got \[2, 3\]"):
        lineas.collect(zoo.mlp(), batch, layers="0", tokens="last", forward=lambda model, batch: model(batch["x"]))


def test_a_model_with_two_texts_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match=r"^tokens='last' needs a model with one text, T5ForConditionalGeneration has"):
        lineas.collect(model, prompts(2, 0), layers="*", tokens="last")
