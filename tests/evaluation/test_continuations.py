"""Continuations: the model's own, with the same random numbers at every point, and nothing left behind."""

import evaluations as ev
import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import hooks_on, language_model, random_maps
from evaluations import PROMPTS, QUIET, TOKENIZER, talks
from fits import snapshot
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import lineas
from lineas.evaluation.metrics import ngram_statistics

LENGTH, STOPPED = 0, 1  # columns of `statistics`
LONG = {"sampling": {"min_new_tokens": 6}, "max_new_tokens": 6}  # nothing ends early


def evaluation(model, maps, data=PROMPTS, *, strengths=(1.0,), tokenizer=TOKENIZER, **settings):
    settings = {"max_new_tokens": 8, **QUIET, **settings}
    return lineas.evaluate(model, maps, tokenizer=tokenizer, prompts=data, strengths=strengths, **settings)


def written(*args, **settings):
    return evaluation(*args, **settings).continuations


def seed_of(batch, seed=0):
    return int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])


def nothing(maps):
    return lineas.SteeringMaps({name: lineas.AffineMap.identity(one.d) for name, one in maps.items()})


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_points_that_change_nothing_write_the_same():
    model, maps = language_model("llama")
    found = written(model, {"nothing": nothing(maps), "maps": maps}, strengths=[0.5, 1], samples=2)
    unsteered, half, whole, *steered = found
    assert unsteered == half == whole
    assert all(texts != unsteered for texts in steered)
    assert any(first != second for first, second in unsteered)  # samples of a prompt are different


@pytest.mark.parametrize("batch_size", [4, 32])
def test_a_point_does_not_depend_on_other_points_or_their_order(batch_size):
    model, maps = language_model("llama")
    other = random_maps({name: one.d for name, one in maps.items()}, seed=5)
    settings = {"batch_size": batch_size, "samples": 2, "max_new_tokens": 4}
    together = evaluation(model, {"one": maps, "two": other}, strengths=[1, 2], instruction="never", **settings)
    turned = evaluation(model, {"two": other, "one": maps}, strengths=[2, 1], **settings)
    alone = evaluation(model, {"one": maps}, strengths=[2], **settings)
    for found in (turned, alone):
        for k in range(len(found)):
            at = together.index(found.methods[k], found.strengths[k])
            assert found.continuations[k] == together.continuations[at]
            np.testing.assert_array_equal(found.statistics[k], together.statistics[at])


