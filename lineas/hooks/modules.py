"""The modules of a model: found by the names that they have in the innermost model, whatever wraps it or parts of it.

Names, lists of blocks, widths of outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .._names import hint, matching
from ..inputs.call import WRAPPED, unwrap
from ..maps.metadata import Layers

# Modules that one glob may match; a fit of more is more likely a slip than meant.
_MOST = 100
# What wrappers of a whole model put before the names of its modules, beside WRAPPED, which is anywhere in a name.
_PREFIXES = ("module.", "base_model.model.", "base_model.")
# Where modules tell how many channels their output has; `nf` is transformers' Conv1D (GPT-2).
_WIDTH_ATTRIBUTES = ("out_features", "out_channels", "num_channels", "num_features", "embedding_dim", "nf")


def check_model(model: Any) -> None:
    """TypeError where `model` is no torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__} (of a pipeline, pass the model in it, such "
            "as its model, unet or transformer)"
        )


def check_runs(model: Any) -> None:
    """`check_model`; ValueError where the model cannot run, since none of its weights has values."""
    check_model(model)
    weights = list(model.parameters())
    # Those that accelerate keeps elsewhere come back when their module runs, by hooks of this name.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    if weights and all(weight.is_meta for weight in weights) and not offloaded:
        raise ValueError(
            "model: its weights are on the meta device, which holds shapes and no values: load them, by "
            "from_pretrained or load_state_dict(..., assign=True)"
        )


# What a fold writes into the configuration of a transformers model, which is saved with it, or else onto the model.
_FOLDED_SHIFTS = "lineas_folded_shifts"


def folded_shifts(model: nn.Module) -> list[str]:
    """The modules whose shifts a fold has put into the weights that read them: the modules' outputs are without it."""
    inner = unwrap(model)
    return list(getattr(getattr(inner, "config", None), _FOLDED_SHIFTS, ()) or getattr(inner, _FOLDED_SHIFTS, ()))


def note_folded_shifts(model: nn.Module, names: Sequence[str]) -> None:
    """Note on a model, for `folded_shifts`, that a fold has moved the shifts of these modules."""
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    home = config if hasattr(config, "model_type") else inner
    if names:
        setattr(home, _FOLDED_SHIFTS, sorted({*folded_shifts(inner), *names}))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules below `model` by name, in the order of ``model.named_modules()``, each once.

    Names are those of the innermost model: wrappers (PEFT, torch.compile, parallel and checkpointing ones, of the whole
    or of parts) have none, and what they wrap stands in their place. A layer with an adapter is no wrapper.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> None:
        module = unwrap(module)
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            for part, child in module._modules.items():
                if child is not None:
                    walk(child, f"{name}.{part}" if name else part)

    walk(model, "")
    del found[""]
    return found


def _spellings(name: str) -> Iterator[str]:
    """A name, or a glob, and what is left of it without the parts that wrappers put in."""
    yield name
    plain = ".".join(part for part in name.split(".") if part not in WRAPPED)
    if plain != name:
        yield from _spellings(plain)
    for prefix in _PREFIXES:
        if plain.startswith(prefix):
            yield from _spellings(plain.removeprefix(prefix))


def resolve(model: nn.Module, layers: Layers, *, argument: str = "layers") -> list[str]:
    """Names of the modules that `layers` matches, in the order of `named_modules`.

    A string is a glob for the full dotted name (see `lineas._names.compile_glob`); a compiled regular expression must
    match the full name. What is in a list is taken as meant: ValueError when one that is not in a list matches more
    than 100 modules, or modules inside one another.

    Error messages call it `argument`. TypeError also when it is something else; ValueError when nothing, or one entry
    of a list, matches no module, with names that look alike.
    """
    patterns = [layers] if isinstance(layers, str | re.Pattern) else layers
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str | re.Pattern) for p in patterns):
        raise TypeError(f"{argument} must be a glob, a compiled regular expression or a list of them, got {layers!r}")
    if not patterns:
        raise ValueError(f"{argument} is empty")
    names = list(named_modules(model))
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            text, hits = pattern, next(filter(None, (matching(glob, names) for glob in _spellings(pattern))), [])
        else:
            text, hits = pattern.pattern, [name for name in names if pattern.fullmatch(name)]
        if not hits:
            raise ValueError(f"{argument}: no module matches {text!r}{hint(text, names)}")
        slip = likely_slip(hits)
        if slip and patterns is not layers:
            raise ValueError(
                f"{argument}: {text!r} matches {slip}; give narrower globs, such as lineas.sites(model).suggested (in "
                "a list, all that a glob matches is taken as meant, and must be able to take a map)"
            )
        chosen.update(hits)
    return [name for name in names if name in chosen]


def likely_slip(names: Sequence[str]) -> str | None:
    """What makes one glob for all these modules look like a slip: too many, or some in others; None if nothing."""
    if len(names) > _MOST:
        return f"{len(names)} modules"
    for name in names:
        outer = next((other for other in names if name.startswith(f"{other}.")), None)
        if outer is not None:
            return f"modules inside one another, {outer!r} and {name!r}"
    return None


