"""Positions where more than a text is in a row: tokens that PEFT has learned, and several texts."""

import logging

import pytest
import torch
from attached import acted_on, ids, language_model, logits
from transformers import ContinuousBatchingConfig, GenerationConfig

peft = pytest.importorskip("peft")
VIRTUAL = 4
LEARNERS = {
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, encoder_hidden_size=8
    ),
}


@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize(
    ("tokens", "long", "short", "later"),
    [
        ("last", [0, 0, 0, 0, 1], [0, 0, 1], [[1, 1], [1, 1]]),
        ("prompt", [1, 1, 1, 1, 1], [1, 1, 1], [[0, 0], [0, 0]]),
        ("generated", [0] * 5, [0] * 3, [[1, 1], [1, 1]]),
        (slice(1, 6), [0, 1, 1, 1, 1], [0, 1, 1], [[1, 1], [0, 1]]),
        (lambda tokens: tokens.positions == 3, [0, 0, 0, 1, 0], [0, 0, 0], [[0, 1], [0, 0]]),
    ],
    ids=["last", "prompt", "generated", "slice", "callable"],
)
def test_positions_count_the_text_and_not_what_was_learned(learner, tokens, long, short, later):
    model, maps = language_model("llama")
    with torch.random.fork_rng(devices=[]):
        wrapped = peft.get_peft_model(model, LEARNERS[learner]()).eval()
    none = [] if learner == "prefix" else [0] * VIRTUAL  # prefixes are in the cache
    batch, token = ids([5, 3]), torch.tensor([[7], [8]])

    def loop():  # generate of PEFT 0.21 puts what was learned before every token under transformers 5.24
        mask = torch.cat([torch.ones(2, VIRTUAL).long(), batch["attention_mask"]], dim=1)
        out = wrapped(**batch, use_cache=True)
        for _ in range(2):
            mask = torch.cat([mask, torch.ones(2, 1).long()], dim=1)
            out = model(token, attention_mask=mask, cache=out.cache)

    with maps.attach(wrapped, tokens=tokens):
        for _ in range(2):
            found = acted_on(model, maps, loop)
            assert found[0] == [none + long, [*none, 0, 0, *short]]
            assert [[row[0] for row in step] for step in found[1:]] == later
        with wrapped.disable_adapter(), pytest.raises(RuntimeError, match="was run without LlamaForCausalLM"):
            wrapped(**batch)  # calls the model's forward, and none of its hooks
        assert acted_on(model, maps, lambda: wrapped(**batch)) == [found[0]]


# --- continuous batching of transformers ------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12], [20] * 7]


def served(model, **settings):
    """What continuous batching makes of PROMPTS, and the errors that it keeps to itself."""
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0} | settings
    # Without limits it takes most of the memory that is free.
    limits = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, page_size=8)
    answers = model.generate_batch(PROMPTS, GenerationConfig(**settings), limits)
    by_request = sorted(answers.items(), key=lambda entry: int(entry[0].split("_")[-1]))
    return [one.generated_tokens for _, one in by_request], [one.error for _, one in by_request]


def one_by_one(model):
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([text]), **settings)[0, len(text) :].tolist() for text in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["last", lambda tokens: tokens.positions % 2 == 0], ids=["last", "even"])
def test_continuous_batching_maps_the_tokens_that_generate_does(tokens):
    model, maps = language_model("llama")
    with maps.attach(model, tokens=tokens):
        expected = one_by_one(model)
        assert served(model)[0] == expected
    assert one_by_one(model) != expected


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["prompt", "generated", slice(-2, None)], ids=str)
def test_continuous_batching_says_what_it_cannot_do(tokens):
    model, maps = language_model("llama")
    logging.disable(logging.CRITICAL)
    try:
        with maps.attach(model, tokens=tokens):
            texts, errors = served(model)
    finally:
        logging.disable(logging.NOTSET)
    assert texts == [[]] * 3
    assert all("must know where the prompt ends, but its rows hold several texts" in error for error in errors)


def test_packed_rows_with_positions():
    model, maps = language_model("llama")
    text, positions = torch.tensor([[5, 6, 7, 8, 9, 0]]), torch.tensor([[0, 1, 2, 0, 1, 0]])
    packed = {"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 3, 5]), "use_cache": False}
    with maps.attach(model, tokens=slice(0, 2)):
        assert acted_on(model, maps, lambda: model(text, **packed)) == [[[1, 1, 0, 1, 1, 0]]]
    with maps.attach(model, tokens="last"), pytest.raises(ValueError, match="'last' must know where the prompt ends"):
        model(text, **packed)
    with maps.attach(model):
        assert logits(model, {"input_ids": text, **packed}).shape == (1, 6, model.config.vocab_size)
