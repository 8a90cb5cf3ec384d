"""Which tokens maps act on in models with states, which do not tell how many tokens they have seen."""

import copy

import compatibility
import pytest
import torch
from attached import GREEDY, acted_on, ids
from families import FAMILIES
from transformers import DynamicCache

import lineas

BY_NAME = {family.name: family for family in FAMILIES}
STATES = ["Mamba", "Mamba-2", "Falcon-Mamba", "RWKV", "xLSTM"]  # states alone
HYBRID = ["Jamba", "Bamba", "LFM2", "Falcon-H1", "RecurrentGemma", "Qwen3-Next"]


def steered(name):
    family = BY_NAME[name]
    return family.model, compatibility.random_maps(family)


def generate(model, batch, **settings):
    return model.generate(**batch, **GREEDY | settings)


EXPECTED = [
    ("generated", [0] * 5, [1] * 5),
    ("prompt", [1] * 5, [0] * 5),
    ("last", [0] * 4 + [1], [1] * 5),
    (slice(3, 7), [0] * 3 + [1] * 2, [1, 1, 0, 0, 0]),
    (slice(-2, None), [0] * 3 + [1] * 2, [1] * 5),
]


@pytest.mark.parametrize(("tokens", "prompt", "later"), EXPECTED, ids=str)
@pytest.mark.parametrize("name", STATES + HYBRID)
def test_positions_go_on_through_states(name, tokens, prompt, later):
    model, maps = steered(name)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with maps.attach(model, tokens=tokens):
        for _ in range(2):  # the second text begins anew
            found = acted_on(model, maps, lambda: generate(model, batch))
            assert found == [[prompt], *([[one]] for one in later)]


@pytest.mark.parametrize("name", ["Mamba", "Mamba-2", "Falcon-Mamba", "Jamba", "Qwen3-Next"])
def test_padding_on_the_left_has_no_positions(name):
    model, maps = steered(name)
    with maps.attach(model, tokens=slice(3, 6)):
        found = acted_on(model, maps, lambda: generate(model, ids([5, 3])))
    assert found[0] == [[0, 0, 0, 1, 1], [0] * 5]
    assert found[1:] == [[[1], [1]], [[0], [1]], [[0], [1]], [[0], [0]], [[0], [0]]]


@pytest.mark.parametrize("name", ["Mamba", "Mamba-2"])
def test_texts_in_turn_keep_their_own_positions(name):
    model, maps = steered(name)

    def loop():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for cache, length in zip(caches, (5, 3), strict=True):
            model(torch.full((1, length), 7), cache=cache)
        for _ in range(2):
            for cache in caches:
                model(torch.tensor([[8]]), cache=cache)
        caches[0].reset()
        model(torch.full((1, 5), 7), cache=caches[0])

    with maps.attach(model, tokens=slice(4, 6)):
        first = [[0, 0, 0, 0, 1]]
        assert acted_on(model, maps, loop) == [first, [[0, 0, 0]], [[1]], [[0]], [[0]], [[1]], first]


def test_a_loop_by_hand_goes_on_with_the_list_of_states_that_rwkv_made():
    model, maps = steered("RWKV")

    def loop():
        states = [model(torch.full((1, length), 7), use_cache=True).state for length in (5, 3)]
        for _ in range(2):
            for state in states:
                model(torch.tensor([[8]]), state=state, use_cache=True)

    with maps.attach(model, tokens=slice(4, 6)):
        assert acted_on(model, maps, loop) == [[[0, 0, 0, 0, 1]], [[0, 0, 0]], [[1]], [[0]], [[0]], [[1]]]


def test_states_are_counted_before_anything_asks_for_positions():
    model, maps = steered("Mamba")
    cache = DynamicCache(config=model.config)
    with maps.attach(model, strength=lambda tokens: 1.0) as handle, torch.no_grad():
        model(torch.full((1, 5), 7), cache=cache)
        model(torch.tensor([[8]]), cache=cache)
        handle.strength = [[0.0] * 6 + [1.0]]
        assert acted_on(model, maps, lambda: model(torch.tensor([[8]]), cache=cache)) == [[[1]]]


@pytest.mark.parametrize("name", ["Mamba", "RWKV"])
def test_states_of_which_nothing_is_known_are_refused_unless_the_mask_tells(name):
    model, maps = steered(name)
    key = "state" if name == "RWKV" else "cache"
    with torch.no_grad():
        filled = getattr(model(torch.full((1, 5), 7), use_cache=True), key)

    def go_on(**settings):
        return model(torch.tensor([[8]]), **{key: copy.deepcopy(filled)}, use_cache=True, **settings)

    with maps.attach(model, tokens=slice(5, 6)), torch.no_grad():
        with pytest.raises(ValueError, match="states of which nothing tells how many tokens they have seen"):
            go_on()
        assert acted_on(model, maps, lambda: go_on(attention_mask=torch.ones(1, 6).long())) == [[[1]]]
    with maps.attach(model), torch.no_grad():
        go_on()  # maps on all tokens need no positions


def test_an_argument_called_state_that_is_no_list_of_states_is_no_cache():
    class Robot(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4)

        def forward(self, input_ids, state):
            return self.norm(self.embed(input_ids) + state[:, None])

    model = Robot()
    maps = lineas.SteeringMaps({"norm": lineas.AffineMap([2.0] * 4, [1.0] * 4)})
    with maps.attach(model, tokens=slice(0, 2)):
        for _ in range(2):
            assert acted_on(model, maps, lambda: model(torch.tensor([[1, 2, 3]]), torch.ones(1, 4))) == [[[1, 1, 0]]]
