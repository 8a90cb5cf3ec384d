"""Which Linears read the output of a norm, and what can be read and written of a module's parameters.

A shift after a norm without a bias of its own can move into the biases of what reads its output, and only there. What
reads it cannot be seen in the modules of a model, so it is written down here for the decoder layers of transformers,
or said by the user.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .._names import near_names
from ..hooks.attach import attached, warn_of_another_model
from ..hooks.modules import check_model, find, folded_shifts, get_module, output_width
from ..inputs.call import unwrap
from ..maps.steering import SteeringMaps
from .refusal import Refusal

Readers: TypeAlias = Mapping[str, Sequence[str]]

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj")
_Layer: TypeAlias = dict[str, tuple[str, ...]]
_LLAMA: _Layer = {"input_layernorm": _ATTENTION, "post_attention_layernorm": _MLP}
_GEMMA2: _Layer = {"input_layernorm": _ATTENTION, "pre_feedforward_layernorm": _MLP}
_MIXTURE: _Layer = {"input_layernorm": _ATTENTION}  # the experts' weights are no Linears

# Read in the forward of each class (transformers 5.24): nothing else sees the output of these norms. The first dict
# is by class of the decoder layer, the second by the name of the norm in it.
DECODER_LAYERS: dict[str, _Layer] = {
    "GemmaDecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": _GEMMA2,
    "Gemma3DecoderLayer": _GEMMA2,
    "GPT2Block": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    "GPTNeoXLayer": {
        "input_layernorm": ("attention.query_key_value",),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    },
    "GraniteDecoderLayer": _LLAMA,
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "MixtralDecoderLayer": _MIXTURE,
    "PhiDecoderLayer": {"input_layernorm": (*_ATTENTION, "mlp.fc1")},
    "Phi3DecoderLayer": {
        "input_layernorm": ("self_attn.qkv_proj",),
        "post_attention_layernorm": ("mlp.gate_up_proj",),
    },
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Qwen3MoeDecoderLayer": _MIXTURE,
    "SmolLM3DecoderLayer": _LLAMA,
}


def check_arguments(
    maps: SteeringMaps, model: nn.Module, readers: Readers | None, use: str
) -> tuple[SteeringMaps, nn.Module, Readers]:
    """Refuse maps that weights cannot hold, and what `attach` would refuse, too; `use` is what is made of them.

    Returns the maps by the names that their modules have in the innermost model, that model, and `readers`. TypeError
    when an argument is of a wrong type; ValueError when maps are on the model, these maps were fitted for some tokens
    only, a module is missing or has another width, slopes could not reach a shift that was folded before, or `readers`
    has a name without a map or an empty list. Warns as `attach` where the maps were fitted to a model of another name.
    """
    check_model(model)
    tokens = _tokens(maps.metadata)
    if tokens != "all":
        raise ValueError(
            f"these maps were fitted for the tokens {tokens!r}; weights act on all tokens, so {use} would change the "
            "others as well: use maps.attach(model), or lineas.SteeringMaps(dict(maps)) for all tokens all the same"
        )
    on = attached(model)
    if on:
        name = next(iter(on[0].maps))
        raise ValueError(f"maps are attached to {name!r} of this model: detach them first, or they would act twice")
    names, folded = {}, folded_shifts(model)
    for name, affine in maps.items():
        names[name], module = find(model, name)
        if names[name] in folded and (affine.weight != 1).any():
            raise ValueError(
                f"{name}: earlier maps are folded into this model, and their shift is in the weights that read this "
                "module: slopes would not reach it. Compose the maps, second @ first, and use the model without any"
            )
        width = output_width(module)
        if width is not None and width != affine.d:
            raise ValueError(f"{name}: the map is for {affine.d} neurons, the module has {width}")
    warn_of_another_model(maps.metadata, model)
    maps, model = maps.rename(names), unwrap(model)
    return maps, model, {} if readers is None else _check_readers(readers, maps, model)


def _tokens(metadata: dict) -> object:
    """The token selection of maps, or of any that they were composed of; "all" where nothing is said."""
    parts = metadata.get("parts")
    if "tokens" in metadata or not isinstance(parts, list):
        return metadata.get("tokens", "all")
    inner = [_tokens(part) for part in parts if isinstance(part, dict)]
    return next((one for one in inner if one != "all"), "all")


def _check_readers(readers: Readers, maps: SteeringMaps, model: nn.Module) -> Readers:
    """`readers` as the user gave them, checked as far as they can be."""
    if not isinstance(readers, Mapping):
        raise TypeError(f"readers must be a mapping from module name to names, got {type(readers).__name__}")
    for name, linears in readers.items():
        if name not in maps:
            near = near_names(str(name), maps)
            raise ValueError(
                f"readers: there is no map for module {name!r}" + ("; similar: " + ", ".join(near) if near else "")
            )
        if not isinstance(linears, list | tuple) or not all(isinstance(linear, str) for linear in linears):
            raise TypeError(f"readers[{name!r}] must be a list of module names, got {linears!r}")
        if not linears:
            raise ValueError(f"readers[{name!r}] is empty")
        for reader in linears:
            try:
                get_module(model, reader)
            except ValueError as error:
                raise ValueError(f"readers[{name!r}]: {error}") from None
    return readers


def count_uses(model: nn.Module) -> Counter[int]:
    """In how many places of the model each module is, by its id."""
    return Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))


def check_bias(bias: bool | None) -> None:
    """TypeError if `bias`, an option of LoRA, is neither a bool nor None."""
    if bias is not None and not isinstance(bias, bool):
        raise TypeError(f"bias must be True, False or None, got {bias!r}")


def name_readers(
    model: nn.Module,
    name: str,
    given: Readers,
    uses: Counter[int],
    known: Callable[[nn.Module, str], Sequence[str]],
    kinds: str,
) -> list[str]:
    """Full names of the modules that alone read the output of norm `name`, from `given` where it says them.

    Elsewhere `known` gives their names in the layer that holds the norm, of which it gets the name in the layer; none
    where it is not known. `uses` is what `count_uses` says of the model, `kinds` what the modules are in messages.
    Refusal where it is not known what reads the output, or one of these modules is used several times.
    """
    if name in given:
        readers = list(given[name])
    else:
        parent, _, last = name.rpartition(".")
        layer = model.get_submodule(parent)
        found = known(layer, last)
        if not found:
            raise Refusal(
                f"it is not known which {kinds} alone read the output of {last!r} in {type(layer).__name__} "
                "(readers= can say it, where there are such)"
            )
        readers = [f"{parent}.{reader}" if parent else reader for reader in found]
    for used in (name, *readers):
        count = uses[id(model.get_submodule(used))]
        if count > 1:
            raise Refusal(f"{used!r} is used in {count} places of the model")
    return readers


def _in_decoder_layer(layer: nn.Module, last: str) -> Sequence[str]:
    """What reads the norm `last` of a decoder layer of transformers; empty where it is not known."""
    return DECODER_LAYERS.get(type(layer).__name__, {}).get(last, ()) if is_from(layer, "transformers.models") else ()


def find_readers(model: nn.Module, name: str, width: int, given: Readers, uses: Counter[int]) -> list[str]:
    """Full names of the Linears that read the output, of `width` neurons, of norm `name`, and that nothing else feeds.

    `uses` is what `count_uses` says of the model. Refusal when it is not known what reads the output, or a reader is no
    plain Linear of that width.
    """
    readers = name_readers(model, name, given, uses, _in_decoder_layer, "Linears")
    for reader in readers:
        inputs = dense_weight(model, reader).shape[1]
        if inputs != width:
            raise Refusal(f"{reader!r} reads {inputs} neurons, not {width}")
    return readers


def is_from(module: nn.Module, package: str) -> bool:
    """Whether the class of `module` is defined in `package`."""
    return f"{type(module).__module__}.".startswith(f"{package}.")


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's Linear, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and is_from(module, "transformers")


def parameter(model: nn.Module, name: str, kind: str) -> Tensor:
    """Parameter `kind` of module `name`, a plain floating-point tensor.

    Refusal when there is none, or it is computed from others, quantised, sharded or offloaded.
    """
    module = model.get_submodule(name)
    if is_parametrized(module, kind):
        raise Refusal(f"{kind} of {name!r} is computed by a parametrization")
    value = module._parameters.get(kind)
    if value is None:
        raise Refusal(f"{name!r}, {type(module).__name__}, has no parameter {kind!r}")
    # Of the data: Parameter hides the class of what it holds.
    if type(value.data) is not Tensor or not value.is_floating_point() or value.element_size() < 2:
        raise Refusal(
            f"{kind} of {name!r} is {value.dtype} in a {type(value.data).__name__}: "
            "quantised or sharded weights cannot be read as they are"
        )
    if value.device.type == "meta":
        raise Refusal(f"{kind} of {name!r} is offloaded: load the model without offloading")
    return value.detach()


def dense_weight(model: nn.Module, name: str) -> Tensor:
    """The weight [out, in] of the plain Linear `name`; Refusal when it is none, and as `parameter`."""
    module = model.get_submodule(name)
    if type(module) is not nn.Linear and not is_conv1d(module) and not is_parametrized(module):
        hint = ": merge the adapter first" if is_from(module, "peft") else ""
        raise Refusal(f"{name!r} is a {type(module).__module__}.{type(module).__name__}, no plain Linear{hint}")
    weight = parameter(model, name, "weight")
    return weight.T if is_conv1d(module) else weight


def shift_through(weight: Tensor, shift: Tensor) -> Tensor:
    """``weight @ shift`` in float64, on the CPU; a block of rows at a time: a Linear may be large."""
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # there is no float64 on mps
    shift = shift.to(device)
    return torch.cat([block.to(device, torch.float64) @ shift for block in weight.split(1024)]).cpu()
