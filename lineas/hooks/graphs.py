"""Graphs that run without lineas: what torch.export and torch.jit.trace make of a model, and files of ONNX.

A hook runs once while such a graph is made, and never again. So whatever it looks up, and does not compute with tensors
of the graph, is a constant of it.
"""

from typing import Any, TypeAlias

import torch
from torch import Tensor

# torch.compiler.is_exporting is of torch 2.7.
_exports = getattr(torch.compiler, "is_exporting", lambda: not torch.compiler.is_dynamo_compiling())

StrengthInput: TypeAlias = Tensor
"""A strength that is an input of a graph: a tensor []."""


def exporting() -> bool:
    """Whether a graph is being made that runs without lineas."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and _exports())


def strength_input(value: Any) -> StrengthInput | None:
    """A strength that is a tensor of the graph that is being made; None where it is another kind of strength.

    TypeError or ValueError when it is a tensor that is no real number.
    """
    if not isinstance(value, Tensor) or not exporting():
        return None
    if value.is_complex():
        raise TypeError(f"strength must be real, got {value.dtype}")
    if value.ndim:
        raise ValueError(
            f"strength must be one number for all as an input of an exported graph, a tensor [], got the shape "
            f"{list(value.shape)}"
        )
    return value if value.is_floating_point() else value.to(torch.float32)


def called_once(what: str, instead: str) -> ValueError:
    """The error for a function of the user that a graph would not call again."""
    return ValueError(f"{what} would be called once, while the graph is made, and be a constant of it: {instead}")


def check_positions(model: str, cached: bool) -> None:
    """ValueError where the graph that is being made of a model cannot tell the positions of tokens."""
    if torch.jit.is_tracing():
        why = "of torch.jit.trace has them as constants: use torch.export"
    elif cached:
        why = "cannot tell them where a cache is one of its inputs: export the model without one"
    else:
        return
    raise ValueError(
        f"{model}: tokens=, a strength for each token and gates of context 'mean' need the positions of tokens, and a "
        f"graph {why}, or maps on all tokens alike"
    )
