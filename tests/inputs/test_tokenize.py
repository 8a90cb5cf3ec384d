"""Texts, conversations and token ids become rows of tokens, and rows batches."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from lineas.inputs.prompts import read

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
TALK = [{"role": "user", "content": "the weather today"}, {"role": "assistant", "content": "was very good"}]


def chatty(template=CHAT, **settings):
    tokenizer = zoo.tokenizer(**settings)
    tokenizer.add_tokens(["<user>", "<assistant>", "<system>"])
    tokenizer.chat_template = template
    return tokenizer


def with_bos(**settings):
    """A tokenizer that puts a beginning-of-text token before every text, as Llama's does."""
    tokenizer = chatty("<bos> " + CHAT, **settings)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer("the day").input_ids[0] == tokenizer.bos_token_id
    return tokenizer


def rows(data, tokenizer=None, **settings):
    """Token ids of every prompt, without padding."""
    batches = read(data, "source", tokenizer=tokenizer, **settings).parts()
    return [
        ids[mask != 0].tolist()
        for batch in batches
        for ids, mask in zip(batch.kwargs["input_ids"], batch.mask, strict=True)
    ]


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_conversation_is_rendered_by_the_chat_template():
    tokenizer = chatty()
    asked, answered = TALK[:1], TALK
    found = rows([asked, answered], tokenizer)
    assert found[0] == tokenizer("<user> the weather today <eos> <assistant>").input_ids
    assert found[1] == tokenizer("<user> the weather today <eos> <assistant> was very good <eos>").input_ids


def test_what_stands_before_the_last_answer_is_the_prompt():
    talk = [{"role": "system", "content": "a"}, *TALK, {"role": "user", "content": "why not"}]
    (batch,) = read([TALK, talk, [*talk, {"role": "assistant", "content": "so"}]], "source", tokenizer=chatty()).parts()
    assert batch.prompt_length.tolist() == [6, 18, 18]
    assert batch.mask.sum(dim=1).tolist() == [10, 18, 20]


def test_prompts_without_an_answer_have_no_length_of_their_own():
    (batch,) = read([TALK[:1]], "source", tokenizer=chatty()).parts()
    assert batch.prompt_length is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_are_cut_where_the_tokenizer_cuts(side):
    tokenizer = chatty()
    tokenizer.truncation_side = side
    whole = rows([TALK], tokenizer)[0]
    (batch,) = read([TALK], "source", tokenizer=tokenizer, max_length=7).parts()
    assert batch.kwargs["input_ids"][0].tolist() == (whole[-7:] if side == "left" else whole[:7])
    assert batch.prompt_length.tolist() == [3 if side == "left" else 6]


def test_what_only_a_generated_answer_starts_with_is_no_part_of_the_prompt():
    thinking = CHAT.replace("<assistant> ' }}{% endif %}", "<assistant> today ' }}{% endif %}")
    (batch,) = read([TALK], "source", tokenizer=chatty(thinking)).parts()
    assert batch.prompt_length.tolist() == [6]


def test_a_template_that_does_not_go_on_from_its_prompt_is_refused():
    odd = "{% if not add_generation_prompt and messages|length > 1 %}<system> {% endif %}" + CHAT
    with pytest.raises(ValueError, match=r"^source\[0\]: the chat template does not render the answer after its "):
        rows([TALK], chatty(odd))


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"^source\[0\] is a conversation, and \w+ has no chat template"):
        rows([TALK], zoo.tokenizer())
    with pytest.raises(ValueError, match=r"^source holds conversations: pass tokenizer="):
        rows([TALK])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (TALK, "^source is one conversation: give a list of them"),
        (TALK[0], "^source is one message: give a list of conversations, which are lists of messages"),
        ([TALK, "a text"], r"^source\[1\] must be a conversation like the entries before it, got str"),
        (["a text", TALK], r"^source\[1\] must be a text like the entries before it, got list"),
        ([3, 4], "^source is one list of token ids: give a list of them"),
        ([[3, 4], [5.0]], r"^source\[1\] must be whole numbers where it is token ids, got 5.0 at index 0"),
        ([[3, 4], []], r"^source\[1\] must be a list of token ids like the entries before it, got list"),
    ],
)
def test_what_is_no_list_of_prompts_of_one_kind_is_refused(data, message):
    with pytest.raises(TypeError, match=message):
        rows(data, chatty())


# --- the beginning of a text ------------------------------------------------------------------------------------------


def test_no_beginning_of_text_token_is_put_twice():
    tokenizer = with_bos()
    bos = tokenizer.bos_token_id
    rendered = tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith("<bos>") and tokenizer(rendered).input_ids[:2] == [bos, bos]
    by_us, by_hand, plain = rows([TALK[:1]], tokenizer)[0], *rows([rendered, "the day"], tokenizer)
    assert by_us == by_hand and by_us[0] == bos != by_us[1]
    assert plain == tokenizer("the day").input_ids


def test_two_that_the_user_wrote_stay_where_the_tokenizer_adds_none():
    tokenizer = chatty()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    assert rows(["<bos> <bos> the day"], tokenizer)[0][:2] == [bos, bos]


# --- token ids --------------------------------------------------------------------------------------------------------


@given(lists=st.lists(st.lists(st.integers(3, 40), min_size=1, max_size=6), min_size=1, max_size=5))
def test_token_ids_are_padded_and_come_back(lists):
    assert rows(lists) == lists
    assert rows([np.array(ids) for ids in lists]) == lists
    (batch,) = read(lists, "source").parts()
    assert batch.mask.shape == (len(lists), max(map(len, lists)))
    assert (batch.mask[:, 0] == 1).all()  # on the right, without a tokenizer
    (left,) = read(lists, "source", tokenizer=zoo.tokenizer(padding_side="left")).parts()
    assert (left.mask[:, -1] == 1).all()


def test_token_ids_give_what_their_texts_give():
    texts, tokenizer = zoo.texts(4), zoo.tokenizer()
    (of_texts,) = read(texts, "source", tokenizer=tokenizer).parts()
    (of_ids,) = read([tokenizer(text).input_ids for text in texts], "source", tokenizer=tokenizer).parts()
    assert torch.equal(of_texts.kwargs["input_ids"], of_ids.kwargs["input_ids"])
    assert rows([[5, 6, 7], [8]], max_length=2) == [[5, 6], [8]]


def test_lists_of_tensors_are_batches_as_before():
    batches = read([torch.ones(2, 3), torch.ones(1, 3)], "source").parts()
    assert [len(batch.args[0]) for batch in batches] == [2, 1]
