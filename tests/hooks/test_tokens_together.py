"""Selections of tokens with everything else: other maps, errors, copies, gradients, threads, wrappers, metadata."""

import copy
import re
import threading

import numpy as np
import pytest
import torch
from attached import (
    GREEDY,
    Pools,
    acted_on,
    hooks_on,
    ids,
    language_model,
    logits,
    pickled,
    random_maps,
    seen_by,
    steered,
)

import lineas
from lineas.maps.metadata import fitted_tokens

# --- with other things ------------------------------------------------------------------------------------------------


def test_strength_0_and_turning_it_up_in_the_middle_keep_count():
    model, maps = steered("llama")
    batch = ids([5, 3])
    with maps.attach(model, tokens=slice(5, 7), strength=0) as handle:
        plain = model.generate(**batch, **GREEDY)
        assert acted_on(model, maps, lambda: model.generate(**batch, **GREEDY)) == [[[0] * 5] * 2, *[[[0], [0]]] * 5]

        def louder(input_ids, scores):
            handle.strength = 1.0
            return scores

        found = acted_on(model, maps, lambda: model.generate(**batch, **GREEDY, logits_processor=[louder]))
        assert [[row[0] for row in one] for one in found[1:]] == [[1, 0], [1, 0], [0, 1], [0, 1], [0, 0]]
    assert torch.equal(model.generate(**batch, **GREEDY), plain)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_middle_of_a_pass_leaves_nothing_behind(error):
    model, maps = steered("llama")
    batch = ids([5, 3])
    with maps.attach(model, tokens="last"):
        expected = model.generate(**batch, **GREEDY)

        def fails(module, args, output):
            raise error

        trouble = model.model.layers[2].register_forward_hook(fails)
        with pytest.raises(error):
            model.generate(**batch, **GREEDY)
        trouble.remove()
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert hooks_on(model) == 0 and not model._forward_pre_hooks and not model._forward_hooks_always_called


@pytest.mark.parametrize("first", [0, 1])
def test_maps_with_different_tokens_act_one_after_the_other_and_leave_in_any_order(first):
    model, one = steered("llama")
    two = random_maps({name: 16 for name in one}, seed=5)
    batch, name = ids([4, 4]), next(iter(one))
    plain = logits(model, batch)
    handles = [one.attach(model, tokens=slice(0, 3)), two.attach(model, tokens=slice(2, None))]
    before, after = seen_by(model, one, lambda: model(**batch))
    expected = before[0].clone()
    expected[:, :3] = one[name].transform(expected[:, :3])
    expected[:, 2:] = two[name].transform(expected[:, 2:])
    torch.testing.assert_close(after[0], expected)
    handles[first].remove()
    with (two if first == 0 else one).attach(model, tokens=slice(2, None) if first == 0 else slice(0, 3)) as again:
        again.strength = 0
        left = logits(model, batch)
    assert torch.equal(logits(model, batch), left) and not torch.equal(left, plain)
    handles[1 - first].remove()
    assert torch.equal(logits(model, batch), plain)
    assert hooks_on(model) == 0 and not model._forward_pre_hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_model_follows_its_own_passes(duplicate):
    model, maps = language_model("llama")
    batch = ids([5, 3])
    with maps.attach(model, tokens="last") as handle:
        expected = model.generate(**batch, **GREEDY)
        other = duplicate(model)
        handle.strength = 0
    assert torch.equal(other.generate(**batch, **GREEDY), expected)
    assert not torch.equal(model.generate(**batch, **GREEDY), expected)


def test_gradients_reach_what_is_selected_and_pass_by_the_rest():
    model = Pools().double()
    embeds = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with random_maps({"embed": 4}).attach(model, tokens="last", strength=[0.5, 2.0]):
        assert torch.autograd.gradcheck(lambda x: model(inputs_embeds=x), (embeds,))
        assert torch.autograd.gradgradcheck(lambda x: model(inputs_embeds=x), (embeds,))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_maps_the_same_tokens_again(reentrant):
    model, maps = language_model("llama")
    model.train()
    batch = ids([5, 3])
    with maps.attach(model, tokens=slice(1, 3)):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        for _ in range(2):
            model.zero_grad()
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
            for parameter, grad in zip(model.parameters(), expected, strict=True):
                torch.testing.assert_close(parameter.grad, grad)
        if not reentrant:
            both = model(**batch, use_cache=False).logits.sum() + model(**batch, use_cache=False).logits.sum()
            message = r"gradient checkpointing runs the layers of one of 2 passes again, and which one cannot be told"
            with pytest.raises(RuntimeError, match=message):
                both.backward()


