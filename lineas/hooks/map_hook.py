"""The hooks of a handle: one a module, which applies its map, and two on the model itself, which tell of its passes."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..maps.affine import AffineMap, at_strength
from ..maps.gates import NeuronGate, gates_of
from ..maps.metadata import Selection, show_tokens
from . import outputs
from .affine import apply, blend, moved, parameters, working_dtype
from .forward_state import Tracker
from .gating import GateReader, gated, parts_of, sites_of, token_values
from .strength import Schedule, Setting, Settings, StrengthArray

# Parameters of a hook at strengths other than the latest, for threads that have their own.
_KEPT = 32


class MapHook:
    """A map as a forward hook.

    An object, not a closure, so that a model with maps can be pickled and copied. A copy of the model carries copies
    of its hooks, as with any hook; a handle speaks of the model it was made for.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        tokens: Selection,
        tracker: Tracker,
        likely: tuple[torch.device, torch.dtype],
        tokens_first: bool | None,
    ) -> None:
        self.name, self.settings, self.tokens, self.tracker, self.likely = name, settings, tokens, tracker, likely
        self.tokens_first = tokens_first  # None: nothing tells
        self.d = settings.latest.maps[name].d
        self.handle: Any = None  # the Handle, for who has lost it
        self.reader = GateReader(name, tracker)
        self.renew()

    def renew(self) -> None:
        """Make what is kept of the map anew."""
        # For compiled graphs, which must not make any: at strength 1, where and in what the output is likely to be.
        self._constants = parameters(self.settings.latest.maps[self.name], 1.0, *self.likely)
        # By strength, device and dtype.
        self._parameters: dict[Any, tuple[AffineMap, Tensor, Tensor]] = {}
        self._last_call: tuple[Any, ...] | None = None
        self._last_gated: tuple[Any, ...] | None = None
        # What compiled graphs know of gates: that of this module, its numbers, whether other gates read the module.
        gates = gates_of(self.settings.latest.maps)
        self._gate, self._is_read = gates.get(self.name), self.name in sites_of(gates)
        self._gate_parts = () if self._gate is None else parts_of(self._gate, *self.likely)

    # A handle speaks of the model it was made for, not of copies.
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"handle": None, "_last_call": None, "_last_gated": None}

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(module, output)
        setting = self.tracker.setting()
        # What was done to the last output is done to the next one in as few steps as can be, mostly one token later.
        last = self._last_call
        if last is not None and type(output) is Tensor:
            before, dtype, device, axes, width, weight, bias = last
            shape = output.shape
            if (
                before is setting
                and output.dtype is dtype
                and len(shape) == axes
                and shape[-1] == width
                and output.device == device
            ):
                return torch.addcmul(bias, output, weight)
        last = self._last_gated
        if last is not None and type(output) is Tensor:
            before, dtype, device, axes, width, weight, bias, gate, parts = last
            shape = output.shape
            if (
                before is setting
                and output.dtype is dtype
                and len(shape) == axes
                and shape[-1] == width
                and output.device == device
            ):
                value = self.reader.again(gate, parts, output)
                if value is not None:
                    return gated(output, torch.addcmul(bias, output, weight), value)
        self.tracker.acted.add(self.name)
        if setting.gates and (self.name in setting.gates or self.name in setting.sites):
            return self._gated(module, output, setting)
        strength = setting.strength
        if self.tokens != "all" or not isinstance(strength, float):
            return self._in_general(module, output, setting)
        if strength == 0:
            return None
        tensor, axis = self._activation(module, output)
        weight, bias = self._at_strength(tensor, setting, strength)
        # Not for images, where only the shape tells the axis.
        if axis == -1 and tensor.ndim < 4 and weight.dtype == tensor.dtype and type(weight) is Tensor:
            size = tensor.ndim, tensor.shape[-1]
            self._last_call = (setting, tensor.dtype, tensor.device, *size, weight, bias)
        return outputs.put(output, apply(tensor, weight, bias, axis))

    def _compiled(self, module: nn.Module, output: Any) -> Any:
        """The map in a graph that holds for every strength that is a number: it is a tensor there, and no constant."""
        self._note()
        gate, value = self._gate, None
        if self._is_read or (gate is not None and (gate.site is not None or gate.context != "token")):
            return self._gated_outside(module, output)
        settings, strength = self.settings, self.settings.scalar
        if self.tokens != "all" or strength is None or not settings.same_for_all:
            if gate is not None:
                return self._gated(module, output, settings.now())
            return self._in_general(module, output, settings.now())
        tensor, axis = self._activation(module, output)
        if gate is not None:
            wide = tensor.to(working_dtype(tensor.dtype))
            parts = tuple(moved(part, wide.device, wide.dtype) for part in self._gate_parts)
            value = token_values(parts, wide, axis)
            mapped = blend(wide, *self._at_strength(tensor, settings.latest, 1.0), strength, axis)
            return outputs.put(output, gated(wide, mapped, value).to(tensor.dtype))
        return outputs.put(output, blend(tensor, *self._at_strength(tensor, settings.latest, 1.0), strength, axis))

    def _gated(self, module: nn.Module, output: Any, setting: Setting) -> Any:
        """The map where its module has a gate, or is read by one of other modules."""
        tensor, axis = self._activation(module, output)
        for one in setting.sites.get(self.name, ()):
            self.reader.read(one, module, tensor, axis)
        gate, strength = setting.gates.get(self.name), setting.strength
        if gate is None:
            return self._in_general(module, output, setting)
        recorded = self.tracker.gate_values
        # Means need every token of a text, also those on which the maps do not act.
        if isinstance(strength, float) and strength == 0 and gate.context == "token" and recorded is None:
            return None
        if gate.site is not None:
            value = self.reader.shared(gate, tensor, axis)
        else:
            value = self.reader.value(gate, module, tensor, axis)
        if recorded is not None:
            recorded[self.name] = (value if isinstance(gate, NeuronGate) else value.squeeze(axis)).detach()
        elif (
            self.name not in setting.sites
            and self.tokens == "all"
            and isinstance(strength, float)
            and strength != 0
            and axis == -1
            and type(tensor) is Tensor
            and tensor.ndim < 4
            and working_dtype(tensor.dtype) == tensor.dtype
            and not torch.compiler.is_compiling()
        ):
            parameters, size = self._at_strength(tensor, setting, strength), (tensor.ndim, tensor.shape[-1])
            if type(parameters[0]) is Tensor:
                parts = self.reader.parts(gate, tensor)
                self._last_gated = (setting, tensor.dtype, tensor.device, *size, *parameters, gate, parts)
        return self._in_general(module, output, setting, value)

    @torch.compiler.disable
    def _gated_outside(self, module: nn.Module, output: Any) -> Any:
        """The same outside of a compiled graph: what is kept of a text from pass to pass is not for graphs."""
        return self._gated(module, output, self.tracker.setting())

    @torch.compiler.assume_constant_result  # which is to say that it runs while the graph is made, and not in it
    def _note(self) -> int:
        self.tracker.acted.add(self.name)
        return 0

    def _activation(self, module: nn.Module, output: Any) -> tuple[Tensor, int]:
        """The hidden state in an output, and the axis of its channels."""
        tensor = outputs.take(output, self.name)
        axis = outputs.channel_axis(module, tensor, self.name)
        if tensor.shape[axis] != self.d:
            raise ValueError(
                f"{self.name}: the map is for {self.d} neurons, the output has {tensor.shape[axis]} "
                f"(shape {tuple(tensor.shape)})"
            )
        return tensor, axis

    def _at_strength(self, tensor: Tensor, setting: Setting, strength: float) -> tuple[Tensor, Tensor]:
        """Slopes and shifts of the map of `setting` at a strength, where and in what `tensor` is computed."""
        device, dtype = tensor.device, working_dtype(tensor.dtype)
        if torch.compiler.is_compiling():
            weight, bias = (moved(part, device, dtype) for part in self._constants)
            return at_strength(weight, bias, strength, torch.where)
        affine, key = setting.maps[self.name], (strength, device, dtype)
        found = self._parameters.get(key)
        if found is None or found[0] is not affine:  # another thread may be under other maps
            found = affine, *parameters(affine, *key)
            if type(found[1]) is Tensor:  # nothing may be left behind of a fake one
                if len(self._parameters) >= _KEPT:
                    self._parameters = {}
                self._parameters[key] = found
        return found[1:]

    def _in_general(self, module: nn.Module, output: Any, setting: Setting, value: Tensor | None = None) -> Any:
        """The map where tokens are selected, the strength is no number, or a gate has the `value`."""
        strength = setting.strength
        if isinstance(strength, float) and strength == 0:
            return None
        tensor, axis = self._activation(module, output)
        chosen = None
        if self.tokens != "all":
            self._check_rows(tensor, show_tokens(self.tokens))
            chosen = self.tracker.current(self.name).chosen(self.tokens, self.name, module, tensor)
            if chosen is None:
                return None
            chosen = chosen[:, :, None]
        if isinstance(strength, Schedule):
            strength = self.tracker.current(self.name).scheduled(strength)
            if isinstance(strength, float) and strength == 0:
                return None
        wide = tensor if value is None else tensor.to(working_dtype(tensor.dtype))
        if isinstance(strength, StrengthArray):
            self._check_rows(tensor, f"a strength of the shape {list(strength.values.shape)}")
            strengths = self._strengths(strength, module, tensor)
            acts = strengths != 0
            chosen = acts if chosen is None else chosen & acts
            mapped = blend(wide, *self._at_strength(tensor, setting, 1.0), strengths, axis)
        elif isinstance(strength, Tensor):  # an input of a graph
            weight, bias = self._at_strength(tensor, setting, 1.0)
            mapped = blend(wide, weight, bias, moved(strength, weight.device, weight.dtype), axis)
        else:
            assert isinstance(strength, float)
            mapped = apply(wide, *self._at_strength(tensor, setting, strength), axis)
        if value is not None:
            mapped = gated(wide, mapped, value).to(tensor.dtype)
        # Not a product: what is not selected keeps its bits, a NaN among them.
        return outputs.put(output, mapped if chosen is None else torch.where(chosen, mapped, tensor))

    def _check_rows(self, tensor: Tensor, what: str) -> None:
        """ValueError where the first axis of an output counts the tokens, or may do so."""
        if tensor.ndim != 3 or self.tokens_first is False:
            return
        if self.tokens_first:
            why = "the module gives [tokens, batch, channels] (batch_first=False)"
        elif tensor.shape[0] == tensor.shape[1]:
            why = f"nothing tells which axis counts the prompts in {list(tensor.shape)}, as the model turns them inside"
        else:
            return
        raise ValueError(
            f"{self.name}: {what} needs an output [batch, tokens, channels], {why}; tokens='all' and a strength "
            "that is a number fit any output"
        )

    def _strengths(self, strengths: StrengthArray, module: nn.Module, tensor: Tensor) -> Tensor:
        """Strengths as a tensor that can be multiplied with `tensor`."""
        shape, where = strengths.values.shape, (tensor.device, working_dtype(tensor.dtype))
        positions, copies, fits = None, 1, tensor.ndim > 1
        if not strengths.of_pass:
            if strengths.by_token:
                here = self.tracker.current(self.name)
                here.check(self.name, module, tensor, f"a strength of the shape {list(shape)}")
                positions = here.tokens().positions
            copies = self.tracker.copies(shape[0], tensor.shape[0])
        elif strengths.by_token:
            fits = tensor.ndim == 3 and shape[1] == tensor.shape[1]
        if not fits or shape[0] * copies != tensor.shape[0]:
            raise ValueError(
                f"{self.name}: the strength has the shape {list(shape)}, the output {list(tensor.shape)}; a prompt may "
                "have several rows where generate made them, and the maps were on from its first pass"
            )
        values = strengths.moved(*where, copies) if positions is None else strengths.at(positions, *where, copies)
        return values.view(*values.shape, *[1] * (tensor.ndim - values.ndim))


class PassHook:
    """A hook on the model itself that tells the tracker that a pass begins, or that it ends."""

    def __init__(self, tracker: Tracker, what: str) -> None:
        self.tracker, self.what = tracker, what

    def __call__(self, module: nn.Module, args: Any, given: Any) -> None:
        tracker = self.tracker  # a graph is broken only where it must be
        if tracker.needs_positions or tracker.needs_passes or not torch.compiler.is_compiling():
            self._tell(module, args, given)

    @torch.compiler.disable
    def _tell(self, module: nn.Module, args: Any, given: Any) -> None:
        getattr(self.tracker, self.what)(module, args, given)


def likely_output(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device on which the output of a module is likely to be, and the dtype in which maps of it are computed."""
    for parameter in (*module.parameters(), *module.buffers(), *itertools.islice(model.parameters(), 1)):
        if parameter.is_floating_point():
            device = torch.device("cpu") if parameter.is_meta else parameter.device
            return device, torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.device("cpu"), torch.float32
