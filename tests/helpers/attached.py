"""Tiny models with random maps, and what is seen of them while the maps are attached."""

import functools
import io

import models_zoo
import numpy as np
import torch

import lineas
from lineas.hooks import modules

FAMILIES = list(models_zoo.LANGUAGE_MODELS)


TOKENIZER = models_zoo.tokenizer()


TEXTS = models_zoo.texts(4)


def random_maps(widths, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return lineas.SteeringMaps(
        {
            name: lineas.AffineMap(rng.uniform(0.5, 1.5, d).astype(dtype), rng.normal(0, 0.3, d).astype(dtype))
            for name, d in widths.items()
        }
    )


def language_model(family, seed=0):
    """A model and random maps for its norms."""
    model = models_zoo.LANGUAGE_MODELS[family]()
    names = modules.resolve(model, models_zoo.NORMS[family])
    return model, random_maps(dict.fromkeys(names, models_zoo.WIDTH), seed)


def encode(texts=TEXTS, tokenizer=TOKENIZER):
    return tokenizer(texts, padding=True, return_tensors="pt")


def logits(model, batch=None):
    with torch.no_grad():
        return model(**(encode() if batch is None else batch)).logits


def hooks_on(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def outputs_of(model, names, run):
    """What the modules give, as the hooks that come after the maps see it."""
    seen = {}
    handles = [
        modules.get_module(model, name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: output})
        )
        for name in names
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def ids(lengths, side="left", seed=0):
    """A padded batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, models_zoo.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return dict(models_zoo.tokenizer(padding_side=side).pad({"input_ids": rows}, return_tensors="pt"))


def seen_by(model, maps, run):
    """Before and after the first map, in every pass: what it got and what it gave."""
    before, after = [], []
    module = modules.get_module(model, next(iter(maps)))
    hooks = list(module._forward_hooks.items())
    first = module.register_forward_hook(lambda module, args, output: before.append(output), prepend=True)
    last = module.register_forward_hook(lambda module, args, output: after.append(output))
    try:
        with torch.no_grad():
            run()
    finally:
        first.remove()
        last.remove()
    assert list(module._forward_hooks.items()) == hooks
    return before, after


@functools.cache
def steered(family):
    """A model and maps that change its greedy text, made once."""
    return language_model(family)


class Embedding(torch.nn.Embedding):
    """Lets embeddings pass."""

    def forward(self, x):
        return x if x.is_floating_point() else super().forward(x)


class Pools(torch.nn.Module):
    """Has parts that see a text, rows without tokens, and fewer tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.rows, self.few = Embedding(60, 4), torch.nn.Identity(), torch.nn.Identity()

    def forward(self, ids=None, inputs_embeds=None):
        x = self.embed(ids if inputs_embeds is None else inputs_embeds)
        return self.rows(x.mean(dim=1)), self.few(x[:, ::2])


def acted_on(model, maps, run):
    """Which tokens were mapped in every pass, as lists of rows; the others must have kept their bits."""
    before, after = seen_by(model, maps, run)
    one, found = maps[next(iter(maps))], []
    for plain, got in zip(before, after, strict=True):
        mapped = (got != plain).any(dim=-1)
        torch.testing.assert_close(got[mapped], one.transform(plain[mapped]))
        found.append(mapped.int().tolist())
    return found
