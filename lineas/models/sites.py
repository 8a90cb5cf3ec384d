"""Find modules by name, and take the hidden state out of a module's output and put it back."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .compiled import check_hooks_run

Layers: TypeAlias = str | re.Pattern[str] | Sequence[str | re.Pattern[str]]

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm
    nn.GroupNorm,
)
_OVER_PIXELS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
# Where modules tell how many channels their output has; `nf` is transformers' Conv1D (GPT-2).
_WIDTH_ATTRIBUTES = ("out_features", "out_channels", "num_channels", "num_features", "embedding_dim", "nf")


def near_names(wanted: str, names: Iterable[str]) -> list[str]:
    """Names that look like `wanted`, best first, with layer numbers written as ``*``; at most five."""
    templates = dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)
    return difflib.get_close_matches(re.sub(r"(?<![^.])\d+(?![^.])", "*", wanted), templates, n=5, cutoff=0.3)


def _hint(wanted: str, names: Sequence[str]) -> str:
    near = near_names(wanted, names)
    if near:
        return "; similar names: " + ", ".join(near)
    return "; the model's first names: " + ", ".join(names[:5]) if names else "; the model has no modules"


def resolve(model: nn.Module, layers: Layers, *, argument: str = "layers") -> list[str]:
    """Names of the modules that `layers` matches, in the order of ``model.named_modules()``.

    Parameters
    ----------
    model : torch.nn.Module
    layers : str, compiled regular expression, or a sequence of them
        A string is a glob for the full dotted name (`fnmatch`, case-sensitive: ``*`` also crosses dots); a compiled
        regular expression must match the full name.
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
            text, hits = pattern, [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        else:
            text, hits = pattern.pattern, [name for name in names if pattern.fullmatch(name)]
        if not hits:
            raise ValueError(f"{argument}: no module matches {text!r}{_hint(text, names)}")
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
    raise ValueError(f"{type(model).__name__} has no module {name!r}{_hint(name, names)}")


def width(module: nn.Module) -> int | None:
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
    return width(inner[0]) if len(inner) == 1 else None


def _is_model_output(output: Any) -> bool:
    # transformers' ModelOutput and diffusers' BaseOutput: ordered mappings that are dataclasses too.
    return isinstance(output, Mapping) and dataclasses.is_dataclass(output)


def take(output: Any, name: str = "module") -> Tensor:
    """The hidden state in a module's output: the tensor itself, or the first entry of a tuple, list or ModelOutput.

    Raises
    ------
    TypeError
        When there is no floating-point tensor in that place; names the module.
    """
    value = output
    if _is_model_output(output):
        value = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        value = output[0]
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: the output must be a tensor, or a tuple, list or ModelOutput that starts with one, "
            f"got {_describe(output)}"
        )
    if not value.is_floating_point():
        raise TypeError(f"{name}: the output must be a floating-point tensor, got {value.dtype}")
    return value


def _describe(output: Any) -> str:
    if isinstance(output, tuple | list):
        return f"{type(output).__name__} of ({', '.join(type(entry).__name__ for entry in output)})"
    return type(output).__name__


def put(output: Any, tensor: Tensor) -> Any:
    """A copy of `output` with `tensor` in the place that `take` reads; `output` is not modified."""
    if isinstance(output, Tensor):
        return tensor
    if _is_model_output(output):
        first = next(iter(output))
        return dataclasses.replace(output, **{first: tensor})
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)._make((tensor, *output[1:]))
    return type(output)((tensor, *output[1:]))


def channel_axis(module: nn.Module, tensor: Tensor, name: str = "") -> int:
    """Axis of the channels in the output `tensor` of `module`, which error messages call `name`.

    1 for convolutions, BatchNorm, GroupNorm and InstanceNorm at any number of dimensions, and in outputs of four and
    more axes also for pooling layers and for modules that hold convolutions or such norms of that width; else -1.

    Raises
    ------
    ValueError
        When a convolution was called without a batch axis, or an output of four or more axes comes from a module that
        does not tell where its channels are, such as an activation function.
    """
    if not isinstance(module, _CHANNELS_SECOND):
        return -1 if tensor.ndim < 4 else _channel_axis_of_images(module, tensor, name)
    if isinstance(module, nn.modules.conv._ConvNd) and tensor.ndim != len(module.kernel_size) + 2:
        raise ValueError(f"{_called(module, name)} must have a batch axis, got shape {tuple(tensor.shape)}")
    return 1


def _channel_axis_of_images(module: nn.Module, tensor: Tensor, name: str) -> int:
    """`channel_axis` of what may be [B, C, H, W] or [B, H, W, C]; the sizes of images are no evidence."""
    if isinstance(module, _OVER_PIXELS) or getattr(module, "data_format", None) == "channels_first":
        return 1
    parts = list(module.modules())
    if tensor.shape[1] in {width(part) for part in parts if isinstance(part, _CHANNELS_SECOND)}:
        return 1
    if tensor.shape[-1] in {width(part) for part in parts}:
        return -1
    raise ValueError(
        f"{_called(module, name)} has shape {tuple(tensor.shape)}, and the module does not tell whether its channels "
        "are on axis 1 or on the last: choose the convolution, norm or linear layer next to it"
    )


def _called(module: nn.Module, name: str) -> str:
    return f"{name}: the output of {type(module).__name__}" if name else f"the output of {type(module).__name__}"


def to_tokens(module: nn.Module, tensor: Tensor, name: str = "") -> Tensor:
    """The output `tensor` of `module` as contiguous [B, T, d], channels last.

    The axes between the batch and the channels (positions, pixels) become the T tokens; [B, d] becomes [B, 1, d].
    A view where the memory layout allows it.
    """
    if tensor.ndim < 2:
        raise ValueError(
            f"{_called(module, name)} must be [batch, ..., channels] or [batch, channels, ...], "
            f"got shape {tuple(tensor.shape)}"
        )
    tokens = tensor.movedim(channel_axis(module, tensor, name), -1)
    # Sizes spelled out: -1 cannot be inferred for an empty batch.
    count = 1
    for size in tokens.shape[1:-1]:
        count *= size
    return tokens.reshape(tokens.shape[0], count, tokens.shape[-1]).contiguous()


def spell(layers: Layers) -> str | list[str]:
    """`layers` as text, for metadata; a regular expression as its pattern."""
    if isinstance(layers, str | re.Pattern):
        return layers if isinstance(layers, str) else layers.pattern
    return [layer if isinstance(layer, str) else layer.pattern for layer in layers]


def model_name(model: nn.Module) -> str | None:
    """The name or folder that a transformers model was loaded by, if any."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
