"""What maps of a model add to its Linears and convolutions, as products of small matrices.

For y = W x + c, a map w y + b of this output adds (w - 1) (W x + c) + b: rows of W times w - 1, and a shift. Where only
weights W read a mapped norm n, W (w n + b) adds W (w - 1) n + W b: columns of W times w - 1, and a shift. All of that
is proportional to the strength, so that a LoRA of it, turned to s, does what the maps do at strength s.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..hooks.affine import moved, parameters
from ..maps.steering import SteeringMaps
from .fold_module import Modulation, find_modulation
from .image_readers import find_image_readers
from .parameter_changes import WIDE
from .readers import Readers, count_uses, is_from, parameter
from .refusal import IN_MODEL, Refusal, refuse


class LowRank(NamedTuple):
    """What is added to a module: ``up @ down`` to its weight, `shift` to its bias.

    Attributes
    ----------
    down : Tensor [rank, in] or [rank, in, height, width]
    up : Tensor [out, rank]
    shift : Tensor [out], float64
    rows : Tensor [out], bool
        The rows of the weight that anything is added to.
    """

    down: Tensor
    up: Tensor
    shift: Tensor
    rows: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)


def low_rank_changes(maps: SteeringMaps, model: nn.Module, strength: float, readers: Readers) -> dict[str, LowRank]:
    """What the maps add to each Linear and convolution; ValueError names the maps that nothing can be added for.

    A map of a norm goes into what reads it, or, where that is not known or is mapped itself, into the Linear that
    modulates it.
    """
    changes: dict[str, LowRank] = {}
    wanted_by: dict[str, str] = {}
    refused, uses = {}, count_uses(model)
    for name, affine in maps.items():
        weight, bias = parameters(affine, strength, *WIDE)
        if (weight == 1).all() and (bias == 0).all():
            continue
        try:
            module = model.get_submodule(name)
            if isinstance(module, nn.Linear | nn.Conv2d) or is_from(module, "peft"):
                if uses[id(module)] > 1:
                    raise Refusal(f"it is used in {uses[id(module)]} places of the model")
                found = {name: _of_rows(model, name, weight, bias)}
            else:
                found = _of_norm(model, name, weight, bias, readers, uses, maps)
            for target, change in found.items():
                if target in changes:
                    found[target] = _both(changes[target], change, target, wanted_by[target])
            changes |= found
            wanted_by |= dict.fromkeys(found, name)
        except Refusal as error:
            refused[name] = str(error.args[0])
    refuse(refused, len(maps), "written as LoRA", IN_MODEL)
    return changes


def _of_norm(
    model: nn.Module,
    name: str,
    weight: Tensor,
    bias: Tensor,
    given: Readers,
    uses: Counter[int],
    maps: SteeringMaps,
) -> dict[str, LowRank]:
    modulation = find_modulation(model, name) if name not in given else None
    try:
        if modulation is not None and modulation[-1]:
            raise Refusal("it is modulated before anything reads it")
        names = find_image_readers(model, name, given, uses)
        mapped = [reader for reader in names if reader in maps and maps[reader].support]
        if mapped:
            raise Refusal(
                f"{mapped[0]!r}, which reads it, has a map as well: what both do to its weights is no multiple of the "
                "strength"
            )
        return {reader: _of_columns(model, reader, weight, bias) for reader in names}
    except Refusal:
        if modulation is None:
            raise
    return {modulation[0]: _of_modulation(model, modulation, weight, bias)}


def _both(first: LowRank, second: LowRank, target: str, wanted_by: str) -> LowRank:
    """The sum of two changes of different rows; those of the same rows do not add up, since one map sees the other."""
    if (first.rows & second.rows).any():
        raise Refusal(
            f"the map of {wanted_by!r} changes {target!r} as well: what both do to it is no multiple of the strength"
        )
    return LowRank(
        torch.cat([first.down, second.down]),
        torch.cat([first.up, second.up], dim=1),
        first.shift + second.shift,
        first.rows | second.rows,
    )


# --- the weights ------------------------------------------------------------------------------------------------------


def _weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a Linear [out, in] or convolution [out, in, height, width] that loaders can add a LoRA to."""
    module = model.get_submodule(name)
    if type(module) not in (nn.Linear, nn.Conv2d):
        hint = ": unload the LoRA first" if is_from(module, "peft") else ""
        raise Refusal(
            f"{name!r} is a {type(module).__module__}.{type(module).__name__}, no plain Linear or Conv2d{hint}"
        )
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
            raise Refusal(
                f"{name!r} has groups={module.groups}, dilation={module.dilation} and padding_mode="
                f"{module.padding_mode!r}; LoRA of convolutions is for one group, no dilation and zeros alone"
            )
    return parameter(model, name, "weight")


