"""What the tests of `lineas.evaluate` and `maps.calibrate` share: tokenizers, conversations, and prices by hand."""

import models_zoo as zoo
import torch
from caches import cache_of, cached
from tokenizers.processors import TemplateProcessing
from torch.nn import functional

import lineas

FIELDS = ("tokens", "predicted", "loss", "unsteered_loss", "kl", "last_kl", "changed")
QUIET = {"progress": False}
TOKENIZER = zoo.tokenizer()
PROMPTS = zoo.texts(5, seed=11, shortest=2, longest=6)
NEUTRAL = zoo.texts(6, seed=12, shortest=2, longest=9)


def chat_tokenizer(side="left", **settings):
    """The tiny tokenizer with a chat template, whose roles are words."""
    found = zoo.tokenizer(padding_side=side, **settings)
    found.chat_template = (
        "{% for m in messages %}{{ {'system': 'we', 'user': 'they', 'assistant': 'it'}[m['role']] + ' ' + "
        "m['content'] + ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'it ' }}{% endif %}"
    )
    return found


def bos_tokenizer(side="left"):
    """The tiny tokenizer, which puts a beginning-of-text token before every text."""
    found = zoo.tokenizer(padding_side=side)
    found.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    found.bos_token = "<eos>"
    return found


def talks(count, seed, *, answered=True):
    texts = zoo.texts(2 * count, seed=seed, shortest=2, longest=5)
    found = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(texts[::2], texts[1::2], strict=True)
    ]
    return found if answered else [talk[:1] for talk in found]


def price(model, maps, data=NEUTRAL, *, strengths=(1.0,), tokenizer=TOKENIZER, **settings):
    """What `lineas.evaluate` measures on neutral texts alone: [points, texts, fields]."""
    settings = {**QUIET, **settings}
    return lineas.evaluate(model, maps, tokenizer=tokenizer, neutral=data, strengths=strengths, **settings).price


def logits_of(model, ids):
    """Logits [T, V] after each token of one text, which runs alone and without padding."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double()


def logits_in_steps(model, ids, prompt):
    """The same from the last token of the prompt on: the prompt first, then a token at a time through the cache."""
    with torch.no_grad():
        out = model(torch.tensor([ids[:prompt]]), use_cache=True)
        found = [out.logits[0, -1]]
        for token in ids[prompt:]:
            out = model(torch.tensor([[token]]), **cached(cache_of(out)), use_cache=True)
            found.append(out.logits[0, -1])
    return torch.stack(found).double()


def by_hand(ids, before, after):
    """`FIELDS` of a text, from logits [n, V] of two models after its last n tokens, in the words of torch."""
    labels = torch.tensor(ids[len(ids) - len(after) + 1 :])
    loss, unsteered = (functional.cross_entropy(x[:-1], labels, reduction="sum") for x in (after, before))
    kl = functional.kl_div(after.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    changed = (after.argmax(-1) != before.argmax(-1)).sum()
    return [len(after), len(labels), *map(float, (loss, unsteered, kl.sum(), kl[-1], changed))]
