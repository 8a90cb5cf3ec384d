"""Which axis of an output counts the prompts: the first, or, sequence-first [tokens, batch, channels], the second.

What the model was called with says how many prompts there are, torch's modules say it of themselves by `batch_first`.
Where neither tells, nothing is guessed in models that hold sequence-first modules; all others are batch-first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from torch import Tensor, nn

from ..inputs.batches import Batch
from ..inputs.call import IMAGES, check_images, unwrap
from . import outputs

_OF_TORCH = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)

# What models of text and images call the part that sees images.
_OF_IMAGES = re.compile(r"(^|\.)(visual|vision|vit|image)\w*\.", re.IGNORECASE)
# Models of transformers that change the order of the axes somewhere inside, without saying so.
_SEQUENCE_FIRST_INSIDE = ("FSMT", "LED", "Longformer", "Mask2Former", "OneFormer", "XLNet")


def batch_first(module: nn.Module) -> bool | None:
    """Whether the output of a module begins with the batch, as far as it says so itself."""
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return next((batch_first(layer) for layer in module.layers), None)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    said = getattr(module, "batch_first", None)
    return said if isinstance(said, bool) else None


def _told(model: nn.Module, name: str, module: nn.Module) -> bool | None:
    """The same, also by a transformer of torch that the module is a part of."""
    said, outer = None, model
    for part in name.split("."):
        if isinstance(outer, _OF_TORCH):
            said = batch_first(outer)
        if part not in outer._modules:
            outer = unwrap(outer)
        inner = outer._modules.get(part)
        if inner is None:
            break
        outer = inner
    own = batch_first(module)
    return said if own is None else own


def tokens_first(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, bool | None]:
    """Whether outputs are [tokens, batch, channels], by name; None where nothing tells in a model with such modules."""
    unknown = None if _mixed(model) else False
    told = {name: _told(model, name, module) for name, module in modules.items()}
    return {name: unknown if one is None else not one for name, one in told.items()}


def _mixed(model: nn.Module) -> bool:
    """Whether a model holds modules that put the tokens first."""
    return any(
        batch_first(module) is False or type(module).__name__.startswith(_SEQUENCE_FIRST_INSIDE)
        for module in model.modules()
    )


class Layout:
    """Where the outputs of a `model` for a `batch`, whose arguments are under their names, have prompts and tokens."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self.model, self.batch = model, batch
        tensors = [value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        self.images = bool(tensors) and all(value.ndim > 3 or value.ndim == 1 for value in tensors)
        self.pairs = {tuple(value.shape[:2]) for value in tensors if value.ndim > 1}
        # Without masks and token ids by name, the first axis of what the model got is that of the prompts; small things
        # that are the same for all, such as positions, have other axes.
        most = min(3, max((value.ndim for value in tensors), default=0))
        self.first = {len(value) for value in tensors if value.ndim >= most}

    @cached_property
    def mixed(self) -> bool:
        """Whether the model holds modules that put the tokens first."""
        return _mixed(self.model)

    def is_sequence_first(self, name: str, module: nn.Module, tensor: Tensor) -> bool:
        """Whether the output `tensor` of module `name` is [tokens, batch, channels].

        ValueError, which names the module, where the output does not have a row for each prompt of the batch, or
        nothing tells its rows from its tokens.
        """
        told, size = _told(self.model, name, module), self.batch.size_of(name, self.model)
        prompts = {size[0]} if size else self.first
        shape = tuple(tensor.shape)
        rows, columns = shape[:2]
        if size and _OF_IMAGES.search(name):
            self._check_image_part(name, shape, size)
        if tensor.ndim == 2:
            self._check_flat(name, module, shape, told, size)
            return False
        if tensor.ndim > 3 or outputs.channel_axis(module, tensor, name) != -1:
            _compare(name, shape, rows, prompts)
            return False
        if told is not None:
            if not told and not size and shape[:2] in self.pairs:  # the model got the tokens first
                if self.batch.whole is not None:
                    raise ValueError(
                        f"{name}: the module has the prompts on the second axis, and so has the batch, which was split "
                        "along the first: give batches of the size that is to run, without batch_size= and mini_batch="
                    )
            else:
                _compare(name, shape, rows if told else columns, prompts)
            return not told
        turned = (columns, rows) in (self.pairs if size is None else {size})
        if size is None and (
            (self.mixed and self.first and not self.images) or (turned and shape[:2] in self.pairs and rows != columns)
        ):
            raise _unclear(name, shape, "which axis counts the prompts", size)
        if rows in prompts and columns in prompts and self.mixed:
            raise _unclear(name, shape, "which axis counts the prompts", size)
        if columns in prompts and rows not in prompts and (turned or self.mixed):
            return True
        _compare(name, shape, rows, prompts)
        return False

    def _check_image_part(self, name: str, shape: tuple[int, ...], size: tuple[int, int]) -> None:
        """ValueError where what a part of the model made of images would pass for the text that came with them."""
        kwargs = self.batch.kwargs
        if not any(kwargs.get(key) is not None for key in IMAGES):
            return
        alike = shape[0] == size[0] * size[1] > size[0] if len(shape) == 2 else shape[1] == size[1]
        if alike or "mm_token_type_ids" in kwargs:
            raise ValueError(
                f"{name}: the output {list(shape)} is of images, the batch has {size[0]} prompts of {size[1]} tokens: "
                "call the part of the model that sees the images alone"
            )
        check_images(self.model, kwargs)

    def _check_flat(
        self, name: str, module: nn.Module, shape: tuple[int, ...], told: bool | None, size: tuple[int, int] | None
    ) -> None:
        """ValueError where an output of two axes has no row for each prompt; `pool_output` looks at those of `size`."""
        if told is not None:
            raise ValueError(f"{name}: {type(module).__name__} was called without a batch axis, its output is {shape}")
        if size is None:
            # Pooled outputs of a batch that has the tokens first.
            _compare(name, shape, shape[0], self.first | ({pair[1] for pair in self.pairs} if self.mixed else set()))
        elif shape[0] == size[0] * size[1] and min(size) > 1 and self.mixed:
            raise _unclear(name, shape, "whether its rows are in the order of prompts or of tokens", size)


def _compare(name: str, shape: tuple[int, ...], rows: int, prompts: set[int]) -> None:
    if prompts and rows not in prompts:
        expected = " or ".join(map(str, sorted(prompts)))
        raise ValueError(f"{name}: the output {list(shape)} has {rows} rows for a batch of {expected} prompts")


def _unclear(name: str, shape: tuple[int, ...], what: str, size: tuple[int, int] | None) -> ValueError:
    way = (
        "run batches of another number of prompts than of tokens (batch_size=), or choose another module"
        if size
        else "give the batch as a mapping with an 'attention_mask' or 'input_ids' [batch, tokens], through forward= "
        "where the model has other names for them"
    )
    return ValueError(
        f"{name}: nothing tells {what} in the output {list(shape)}, since modules or inputs of the model have the "
        f"tokens first, as those with batch_first=False: {way}"
    )