def _own_bias(model: nn.Module, name: str, size: int) -> Tensor:
    if model.get_submodule(name)._parameters.get("bias") is None:
        return torch.zeros(size, dtype=torch.float64, device="cpu")
    return moved(parameter(model, name, "bias"), *WIDE)


def _small(down: Tensor, up: Tensor, shift: Tensor, weight: Tensor, name: str) -> LowRank:
    """A change in the dtype of the file; a rank beyond that of any matrix of this shape is brought down to it."""
    rows = (up != 0).any(dim=1) | (shift != 0)
    out, columns = len(up), down[0].numel() if len(down) else 0
    if len(down) > min(out, columns):
        whole = up @ down.flatten(1)
        if out < columns:
            down, up = whole.view(out, *down.shape[1:]), torch.eye(out, dtype=torch.float64, device="cpu")
        else:
            down, up = torch.eye(columns, dtype=torch.float64, device="cpu").view(columns, *down.shape[1:]), whole
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    small = LowRank(down.to(dtype), up.to(dtype), shift, rows)
    if not all(part.to(dtype).isfinite().all() for part in small[:3]):
        raise Refusal(f"the LoRA of {name!r} would not be finite in {dtype}")
    return small


def _one_hot(index: Tensor, size: int) -> Tensor:
    """Ones at (row k, column index[k]) of a float64 matrix [len(index), size]."""
    return torch.nn.functional.one_hot(index.cpu(), size).double()


def _of_rows(model: nn.Module, name: str, weight: Tensor, bias: Tensor) -> LowRank:
    """What a map of the module's own output adds to it."""
    own = _weight(model, name)
    chosen = (weight != 1).nonzero().flatten()
    down = moved(own[chosen.to(own.device)], *WIDE)
    down *= (weight - 1)[chosen].view(-1, *[1] * (own.ndim - 1))
    shift = (weight - 1) * _own_bias(model, name, len(weight)) + bias
    return _small(down, _one_hot(chosen, len(weight)).T, shift, own, name)


def _of_columns(model: nn.Module, name: str, weight: Tensor, bias: Tensor) -> LowRank:
    """What a map of the module's input adds to it."""
    module, own = model.get_submodule(name), _weight(model, name)
    if own.shape[1] != len(weight):
        raise Refusal(f"{name!r} reads {own.shape[1]} neurons, not {len(weight)}")
    if isinstance(module, nn.Conv2d) and module.padding != (0, 0) and (bias != 0).any():
        raise Refusal(f"its shift is not 0, and {name!r} sees zeros without it at the edges (padding={module.padding})")
    chosen = (weight != 1).nonzero().flatten()
    spots = own[0, 0].numel()  # 1, or the places of a convolution's window
    block = moved(own[:, chosen.to(own.device)], *WIDE) * (weight - 1)[chosen].view(-1, *[1] * (own.ndim - 2))
    index = (chosen[:, None] * spots + torch.arange(spots, device="cpu")).flatten()
    down = _one_hot(index, own[0].numel()).view(len(index), *own.shape[1:])
    there = bias.nonzero().flatten()
    seen = moved(own[:, there.to(own.device)], *WIDE).view(len(own), len(there), spots).sum(dim=2)
    return _small(down, block.flatten(1), seen @ bias[there], own, name)


def _of_modulation(model: nn.Module, modulation: Modulation, weight: Tensor, bias: Tensor) -> LowRank:
    """What a map adds to the Linear whose slices s and t make n (1 + s) + t of a norm n.

    After it: w (n (1 + s) + t) + b, so s gains (w - 1) (1 + s), and t gains (w - 1) t + b. Before it:
    (w n + b) (1 + s) + t, so t gains b (1 + s) instead.
    """
    name, count, shift_at, scale_at, before = modulation
    own, size = _weight(model, name), len(weight)
    if len(own) != count * size:
        raise Refusal(f"the modulation {name!r} gives {len(own)} numbers, not {count * size}")
    bias_of = _own_bias(model, name, len(own)).view(count, size)
    slopes, shift = weight - 1, torch.zeros(count, size, dtype=torch.float64, device="cpu")
    shift[scale_at] = slopes * (bias_of[scale_at] + 1)
    if before:
        chosen = ((slopes != 0) | (bias != 0)).nonzero().flatten()
        read = [chosen + scale_at * size]
        up = (
            _one_hot(read[0], len(own)).T * slopes[chosen]
            + _one_hot(chosen + shift_at * size, len(own)).T * bias[chosen]
        )
        shift[shift_at] = bias * (bias_of[scale_at] + 1)
    else:
        chosen = slopes.nonzero().flatten()
        read = [chosen + scale_at * size, chosen + shift_at * size]
        up = torch.cat([_one_hot(rows, len(own)).T * slopes[chosen] for rows in read], dim=1)
        shift[shift_at] = slopes * bias_of[shift_at] + bias
    down = moved(own[torch.cat(read).to(own.device)], *WIDE)
    return _small(down, up, shift.flatten(), own, name)
