"""Gates on tensors, of whole texts and of texts that come in several passes.

`values` is a function of tensors alone, for whole texts. In a model a text may come a few tokens at a time; the sums
that a gate of context "mean" needs of the tokens before are then kept beside the key-value cache, which is what tells
one text from another.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .._checks import as_dense
from ..maps.affine import AffineMap
from ..maps.gates import AnyGate, Gate, NeuronGate
from . import outputs
from .affine import apply, moved, parameters, working_dtype
from .caches import cache_of, identity
from .graphs import exporting

Parts = tuple[Tensor, ...]
"""What a gate computes with: weight [1, d] and bias [1], or quadratic, linear and constant [d]."""


def parts_of(gate: AnyGate, device: torch.device, dtype: torch.dtype) -> Parts:
    """A gate's numbers where and in what it is computed. Closed neurons have the constant -inf, which gives 0."""
    with torch.inference_mode(False):  # as in affine.parameters
        if isinstance(gate, NeuronGate):
            arrays = [torch.tensor(x, device="cpu") for x in (gate.quadratic, gate.linear, gate.constant)]
            arrays[2][torch.tensor(gate.closed)] = -torch.inf
        else:
            arrays = [torch.tensor(gate.weight, device="cpu")[None], torch.tensor([gate.bias], dtype=torch.float64)]
        return tuple(moved(x, device, dtype) for x in arrays)


def values(gate: AnyGate, tensor: Tensor, real_mask: Tensor | None = None, axis: int = -1) -> Tensor:
    """The values of a gate for activations of whole texts, which begin with the tensor.

    Parameters
    ----------
    gate : Gate or NeuronGate
        What it reads is `tensor`, whatever its ``site`` says.
    tensor : Tensor
        Activations with the gate's d channels on `axis`; [B, T, d] for context "mean".
    real_mask : Tensor [B, T], optional
        Nonzero where a token is real; padding counts in no mean. Default: all are.
    axis : int, default -1
        The channel axis.

    Returns
    -------
    Tensor
        From 0 to 1, broadcastable to `tensor`, on its device, float32 (float64 for float64); differentiable in it.

    Raises
    ------
    TypeError
        If `tensor` is not of a floating dtype that maps take.
    ValueError
        If it does not have the channels, has no axis of tokens where the context is "mean", or the mask another shape.
    """
    dtype = working_dtype(tensor.dtype)
    if not -tensor.ndim <= axis < tensor.ndim or tensor.shape[axis] != gate.d:
        raise ValueError(f"the gate needs {gate.d} channels on axis {axis}, got shape {list(tensor.shape)}")
    parts = parts_of(gate, tensor.device, dtype)
    if gate.context == "token":
        return token_values(parts, tensor, axis)
    if tensor.ndim != 3 or axis not in (-1, 2):
        raise ValueError(f"a gate of context 'mean' needs activations [batch, tokens, {gate.d}], got {_shape(tensor)}")
    if real_mask is None:
        counts = torch.arange(1, tensor.shape[1] + 1, device=tensor.device, dtype=dtype)
        return mean_values(parts, summed(parts, tensor, None, None), counts)
    if real_mask.shape != tensor.shape[:2]:
        raise ValueError(f"real_mask must have the shape {list(tensor.shape[:2])}, got {list(real_mask.shape)}")
    real = real_mask.to(tensor.device) != 0
    counts = real.cumsum(dim=1).clamp(min=1).to(dtype)
    return mean_values(parts, summed(parts, tensor, ~real, None), counts)


def _shape(tensor: Tensor) -> str:
    return f"the shape {list(tensor.shape)}"