def test_inference_mode_and_gradients_after_it():
    model, maps = language_model("llama")
    batch = ids([5, 3])
    with maps.attach(model, tokens="last", strength=[0.5, 1.0]):
        with torch.inference_mode():
            expected = model(**batch).logits
        found = model(**batch).logits
        found.sum().backward()
    assert torch.equal(found.detach(), expected)


def test_threads_generate_at_the_same_time():
    model, maps = steered("llama")
    prompts = [ids([3 + k, 2], seed=k) for k in range(4)]
    with maps.attach(model, tokens="last"):
        expected = [model.generate(**batch, **GREEDY).tolist() for batch in prompts]
        found, together = [None] * 4, threading.Barrier(4)

        def work(k):
            together.wait()
            found[k] = [model.generate(**prompts[k], **GREEDY).tolist() for _ in range(3)]

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[one] * 3 for one in expected]


def test_peft_models_are_followed_through_their_wrapper():
    peft = pytest.importorskip("peft")
    model, maps = language_model("llama")
    batch = ids([5, 3])
    with maps.attach(model, tokens="last"):
        expected = model.generate(**batch, **GREEDY)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))  # new adapters do nothing
    with maps.rename(prefix="base_model.model.").attach(wrapped, tokens="last"):
        assert torch.equal(wrapped.generate(**batch, **GREEDY), expected)
        wrapped(**batch)


def test_a_compiled_model_maps_the_same_tokens():
    model = Pools()
    with random_maps({"embed": 4}).attach(model, tokens=slice(1, 3)), torch.no_grad():
        expected = model(ids([5, 3])["input_ids"])
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids([5, 3])["input_ids"]), expected)


# --- metadata ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, "all"),
        ({"tokens": "last"}, "last"),
        ({"tokens": {"slice": [-2, None, None]}}, slice(-2, None)),
        ({"tokens": None}, "all"),
        ({"parts": [{"tokens": "last"}]}, "last"),
        ({"parts": [{"tokens": "last"}, {"parts": [{"tokens": "last"}]}]}, "last"),
        ({"parts": 3}, "all"),
    ],
)
def test_maps_act_by_default_on_what_they_were_fitted_for(metadata, expected):
    model, maps = steered("llama")
    maps = lineas.SteeringMaps(dict(maps), metadata)
    assert fitted_tokens(maps.metadata) == expected
    with maps.attach(model) as handle:
        assert handle.tokens == expected
    with maps.attach(model, tokens="all") as handle:
        assert handle.tokens == "all"


@pytest.mark.parametrize(
    "tokens",
    [
        *("first", 3, True, ["last"], {}, {"a": 1}, {"callable": 3}, {"slice": [0, 1, 1], "callable": "third"}),
        *({"slice": part} for part in (3, [], ["a", None, None], [1, 2, 3, 4], [0, 1, 0])),
    ],
)
def test_metadata_that_name_no_tokens_are_refused(tokens):
    model, maps = steered("llama")
    for metadata in ({"tokens": tokens}, {"parts": [{"tokens": "all"}, {"tokens": tokens}]}):
        wrong = lineas.SteeringMaps(dict(maps), metadata)
        with pytest.raises(ValueError, match="^metadata name the tokens " + re.escape(repr(tokens))):
            wrong.attach(model)
        with pytest.raises(ValueError, match="tokens"):
            wrong.fold(model)
        with wrong.attach(model, tokens="last") as handle:
            assert handle.tokens == "last"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"tokens": {"callable": "third"}},
            r"^these maps were fitted for the tokens that third selects, which metadata",
        ),
        (
            {"parts": [{"tokens": "last"}, {"tokens": {"slice": [0, 2, None]}}]},
            r"^these maps are composed of .* tokens='last', tokens=slice\(0, 2, None\); pass tokens= to say which",
        ),
    ],
)
def test_what_metadata_cannot_say_must_be_said(metadata, message):
    model, maps = steered("llama")
    maps = lineas.SteeringMaps(dict(maps), metadata)
    with pytest.raises(ValueError, match=message):
        maps.attach(model)
    with maps.attach(model, tokens=slice(np.int64(0), None)) as handle:
        assert handle.tokens == slice(0, None) and type(handle.tokens.start) is int
        assert repr(handle) == "Handle(3 modules, strength=1.0, tokens=slice(0, None, None))"
