"""GGUF files for tests: tiny models of transformers, converted as llama.cpp's converter does it, and parts of files.

The conversion is checked by llama.cpp itself, which has to give the log-probabilities of transformers.
"""

import gguf
import numpy as np
import torch
from fold_cases import language_model, shake
from transformers import AutoConfig, AutoModelForCausalLM

# model_type of transformers: general.architecture of GGUF.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "granite": "granite",
    "olmo2": "olmo2",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "starcoder2": "starcoder2",
}
# Rows of q and k in the order of ggml's own rotary embedding.
PERMUTED = ("llama", "mistral", "mixtral", "granite", "smollm3")
NAMES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def model(kind, **settings):
    """A tiny model of transformers in float32, as wide as a block of quantised numbers; two layers."""
    if kind == "gpt2":
        settings = {"n_embd": 32} | settings
    else:
        settings = {"hidden_size": 32, "intermediate_size": 64} | settings
    if kind in ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"):
        settings = {"head_dim": 16, "query_pre_attn_scalar": 16} | settings
        if not kind.startswith("gemma"):
            settings.pop("query_pre_attn_scalar")
    if kind == "qwen3_moe":
        settings = {"norm_topk_prob": True} | settings
    if kind == "starcoder2":
        return _starcoder2(**settings)
    return language_model(kind, dtype=torch.float32, **settings)


def _starcoder2(**settings):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    common = {"vocab_size": 50, "num_hidden_layers": 2, "initializer_range": 0.2, "sliding_window": None}
    config = AutoConfig.for_model("starcoder2", **{**heads, **common, "bos_token_id": 1, "eos_token_id": 1, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shake(AutoModelForCausalLM.from_config(config), 0)


def convert(made, path, *, quantize=(), metadata=None):
    """Write a model of `model` to a GGUF file; returns the path.

    `quantize` has the types of the matrices of the blocks, in turn; other tensors are float32.
    """
    kind = made.config.model_type
    arch = ARCHITECTURES[kind]
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, made.config, kind)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float64}[type(value)](key, value)
    types = [gguf.GGMLQuantizationType[name] for name in quantize]
    turn = 0
    for name, x in tensors(made).items():
        if types and x.ndim == 2 and name.startswith("blk."):
            chosen = types[turn % len(types)]
            turn += 1
            writer.add_tensor(name, gguf.quants.quantize(x, chosen), raw_dtype=chosen)
        else:
            writer.add_tensor(name, x)
    finish(writer)
    return path


def finish(writer):
    """Write what was put into a writer, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(made):
    """The arrays of a model by their names in GGUF."""
    config = made.config
    kind = config.model_type
    names = gguf.get_tensor_name_map(NAMES[ARCHITECTURES[kind]], config.num_hidden_layers)
    found = {}
    for name, parameter in made.state_dict().items():
        x = parameter.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, _, last = name.rpartition(".")
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if kind == "gpt2" and last == "weight" and x.ndim == 2 and base.startswith("transformer.h."):
            x = x.T
        if kind == "gpt_neox" and ".query_key_value" in name:
            parts = x.reshape(config.num_attention_heads, 3, -1, *x.shape[1:])
            x = np.concatenate([parts[:, k].reshape(-1, *x.shape[1:]) for k in range(3)])
        if kind in PERMUTED and base.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
            x = x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if base.endswith("mlp.experts"):
            block = f"blk.{name.split('.')[2]}"
            parts = {"gate_exps": x[:, : x.shape[1] // 2], "up_exps": x[:, x.shape[1] // 2 :]}
            parts = parts if last == "gate_up_proj" else {"down_exps": x}
            found |= {f"{block}.ffn_{part}.weight": np.ascontiguousarray(y) for part, y in parts.items()}
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        found[target] = np.ascontiguousarray(x)
    return found


def _describe(writer, config, kind):
    heads = config.num_attention_heads
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 0) or 4 * width)
    writer.add_head_count(heads)
    grouped = None if kind == "gpt_neox" else getattr(config, "num_key_value_heads", None)
    writer.add_head_count_kv(grouped or heads)
    epsilons = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    epsilon = next(getattr(config, name) for name in epsilons if hasattr(config, name))
    root = "rms_norm_eps" in vars(config)
    (writer.add_layer_norm_rms_eps if root else writer.add_layer_norm_eps)(epsilon)
    if kind != "gpt2":
        rope = config.rope_parameters
        rope = rope.get("full_attention", rope)
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
        writer.add_key_length(head)
        writer.add_value_length(head)
    if kind in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if kind == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if kind in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts if kind == "mixtral" else config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    vocabulary = [b"<unk>", b"<s>", b"</s>", *(f"\u2581w{k}".encode() for k in range(3, config.vocab_size))]
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocabulary)
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([2, 3, 3, *[1] * (config.vocab_size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


def read(path):
    """The tensors of a file, decoded, by name, as the package gguf reads them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(length) for length in tensor.shape][::-1]
        found[tensor.name] = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found
