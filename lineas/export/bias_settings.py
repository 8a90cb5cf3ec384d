"""Where a bias that a model was made without can live so that it survives save_pretrained and from_pretrained."""

import copy
import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .readers import is_from
from .refusal import Refusal

# Settings of transformers' configurations that give Linears a bias.
_FLAGS = ("attention_bias", "mlp_bias")
_TO_LLAMA = ("MistralForCausalLM", "Qwen2ForCausalLM")

Setting = tuple[tuple[str, ...], str]  # the way to a part of the configuration, and a flag there


def switch_on(config: Any, settings: Iterable[Setting]) -> None:
    """Put `settings` into a configuration."""
    for way, flag in settings:
        setattr(functools.reduce(getattr, way, config), flag, True)


def find_bias_settings(model: nn.Module, wanted: Iterable[str]) -> tuple[list[Setting], set[str]]:
    """Settings of a transformers model under which the Linears `wanted` have a bias, and all biases that come by them.

    The model's own class is asked: it is built without memory, with and without each setting. Refusal when there is no
    such setting; its ``args[1]`` are the Linears concerned.
    """
    wanted = list(wanted)
    kind = type(model).__name__
    if not any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__):
        raise Refusal(
            f"has no bias, and {kind} is no transformers model whose configuration could give it one: "
            "make the Linear with bias=True (zeros do)",
            wanted,
        )
    config: Any = model.config

    def keys(settings: Iterable[Setting]) -> set[str]:
        """Names of what such a model keeps on disk, with these settings on."""
        try:
            changed = copy.deepcopy(config)
            switch_on(changed, settings)
            with torch.device("meta"):  # takes no memory and draws no random numbers
                return set(type(model)(changed).state_dict())
        except Exception as error:  # whatever a model's class may raise
            raise Refusal(f"has no bias, and {kind} could not be built to look for one: {error}", wanted) from None

    plain = keys([])
    if plain != set(model.state_dict()):
        raise Refusal(f"has no bias, and this {kind} is not as its configuration says", wanted)
    ways = [(), *((name,) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None)]
    chosen: list[Setting] = []
    for way, flag in itertools.product(ways, _FLAGS):
        if getattr(functools.reduce(getattr, way, config), flag, None) is False:
            gained = keys([(way, flag)]) - plain
            if any(f"{name}.bias" in gained for name in wanted):
                chosen.append((way, flag))
    found = keys(chosen)
    lost = [name for name in wanted if f"{name}.bias" not in found]
    if lost:
        hint = " (convert=True makes a LlamaForCausalLM, which has)" if kind in _TO_LLAMA else ""
        raise Refusal(
            f"has no bias, and {kind} has no setting that gives it one, so it would be lost when saved{hint}", lost
        )
    return chosen, found - plain


def check_conversion(model: nn.Module) -> None:
    """Refuse what `to_llama` cannot convert exactly; ValueError says why."""
    kind = type(model).__name__
    if kind not in (*_TO_LLAMA, "LlamaForCausalLM") or not is_from(model, "transformers.models"):
        raise ValueError(f"convert: model must be a {' or '.join(_TO_LLAMA)} of transformers, got {kind}")
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"convert: Llama has no sliding window, and this model has one of {window} tokens; where no text is "
            "longer, set model.config.sliding_window = None first"
        )
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"convert: Llama attends to all tokens in every layer, this model has {config.layer_types}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in {device.type for device in devices}:
        raise ValueError(f"convert: the model must be on one device, it is on {sorted(map(str, devices))}")
    foreign = [name for name, module in model.named_modules() if is_from(module, "peft")]
    if foreign:
        raise ValueError(f"convert: the model carries an adapter at {foreign[0]!r}: merge it first")


def to_llama(model: nn.Module) -> nn.Module:
    """A LlamaForCausalLM with copies of the weights of a Mistral or Qwen2 model, with a bias in every Linear.

    `check_conversion` has to pass. The layers of the three families compute the same but for biases and windows.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    old: Any = model.config
    fields = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    kept = {name: copy.deepcopy(value) for name, value in old.to_dict().items() if name in fields}
    kept["head_dim"] = getattr(old, "head_dim", None) or old.hidden_size // old.num_attention_heads
    config = LlamaConfig(**{**kept, "attention_bias": True, "mlp_bias": True})
    first = next(model.parameters())
    state = copy.deepcopy(model.state_dict())
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    for name in shapes.keys() - state.keys():  # biases only; anything else does not fit and is an error below
        state[name] = torch.zeros(shapes[name], dtype=first.dtype, device=first.device)
    with torch.device("cpu"):  # whatever torch's default device is
        converted: Any = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=first.dtype, attn_implementation=old._attn_implementation
        )
    converted = converted.to(first.device).train(model.training)
    converted.generation_config = copy.deepcopy(model.generation_config)
    return converted
