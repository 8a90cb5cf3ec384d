"""Find modules by name, and take the hidden state out of a module's output and put it back."""

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._names import hint, matching
from ..maps.metadata import Layers
from .compile import check_hooks_run

# Where modules tell how many channels their output has; `nf` is transformers' Conv1D (GPT-2).
_WIDTH_ATTRIBUTES = ("out_features", "out_channels", "num_channels", "num_features", "embedding_dim", "nf")


def resolve(model: nn.Module, layers: Layers, *, argument: str = "layers") -> list[str]:
    """Names of the modules that `layers` matches, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : torch.nn.Module
    layers : str, compiled regular expression, or a sequence of them
        A string is a glob for the full dotted name (see `lineas._names.compile_glob`); a compiled regular expression
        must match the full name.
    argument : str, default "layers"
        What to call `layers` in error messages.

    Raises
    ------
    TypeError
        When `layers` is something else.
    ValueError
        When nothing, or one entry of a sequence, matches no module; names that look alike are listed.
    """
    patterns = [layers] if isinstance(layers, str | re.Pattern) else layers
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str | re.Pattern) for p in patterns):
        raise TypeError(f"{argument} must be a glob, a compiled regular expression or a list of them, got {layers!r}")
    if not patterns:
        raise ValueError(f"{argument} is empty")
    names = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str):
            text, hits = pattern, matching(pattern, names)
        else:
            text, hits = pattern.pattern, [name for name in names if pattern.fullmatch(name)]
        if not hits:
            raise ValueError(f"{argument}: no module matches {text!r}{hint(text, names)}")
        chosen.update(hits)
    return [name for name in names if name in chosen]


def get_module(model: nn.Module, name: str) -> nn.Module:
    """Module `name` of `model`.

    Raises
    ------
    ValueError
        Where there is none, with names that look alike, or its hooks would not be called (`check_hooks_run`).
    """
    if name:
        check_hooks_run(model, name)
        try:
            return model.get_submodule(name)
        except AttributeError:
            pass
    names = [other for other, _ in model.named_modules() if other]
    raise ValueError(f"{type(model).__name__} has no module {name!r}{hint(name, names)}")


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
    # Language models bring RMSNorm classes of their own, whose gain alone tells the width.
    if isinstance(weight, Tensor) and not is_lazy(weight):
        return weight.shape[0] if weight.ndim == 1 else None
    # Those of diffusion transformers scale and shift what a norm inside of them gives.
    inner = [child for child in module.children() if "norm" in type(child).__name__.lower()]
    return output_width(inner[0]) if len(inner) == 1 else None


def block_names(model: nn.Module) -> list[str]:
    """Names of the blocks (decoder layers) of a transformer, in order: the entries of its longest list of modules."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks")
    longest = max(lists, key=lambda name: len(lists[name]))
    return [f"{longest}.{k}" for k in range(len(lists[longest]))]


def model_name(model: nn.Module) -> str | None:
    """The name or folder that a transformers model was loaded by, if any."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
