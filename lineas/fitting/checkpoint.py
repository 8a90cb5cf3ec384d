"""Checkpoints: what a fit needs to go on, kept on disk after every step.

A file is written as a whole or not at all: whenever the process dies, the one before it is there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs.frozen import RandomState
from ..maps.files import read, write

if TYPE_CHECKING:
    from .loop import History
    from .objective import Objective
    from .step_sizes import Steps

FORMAT = "lineas checkpoint"
# What a checkpoint keeps of a history, beside the maps.
_PROGRESS = ("records", "best_step", "best_strength", "best_loss", "best_keep", "best_score", "held_out_passes")


class Checkpoint:
    """The file in which a fit is kept.

    What must be the same for a fit to go on is `identity`, as JSON has it: settings, modules, digests; and, up to
    rounding, the `targets`: the target activations of every set, which whatever else acts on the model changes too,
    such as attached maps, adapters, a `forward` or a selection of tokens.

    `followers` are the checkpoints of fits that stand on the maps of this one: where there are any, it may be read, but
    takes no step further, which would change the maps under them.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        identity: dict[str, Any],
        targets: Mapping[str, Sequence[Tensor]],
        objective: Objective,
        followers: Sequence[str] = (),
    ) -> None:
        self.path, self.identity, self.followers = os.fspath(path), identity, followers
        self.taken = 0  # steps that the file had when the fit went on from it
        self.targets = {argument: _moments(samples) for argument, samples in targets.items()}
        self.names, self.tolerance, self.processes = objective.loss_names, objective.tolerance, objective.processes

    def save(self, history: History, steps: Steps) -> None:
        """Write the fit as it stands, by the first of several processes.

        OSError if that fails, ValueError if the fit went further, and there are fits on top of it.
        """
        first, further = self.processes.rank == 0, 0 < self.taken < len(history.records)
        followers = [path for path in self.followers if first and further and os.path.exists(path)]
        if followers:
            raise ValueError(
                f"checkpoint: the fit in {self.path} has {self.taken} steps and would go on, which changes the maps "
                f"that the fit in {followers[0]} is on top of; give steps and patience as before or another folder, "
                f"or remove {' and '.join(followers)} to fit anew what follows. No file was changed"
            )
        tensors, state = steps.state()
        maps = history.maps
        tensors |= {"weight": maps.weight, "bias": maps.bias}
        if maps.standards is not None:
            tensors |= maps.standards._asdict()
        for argument, moments in self.targets.items():
            tensors |= {f"moments {argument} {k}": module for k, module in enumerate(moments)}
        random = RandomState(steps.objective.model)
        tensors |= self.processes.each({f"random {device}": numbers for device, numbers in random.tensors.items()})
        if not first:
            return
        if history.best is not None:
            tensors |= {"best weight": history.best[0], "best bias": history.best[1]}
        progress = {name: getattr(history, name) for name in _PROGRESS}
        save(self.path, tensors, {"identity": self.identity, "steps": state, "passes": steps.passes, **progress})

    def resume(self, history: History, steps: Steps) -> None:
        """Go on from the file; errors as of `load`, and a ValueError that says what differs from another fit's."""
        tensors, state = self.processes.read(lambda: load(self.path))
        seen = state["identity"]
        differs = next((key for key, value in self.identity.items() if seen.get(key) != value), None)
        if differs is not None:
            detail = "" if "digest" in differs else f": it was {seen.get(differs)!r}, and is {self.identity[differs]!r}"
            raise ValueError(
                f"checkpoint: {self.path} is that of another fit, of which the {differs} differs{detail}; give another "
                "file, or remove it to begin again"
            )
        self._check_targets(tensors)
        if len(state["records"]) > steps.count:
            raise ValueError(
                f"steps must be at least the {len(state['records'])} that the fit in {self.path} has taken, got "
                f"{steps.count}; give another file for a shorter fit"
            )
        maps, device = history.maps, history.maps.weight.device
        maps.weight.copy_(tensors["weight"])
        maps.bias.copy_(tensors["bias"])
        if maps.standards is not None:  # to the bit, which those of now may not be
            for name, values in maps.standards._asdict().items():
                values.copy_(tensors[name])
        for name in _PROGRESS:
            setattr(history, name, state[name])
        if "best weight" in tensors:
            history.best = tensors["best weight"].to(device), tensors["best bias"].to(device)
            history.best_terms = history.records[history.best_step]["held_out_layer_loss"]
        steps.resume(tensors, state["steps"])
        steps.passes = state["passes"]
        self.taken = len(history.records)
        random = RandomState(steps.objective.model)
        random.tensors = {
            name: tensors.get(self.processes.mine(f"random {name}"), numbers)
            for name, numbers in random.tensors.items()
        }
        random.restore()

    def _check_targets(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise ValueError where the activations of a target are others, by more than other sums of the same would."""
        for argument, moments in self.targets.items():
            for k, (name, now) in enumerate(zip(self.names, moments, strict=True)):
                if not _alike(tensors[f"moments {argument} {k}"], now.cpu(), self.tolerance):
                    raise ValueError(
                        f"checkpoint: {self.path} is that of another fit, of which the activations of {argument} at "
                        f"module {name!r} differ, though weights and prompts are the same: look for attached maps, "
                        "adapters switched on or off, another forward= or tokens=; make it as it was, give another "
                        "file, or remove it to begin again"
                    )


def _moments(samples: Sequence[Tensor]) -> list[Tensor]:
    """Mean and standard deviation [2, d] of the samples [m, d] of every module."""
    return [torch.stack(torch.std_mean(sample, dim=0, correction=0)[::-1]) for sample in samples]


def _alike(before: Tensor, now: Tensor, tolerance: float) -> bool:
    """Whether two means and standard deviations [2, d] are the same up to a share of the size of the neurons.

    Not to the bit: other threads, another machine and another device add in another order.
    """
    size = before.square().sum(dim=0).sqrt()
    return bool(((now - before).abs() <= tolerance * (size + size.median())).all())


def save(path: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint; OSError if it cannot be written, which leaves the one that was there before."""
    try:
        write(path, FORMAT, tensors, {"state": state})
    except OSError as error:
        kept = "the last checkpoint is untouched" if os.path.exists(path) else "there is no checkpoint yet"
        raise OSError(error.errno, f"cannot write the checkpoint ({error.strerror}; {kept})", path) from None


def load(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint; OSError if it cannot be read, ValueError if it is none or damaged."""
    try:
        _, tensors, entries = read(path, FORMAT, framework="pt")
    except ValueError as error:
        raise ValueError(f"checkpoint: {error}") from None
    return tensors, entries["state"]


def digest(*values: Any) -> str:
    """A digest of everything in the values that is an array, a number or text, in any nesting of lists and mappings."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy())
        elif isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Mapping):
            add([entry for key in sorted(value, key=str) for entry in (str(key), value[key])])
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}]".encode())
            for entry in value:
                add(entry)
        elif value is None or isinstance(value, str | bytes | int | float):
            found.update(repr(value).encode())

    add(values)
    return found.hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """A digest of all parameters and buffers of a model: names, shapes, dtypes, and sums that tell every bit's place.

    Every number is multiplied by one that belongs to its place. Sums of integers wrap around and do not depend on their
    order, so that they are the same on every device, and take one pass over the weights. Weights that are not in memory
    count by name and shape alone.
    """
    found: list[Any] = []
    places = torch.from_numpy(np.random.PCG64(0).random_raw(_BLOCK).view(np.int64))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found += [name, str(tensor.dtype), list(tensor.shape)]
        if type(tensor.data) is Tensor and tensor.device.type != "meta" and tensor.numel():
            places = places.to(tensor.device)
            values = tensor.detach().contiguous().flatten()
            blocks = values.view(_INTEGERS.get(values.element_size(), torch.uint8)).split(_BLOCK)
            found += torch.stack([(block * places[: len(block)]).sum() for block in blocks]).tolist()
    return digest(found)


_BLOCK = 1 << 20
# Of numbers of 8 bytes either half has a place: products of whole ones would lose what differs in the first bits only.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int32}
