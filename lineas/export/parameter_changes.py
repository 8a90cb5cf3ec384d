"""New values for parameters of a model, all computed before the first is written."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..hooks.affine import moved
from .readers import parameter
from .refusal import Refusal

Key = tuple[str, str]  # module, parameter


WIDE = torch.device("cpu"), torch.float64
"""Where vectors are computed, and in what: not every device has float64."""


class ParameterChanges:
    """New parameters of a model, by module and parameter name.

    Vectors are kept in float64 until all changes of them are known, so that each is rounded once. Matrices are kept in
    their own dtype: a large model in float64 may not fit.

    Attributes
    ----------
    added_biases : dict of str to list of str
        Modules that are to have a bias and were made without one, and the maps that want it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.added_biases: dict[str, list[str]] = {}
        self._new: dict[Key, Tensor] = {}
        self._first: dict[int, str] = {}  # the first name of each module
        self._owners: dict[int, list[Key]] = {}  # of each parameter
        for name, module in model.named_modules():
            self._first[id(module)] = name
            for kind, value in module._parameters.items():
                if value is not None:
                    self._owners.setdefault(id(value), []).append((name, kind))

    def _key(self, name: str, kind: str) -> Key:
        return self._first[id(self.model.get_submodule(name))], kind

    def has(self, name: str, kind: str) -> bool:
        """Whether module `name` has, or is to have, the parameter."""
        return self._key(name, kind) in self._new or self.model.get_submodule(name)._parameters.get(kind) is not None

    def read(self, name: str, kind: str) -> Tensor:
        """The parameter as it will be; Refusal where it cannot be read."""
        key = self._key(name, kind)
        return self._new[key] if key in self._new else parameter(self.model, *key)

    def vector(self, name: str, kind: str) -> Tensor:
        """`read` in float64 on the CPU."""
        return moved(self.read(name, kind), *WIDE)

    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Note a new value of a parameter; Refusal where another module has the same parameter."""
        key = self._key(name, kind)
        old = self.model.get_submodule(name)._parameters.get(kind)
        others = [".".join(owner) for owner in self._owners.get(id(old), []) if owner != key]
        if others:
            raise Refusal(f"{kind} of {name!r} is tied to {others[0]!r}, which would change with it")
        self._new[key] = value if value.ndim == 1 else value.to(parameter(self.model, *key).dtype)

    def map_rows(self, name: str, change: Callable[[Tensor], Tensor], axis: int = 0) -> None:
        """Change the weight of a module: `change` gets it in float64 as [rows, rest], with `axis` as the rows."""
        weight = self.read(name, "weight")
        rows = weight.movedim(axis, 0)
        double = (rows.cpu() if rows.device.type == "mps" else rows).double()  # there is no float64 on mps
        out = change(double.reshape(len(rows), -1)).reshape(rows.shape)
        self.write(name, "weight", moved(out, weight.device, weight.dtype).movedim(0, axis).contiguous())

    def add_to_bias(self, name: str, shift: Tensor, wanted_by: str) -> None:
        """Add a float64 vector to the bias of a module, which may have none so far."""
        if self.has(name, "bias"):
            shift = self.vector(name, "bias") + shift
        if self.model.get_submodule(name)._parameters.get("bias") is None:
            self.added_biases.setdefault(name, []).append(wanted_by)
        self.write(name, "bias", shift)

    def rounded(self) -> dict[Key, Tensor]:
        """All new values in the dtype and on the device of the parameters they are for; Refusal of what overflows."""
        found = {}
        for (name, kind), value in self._new.items():
            old = self.model.get_submodule(name)._parameters.get(kind)
            like = parameter(self.model, name, "weight") if old is None else old
            found[name, kind] = moved(value, like.device, like.dtype)
            if not found[name, kind].isfinite().all():
                raise Refusal(f"{kind} of {name!r} would be too large for {like.dtype}")
        return found


def write_parameters(model: nn.Module, values: dict[Key, Tensor]) -> Callable[[], None]:
    """Give the parameters of `model` their new values and return what undoes it.

    A parameter that was not there is added. The memory of the old values is not written to: others may look at it.
    """
    old: list[tuple[nn.Module, str, nn.Parameter | None, Tensor | None]] = []

    def undo() -> None:
        for module, kind, before, data in reversed(old):
            module._parameters[kind] = before
            if before is not None and data is not None:
                before.data = data

    for (name, kind), value in values.items():
        module = model.get_submodule(name)
        before = module._parameters.get(kind)
        old.append((module, kind, before, None if before is None else before.data))
        if before is None:
            like = module._parameters["weight"]
            module._parameters[kind] = nn.Parameter(value, requires_grad=like is not None and like.requires_grad)
        else:
            before.data = value
    return undo
