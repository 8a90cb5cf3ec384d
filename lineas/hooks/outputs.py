"""The hidden state in a module's output: take it out, put it back, and find its channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .modules import output_width

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


def _is_model_output(output: Any) -> bool:
    # transformers' ModelOutput and diffusers' BaseOutput: ordered mappings that are dataclasses too.
    return isinstance(output, Mapping) and dataclasses.is_dataclass(output)


def take(output: Any, name: str = "module") -> Tensor:
    """The hidden state in a module's output: the tensor itself, or the first entry of a tuple, list or ModelOutput.

    TypeError, which names the module, when there is no floating-point tensor in that place, or a nested one.
    """
    value = output
    if _is_model_output(output):
        value = next(iter(output.values()), None)
    elif isinstance(output, tuple | list) and output:
        value = output[0]
    if not isinstance(value, Tensor):
        kind = type(output).__name__
        if isinstance(output, tuple | list):
            kind += f" of ({', '.join(type(entry).__name__ for entry in output)})"
        raise TypeError(
            f"{name}: the output must be a tensor, or a tuple, list or ModelOutput that starts with one, got {kind}"
        )
    if not value.is_floating_point():
        raise TypeError(f"{name}: the output must be a floating-point tensor, got {value.dtype}")
    if value.is_nested:
        raise TypeError(
            f"{name}: the output is a nested tensor, which has no axis of tokens; TransformerEncoder makes none "
            "with enable_nested_tensor=False"
        )
    return value


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

    ValueError when a convolution was called without a batch axis, or an output of four or more axes comes from a module
    that does not tell where its channels are, such as an activation function.
    """
    if isinstance(module, _CHANNELS_SECOND):
        if isinstance(module, nn.modules.conv._ConvNd) and tensor.ndim != len(module.kernel_size) + 2:
            raise ValueError(f"{_called(module, name)} must have a batch axis, got shape {tuple(tensor.shape)}")
        return 1
    if tensor.ndim < 4:
        return -1
    # [B, C, H, W] or [B, H, W, C]: the sizes of images are no evidence.
    if isinstance(module, _OVER_PIXELS) or getattr(module, "data_format", None) == "channels_first":
        return 1
    parts = list(module.modules())
    if tensor.shape[1] in {output_width(part) for part in parts if isinstance(part, _CHANNELS_SECOND)}:
        return 1
    if tensor.shape[-1] in {output_width(part) for part in parts}:
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
    return tokens.reshape(len(tokens), tokens.shape[1:-1].numel(), tokens.shape[-1]).contiguous()