def test_the_seed_and_the_size_of_batches_say_which_random_numbers():
    model, maps = language_model("llama")
    found = written(model, maps, **LONG)
    assert written(model, maps, **LONG) == found
    assert written(model, maps, seed=1, **LONG) != found
    torch.manual_seed(123)
    assert written(model, maps, **LONG) == found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_those_of_generate(family, side):
    model, maps = language_model(family)
    found = evaluation(model, maps, strengths=[2], batch_size=3, tokenizer=zoo.tokenizer(padding_side=side), seed=7)
    order = sorted(range(5), key=lambda k: len(PROMPTS[k].split()))
    for batch, rows in enumerate((order[:3], order[3:])):
        inputs = zoo.tokenizer()([PROMPTS[k] for k in rows], padding=True, return_tensors="pt")
        for k, strength in enumerate([0, 2]):
            torch.manual_seed(seed_of(batch, 7))
            with maps.attach(model, strength):
                tokens = model.generate(
                    **inputs, do_sample=True, top_p=0.9, top_k=0, temperature=1.0, max_new_tokens=8, pad_token_id=0
                )
            for row, ids in zip(rows, tokens[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                kept = ids[: ids.index(1)] if 1 in ids else ids
                assert found.continuations[k][row] == [TOKENIZER.decode(kept, skip_special_tokens=True)]
                expected = [len(kept), float(1 in ids), *ngram_statistics(kept).values()]
                np.testing.assert_array_equal(found.statistics[k, row, 0], expected)


def test_maps_act_on_the_tokens_that_are_selected():
    model, maps = language_model("llama")
    found = written(model, maps, tokens="generated", sampling={"do_sample": False})[1]
    for prompt, texts in zip(PROMPTS, found, strict=True):
        inputs = TOKENIZER(prompt, return_tensors="pt")
        with maps.attach(model, tokens="generated"):
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert texts == [TOKENIZER.decode(ids, skip_special_tokens=True)]
    assert found != written(model, maps, sampling={"do_sample": False})[1]


def test_greedy_samples_of_a_prompt_are_alike(recwarn):
    model, maps = language_model("llama")
    found = written(model, maps, samples=3, sampling={"do_sample": False})
    assert all(len(set(texts)) == 1 for point in found for texts in point)
    assert not [w for w in recwarn if "do_sample" in str(w.message)]  # no settings of sampling go along


def test_beams_and_other_settings_are_those_of_generate():
    model, maps = language_model("llama")
    sampling = {"do_sample": False, "num_beams": 3, "eos_token_id": [1, 9]}
    found = written(model, maps, sampling=sampling)[0]
    for prompt, texts in zip(PROMPTS, found, strict=True):
        inputs = TOKENIZER(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=8, **sampling)[0, inputs["input_ids"].shape[1] :].tolist()
        end = next((k for k, token in enumerate(ids) if token in (1, 9)), len(ids))
        assert texts == [TOKENIZER.decode(ids[:end], skip_special_tokens=True)]


def test_settings_of_the_model_that_would_change_what_generate_returns():
    model, maps = language_model("llama")
    expected = written(model, maps)
    model.generation_config.return_dict_in_generate = True
    model.generation_config.output_scores = True
    assert written(model, maps) == expected
    model.generation_config.do_sample, model.generation_config.num_return_sequences = True, 3
    assert written(model, maps) == expected


# --- where a text ends ------------------------------------------------------------------------------------------------


def ending(at):
    """A model that says the end at the step `at` of every row, and "good" before and after."""
    model = zoo.llama()
    lengths = {}

    def speak(module, args, output):
        rows = len(output.logits)
        lengths.setdefault("step", 0)
        word = 1 if lengths["step"] == at else TOKENIZER.vocab["good"]
        output.logits[:] = -100.0
        output.logits[:, :, word] = 100.0
        lengths["step"] += 1
        return output if rows else None

    model.register_forward_hook(speak)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.update(step=0) if kwargs["input_ids"].shape[1] > 1 else None,
        with_kwargs=True,
    )
    return model


@pytest.mark.parametrize("pad_token", [True, False])
def test_a_text_ends_at_its_end_token(pad_token):
    maps = language_model("llama")[1]
    found = evaluation(ending(3), maps, tokenizer=zoo.tokenizer(pad_token=pad_token))
    assert found.continuations == [[["good good good"]] * 5] * 2
    np.testing.assert_array_equal(found.statistics[..., LENGTH], 3)
    np.testing.assert_array_equal(found.statistics[..., STOPPED], 1)
    cut = evaluation(ending(3), maps, max_new_tokens=3)
    assert cut.continuations == found.continuations
    np.testing.assert_array_equal(cut.statistics[..., STOPPED], 0)
    empty = evaluation(ending(0), maps)
    assert empty.continuations == [[[""]] * 5] * 2
    np.testing.assert_array_equal(empty.statistics[..., LENGTH], 0)
    assert np.isnan(empty.statistics[..., 2:]).all() and np.isnan(empty.rows()[0]["distinct_1"])


def test_rows_of_a_batch_end_where_they_end():
    model, maps = language_model("llama")
    with torch.no_grad():
        model.lm_head.weight[1] *= 3  # the end is likely
    found = evaluation(model, maps, samples=4, sampling={"suppress_tokens": [0, 2]})  # words alone
    lengths, stopped = found.statistics[..., LENGTH], found.statistics[..., STOPPED]
    assert len(np.unique(lengths)) > 3
    assert (stopped[lengths < 8] == 1).all() and (stopped[lengths == 8] == 0).all()
    for point, of_point in zip(found.continuations, lengths, strict=True):
        counts = [[len(text.split()) for text in several] for several in point]
        np.testing.assert_array_equal(counts, of_point)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_conversations_are_continued_by_the_assistant():
    model, maps = language_model("llama")
    tokenizer, data = ev.chat_tokenizer(), talks(4, seed=2, answered=False)
    found = evaluation(model, maps, data, tokenizer=tokenizer)
    assert found.prompts == data
    ids = [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=True)["input_ids"] for t in data]
    expected = evaluation(model, maps, ids, tokenizer=tokenizer)
    assert found.continuations == expected.continuations
    assert expected.prompts == ids
    arrays = [np.array(one) for one in ids]
    assert evaluation(model, maps, arrays, tokenizer=tokenizer) == expected  # lists of them, as files hold them


def test_an_instruction_stands_before_prompts():
    model, maps = language_model("llama")
    found = written(model, maps, instruction="we never say awful")[1]
    assert found == written(model, maps, [f"we never say awful {prompt}" for prompt in PROMPTS])[0]
    tokenizer, data = ev.chat_tokenizer(), talks(3, seed=2, answered=False)
    found = written(model, maps, data, tokenizer=tokenizer, instruction="we never")[1]
    systems = [[{"role": "system", "content": "we never"}, *talk] for talk in data]
    assert found == written(model, maps, systems, tokenizer=tokenizer)[0]


