"""Which tokens attached maps act on: against hand-written masks, rows by themselves, and with and without a cache."""

import copy

import models_zoo as zoo
import pytest
import torch
from attached import GREEDY, Pools, acted_on, hooks_on, ids, logits, random_maps, steered
from caches import cache_of, cached
from fits import named
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from lineas.hooks.tokens import Tokens

FAMILIES = list(zoo.LANGUAGE_MODELS)
GREEDY4 = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def third(tokens):
    """Every third token, counted in the row."""
    return tokens.positions % 3 == 0


SELECTIONS = ["last", "prompt", "generated", slice(1, 4), slice(-3, -1), slice(2, None, 2), third]


# --- against masks written by hand ------------------------------------------------------------------------------------

# Rows of 5 and 3 tokens.
PLAIN = [
    ("last", [0, 0, 0, 0, 1], [0, 0, 1]),
    ("prompt", [1, 1, 1, 1, 1], [1, 1, 1]),
    ("generated", [0, 0, 0, 0, 0], [0, 0, 0]),
    (slice(1, 4), [0, 1, 1, 1, 0], [0, 1, 1]),
    (slice(-3, -1), [0, 0, 1, 1, 0], [1, 1, 0]),
    (slice(-4, None), [0, 1, 1, 1, 1], [1, 1, 1]),
    (slice(None, -2), [1, 1, 1, 0, 0], [1, 0, 0]),
    (slice(2, None, 2), [0, 0, 1, 0, 1], [0, 0, 1]),
    (slice(-2, None, 2), [0, 0, 0, 1, 0], [0, 1, 0]),
    (slice(4, None), [0, 0, 0, 0, 1], [0, 0, 0]),
    (third, [1, 0, 0, 1, 0], [1, 0, 0]),
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("tokens", "long", "short"), PLAIN, ids=named)
def test_a_plain_pass_maps_the_selected_tokens_of_each_row_and_no_padding(tokens, long, short, side):
    model, maps = steered("llama")
    batch = ids([5, 3], side)
    with maps.attach(model, tokens=tokens):
        [found] = acted_on(model, maps, lambda: model(**batch))
    assert found == [long, [0, 0, *short] if side == "left" else [*short, 0, 0]]


# What three more passes of one token each bring, for the same rows.
LATER = [
    ("last", [1] * 3, [1] * 3),
    ("prompt", [0] * 3, [0] * 3),
    ("generated", [1] * 3, [1] * 3),
    (slice(1, 4), [0, 0, 0], [1, 0, 0]),
    (slice(-3, -1), [0] * 3, [0] * 3),
    (slice(-1, None), [1] * 3, [1] * 3),
    (slice(2, None, 2), [0, 1, 0], [0, 1, 0]),
    (slice(6, None), [0, 1, 1], [0, 0, 0]),
    (third, [0, 1, 0], [1, 0, 0]),
]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("tokens", "long", "short"), LATER, ids=named)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_positions_go_on_through_the_cache(family, tokens, long, short, static):
    model, maps = steered(family)
    batch = ids([5, 3])
    extra = {"cache_implementation": "static"} if static else {}
    with maps.attach(model, tokens=tokens):
        found = acted_on(model, maps, lambda: model.generate(**batch, **GREEDY4, **extra))
    first = [(a, b) for selection, a, b in PLAIN if selection == tokens]
    assert not first or found[0] == [first[0][0], [0, 0, *first[0][1]]]
    assert found[1:] == [[[a], [b]] for a, b in zip(long, short, strict=True)]


# --- the same text, however it is generated ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", SELECTIONS, ids=named)
def test_the_same_text_with_and_without_a_cache_together_and_alone(family, tokens):
    model, maps = steered(family)
    lengths = [7, 4, 9]
    batch = ids(lengths)
    with maps.attach(model, tokens=tokens):
        cached, uncached = (
            model.generate(**batch, **GREEDY, use_cache=cache)[:, 9:].tolist() for cache in (True, False)
        )
        alone = [
            model.generate(batch["input_ids"][i : i + 1, 9 - n :], **GREEDY)[0, n:].tolist()
            for i, n in enumerate(lengths)
        ]
    assert cached == uncached == alone
    assert hooks_on(model) == 0


def test_selections_give_different_texts():
    model, maps = steered("llama")
    batch, found = ids([9, 9, 9, 9]), []
    for tokens in ["all", *SELECTIONS]:
        with maps.attach(model, tokens=tokens):
            found.append(str(model.generate(**batch, **GREEDY).tolist()))
    found.append(str(model.generate(**batch, **GREEDY).tolist()))
    assert len(set(found)) >= len(SELECTIONS)  # "last" and another may agree by chance; not most of them


