"""Models that are divided among processes: how, what that asks of a fit, and what of them it cannot take."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_WAYS = "fully_shard and plain tensor parallelism are taken"


class Sharding:
    """How a model is divided among the processes of a group.

    Parameters
    ----------
    model : nn.Module
        The model.
    size : int
        How many processes the group has.

    Attributes
    ----------
    kind : "whole", "fully_shard" or "tensor"
        Whether every process has the whole model; parts of the weights, which it gathers layer by layer; or computes
        parts of the layers.
    in_step : bool
        Whether a forward pass waits for the same one of the other processes, so that all must make as many.

    Raises
    ------
    ValueError
        If the model is divided by FullyShardedDataParallel, in two ways at once, or among other processes.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self._units: dict[int, Any] = {}
        units = _units(model)
        for unit in units:  # outer ones come first
            for module in unit.modules():
                self._units[id(module)] = unit
        divided = _divided(model)
        self.kind = "fully_shard" if units else "tensor" if divided else "whole"
        # A wrapper inside broadcasts buffers in its forward, which every process must take part in then.
        wrapped = any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())
        self.in_step = self.kind != "whole" or wrapped
        for name, module in model.named_modules():
            if type(module).__name__ == "FullyShardedDataParallel":
                raise ValueError(
                    f"model: module {name!r} is a FullyShardedDataParallel, which a fit on several processes does not "
                    f"take: {_WAYS}"
                )
        for name, weight in divided.items():
            if len([placement for placement in weight.placements if not placement.is_replicate()]) > 1:
                raise ValueError(f"model: {name!r} is divided in two ways at once ({weight.placements}): {_WAYS}")
            if weight.device_mesh.size() != size:
                raise ValueError(
                    f"process_group has {size} processes, and {name!r} of the model is divided among "
                    f"{weight.device_mesh.size()}: they must be the same"
                )

    @staticmethod
    def check_alone(model: nn.Module) -> None:
        """ValueError where a model is divided among processes, which all have to take part in the fit."""
        name = next(iter(_divided(model)), None)
        if name is not None or _units(model):
            what = "it" if name is None else repr(name)
            raise ValueError(
                f"model: {what} is divided among processes (fully_shard or tensor parallelism), so that all of them "
                "must fit together: give process_group='world', or the group that has the model"
            )

    @property
    def leaves(self) -> bool:
        """Whether a forward pass may be left early: units of fully_shard count on its end."""
        return self.kind != "fully_shard"

    def before_backward(self, module: nn.Module, tensor: Tensor) -> None:
        """Have the weights in place when a backward pass enters the middle of a unit of fully_shard by `tensor`.

        fully_shard itself gathers them where it enters a unit by its output.
        """
        unit = self._units.get(id(module))
        if unit is not None and tensor.requires_grad:
            tensor.register_hook(lambda gradient: unit.unshard())


def check_plain(name: str, tensor: Tensor) -> None:
    """ValueError, which names the module, where its output is divided among processes."""
    kind = _dtensor()
    if kind is not None and isinstance(tensor, kind):
        raise ValueError(
            f"module {name!r} gives a DTensor with placements {list(getattr(tensor, 'placements', ()))}: maps and "
            "losses need modules whose output is a plain tensor, whole on every process, such as layers"
        )


def _dtensor() -> Any:
    """torch's DTensor; None where its module is not loaded, and so there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def _divided(model: nn.Module) -> dict[str, Any]:
    kind = _dtensor()
    if kind is None:
        return {}
    return {name: weight for name, weight in model.named_parameters() if isinstance(weight, kind)}


def _units(model: nn.Module) -> list[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return [] if kind is None else [one for one in model.modules() if isinstance(one, kind)]
