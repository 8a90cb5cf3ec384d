"""Which module of a vLLM model is the one of transformers that maps were fitted for, and whether it gives the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer

from ..._names import hint
from ...hooks.modules import output_width
from ...maps.affine import AffineMap
from .steering import ModuleHook, Steering

# What transformers calls separate modules, and vLLM computes at once.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
_FUSED["up_proj"] = "gate_up_proj"


def put_on(model: nn.Module, steering: Steering, hidden_size: int, tensor_parallel: int) -> None:
    """Put a hook on every module that one of the maps of `steering` is for.

    ValueError, before any is put on, where the model has no such module, or the module's output is of another width
    or is not known to be the one in transformers.
    """
    by_module: dict[str, dict[str, AffineMap]] = {}
    for label, maps in steering.catalogue.items():
        for name, one in maps.items():
            by_module.setdefault(name, {})[label] = one
    found = {}
    for name, here in by_module.items():
        module = _find(model, name, here)
        if isinstance(module, PPMissingLayer):
            continue  # another process has it
        stream = _check(name, module, here, hidden_size, tensor_parallel)
        found[name] = module, ModuleHook(steering, name, here, stream)
    for name, (module, hook) in found.items():
        module.register_forward_hook(hook)
        steering.hooks[name] = hook


def _spellings(model: nn.Module, name: str) -> Iterator[str]:
    """The name of a module in transformers, and what vLLM's own table for loading weights makes of it."""
    yield name
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        # Without what tells where in a fused weight the one of a module goes.
        renamed = mapper.get_rename_mapper().map_name(f"{name}.weight")
        if renamed is not None:
            yield renamed.removesuffix(".weight")


def _find(model: nn.Module, name: str, maps: Mapping[str, AffineMap]) -> nn.Module:
    for spelling in _spellings(model, name):
        module: nn.Module | None = model
        for part in spelling.split("."):
            if isinstance(module, PPMissingLayer):
                return module
            module = module._modules.get(part) if module is not None else None
        if module is not None:
            return module
    names = [other for other, _ in model.named_modules() if other]
    last = name.rpartition(".")[2]
    if last in _FUSED and any(other.endswith(_FUSED[last]) for other in names):
        why = f"vLLM computes {last} as a part of {_FUSED[last]}, which has no output of its own for it"
    else:
        why = f"{type(model).__name__} of vLLM has no such module{hint(name, names)}"
    raise ValueError(f"{_whose(maps)}: module {name!r}: {why}")


def _check(name: str, module: nn.Module, maps: Mapping[str, AffineMap], hidden_size: int, tensor_parallel: int) -> bool:
    """Whether the module gives the residual stream in two terms; ValueError where it cannot take these maps."""
    kind, norm = type(module).__name__, "norm" in type(module).__name__.lower()
    whole = next(module.children(), None) is not None
    what = f"{_whose(maps)}: module {name!r}, a {kind}"
    if isinstance(module, VocabParallelEmbedding):
        raise ValueError(f"{what}: embeddings and heads are not steered, vLLM scales or calls them in another way")
    if isinstance(module, LinearBase):
        width: int | None = module.output_size
        if getattr(module, "skip_bias_add", False) and getattr(module, "bias", None) is not None:
            raise ValueError(f"{what}: vLLM adds its bias later, so its output is not the one in transformers")
        summed = isinstance(module, RowParallelLinear) and module.reduce_results
        if tensor_parallel > 1 and (isinstance(module, ColumnParallelLinear) or not summed):
            raise ValueError(
                f"{what}: with tensor_parallel_size={tensor_parallel} each process has a part of its output only"
            )
    elif norm:
        width = output_width(module) or getattr(module, "hidden_size", None)
        if width is not None and width != hidden_size:
            raise ValueError(f"{what}: it norms heads of {width} neurons, not the {hidden_size} of a token")
    elif whole:
        width = hidden_size
        if tensor_parallel > 1:
            raise ValueError(f"{what}: with tensor_parallel_size={tensor_parallel} maps must be on norms")
    else:
        raise ValueError(f"{what}: maps must be on norms, linear layers, attention, MLPs or decoder layers")
    if width is None:
        raise ValueError(f"{what}: nothing tells the width of its output")
    for label, one in maps.items():
        if one.d != width:
            raise ValueError(
                f"maps {label!r} do not fit the model: module {name!r} gives {width} neurons, its map is for {one.d}"
            )
    return whole and not norm and not isinstance(module, LinearBase)


def _whose(maps: Mapping[str, AffineMap]) -> str:
    return "maps " + ", ".join(map(repr, maps))
