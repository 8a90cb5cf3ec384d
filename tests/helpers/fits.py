"""Short end-to-end fits of tiny models, and what their tests compare."""

import models_zoo as zoo
import numpy as np
import torch

from lineas import fit_end_to_end
from lineas.fitting import autograd, parameters
from lineas.hooks import affine, pooling

QUIET = dict(progress=False)


def tokens(texts, **settings):
    return dict(zoo.tokenizer(**settings)(texts, return_tensors="pt", padding=True))


def prompts(count, seed):
    return tokens(zoo.texts(count, seed=seed))


def snapshot(model):
    """What a fit must leave as it was."""
    return (
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        torch.get_rng_state().tolist(),
    )


class Trouble:
    """A forward that meets with something at its n-th call."""

    def __init__(self, at, act):
        self.at, self.act, self.calls = at, act, 0

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls == self.at:
            self.act(model)
        return model(**batch) if isinstance(batch, dict) else model(batch)


def interrupt(model):
    raise KeyboardInterrupt


def same_maps(a, b, **tolerance):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name].weight, b[name].weight, **{"rtol": 0, "atol": 0, **tolerance})
        np.testing.assert_allclose(a[name].bias, b[name].bias, **{"rtol": 0, "atol": 0, **tolerance})


def rows(batch, start, stop):
    return {name: value[start:stop] for name, value in batch.items()}


def short_fit(model, source=None, target=None, **settings):
    """Fit a tiny Llama on six random prompts a side, in a few steps and in the activations' own units."""
    source = prompts(6, 1) if source is None else source
    target = prompts(6, 2) if target is None else target
    defaults = {"layers": zoo.NORMS["llama"], "scaling": "layer-mean", "lr": 0.02, "steps": 4, **QUIET}
    return fit_end_to_end(model, source, target, **{**defaults, **settings})


def named(value):
    """What to call a parameter of a test: functions by name, not by the place in memory that no two processes share."""
    return getattr(value, "__name__", str(value))


def use_engine(monkeypatch, engine):
    """Let the engine compute what is on the CPU, or the torch twins that other devices use."""
    for module in (affine, pooling, autograd, parameters):
        monkeypatch.setattr(module, "on_engine", lambda tensor: engine)


def noisy(model, batch):
    """A forward that draws random numbers, as one of a diffusion model does."""
    handle = model.model.embed_tokens.register_forward_hook(lambda m, args, out: out + 0.1 * torch.randn_like(out))
    try:
        return model(**batch)
    finally:
        handle.remove()
