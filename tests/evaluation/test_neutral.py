"""Prices on neutral texts, against plain transformers and torch: one text at a time, without padding."""

import re

import evaluations as ev
import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import hooks_on, language_model, random_maps
from evaluations import NEUTRAL, TOKENIZER, by_hand, logits_in_steps, logits_of, price, talks
from fits import named, snapshot
from transformers import T5Config, T5ForConditionalGeneration

import lineas
from lineas.evaluation import neutral

CLOSE = {"rtol": 1e-4, "atol": 2e-6}


def encoded(texts=NEUTRAL, tokenizer=TOKENIZER):
    return tokenizer(texts)["input_ids"]


def expected(model, maps, strength=1.0, rows=None, **settings):
    found = []
    for ids in encoded() if rows is None else rows:
        before = logits_of(model, ids)
        with maps.attach(model, strength, **settings):
            found.append(by_hand(ids, before, logits_of(model, ids)))
    return found


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prices_are_those_of_texts_alone(family, side):
    model, maps = language_model(family)
    found = price(model, maps, tokenizer=zoo.tokenizer(padding_side=side), strengths=[0.5, 2])
    assert found.shape == (3, len(NEUTRAL), len(ev.FIELDS))
    for k, strength in enumerate([0.5, 2], start=1):
        np.testing.assert_allclose(found[k], expected(model, maps, strength), **CLOSE)
    assert (found[1:, :, 4:6] > 1e-3).all()  # maps that change something


def test_the_loss_is_that_of_transformers():
    model, maps = language_model("llama")
    found = price(model, maps)
    for row, ids in zip(found[1], encoded(), strict=True):
        batch = torch.tensor([ids])
        with torch.no_grad():
            plain = model(batch, labels=batch).loss
            with maps.attach(model):
                steered = model(batch, labels=batch).loss
        np.testing.assert_allclose(row[2:4] / row[1], [float(steered), float(plain)], rtol=1e-5)


def test_the_unsteered_model_has_a_price_of_exactly_0():
    model, maps = language_model("llama")
    found = price(model, maps, strengths=[1e-30, 1])
    assert (found[0, :, 4:] == 0).all()
    assert (found[:, :, 3] == found[0, :, 2]).all()  # the loss of the unsteered model stands at every point
    np.testing.assert_array_equal(found[1, :, 4:6], 0)  # at a strength that float32 has no room for


def test_small_prices_keep_their_digits():
    model, maps = language_model("llama")
    found = price(model, maps, strengths=[0.01, 0.02])
    # Divergences are quadratic in small changes.
    np.testing.assert_allclose(found[2, :, 4] / found[1, :, 4], 4, rtol=0.1)
    np.testing.assert_allclose(found[1, :, 4], np.array(expected(model, maps, 0.01))[:, 4], rtol=0.02)
    assert (found[1, :, 4] < 1e-3).all()


def test_maps_that_are_attached_already_are_part_of_the_model():
    model, maps = language_model("llama")
    others = random_maps({name: one.d for name, one in maps.items()}, seed=5)
    with others.attach(model, 0.7):
        found = price(model, maps)
        np.testing.assert_allclose(found[1], expected(model, maps), **CLOSE)
        assert len(lineas.attached(model)) == 1


def test_models_in_bfloat16_have_prices_in_float32():
    model, maps = language_model("llama")
    model = model.bfloat16()
    found = price(model, maps)
    assert np.isfinite(found).all() and (found[1, :, 4] > 1e-3).all()
    np.testing.assert_allclose(found[1, :, :5], np.array(expected(model, maps))[:, :5], rtol=0.2, atol=0.05)


# --- tokens that depend on the prompt ---------------------------------------------------------------------------------


def late(tokens):
    """Every other token from the last of the prompt on."""
    since = tokens.positions - tokens.prompt_length[:, None]
    return (since >= -1) & (since % 2 == 1)