def find(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """A module of `model`, and its name among `named_modules`, which may differ from `name` in parts of wrappers.

    ValueError where there is none, with names that look alike, or its hooks would not be called, or not be taken: torch
    takes hooks on modules that only stand for a part of a traced or exported model, and passes over them.
    """
    for spelling in _spellings(name):
        module, path = unwrap(model), spelling.split(".")
        for k, part in enumerate(path):
            _check_calls_parts(module, ".".join(path[k:]), name)
            child = module._modules[part] if part in module._modules else None
            if child is None:
                break
            module = unwrap(child)
        else:
            if isinstance(module, torch.jit.ScriptModule) and not isinstance(module, torch.jit.TopLevelTracedModule):
                raise ValueError(
                    f"module {name!r} cannot call hooks: it is a {type(module).__name__}; attach before "
                    "torch.jit.script"
                )
            return spelling, module
    raise ValueError(f"{type(unwrap(model)).__name__} has no module {name!r}{hint(name, list(named_modules(model)))}")


def get_module(model: nn.Module, name: str) -> nn.Module:
    """Module `name` of `model`; see `find`."""
    return find(model, name)[1]


def _check_calls_parts(module: nn.Module, part: str, name: str) -> None:
    """ValueError where a module is one graph that does not call its `part`, which is module `name` of the model."""
    if isinstance(module, fx.GraphModule):
        targets = (str(node.target) for node in module.graph.nodes if node.op == "call_module")
        if any(part == target or part.startswith(f"{target}.") for target in targets):
            return
    elif not isinstance(module, torch.jit.ScriptModule):
        return
    raise ValueError(
        f"module {name!r} would not call hooks: it is a part of a {type(module).__name__}, which runs as one graph; "
        "attach to the model that was traced or exported, before that is done"
    )


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks of a transformer, its decoder layers, in order: the longest list of modules of one class.

    Lists inside of blocks, such as those of experts, and lists of lists do not count. ValueError where there is no such
    list, or two are equally long, as in models with an encoder and a decoder.
    """
    lists: dict[str, list[str]] = {}
    for name, module in {"": unwrap(model), **named_modules(model)}.items():
        parts = (
            [unwrap(part) for part in module.children()] if isinstance(module, nn.ModuleList | nn.Sequential) else []
        )
        within = any(name.startswith(f"{block}.") or name == block for blocks in lists.values() for block in blocks)
        kinds = {type(part) for part in parts}
        if len(kinds) == 1 and kinds.pop().forward is not nn.Module.forward and not within:
            lists[name] = [f"{name}.{part}".removeprefix(".") for part in module._modules]
    label, longest = type(unwrap(model)).__name__, max(map(len, lists.values()), default=0)
    found = [name for name, blocks in lists.items() if len(blocks) == longest]
    if not found:
        raise ValueError(f"{label} has no list of modules of one class: name the modules instead of numbering blocks")
    if len(found) > 1:
        raise ValueError(
            f"{label} has {longest} blocks in each of {', '.join(found)}: name the modules instead of numbering blocks"
        )
    return lists[found[0]]


def output_width(module: nn.Module) -> int | None:
    """Number of channels of the output of `module`, or None where only a forward pass can tell."""
    leaf = next(module.children(), None) is None
    for attribute in _WIDTH_ATTRIBUTES:
        # What blocks call "num_channels" and the like may be those of their input, as in ViT's patches.
        value = getattr(module, attribute, None) if leaf or attribute.startswith("out_") else None
        if isinstance(value, int) and value > 0:  # 0: a lazy module that has not seen its input yet
            return value
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, Sequence) and shape:
        return int(shape[-1])
    weight = getattr(module, "weight", None)
    if "norm" not in type(module).__name__.lower():
        return None
    # Language models bring RMSNorm classes of their own, whose gain alone tells the width; as a buffer it is no gain.
    if "weight" in module._buffers:
        return None
    if isinstance(weight, Tensor) and not is_lazy(weight):
        return weight.shape[0] if weight.ndim == 1 else None
    # Those of diffusion transformers scale and shift what a norm inside of them gives.
    inner = [child for child in module.children() if "norm" in type(child).__name__.lower()]
    return output_width(inner[0]) if len(inner) == 1 else None


def block_width(model: nn.Module, name: str) -> int | None:
    """Number of channels of the output of a transformer's block: what its configuration and the block's norms both say.

    None where they do not, or the module is none of a numbered list.
    """
    config: Any = getattr(unwrap(model), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, block = getattr(text, "hidden_size", None), get_module(model, name)
    norms = {output_width(child) for child in block.children() if "norm" in type(child).__name__.lower()}
    return width if name.rpartition(".")[2].isdigit() and norms == {width} else None


def model_name(model: nn.Module) -> str | None:
    """The name or folder that a transformers model was loaded by, if any."""
    return getattr(getattr(unwrap(model), "config", None), "_name_or_path", None) or None