def token_values(parts: Parts, tensor: Tensor, axis: int) -> Tensor:
    """The values of a gate that reads a token alone, from its numbers."""
    wide = tensor.to(parts[0].dtype)
    if len(parts) == 2:
        if axis == -1:
            return linear(wide, *parts).sigmoid_()
        return linear(wide.movedim(axis, -1), *parts).movedim(-1, axis).sigmoid()
    if axis != -1:
        shape = [1] * tensor.ndim
        shape[axis] = -1
        parts = tuple(part.view(shape) for part in parts)
    quadratic, slope, constant = parts
    return torch.addcmul(constant, torch.addcmul(slope, quadratic, wide), wide).sigmoid_()


def summed(parts: Parts, tensor: Tensor, padding: Tensor | None, before: Tensor | None) -> Tensor:
    """The sums [B, T] of weight . z over the real tokens of a text up to and including each.

    `padding` [B, T] is true where a token is none; `before` [B] are the sums up to the tensor.
    """
    logits = linear(tensor.to(parts[0].dtype), parts[0]).squeeze(-1)
    if padding is not None:
        logits = logits.masked_fill(padding, 0)  # not a product: padding may hold a NaN
    if logits.shape[1] != 1:
        logits = logits.cumsum(dim=1)
    return logits if before is None else logits + before[:, None]


def mean_values(parts: Parts, sums: Tensor, counts: Tensor) -> Tensor:
    """The values [B, T, 1] of a gate that reads means: of its sums, and the numbers of tokens that are in them."""
    return torch.addcdiv(parts[1], sums, counts).sigmoid_()[:, :, None]


def gated(tensor: Tensor, mapped: Tensor, value: Tensor) -> Tensor:
    """What a map makes of an activation, as far as its gate is open: exactly `tensor` at 0 and `mapped` at 1."""
    return torch.lerp(tensor, mapped, value)


def transform(affine: AffineMap, gate: AnyGate, z: Tensor, seen: Any, strength: float, axis: int) -> Tensor:
    """`lineas.SteeringMaps.transform` of one module with a gate, on tensors."""
    z = as_dense(z, "z")
    seen = as_dense(seen if isinstance(seen, Tensor) else torch.as_tensor(seen, device=z.device), "z")
    dtype = working_dtype(z.dtype)
    if not -z.ndim <= axis < z.ndim or z.shape[axis] != affine.d:
        raise ValueError(f"z must have {affine.d} channels on axis {axis}, got shape {tuple(z.shape)}")
    value = values(gate, seen, axis=axis).to(z.device, dtype)
    if value.ndim != z.ndim or any(a not in (1, b) for a, b in zip(value.shape, z.shape, strict=True)):
        raise ValueError(f"its gate has the shape {tuple(value.shape)}, the activations {tuple(z.shape)}")
    wide = z.to(dtype)
    mapped = apply(wide, *parameters(affine, strength, z.device, dtype), axis)
    return gated(wide, mapped, value).to(z.dtype)


# --- texts that come in several passes --------------------------------------------------------------------------------

ATTRIBUTE = "_lineas_gate_sums"
_KEPT = 64  # tensors of single passes before they become one
# What changes the rows of a cache of transformers.
_ROWS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")


class _Columns:
    """The sums of one gate for each column of a cache, [B, columns], in pieces."""

    __slots__ = ("columns", "gate", "pieces")

    def __init__(self, gate: Gate) -> None:
        self.gate, self.columns = gate, 0
        self.pieces: list[Tensor] = []

    def upto(self, columns: int) -> None:
        """Forget what is further back than so many columns: the cache was cropped, or is begun anew."""
        while self.columns > columns:
            piece = self.pieces.pop()
            self.columns -= piece.shape[1]
            if self.columns < columns:
                piece = piece[:, : columns - self.columns]
                self.columns += piece.shape[1]
                self.pieces.append(piece)

    def put(self, sums: Tensor) -> None:
        self.pieces.append(sums)
        self.columns += sums.shape[1]
        if len(self.pieces) > _KEPT:
            self.pieces = [torch.cat(self.pieces, dim=1)]

    def change_rows(self, change: Any) -> None:
        if self.pieces:
            self.pieces = [change(torch.cat(self.pieces, dim=1))]