SELECTIONS = ["generated", "prompt", "last", slice(-2, None), slice(-3, -1), late]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", SELECTIONS, ids=named)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_first_half_of_a_text_is_its_prompt(family, tokens, side):
    model, maps = language_model(family)
    found = price(model, maps, tokenizer=zoo.tokenizer(padding_side=side), tokens=tokens)[1]
    for row, ids in zip(found, encoded(), strict=True):
        prompt = len(ids) // 2
        before = logits_of(model, ids)[prompt - 1 :]
        with maps.attach(model, tokens=tokens):
            after = logits_in_steps(model, ids, prompt)
        np.testing.assert_allclose(row, by_hand(ids, before, after), **CLOSE)
    assert found[:, 4].max() > 1e-3


@pytest.mark.parametrize("tokens", [slice(1, 3), slice(2, None, 2)], ids=named)
def test_slices_from_the_start_need_no_prompt(tokens):
    model, maps = language_model("llama")
    np.testing.assert_allclose(price(model, maps, tokens=tokens)[1], expected(model, maps, tokens=tokens), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", ["generated", "prompt", late], ids=named)
def test_the_prompt_of_a_conversation_is_what_stands_before_the_answer(tokens, side):
    model, maps = language_model("llama")
    data, tokenizer = talks(4, seed=3), ev.chat_tokenizer(side)
    found = price(model, maps, data, tokenizer=tokenizer, tokens=tokens)[1]
    for row, talk in zip(found, data, strict=True):
        ids = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
        prompt = len(tokenizer.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
        before = logits_of(model, ids)[prompt - 1 :]
        with maps.attach(model, tokens=tokens):
            after = logits_in_steps(model, ids, prompt)
        np.testing.assert_allclose(row, by_hand(ids, before, after), **CLOSE)


def test_conversations_without_an_answer_are_halved_like_texts():
    model, maps = language_model("llama")
    tokenizer, asked = ev.chat_tokenizer(), talks(3, seed=3, answered=False)
    ids = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=True)["input_ids"] for t in asked]
    settings = {"tokenizer": tokenizer, "tokens": "generated"}
    answered = talks(2, seed=4)
    alone = price(model, maps, ids, tokens="generated")
    np.testing.assert_allclose(price(model, maps, asked, **settings), alone, **CLOSE)
    np.testing.assert_allclose(price(model, maps, [*answered, *asked], **settings)[:, 2:], alone, **CLOSE)


def test_maps_act_on_the_tokens_that_they_were_fitted_for():
    model, maps = language_model("llama")
    fitted = lineas.SteeringMaps(maps, {"tokens": "generated"})
    np.testing.assert_array_equal(price(model, fitted), price(model, maps, tokens="generated"))
    np.testing.assert_array_equal(price(model, fitted, tokens="all"), price(model, maps))


# --- instructions -----------------------------------------------------------------------------------------------------

INSTRUCTION = "we never say awful"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make", [lambda side: zoo.tokenizer(padding_side=side), ev.bos_tokenizer])
def test_an_instruction_before_texts(make, side):
    model, maps = language_model("gpt2")
    tokenizer = make(side)
    found = price(model, maps, tokenizer=tokenizer, instruction=INSTRUCTION)[1]
    added = TOKENIZER(INSTRUCTION)["input_ids"]
    for row, text in zip(found, NEUTRAL, strict=True):
        ids, words = tokenizer(text)["input_ids"], TOKENIZER(text)["input_ids"]
        start = ids[: len(ids) - len(words)]  # nothing, or the beginning of a text
        before = logits_of(model, ids)[len(start) :]
        after = logits_of(model, [*start, *added, *words])[-len(words) :]
        np.testing.assert_allclose(row, by_hand(words, before, after), **CLOSE)
        assert row[0] == len(words)


