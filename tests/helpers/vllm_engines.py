"""Small engines of vLLM with maps, and what transformers and the hooks of lineas give for the same requests."""

import contextlib
import importlib.util
import os

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lineas
from lineas.export.vllm.requests import read

# An engine in this process, on the CPU, that compiles nothing.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
if importlib.util.find_spec("vllm"):  # before it is imported
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)

_ALIVE = []
WIDTH = 64
N_NEW = 8


def tiny_llama():
    """A random Llama of two layers, whose next tokens are sure enough not to hang on rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tiny_maps(seed=0):
    """Maps on norms, on a linear layer and the last norm, and on a decoder layer and an MLP."""
    rng = np.random.default_rng(seed)

    def some(*names):
        return lineas.SteeringMaps(
            {
                name: lineas.AffineMap(
                    rng.uniform(0.5, 1.5, WIDTH).astype(np.float32), rng.normal(0.0, 0.5, WIDTH).astype(np.float32)
                )
                for name in names
            }
        )

    return {
        "norms": some("model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"),
        "linear": some("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "model.norm"),
        "layers": some("model.layers.0", "model.layers.1.self_attn", "model.layers.1.mlp"),
    }


def save(maps, folder):
    """Files of maps by name."""
    files = {name: str(folder / f"{name}.safetensors") for name in maps}
    for name, path in files.items():
        maps[name].save(path)
    return files


def start(folder, files, **settings):
    """An engine with maps; those of `files` but the first through the environment, the first by configuration."""
    from vllm import LLM

    (first, path), *others = files.items() if files else [(None, None)]
    config = {"lineas": {"maps": {first: path}}} if files else {}
    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "num_gpu_blocks_override": 600,
        "max_num_seqs": 64,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINEAS_VLLM_MAPS", ",".join(f"{name}={path}" for name, path in others))
        # An engine that is collected takes down the process groups that it shares with the others of a process.
        _ALIVE.append(LLM(str(folder), additional_config=config, **{**defaults, **settings}))
    return _ALIVE[-1]


def mixed_requests(n=64, seed=1):
    """Prompts of many lengths with no maps, one, or several, at strengths from 0 to 2."""
    rng, found = np.random.default_rng(seed), []
    for k in range(n):
        ids = rng.integers(3, 128, int(rng.integers(1, 70))).tolist()
        names = rng.permutation(["norms", "linear", "layers"])[: k % 4].tolist()
        strengths = [float(s) for s in np.round(rng.uniform(0, 2, len(names)), 2)]
        if k % 8 == 5:
            strengths[0] = 0.0
        wanted = dict(zip(names, strengths, strict=True))
        found.append((ids, {"lineas": {"maps": wanted}} if names else None))
    return found


def generate(llm, requests, n_new=N_NEW):
    """Tokens, their log-probabilities and the number of cached tokens for each request, all in one batch."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        [
            SamplingParams(
                temperature=0, max_tokens=n_new, logprobs=0, ignore_eos=True, detokenize=False, extra_args=extra_args
            )
            for _, extra_args in requests
        ],
        use_tqdm=False,
    )
    found = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        logprobs = [at[token].logprob for at, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        found.append((tokens, logprobs, output.num_cached_tokens))
    return found


def next_token_log_probabilities(llm, prompts, size, extra_args):
    """Those [prompts, size] of the token after each prompt, of a vocabulary of this size."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=1, logprobs=size, detokenize=False, extra_args=extra_args)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
    found = np.full((len(prompts), size), -np.inf)
    for row, output in zip(found, outputs, strict=True):
        for token, one in output.outputs[0].logprobs[0].items():
            row[token] = one.logprob
    return found


@torch.no_grad()
def with_hooks(model, maps, ids, extra_args, n_new=N_NEW):
    """Tokens and their log-probabilities by transformers, with the hooks of lineas."""
    with contextlib.ExitStack() as attached:
        for name, strength in read(extra_args, maps).items():
            attached.enter_context(maps[name].attach(model, strength=strength))
        ids, logprobs = list(ids), []
        for _ in range(n_new):
            found = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(found.argmax()))
            logprobs.append(float(found.max()))
    return ids[-n_new:], logprobs