class GateSums:
    """The sums of all gates that read means, for the text that is in a cache. They go with it where it is copied."""

    def __init__(self) -> None:
        self._of: dict[tuple[int, str, int], _Columns] = {}

    def of(self, key: tuple[int, str, int], gate: AnyGate) -> _Columns | None:
        """The columns of a gate, if it is known."""
        found = self._of.get(key)
        return found if found is not None and found.gate is gate else None

    def before(self, key: tuple[int, str, int], gate: Gate, columns: int, rows: int) -> Tensor | None:
        """The sums [B] of the first so many columns; None where they are not known."""
        found = self._of.get(key)
        if found is None or found.gate is not gate or found.columns < columns or not columns:
            return None
        found.upto(columns)
        last = found.pieces[-1][:, -1]
        return last if len(last) == rows else None

    def put(self, key: tuple[int, str, int], gate: Gate, columns: int, sums: Tensor) -> None:
        """Note the sums [B, T] of the tokens that come after so many columns."""
        found = self._of.get(key)
        if found is None or found.gate is not gate or not columns:
            found = self._of[key] = _Columns(gate)
            if columns:  # padding, or learned tokens of PEFT: no sums, but columns
                found.put(sums.new_zeros(len(sums), columns))
        found.upto(columns)
        found.put(sums.detach())

    def follow(self, cache: Any) -> None:
        """Go with a cache from now on, and with its rows."""
        cache = identity(cache)
        try:
            setattr(cache, ATTRIBUTE, self)
        except AttributeError:  # a tuple, or a class with slots: the next pass will say so
            return
        for name in _ROWS:
            if callable(getattr(type(cache), name, None)):
                setattr(cache, name, _Followed(cache, name))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda sums: sums.index_select(0, beam_idx.to(sums.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda sums: sums.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda sums: sums[indices.to(sums.device)])

    def _change(self, change: Any) -> None:
        for columns in self._of.values():
            columns.change_rows(change)


class _Followed:
    """A method of a cache that changes its rows, and then those of the sums. It keeps no cache alive."""

    def __init__(self, cache: Any, name: str) -> None:
        self.cache, self.name = weakref.ref(cache), name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        if cache is None:
            raise RuntimeError(f"{self.name}: gates knew the cache that this one is a copy of, and it is gone")
        result = getattr(type(cache), self.name)(cache, *args, **kwargs)
        getattr(getattr(cache, ATTRIBUTE), self.name)(*args, **kwargs)
        return result

    # The copy of a cache brings a method of its own along.
    def __deepcopy__(self, memo: dict[int, Any]) -> _Followed:
        cache = self.cache()
        return _Followed(memo.get(id(cache), cache), self.name)

    def __reduce__(self) -> tuple:
        return _Lost, (self.name,)


class _Lost:
    """What a method of a cache is in one that was pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name}: this cache was pickled while a gate read the means of its text")


def sums_of(cache: Any) -> GateSums | None:
    """The sums that go with a cache, new ones where it has none; None where it cannot hold any."""
    cache = identity(cache)
    found = getattr(cache, ATTRIBUTE, None)
    if found is None:
        found = GateSums()
        found.follow(cache)
    return getattr(cache, ATTRIBUTE, None)


class GatePass:
    """What the gates of a handle know of one forward pass."""

    def __init__(self, here: Any) -> None:
        cache = cache_of(here.named)
        self.cached = cache is not None
        self.sums = GateSums() if cache is None else sums_of(cache)  # without a cache they may go with one that is made
        self.before: dict[tuple[int, str, int], Tensor | None] = {}
        self.shared: dict[int, Tensor] = {}  # values for modules that run later, by the number of the gate
        self._counted: dict[tuple[torch.device, torch.dtype], tuple[Tensor | None, Tensor]] = {}

    def counted(self, here: Any, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
        """Which tokens [B, T] of a pass are padding, None where none is, and the number of real ones up to each."""
        found = self._counted.get((device, dtype))
        if found is None:
            if here.packed:
                raise ValueError(
                    f"{name}: the rows hold several texts, of which a gate of context 'mean' would mix the means: only "
                    "gates of context 'token' work there"
                )
            positions = here.tokens().positions.to(device)
            padding = None if here.mask is None else ~here.mask.to(device)
            # Elsewhere this would wait, and a graph is for every mask.
            if padding is not None and device.type == "cpu" and not exporting() and not padding.any():
                padding = None
            found = self._counted[device, dtype] = padding, (positions + 1).clamp_(min=1).to(dtype)
        return found


def gating_of(here: Any) -> GatePass:
    """What gates know of a pass."""
    if here.gating is None:
        here.gating = GatePass(here)
    return here.gating


def _some(counts: int | Tensor) -> bool:
    return bool(counts) if isinstance(counts, int) else bool(counts.any())


class GateReader:
    """The gates that read the output of one module, as the hooks of a handle ask for them."""

    def __init__(self, name: str, tracker: Any) -> None:
        self.name, self.tracker = name, tracker
        self._parts: dict[tuple[int, torch.device, torch.dtype], tuple[AnyGate, Parts]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_parts": {}}

    def parts(self, gate: AnyGate, tensor: Tensor) -> Parts:
        """A gate's numbers where and in what `tensor` is computed."""
        key = id(gate), tensor.device, working_dtype(tensor.dtype)
        found = self._parts.get(key)
        if found is None or found[0] is not gate:
            found = gate, parts_of(gate, *key[1:])
            if type(found[1][0]) is Tensor:  # nothing may be left behind of a fake one
                self._parts = {**(self._parts if len(self._parts) < 8 else {}), key: found}
        return found[1]

    def value(self, gate: AnyGate, module: nn.Module, tensor: Tensor, axis: int) -> Tensor:
        """The values of a gate that reads this module's output `tensor`, broadcastable to it."""
        if gate.d != tensor.shape[axis]:
            raise ValueError(
                f"{self.name}: the gate is for {gate.d} neurons, the output has {tensor.shape[axis]} "
                f"(shape {tuple(tensor.shape)})"
            )
        parts = self.parts(gate, tensor)
        if gate.context == "token":
            return token_values(parts, tensor, axis)
        assert isinstance(gate, Gate)
        here = self.tracker.current(self.name)
        here.check(self.name, module, tensor, "a gate of context 'mean'")
        gating = gating_of(here)
        padding, counts = gating.counted(here, self.name, tensor.device, parts[0].dtype)
        key = self.tracker.number, self.name, id(gate)
        if key not in gating.before:
            gating.before[key] = self._before(here, gating.sums, key, gate, tensor)
        elif torch._C._current_graph_task_id() != -1:  # checkpointed layers are run again
            return mean_values(parts, summed(parts, tensor, padding, gating.before[key]), counts)
        elif gating.cached:
            raise ValueError(
                f"{self.name}: the module runs more than once in a pass, and a gate of context 'mean' cannot tell its "
                "calls apart where the text is in a cache: pass use_cache=False"
            )
        sums = summed(parts, tensor, padding, gating.before[key])
        if gating.sums is not None:
            gating.sums.put(key, gate, here.past, sums)
        return mean_values(parts, sums, counts)

    def again(self, gate: AnyGate, parts: Parts, tensor: Tensor) -> Tensor | None:
        """The values for another output like the last one, mostly one token later, in as few steps as can be.

        None where that is not all: `value` and `shared` then know what to do, or to say.
        """
        if gate.site is None and gate.context == "token":
            return token_values(parts, tensor, -1)
        here = self.tracker.passing
        gating = None if here is None else here.gating
        if gating is None or here.grad or torch.is_grad_enabled():
            return None
        if gate.site is not None:
            value = gating.shared.get(id(gate))
            size = tensor.shape[-1]
            fits = value is not None and value.ndim == tensor.ndim and value.numel() * size == tensor.numel()
            return value if fits and value.dtype is tensor.dtype and value.device == tensor.device else None
        key = self.tracker.number, self.name, id(gate)
        found = None if gating.sums is None or key in gating.before else gating.sums.of(key, gate)
        rows, length = tensor.shape[0], tensor.shape[1]
        if found is None or length != 1 or (rows, length) != here.shape or not 0 < here.past <= found.columns:
            return None
        found.upto(here.past)
        last = found.pieces[-1]
        padding, counts = gating.counted(here, self.name, tensor.device, tensor.dtype)
        if padding is not None or last.shape[0] != rows or last.device != tensor.device:
            return None
        gating.before[key] = last[:, -1]
        sums = linear(tensor, parts[0]).squeeze(-1)
        sums += last[:, -1:]
        found.put(sums)
        return torch.addcdiv(parts[1], sums, counts).sigmoid_().unsqueeze(-1)

    def _before(
        self, here: Any, sums: GateSums | None, key: tuple[int, str, int], gate: Gate, tensor: Tensor
    ) -> Tensor | None:
        """The sums of what is in the cache already, [B]; ValueError where the gate has not seen it."""
        if not here.past:
            return None
        found = None if sums is None else sums.before(key, gate, here.past, len(tensor))
        if found is None and _some(here.before):
            why = (
                "keeps it in a cache that is no object of its own"
                if sums is None
                else f"has {here.past} columns of it in a cache that this gate has not seen in these rows: fill the "
                "cache with the maps on, at strength 0 if they are not to act on it"
            )
            raise ValueError(f"{self.name}: a gate of context 'mean' needs the whole text, but the model {why}")
        return None if found is None else found.to(tensor.device)

    def read(self, gate: Gate, module: nn.Module, tensor: Tensor, axis: int) -> None:
        """Work out a gate for modules that run later in this pass."""
        here = self.tracker.current(self.name)
        if here.checkpointed:
            raise RuntimeError(
                f"{self.name}: a gate that multiplies the maps of other modules does not work under gradient "
                "checkpointing, which runs the layers between them again: switch it off, or give every module its own"
            )
        gating_of(here).shared[id(gate)] = self.value(gate, module, tensor, axis)

    def shared(self, gate: Gate, tensor: Tensor, axis: int) -> Tensor:
        """The values of a gate that read another module, for this module's output `tensor`."""
        value = gating_of(self.tracker.current(self.name)).shared.get(id(gate))
        if value is None:
            raise ValueError(
                f"{self.name}: its gate reads the output of {gate.site!r}, which has not run yet in this pass: a "
                "gate of several modules must read one that runs before them"
            )
        if axis != -1 or value.ndim != tensor.ndim or value.shape[:-1] != tensor.shape[:-1]:
            raise ValueError(
                f"{self.name}: its gate reads the output of {gate.site!r} and has the shape {list(value.shape)}, this "
                f"output is {list(tensor.shape)}: both must have the same rows and tokens, and their channels last"
            )
        return value.to(tensor.device, working_dtype(tensor.dtype))


class SiteHook:
    """A hook on a module without a map whose output a gate reads."""

    def __init__(self, name: str, settings: Any, tracker: Any) -> None:
        self.name, self.settings, self.tracker = name, settings, tracker
        self.handle: Any = None
        self.reader = GateReader(name, tracker)

    # As a map's hook.
    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"handle": None}

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for gate in self.tracker.setting().sites.get(self.name, ()):
            tensor = outputs.take(output, self.name)
            self.reader.read(gate, module, tensor, outputs.channel_axis(module, tensor, self.name))


def sites_of(gates: Mapping[str, AnyGate]) -> dict[str, list[Gate]]:
    """The gates that read a module of their own choice, each once, by that module."""
    found: dict[str, list[Gate]] = {}
    for gate in gates.values():
        if isinstance(gate, Gate) and gate.site is not None:
            known = found.setdefault(gate.site, [])
            if all(other is not gate for other in known):
                known.append(gate)
    return found