def test_an_instruction_is_the_system_message_of_a_conversation():
    model, maps = language_model("llama")
    tokenizer, data = ev.chat_tokenizer(), talks(3, seed=3)
    data.append([{"role": "system", "content": "the day"}, *talks(1, seed=8)[0]])
    found = price(model, maps, data, tokenizer=tokenizer, instruction=INSTRUCTION)[1]
    for k, (row, talk) in enumerate(zip(found, data, strict=True)):
        content = INSTRUCTION if k < 3 else f"{INSTRUCTION}\n\nthe day"
        said = [{"role": "system", "content": content}, *talk[k == 3 :]]
        ids, prefixed = (tokenizer.apply_chat_template(t, return_dict=True)["input_ids"] for t in (talk, said))
        # With a system message in both, its words are the same up to the end.
        shared = len(ids) - (1 if k == 3 else 0)
        before, after = logits_of(model, ids)[-shared:], logits_of(model, prefixed)[-shared:]
        np.testing.assert_allclose(row, by_hand(ids, before, after), **CLOSE)


def test_an_instruction_takes_nothing_of_a_text_that_is_cut():
    model, maps = language_model("llama")
    words = [" ".join(text.split()[:4]) for text in NEUTRAL]
    settings = {"instruction": INSTRUCTION}
    np.testing.assert_array_equal(price(model, maps, max_length=4, **settings), price(model, maps, words, **settings))
    tokenizer, data = ev.chat_tokenizer(), [talk for talk in talks(6, seed=3)]
    ids = [tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"] for talk in data]
    found = price(model, maps, data, tokenizer=tokenizer, max_length=6, **settings)[1]
    added = tokenizer.apply_chat_template([{"role": "system", "content": INSTRUCTION}], return_dict=True)["input_ids"]
    for row, text in zip(found, ids, strict=True):
        kept = text[:6]
        after = logits_of(model, [*added, *kept])[len(added) :]
        np.testing.assert_allclose(row, by_hand(kept, logits_of(model, kept), after), **CLOSE)


@pytest.mark.parametrize(
    ("data", "tokenizer", "kind", "message"),
    [
        (encoded(), TOKENIZER, TypeError, "instruction: it is put before texts and conversations, not before token"),
        (["day"], ev.bos_tokenizer(), ValueError, r"neutral\[0\] has less than 2 tokens in common with itself after"),
    ],
)
def test_instructions_that_cannot_be_put_before_a_text(data, tokenizer, kind, message):
    model, maps = language_model("llama")
    with pytest.raises(kind, match=message):
        price(model, maps, data, tokenizer=tokenizer, instruction=INSTRUCTION)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [1, 3 * zoo.VOCABULARY, 20 * zoo.VOCABULARY, 55 * zoo.VOCABULARY])