GENERATIONS = {
    "beams": {"num_beams": 3},
    "beams, uncached": {"num_beams": 3, "use_cache": False},
    "several texts": {"num_beams": 4, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("tokens", ["last", "prompt", "generated", slice(-2, 20)], ids=named)
@pytest.mark.parametrize("way", list(GENERATIONS))
def test_other_ways_to_generate_give_each_row_what_it_gets_alone(way, tokens):
    model, maps = steered("llama")
    lengths, how = [6, 4], {**GREEDY, **GENERATIONS[way]}
    batch, count = ids(lengths), how.get("num_return_sequences", 1)
    with maps.attach(model, tokens=tokens):
        together = model.generate(**batch, **how)[:, 6:].tolist()
        how = {key: value for key, value in how.items() if key not in ("use_cache", "cache_implementation")}
        alone = [
            row
            for i, n in enumerate(lengths)
            for row in model.generate(batch["input_ids"][i : i + 1, 6 - n :], **how)[:, n:].tolist()
        ]
    assert len(together) == 2 * count and together == alone


@pytest.mark.parametrize("tokens", ["last", "prompt", "generated", slice(-2, 9)], ids=named)
def test_several_tokens_tried_at_once_give_the_same_text(tokens):
    model, maps = steered("llama")
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    how = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12}
    passes = []
    with maps.attach(model, tokens=tokens):
        expected = model.generate(prompt, **how)
        look = model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        found = model.generate(prompt, **how, prompt_lookup_num_tokens=3)
        look.remove()
    assert found.tolist() == expected.tolist()
    assert any(1 < length < 10 for length in passes[1:])  # candidates were tried


def test_embeddings_count_like_token_ids():
    model, maps = steered("qwen2")
    batch = ids([6, 3])
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    for tokens in ("last", "prompt", slice(1, 7)):
        with maps.attach(model, tokens=tokens):
            expected = model.generate(**batch, **GREEDY)[:, 6:]
            assert torch.equal(model.generate(**embedded, **GREEDY), expected)


def test_a_loop_by_hand_lets_the_model_make_its_cache():
    model, maps = steered("llama")
    batch = ids([5, 3])

    def loop():
        out = model(**batch)
        mask = batch["attention_mask"]
        for _ in range(2):
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            token = out.logits[:, -1:].argmax(dim=-1)
            # By position, as far as they go.
            out = model(token, mask, **cached(cache_of(out)))

    with maps.attach(model, tokens="generated"):
        assert acted_on(model, maps, loop) == [[[0] * 5] * 2, [[1], [1]], [[1], [1]]]


def test_generations_in_turn_keep_their_own_positions():
    model, maps = steered("llama")

    def loop():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache, length in zip(caches, (5, 3), strict=True):
            model(torch.full((1, length), 7), **cached(cache))
        for _ in range(2):
            for cache in caches:
                model(torch.tensor([[8]]), **cached(cache))

    with maps.attach(model, tokens=slice(4, 6)):
        assert acted_on(model, maps, loop) == [
            [[0, 0, 0, 0, 1]],
            [[0, 0, 0]],
            [[1]],  # position 5 of the first
            [[0]],  # 3 of the second
            [[0]],
            [[1]],
        ]


def test_a_conversation_that_goes_on_in_its_cache_has_a_new_prompt():
    model, maps = steered("llama")
    cache = DynamicCache(config=model.config)
    with maps.attach(model, tokens="last"):
        first = model.generate(torch.full((1, 4), 7), **cached(cache), **GREEDY)
        turn = torch.cat([first, torch.tensor([[9, 8, 7]])], dim=1)
        # 3 new tokens, and the last generated one, which was never passed through the model.
        found = acted_on(
            model,
            maps,
            lambda: model.generate(turn, **cached(cache), **{**GREEDY, "max_new_tokens": 2, "min_new_tokens": 2}),
        )
    assert found == [[[0, 0, 0, 1]], [[1]]]


def test_a_cache_filled_beforehand_without_the_maps_counts():
    model, maps = steered("llama")
    text = torch.randint(3, zoo.VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(3))
    filled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text[:, :5], **cached(filled))
    with maps.attach(model, tokens=slice(6, 9)):
        found = acted_on(model, maps, lambda: model.generate(text, **cached(copy.deepcopy(filled)), **GREEDY))
        assert found[0] == [[0, 1, 1]] and [row[0] for row in found[1:]] == [[1], [0], [0], [0], [0]]
    with maps.attach(model, tokens="prompt"):
        assert acted_on(model, maps, lambda: model(text[:, 5:], **cached(filled))) == [[[1, 1, 1]]]


