"""A strength for each prompt where generation makes several rows of one: beams, and several sequences of a prompt."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import GREEDY, ids, random_maps, seen_by, steered
from caches import cache_of, cached
from torch import nn
from transformers import DynamicCache

from lineas.hooks import forward_state

LENGTHS, STRENGTHS = [5, 3], [0.3, 1.0]
BY_POSITION = [[0.5, 0.0, 1.0, 0.2, 1.0, 0.3, 0.7, 0.1], [1.0, 0.3, 0.0, 1.0, 0.5, 0.9]]
TABLE = np.array([row + [row[-1]] * (8 - len(row)) for row in BY_POSITION])

BEAMS = {"num_beams": 3, "num_return_sequences": 2}
SAMPLES = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "min_new_tokens": 5}
SIDE_BY_SIDE = (
    r"the strength has the shape \[2\], the output \[{}\]; a prompt may have several rows where generate made"
)


def drawn(model, batch, **settings):
    torch.manual_seed(0)
    return model.generate(**batch, **settings)


@pytest.mark.parametrize("strength", [STRENGTHS, TABLE], ids=["rows", "positions"])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", list(zoo.LANGUAGE_MODELS))
def test_every_beam_gets_the_strength_of_its_prompt(family, cache, strength):
    model, maps = steered(family)
    batch, how = ids(LENGTHS), {**GREEDY, **BEAMS, "use_cache": cache}
    with maps.attach(model, strength=strength) as handle:
        together = model.generate(**batch, **how)[:, 5:].tolist()
        alone = []
        for row, n in enumerate(LENGTHS):
            handle.strength = strength[row : row + 1]
            alone += model.generate(batch["input_ids"][row : row + 1, 5 - n :], **how)[:, n:].tolist()
    assert len(together) == 4 and together == alone


@pytest.mark.parametrize("tokens", ["all", "last"])
@pytest.mark.parametrize("way", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_every_sequence_of_a_prompt_gets_its_strength(way, tokens):
    model, maps = steered("llama")
    with maps.attach(model, strength=STRENGTHS, tokens=tokens):
        before, after = seen_by(model, maps, lambda: drawn(model, ids(LENGTHS), **SAMPLES, **way))
    one, strengths = maps[next(iter(maps))], torch.tensor(STRENGTHS).repeat_interleave(3)
    assert len(before) == 5
    for plain, found in zip(before, after, strict=True):
        mapped = torch.stack([one.transform(row, float(s)) for row, s in zip(plain, strengths, strict=True)])
        if tokens == "all":
            torch.testing.assert_close(found, mapped)
        else:  # a token goes on after the last one of the prompt; padding is on the left
            torch.testing.assert_close(found[:, -1:], mapped[:, -1:])


def test_embeddings_are_rows_like_ids_and_blocks_have_their_own_strengths():
    model, maps = steered("qwen2")
    batch = ids(LENGTHS)
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
    }
    with maps.attach(model, strength=1.0) as handle:
        with handle.at(strength=STRENGTHS):
            expected = model.generate(**batch, **GREEDY, **BEAMS)[:, 5:]
            assert torch.equal(model.generate(**embedded, **GREEDY, **BEAMS), expected)
        assert not torch.equal(model.generate(**batch, **GREEDY, **BEAMS)[:, 5:], expected)


def test_a_loop_by_hand_lets_the_model_make_its_cache():
    model, maps = steered("llama")
    rows = {name: tensor.repeat_interleave(2, dim=0) for name, tensor in ids(LENGTHS).items()}

    def loop():
        out = model(**rows)
        mask = torch.cat([rows["attention_mask"], torch.ones(4, 1)], dim=1)
        model(torch.tensor([[7], [8], [9], [7]]), attention_mask=mask, **cached(cache_of(out)))

    with maps.attach(model, strength=[0.0, 1.0]):
        before, after = seen_by(model, maps, loop)
    for plain, found in zip(before, after, strict=True):
        assert torch.equal(plain[:2], found[:2]) and not torch.isclose(plain[2:], found[2:]).all(dim=2).any()


# --- without evidence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [STRENGTHS, TABLE], ids=["rows", "positions"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2]])
@pytest.mark.parametrize("cache", [True, False])
def test_rows_that_are_no_copies_side_by_side_are_refused(cache, order, strength):
    model, maps = steered("llama")
    batch = {name: tensor[order] for name, tensor in ids([5, 3, 5, 4]).items()}
    message = (
        rf"^{next(iter(maps))}: the strength has the shape \[2(, 8)?\], the output \[4, 5, 16\]; a prompt may have"
    )
    with maps.attach(model, strength=strength) as handle:
        for run in (lambda: model.generate(**batch, **GREEDY, use_cache=cache), lambda: model(**batch)):
            with pytest.raises(ValueError, match=message):
                run()
        handle.strength = 0.5
        model(**batch)


def test_rows_that_differ_in_their_padding_alone_are_refused():
    model, maps = steered("llama")
    batch = {"input_ids": torch.full((4, 3), 7), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]] * 2)}
    with maps.attach(model, strength=STRENGTHS):
        with pytest.raises(ValueError, match=SIDE_BY_SIDE.format("4, 3, 16")):
            model(**batch)
        model(**{**batch, "attention_mask": torch.ones(4, 3)})


def test_prompts_that_are_alike_at_first_are_refused_where_they_differ():
    model, maps = steered("llama")
    batch = ids([6, 6, 6, 6])
    batch["input_ids"][:, :4] = torch.arange(3, 7)
    with maps.attach(model, strength=STRENGTHS):
        with pytest.raises(ValueError, match=SIDE_BY_SIDE.format("4, 2, 16")):
            model.generate(**batch, **GREEDY, prefill_chunk_size=2)
        cache = DynamicCache(config=model.config)
        model(batch["input_ids"][:, :4], **cached(cache))
        for rest in (batch["input_ids"][:, 4:], batch["input_ids"][:, 5:]):
            with pytest.raises(ValueError, match=SIDE_BY_SIDE.format(f"4, {rest.shape[1]}, 16")):
                model(rest, **cached(cache))


def test_a_static_cache_that_is_used_again_begins_another_text():
    model, maps = steered("llama")
    batch, how = ids([5, 3, 4]), {**GREEDY, "cache_implementation": "static"}
    with maps.attach(model, strength=STRENGTHS) as handle:
        model.generate(**{name: tensor[:2] for name, tensor in batch.items()}, **how, num_beams=3)
        handle.strength = [1.0, 0.3, 0.7]
        found = model.generate(**batch, **how, num_beams=2)
        assert torch.equal(found, model.generate(**batch, **GREEDY, num_beams=2))


def test_a_cache_from_before_tells_nothing_of_its_rows():
    model, maps = steered("llama")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.full((4, 3), 7), **cached(cache))
    with maps.attach(model, strength=STRENGTHS), pytest.raises(ValueError, match=SIDE_BY_SIDE.format("4, 1, 16")):
        model(torch.tensor([[7], [8], [9], [7]]), **cached(cache))


def test_images_and_parts_that_run_alone_are_refused():
    model, maps = zoo.cnn(), random_maps({"conv1": 6})
    images = zoo.images(2).repeat(2, 1, 1, 1)
    with maps.attach(model, strength=STRENGTHS):
        for batch in (images, images[[0, 0, 1, 1]]):
            with pytest.raises(ValueError, match=SIDE_BY_SIDE.format("4, 6, 6, 6")):
                model(batch)
    model, maps = steered("llama")
    with maps.attach(model, strength=STRENGTHS), pytest.raises(ValueError, match=SIDE_BY_SIDE.format("4, 3, 16")):
        model.model(torch.full((4, 3), 7))


def test_guidance_of_a_pipeline_doubles_the_rows_and_is_refused():
    """As pipelines of diffusers do: the prompts without their text, and then with it."""

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, sample, timestep, encoder_hidden_states=None):
            return self.conv(sample)

    model, x = Denoiser(), zoo.images(1).repeat(2, 1, 1, 1)
    with random_maps({"conv": 3}).attach(model, strength=STRENGTHS):
        model(x, torch.tensor(3), encoder_hidden_states=torch.zeros(2, 4, 8))
        with pytest.raises(ValueError, match=SIDE_BY_SIDE.format("4, 3, 6, 6")):
            model(torch.cat([x, x]), torch.tensor(3), encoder_hidden_states=torch.zeros(4, 4, 8))


def test_tokens_in_one_axis_are_no_rows():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.part = nn.Embedding(9, 4), nn.Identity()

        def forward(self, input_ids):
            return self.part(self.embed(input_ids).flatten(0, 1))

    model = Flat()
    with random_maps({"part": 4}).attach(model, strength=STRENGTHS):
        with pytest.raises(ValueError, match=SIDE_BY_SIDE.format("6, 4")):
            model(torch.full((2, 3), 7))


# --- the price --------------------------------------------------------------------------------------------------------


def test_rows_are_compared_once_a_text_and_only_where_they_are_more(monkeypatch):
    model, maps = steered("llama")
    batch, compared, placed = ids(LENGTHS), [], []
    alike, find = forward_state._alike, forward_state.Tracker._sequence_of
    monkeypatch.setattr(forward_state, "_alike", lambda *args: compared.append(args) or alike(*args))
    monkeypatch.setattr(forward_state.Tracker, "_sequence_of", lambda *args: placed.append(args) or find(*args))
    with maps.attach(model, strength=STRENGTHS):
        for cache in (True, False):
            model.generate(**batch, **GREEDY, use_cache=cache)
        assert not compared and not placed
        model.generate(**batch, **GREEDY, **BEAMS)
        assert len(compared) == 2 and len(placed) == 6  # ids and mask; six passes


def test_a_strength_for_each_row_leaves_one_graph():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Linear(5, 7)

        def forward(self, x):
            return torch.tanh(self.part(x))

    model, x, maps = Net(), torch.randn(2, 5), random_maps({"part": 7})
    torch.compiler.reset()
    with torch.no_grad(), maps.attach(model, strength=STRENGTHS) as handle:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for strength in (STRENGTHS, 0.3, [0.0, 2.0]):
            handle.strength = strength
            torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


def test_a_schedule_that_is_set_within_a_pass_is_for_the_next_one():
    model, maps = steered("llama")
    batch, seen = ids(LENGTHS), []

    def schedule(tokens):
        seen.append(tokens.positions.tolist())
        return 1.0

    with maps.attach(model, strength=STRENGTHS) as handle:

        def change(module, args):
            handle.strength = schedule

        watch = model.model.layers[1].register_forward_pre_hook(change)
        with torch.no_grad():
            model(**batch)
            watch.remove()
            assert not seen
            model(**batch)
    assert seen == [[[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]]


def test_a_schedule_that_is_set_between_passes_counts_the_text_from_there():
    model, maps = steered("llama")
    steps = []

    def schedule(tokens):
        steps.append((tokens.step, tokens.positions.tolist()))
        return 1.0

    with maps.attach(model, strength=STRENGTHS) as handle:
        cache = DynamicCache(config=model.config)
        model(torch.full((4, 3), 7), **cached(cache))
        handle.strength = schedule
        for _ in range(2):
            model(torch.full((4, 1), 8), **cached(cache))
    assert steps == [(0, [[3]] * 4), (1, [[4]] * 4)]