@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_the_size_of_batches_changes_no_number(numbers, tokens, monkeypatch):
    model, maps = language_model("gpt2")
    settings = {"tokens": tokens, "strengths": [0.5, 1], "instruction": INSTRUCTION}
    whole = price(model, maps, **settings)
    sizes = []
    monkeypatch.setattr(neutral, "_NUMBERS", numbers)
    model.register_forward_pre_hook(
        lambda model, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    np.testing.assert_allclose(price(model, maps, **settings), whole, **CLOSE)
    # More than one text at a time only where the logits of all of them are within bounds, also after an instruction.
    assert all(rows == 1 or rows * tokens * zoo.VOCABULARY <= numbers for rows, tokens in sizes)
    assert (max(rows for rows, _ in sizes) > 1) == (numbers >= 20 * zoo.VOCABULARY)


def test_points_together_are_what_they_are_alone():
    model, maps = language_model("llama")
    other = random_maps({name: one.d for name, one in maps.items()}, seed=5)
    settings = {"instruction": {"a": "never", "b": INSTRUCTION}}
    together = price(model, {"one": maps, "two": other}, strengths=[2, 0.5], **settings)
    points = [("one", maps, 2), ("one", maps, 0.5), ("two", other, 2), ("two", other, 0.5)]
    for k, (name, some, strength) in enumerate(points, start=3):
        np.testing.assert_array_equal(together[k], price(model, {name: some}, strengths=[strength])[1])
    for k, name in enumerate("ab", start=1):
        alone = price(model, maps, instruction={name: settings["instruction"][name]})
        np.testing.assert_array_equal(together[k], alone[1])


def test_one_pass_of_the_unsteered_model_serves_all_points():
    model, maps = language_model("llama")
    calls = []
    handle = model.register_forward_pre_hook(lambda *args: calls.append(len(lineas.attached(model))))
    price(model, maps, strengths=[0.5, 1, 2])
    handle.remove()
    assert calls == [0, 1, 1, 1]


def test_token_ids_arrays_and_generators_are_texts_too():
    model, maps = language_model("llama")
    found = price(model, maps)
    for data in (encoded(), [np.array(ids) for ids in encoded()], np.array(NEUTRAL), (t for t in NEUTRAL)):
        np.testing.assert_array_equal(price(model, maps, data), found)
    np.testing.assert_array_equal(price(model, maps, encoded(), tokenizer=None), found)


def test_long_texts_are_cut():
    model, maps = language_model("llama")
    cut = [ids[:3] for ids in encoded()]
    np.testing.assert_array_equal(price(model, maps, max_length=3), price(model, maps, cut))


# --- what cannot be measured ------------------------------------------------------------------------------------------


class Padded(torch.nn.Module):
    """A model with more logits than its configuration says."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        out.logits = torch.nn.functional.pad(out.logits, (0, 7), value=-30.0)
        return out


def test_logits_may_be_more_than_the_vocabulary():
    model, maps = language_model("llama")
    wrapped = Padded(model)
    wrapped.config = object()  # nothing that tells the size of the vocabulary
    names = maps.rename(prefix="model.")
    np.testing.assert_allclose(price(wrapped, names), price(model, maps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strength", [1e30, 3e38])
def test_logits_that_are_not_finite_are_an_error(strength):
    model, maps = language_model("llama")
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=re.escape(f"neutral: the logits of 'maps' at strength {strength:g} are not f")
    ):
        price(model, maps, strengths=[1, strength])
    assert snapshot(model) == before


def test_an_unsteered_model_that_is_broken_is_named():
    model, maps = language_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"neutral: the logits of 'unsteered' are not finite"):
        price(model, maps)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ([], ValueError, "neutral is empty"),
        ("the day", TypeError, "neutral is one string: give a list of texts"),
        (3, TypeError, "neutral must be texts, .* got int"),
        (["the day", 3], TypeError, r"neutral\[1\] must be a text like the entries before it, got int"),
        (["the day", ""], ValueError, r"neutral\[1\] has no tokens"),
        (["the day", "day"], ValueError, r"neutral\[1\] must have at least 2 tokens, so that one is predicted, got 1"),
        ({"input_ids": torch.ones(2, 3)}, TypeError, "neutral must be texts, conversations or token ids, got batches"),
        (torch.ones(2, 3, dtype=torch.long), TypeError, "neutral must be texts, .*, got batches"),
        ([{"role": "user", "content": "the day"}], TypeError, "neutral is one conversation: give a list of them"),
        (talks(2, seed=1), ValueError, r"neutral\[0\] is a conversation, and .* has no chat template"),
    ],
)
def test_texts_that_are_none(data, kind, message):
    model, maps = language_model("llama")
    with pytest.raises(kind, match=message):
        price(model, maps, data)
    assert hooks_on(model) == 0


def test_models_of_which_no_price_is_known():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=zoo.VOCABULARY, **sizes))
    maps = lineas.SteeringMaps({"decoder.block.0.layer.2.layer_norm": lineas.AffineMap.identity(8)})
    with pytest.raises(ValueError, match=r"neutral: .* this one has an encoder and a decoder"):
        price(model, maps)
    model, maps = language_model("llama")
    base = maps.rename(lambda name: name.removeprefix("model."))
    with pytest.raises(ValueError, match=r"must give logits \[batch, tokens, vocabulary\], .* got BaseModelOutput"):
        price(model.model, base)
    assert hooks_on(model) == 0


def test_texts_need_a_tokenizer():
    model, maps = language_model("llama")
    with pytest.raises(ValueError, match="neutral holds texts: pass tokenizer="):
        price(model, maps, tokenizer=None)