def test_a_prompt_in_parts_is_an_error_where_its_end_matters():
    model, maps = steered("llama")
    batch, name = ids([9, 7]), next(iter(maps))
    for tokens, said in (("last", "'last'"), (slice(-2, None), r"slice\(-2, None, None\)")):
        message = rf"^{name}: tokens={said} must know where the prompt ends, but it came in several passes \(prefill_"
        with maps.attach(model, tokens=tokens), pytest.raises(ValueError, match=message):
            model.generate(**batch, **GREEDY, prefill_chunk_size=3)
    for tokens in (slice(2, 8), third):
        with maps.attach(model, tokens=tokens):
            expected = model.generate(**batch, **GREEDY)
            assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=3), expected)


# --- rows by themselves, by chance ------------------------------------------------------------------------------------

slices = st.builds(
    slice,
    st.none() | st.integers(-6, 6),
    st.none() | st.integers(-6, 10),
    st.none() | st.integers(1, 3),
)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    slices | st.sampled_from(["last", "prompt"]),
)
def test_any_slice_selects_from_a_padded_row_what_python_selects_from_a_list(lengths, side, tokens):
    model, maps = steered("llama")
    batch, longest = ids(lengths, side), max(lengths)
    with maps.attach(model, tokens=tokens):
        [found] = acted_on(model, maps, lambda: model(**batch))
    part = {"last": slice(-1, None), "prompt": slice(None)}.get(tokens, tokens) if isinstance(tokens, str) else tokens
    for row, n in zip(found, lengths, strict=True):
        positions = range(n)[part]
        pad = [0] * (longest - n)
        expected = [int(k in positions) for k in range(n)]
        assert row == (pad + expected if side == "left" else expected + pad)


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=3),
    st.sampled_from(FAMILIES),
    slices | st.sampled_from(SELECTIONS),
    st.booleans(),
)
def test_rows_of_a_batch_get_the_text_they_get_alone(lengths, family, tokens, cache):
    model, maps = steered(family)
    batch, longest, how = ids(lengths), max(lengths), {**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3}
    with maps.attach(model, tokens=tokens):
        together = model.generate(**batch, **how, use_cache=cache)[:, longest:].tolist()
        alone = [
            model.generate(batch["input_ids"][i : i + 1, longest - n :], **how)[0, n:].tolist()
            for i, n in enumerate(lengths)
        ]
    assert together == alone


# --- callables --------------------------------------------------------------------------------------------------------


def test_a_callable_is_told_ids_positions_prompt_step_and_arguments():
    model, maps = steered("llama")
    batch, seen = ids([5, 3]), []

    def look(tokens):
        seen.append(tokens)
        return tokens.ids == 7

    with maps.attach(model, tokens=look) as handle:
        assert handle.tokens is look
        out = model.generate(**batch, **{**GREEDY, "max_new_tokens": 3, "min_new_tokens": 3})
    assert [tokens.step for tokens in seen] == [0, 1, 2] and all(type(one) is Tokens for one in seen)
    assert seen[0].positions.tolist() == [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]
    assert seen[2].positions.tolist() == [[6], [4]]
    assert seen[0].mask.tolist() == batch["attention_mask"].bool().tolist() and seen[2].mask.all()
    assert all(one.prompt_length.tolist() == [5, 3] for one in seen)
    assert torch.equal(torch.cat([one.ids for one in seen], dim=1), out[:, :-1])
    assert seen[1].kwargs["use_cache"] is True


