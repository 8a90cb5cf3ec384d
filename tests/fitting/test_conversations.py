"""Fits to conversations: what is rendered, pooled and mapped."""

import models_zoo as zoo
import numpy as np
import pytest
import torch

import lineas

LAYERS = zoo.NORMS["llama"]
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
QUIET = {"progress": False}


def tokenizer(side="left"):
    """The tiny tokenizer with a chat template of words that it knows."""
    found = zoo.tokenizer(padding_side=side)
    found.chat_template = CHAT.replace("<assistant>", "the").replace("'<' + m['role'] + '> '", "'the '")
    return found


def talks(count, seed):
    texts = zoo.texts(2 * count, seed=seed)
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]


def pooled(model, talk, start, stop):
    """The mean of a norm's output over some tokens of a conversation, without padding."""
    ids = tokenizer().apply_chat_template(talk, return_dict=True, return_tensors="pt")["input_ids"]
    seen = []
    norm = model.model.layers[1].post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return seen[0][0, start(ids) : stop(ids)].mean(dim=0).numpy()


def prompt_length(talk):
    return len(tokenizer().apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_generated_tokens_are_those_of_the_answers(side):
    model, data = zoo.llama(), talks(5, seed=1)
    name = "model.layers.1.post_attention_layernorm"
    for tokens in ("generated", "prompt"):
        found = lineas.collect(model, data, layers=name, tokenizer=tokenizer(side), tokens=tokens)[name]
        for row, talk in zip(found, data, strict=True):
            length = prompt_length(talk)
            start, stop = (length, None) if tokens == "generated" else (0, length)
            expected = pooled(model, talk, lambda ids, at=start: at, lambda ids, at=stop: at or ids.shape[1])
            np.testing.assert_allclose(row, expected, atol=1e-5)


@pytest.mark.parametrize("fit", [lineas.fit_end_to_end, lineas.fit_incremental])
def test_maps_fitted_to_answers_act_on_generated_tokens(fit):
    model, settings = zoo.llama(), {"layers": LAYERS, "tokenizer": tokenizer(), "tokens": "generated", **QUIET}
    found = fit(model, talks(6, 1), talks(6, 2), **settings)
    maps = getattr(found, "maps", found)
    assert maps.metadata["tokens"] == "generated"
    with maps.attach(model) as handle:
        assert handle.tokens == "generated"
        prompt = tokenizer()("the day was", return_tensors="pt")
        with torch.no_grad():
            steered = model(**prompt).logits
    with torch.no_grad():
        assert torch.equal(steered, model(**prompt).logits)  # nothing is generated in a prompt


def test_every_kind_of_fit_takes_conversations():
    model, settings = zoo.llama(), {"layers": LAYERS, "tokenizer": tokenizer(), **QUIET}
    source, target = talks(4, 1), talks(4, 2)
    lineas.fit_end_to_end(model, source, target, held_out=(talks(3, 3), talks(3, 4)), steps=2, **settings)
    lineas.fit_jointly(model, {"a": (source, target), "b": (target, source)}, steps=1, **settings)
    lineas.sparse_path_end_to_end(model, source, target, n_penalties=2, **settings)


def test_answers_are_needed_where_they_are_asked_for():
    settings = {"layers": LAYERS, "tokenizer": tokenizer(), "tokens": "generated", **QUIET}
    with pytest.raises(ValueError, match=r"tokens='generated' selects nothing of target, where every token is of a pr"):
        lineas.fit_end_to_end(zoo.llama(), talks(4, 1), [talk[:1] for talk in talks(4, 2)], **settings)
    mixed = [*talks(4, 1), talks(1, 2)[0][:1]]
    with pytest.raises(ValueError, match=r"tokens='generated' selects none of the \d+ tokens of row 4"):
        lineas.fit_end_to_end(zoo.llama(), talks(4, 1), mixed, **settings)