def test_an_instruction_takes_nothing_of_a_prompt_that_is_cut():
    model, maps = language_model("llama")
    data = [f"{prompt} the long day" for prompt in PROMPTS]
    cut = [" ".join(text.split()[:3]) for text in data]
    settings = {"instruction": "we never say awful"}
    assert written(model, maps, data, max_length=3, **settings) == written(model, maps, cut, **settings)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_go_on_after_their_start_token(kind):
    common = {"vocab_size": zoo.VOCABULARY, "d_model": 16, "decoder_start_token_id": 1, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "t5":
            config = T5Config(**common, d_kv=8, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
            model, name = T5ForConditionalGeneration(config).eval(), "decoder.block.1.layer.2.layer_norm"
        else:
            sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
                     (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
            config = BartConfig(**common, **sizes, max_position_embeddings=32, pad_token_id=0, forced_eos_token_id=None)
            model, name = BartForConditionalGeneration(config).eval(), "model.decoder.layers.1.final_layer_norm"
    maps = random_maps({name: 16})
    tokenizer = zoo.tokenizer(padding_side="right")
    found = evaluation(model, maps, tokenizer=tokenizer, sampling={"do_sample": False, "min_new_tokens": 5})
    for k, prompt in enumerate(PROMPTS):
        inputs = TOKENIZER(prompt, return_tensors="pt")
        with maps.attach(model):
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=5)[0, 1:]
        assert found.continuations[1][k] == [TOKENIZER.decode(ids, skip_special_tokens=True)]
    assert (found.statistics[..., LENGTH] >= 5).all()


# --- generate= --------------------------------------------------------------------------------------------------------


class Plain(torch.nn.Module):
    """A module without generate, whose output `speaker` turns into words."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


CALLS = []


def speaker(model, prompts):
    CALLS.append((list(prompts), len(lineas.attached(model))))
    noise = torch.rand(len(prompts))
    value = float(model(torch.ones(4)).sum())
    return [f"{prompt} {number:.6f} {value:.4f}" for prompt, number in zip(prompts, noise, strict=True)]


def test_a_callable_writes_for_models_that_do_not():
    CALLS.clear()
    model, maps = Plain(), lineas.SteeringMaps({"layer": lineas.AffineMap(np.full(4, 2.0), np.ones(4))})
    found = evaluation(
        model, maps, ["b", "aa"], tokenizer=None, generate=speaker, samples=2, batch_size=3, instruction="say "
    )
    first, told, second = found.continuations
    assert [prompts for prompts, _ in CALLS[:2]] == [["b", "b", "aa"], ["aa"]]
    assert [prompts for prompts, _ in CALLS[2:4]] == [["say b", "say b", "say aa"], ["say aa"]]
    assert [count for _, count in CALLS] == [0, 0, 0, 0, 1, 1]
    numbers = [[[text.split()[-2] for text in several] for several in point] for point in found.continuations]
    assert numbers[0] == numbers[1] == numbers[2] and len({n for several in numbers[0] for n in several}) == 4
    values = [point[0][0].split()[-1] for point in (first, told, second)]
    assert values[0] == values[1] != values[2]
    np.testing.assert_array_equal(found.statistics[0, :, :, LENGTH], 3)  # words
    assert np.isnan(found.statistics[..., STOPPED]).all() and np.isnan(found.rows()[0]["stopped"])
    assert found.metadata["sampling"] is None


def test_a_callable_gets_conversations_with_the_instruction():
    CALLS.clear()
    model, maps = Plain(), lineas.SteeringMaps({"layer": lineas.AffineMap.identity(4)})
    data = talks(2, seed=2, answered=False)
    found = evaluation(model, maps, data, tokenizer=ev.bos_tokenizer(), generate=speaker, instruction="say")
    seen = sorted(str(prompt) for prompts, _ in CALLS[1:2] for prompt in prompts)
    assert seen == sorted(str([{"role": "system", "content": "say"}, *talk]) for talk in data)
    counts = [[len(text.split()) for text in several] for several in found.continuations[0]]
    np.testing.assert_array_equal(found.statistics[0, :, :, LENGTH], counts)  # tokens, none of them special


@pytest.mark.parametrize(
    ("generate", "kind", "message"),
    [
        (lambda model, prompts: None, TypeError, "generate must return a list of texts, got NoneType"),
        (lambda model, prompts: "two!!", TypeError, "generate must return a list of texts, got str"),
        (lambda model, prompts: prompts[:1], ValueError, "one text a prompt: expected 5, got 1 of type str"),
        (lambda model, prompts: [1] * 5, ValueError, "one text a prompt: expected 5, got 5 of type int"),
    ],
)
def test_what_a_callable_must_return(generate, kind, message):
    model, maps = language_model("llama")
    before = snapshot(model)
    with pytest.raises(kind, match=message) as error:
        evaluation(model, maps, generate=generate)
    assert error.value.__notes__ == ["while the prompts were continued by 'unsteered'"]
    assert snapshot(model) == before


# --- nothing is left behind -------------------------------------------------------------------------------------------


def at_call(model, count, error):
    """Let the model raise `error` at a pass; the hook that does, to be removed."""
    calls = []

    def act(module, args):
        calls.append(1)
        if len(calls) == count:
            raise error

    return model.register_forward_pre_hook(act)


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=str)
def test_model_and_random_state_are_as_they_were(error):
    model, maps = language_model("gpt2")
    model.train()
    model.transformer.h[1].eval()
    next(model.parameters()).requires_grad_(False)
    others = random_maps({name: one.d for name, one in maps.items()}, seed=5)
    with others.attach(model, 0.5) as handle:
        trouble = None if error is None else at_call(model, 8, error)  # in continuations
        torch.manual_seed(5)
        before = snapshot(model)
        settings = {"neutral": ev.NEUTRAL, "max_new_tokens": 4, "strengths": [1, 2]}
        if error is None:
            evaluation(model, maps, **settings)
        else:
            with pytest.raises(type(error)):
                evaluation(model, maps, **settings)
        assert snapshot(model) == before
        assert lineas.attached(model) == [handle] and handle.strength == 0.5
        if trouble is not None:
            trouble.remove()
        batch = zoo.tokenizer()(PROMPTS, padding=True, return_tensors="pt")
        steered = model.eval()(**batch).logits
    with others.attach(model, 0.5):
        assert torch.equal(model(**batch).logits, steered)
    assert hooks_on(model) == 0


def test_maps_that_are_attached_already_are_part_of_the_model():
    model, maps = language_model("llama")
    others = random_maps({name: one.d for name, one in maps.items()}, seed=5)
    with others.attach(model):
        found = written(model, maps)
    assert found[0] == written(model, others)[1]
    assert found[1] == written(model, maps @ others)[1]


def test_gradients_of_the_caller_do_not_matter():
    model, maps = language_model("llama")
    found = written(model, maps)
    with torch.no_grad():
        assert written(model, maps) == found
    with torch.inference_mode():
        assert written(model, maps) == found


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"data": talks(1, seed=1)}, ValueError, r"prompts\[0\] is a conversation, and .* has no chat template"),
        (
            {"data": talks(1, seed=1), "tokenizer": ev.chat_tokenizer()},
            ValueError,
            "prompts: a conversation ends with an answer of the assistant: leave it out",
        ),
        ({"tokenizer": None}, ValueError, "prompts: pass tokenizer=, which makes texts of the tokens"),
        ({"data": ["a", ""]}, ValueError, r"prompts\[1\] has no tokens"),
        ({"data": torch.ones(2, 3)}, TypeError, "prompts must be texts, conversations or token ids, got batches"),
        ({"data": "the", "generate": speaker}, TypeError, "prompts must be a list of texts, .*, got one string"),
        ({"data": [3], "generate": speaker}, TypeError, "prompts must be a list of texts, .*, got list"),
        ({"data": [], "generate": speaker}, ValueError, "prompts is empty"),
        ({"data": ["a", [5]], "generate": speaker}, TypeError, "prompts must be a list of texts, .*, got list"),
        ({"data": [[5, 6]], "instruction": "a"}, TypeError, "instruction: it is put before texts and conversations"),
        (
            {"data": [[5, 6]], "instruction": "a", "generate": speaker},
            TypeError,
            "instruction: it is put before texts and conversations",
        ),
        ({"sampling": {"max_new_tokens": 3}}, ValueError, "sampling must not hold 'max_new_tokens': see prompts="),
        ({"sampling": {"num_return_sequences": 3}}, ValueError, "sampling must not hold 'num_return_sequences'"),
        ({"sampling": ["greedy"]}, TypeError, "sampling must be a mapping of arguments for generate, got list"),
        ({"generate": "greedy"}, TypeError, "generate must be a function of model and prompts, got str"),
    ],
)
def test_arguments_that_are_wrong(settings, kind, message):
    model, maps = language_model("llama")
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(kind, match=message):
        evaluation(model, maps, **settings)
    assert not calls


def test_a_model_without_generate_needs_a_callable():
    maps = lineas.SteeringMaps({"layer": lineas.AffineMap.identity(4)})
    with pytest.raises(TypeError, match=r"prompts: Plain has no generate\(\): pass generate="):
        evaluation(Plain(), maps)