def test_a_callable_may_give_an_array():
    model, maps = steered("llama")
    with maps.attach(model, tokens=lambda tokens: tokens.positions.numpy() == 1):
        assert acted_on(model, maps, lambda: model(**ids([3, 2]))) == [[[0, 1, 0], [0, 0, 1]]]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda tokens: None, TypeError, r"must return a boolean tensor or array, got NoneType"),
        (lambda tokens: tokens.positions, TypeError, r"must return booleans, got torch.int64: to weigh tokens, make"),
        (
            lambda tokens: tokens.mask[0],
            ValueError,
            r"must return the shape \[2, 3\] of the tokens of this pass, got \[3\]",
        ),
    ],
)
def test_what_a_callable_must_give(answer, error, message):
    model, maps = steered("llama")
    plain = logits(model, ids([3, 2]))
    with maps.attach(model, tokens=answer) as handle:
        with pytest.raises(error, match=r"^tokens: <lambda> " + message):
            model(**ids([3, 2]))
        handle.strength = 0  # nothing of the failed pass is left
        assert torch.equal(logits(model, ids([3, 2])), plain)


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            "first",
            ValueError,
            r"^tokens must be 'all', 'last', 'prompt', 'generated', a slice or a callable, got 'first'",
        ),
        (3, TypeError, r"^tokens must be 'all', 'last', 'prompt', 'generated', a slice or a callable, got int"),
        (slice(0.5, None), TypeError, r"^tokens: the start of a slice must be an integer or None, got 0.5"),
        (slice(None, True), TypeError, r"^tokens: the stop of a slice must be an integer or None, got True"),
        (slice(None, None, -1), ValueError, r"^tokens: the step of a slice must be above 0, got -1"),
    ],
)
def test_a_selection_that_is_none(tokens, error, message):
    model, maps = steered("llama")
    with pytest.raises(error, match=message):
        maps.attach(model, tokens=tokens)
    assert hooks_on(model) == 0


def test_a_part_of_the_model_cannot_be_called_by_itself():
    model, maps = steered("llama")
    name = next(iter(maps))
    message = rf"^{name} was run without LlamaForCausalLM, whose arguments tell its tokens: call the model that"
    with maps.attach(model, tokens="last"):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                model.model(**ids([3]))
            logits(model, ids([3]))
    with random_maps({name.removeprefix("model."): 16}).attach(model.model, tokens="last"):
        logits(model, ids([3]))  # the part that is called may carry them


def test_outputs_without_the_tokens_of_the_model_name_the_module():
    cnn, batch = zoo.cnn(), ids([3, 2])
    with random_maps({"conv1": 6}).attach(cnn, tokens="last"):
        message = r"^conv1: tokens='last' needs a model that takes text, and it was called without input_ids"
        with pytest.raises(ValueError, match=message):
            cnn(zoo.images(2))

    for part, message in (
        (
            "rows",
            r"^rows: tokens='last' needs an output \[batch, tokens, channels\], got the shape \[2, 4\]; tokens='all",
        ),
        ("few", r"^few: tokens='last' needs an output for the 2 x 3 tokens .* with, got the shape \[2, 2, 4\]"),
    ):
        model = Pools()
        with random_maps({part: 4}).attach(model, tokens="last"), pytest.raises(ValueError, match=message):
            model(batch["input_ids"])


def test_a_model_with_two_texts_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    name = "encoder.block.0.layer.0.layer_norm"
    message = rf"^{name}: tokens='last' needs a model with one text, T5ForConditionalGeneration has an encoder and"
    with pytest.raises(ValueError, match=message):
        random_maps({name: 16}).attach(model, tokens="last")
    assert hooks_on(model) == 0 and not model._forward_pre_hooks


def test_masks_that_do_not_tell_the_padding():
    model, maps = steered("llama")
    text = torch.full((2, 4), 7)
    with maps.attach(model, tokens="last"):
        message = (
            r"^attention_mask must have the shape \[2, 4\] of the tokens in the cache and of those .*, got \[2, 3\]"
        )
        with pytest.raises(ValueError, match=message):
            model(text, attention_mask=torch.ones(2, 3))
        with pytest.raises(ValueError, match=r"^attention_mask must be \[batch, tokens\] or .* got \[2, 4, 4\]"):
            model(text, attention_mask=torch.ones(2, 4, 4))
        with pytest.raises(ValueError, match=r"^cu_seq_lens_q says that rows hold several texts: only tokens='all'"):
            model(text, cu_seq_lens_q=torch.tensor([0, 2, 4]))
        causal = torch.ones(4, 4).tril().bool()[None, None].repeat(2, 1, 1, 1)
        causal[1, :, :, :2] = False  # two columns of padding
        for mask in (causal, torch.where(causal, 0.0, -1e9)):
            # -1e9: rows of padding alone must not give NaN
            assert acted_on(model, maps, lambda mask=mask: model(text, attention_mask=mask)) == [[[0, 0, 0, 1]] * 2]
        assert acted_on(model, maps, lambda: model(text)) == [[[0, 0, 0, 1]] * 2]
