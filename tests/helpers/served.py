"""What is served in tests: a tiny model with two sets of maps, a real server, and what transformers makes of them."""

import contextlib
import threading

import models_zoo
import numpy as np
import pytest
import torch

import lineas

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
from fastapi.testclient import TestClient

from lineas.serving.app import create_app

__all__ = ["Reference", "TestClient", "all_maps", "create_app", "make_maps", "model", "running", "tokenizer"]

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ message.role }} {{ message.content }} {% endfor %}{% if add_generation_prompt %}the {% endif %}"
)


def tokenizer(chat=True):
    made = models_zoo.tokenizer()
    made.chat_template = TEMPLATE if chat else None
    return made


def model(seed=0, context=64, endless=False):
    """A tiny Llama; `endless` never ends by itself."""
    made = models_zoo.llama(seed)
    made.config.max_position_embeddings = context
    if endless:
        made.generation_config.suppress_tokens = [models_zoo.tokenizer().eos_token_id]
    return made


def make_maps(seed, metadata=None):
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{k}.post_attention_layernorm" for k in range(models_zoo.LAYERS)]
    width = models_zoo.WIDTH
    entries = {name: lineas.AffineMap(rng.uniform(0.5, 1.5, width), rng.normal(0, 1, width)) for name in names}
    return lineas.SteeringMaps(entries, metadata or {})


def all_maps():
    return {"a": make_maps(0, {"calibration": {"strength": 0.7}}), "b": make_maps(1)}


class Reference:
    """What transformers' own ``generate`` makes of a model of its own, with the maps attached as anybody does."""

    def __init__(self, made=None):
        self.model, self.tokenizer, self.maps = made or model(), tokenizer(), all_maps()

    def ids(self, prompt):
        return self.tokenizer(prompt)["input_ids"]

    def generate(self, ids, strengths=(), max_tokens=16, seed=None, **sampling):
        """The new tokens, greedy without a seed."""
        how = {"do_sample": False} if seed is None else {"do_sample": True, "top_k": 0, **sampling}
        with contextlib.ExitStack() as stack:
            for name, strength in dict(strengths).items():
                stack.enter_context(self.maps[name].attach(self.model, strength))
            torch.manual_seed(seed or 0)
            made = self.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=max_tokens, **how
            )
        return made[0, len(ids) :].tolist()

    def text(self, prompt, *args, **options):
        """The text that goes on with a prompt."""
        ids = self.ids(prompt)
        made = self.tokenizer.decode([*ids, *self.generate(ids, *args, **options)], skip_special_tokens=True)
        assert made.startswith(prompt)
        return made[len(prompt) :]


@contextlib.contextmanager
def running(app):
    """The address of a real server of an application."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        app.state.engine.stop()
        server.should_exit = True
        thread.join()
