"""Maps into a model: the hook that applies one, the `Handle` on all of them, and `attach`."""

import itertools
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._warn import warn
from ..inputs.call import unwrap
from ..maps.affine import AffineMap, at_strength
from ..maps.metadata import Selection, check_tokens, fitted_tokens, show_tokens
from . import outputs
from .affine import apply, blend, moved, parameters, working_dtype
from .forward_state import Tracker
from .modules import get_module, model_name, output_width
from .strength import Schedule, Strength, StrengthArray, StrengthSetting, StrengthValue, as_given, read_strength

# Parameters of a hook at strengths other than the latest, for threads that have their own.
_KEPT = 32


class _Hook:
    """A map as a forward hook.

    An object, not a closure, so that a model with maps can be pickled and copied. A copy of the model carries copies
    of its hooks, as with any hook; a handle speaks of the model it was made for.
    """

    def __init__(
        self,
        name: str,
        affine: AffineMap,
        setting: StrengthSetting,
        tokens: Selection,
        tracker: Tracker,
        likely: tuple[torch.device, torch.dtype],
    ) -> None:
        self.name, self.setting, self.tokens, self.tracker, self.likely = name, setting, tokens, tracker, likely
        self.set_map(affine)

    def set_map(self, affine: AffineMap) -> None:
        # For compiled graphs, which must not make any: at strength 1, where and in what the output is likely to be.
        self._constants = parameters(affine, 1.0, *self.likely)
        self.map = affine
        # By strength, device and dtype.
        self._parameters: dict[Any, tuple[AffineMap, Tensor, Tensor]] = {}
        self._last_call: tuple[Any, ...] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(module, output)
        setting = self.setting
        # What was done to the last output is done to the next one in as few steps as can be, mostly one token later.
        last = self._last_call
        if last is not None and setting.uniform and type(output) is Tensor:
            strength, affine, dtype, device, axes, width, weight, bias = last
            shape = output.shape
            if (
                strength is setting.value
                and affine is self.map
                and output.dtype is dtype
                and len(shape) == axes
                and shape[-1] == width
                and output.device == device
            ):
                return torch.addcmul(bias, output, weight)
        strength = setting.value
        if not setting.uniform or type(strength) is not float:
            return self._in_general(module, output)
        if strength == 0:
            return None
        tensor, axis = self._activation(module, output)
        affine, weight, bias = self._ready(tensor, strength)
        # Not for images, where only the shape tells the axis.
        if axis == -1 and tensor.ndim < 4 and weight.dtype == tensor.dtype and type(weight) is Tensor:
            size = tensor.ndim, tensor.shape[-1]
            self._last_call = (strength, affine, tensor.dtype, tensor.device, *size, weight, bias)
        return outputs.put(output, apply(tensor, weight, bias, axis))

    def _compiled(self, module: nn.Module, output: Any) -> Any:
        """The map in a graph that holds for every strength that is a number: it is a tensor there, and no constant."""
        strength = self.setting.scalar
        if strength is None or not self.setting.uniform:
            return self._in_general(module, output)
        tensor, axis = self._activation(module, output)
        return outputs.put(output, blend(tensor, *self._at_strength(tensor, 1.0), strength, axis))

    def _activation(self, module: nn.Module, output: Any) -> tuple[Tensor, int]:
        """The hidden state in an output, and the axis of its channels."""
        tensor = outputs.take(output, self.name)
        axis = outputs.channel_axis(module, tensor, self.name)
        if tensor.shape[axis] != self.map.d:
            raise ValueError(
                f"{self.name}: the map is for {self.map.d} neurons, the output has {tensor.shape[axis]} "
                f"(shape {tuple(tensor.shape)})"
            )
        return tensor, axis

    def _at_strength(self, tensor: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """Slopes and shifts of the map at a strength, where and in what `tensor` is computed."""
        if torch.compiler.is_compiling():
            weight, bias = (moved(part, tensor.device, working_dtype(tensor.dtype)) for part in self._constants)
            return at_strength(weight, bias, strength, torch.where)
        return self._ready(tensor, strength)[1:]

    def _ready(self, tensor: Tensor, strength: float) -> tuple[AffineMap, Tensor, Tensor]:
        """What `_at_strength` gives, behind the map that it is of."""
        key = (strength, tensor.device, working_dtype(tensor.dtype))
        # Read once, and with its map: another thread may exchange either at any time.
        affine, found = self.map, self._parameters.get(key)
        if found is None or found[0] is not affine:
            found = affine, *parameters(affine, *key)
            if type(found[1]) is Tensor:  # nothing may be left behind of a fake one
                if len(self._parameters) >= _KEPT:
                    self._parameters = {}
                self._parameters[key] = found
        return found

    def _in_general(self, module: nn.Module, output: Any) -> Any:
        """The map where tokens are selected, threads differ, or the strength is no number."""
        strength = self.setting.now()
        if isinstance(strength, float) and strength == 0:
            return None
        tensor, axis = self._activation(module, output)
        chosen = None
        if self.tokens != "all":
            chosen = self.tracker.current(self.name).chosen(self.tokens, self.name, module, tensor)
            if chosen is None:
                return None
            chosen = chosen[:, :, None]
        if isinstance(strength, Schedule):
            strength = self.tracker.current(self.name).scheduled(strength)
            if isinstance(strength, float) and strength == 0:
                return None
        if isinstance(strength, StrengthArray):
            strengths = self._strengths(strength, module, tensor)
            acts = strengths != 0
            chosen = acts if chosen is None else chosen & acts
            mapped = blend(tensor, *self._at_strength(tensor, 1.0), strengths, axis)
        else:
            assert isinstance(strength, float)
            mapped = apply(tensor, *self._at_strength(tensor, strength), axis)
        # Not a product: what is not selected keeps its bits, a NaN among them.
        return outputs.put(output, mapped if chosen is None else torch.where(chosen, mapped, tensor))

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


def _likely_output(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device on which the output of a module is likely to be, and the dtype in which maps of it are computed."""
    for parameter in (*module.parameters(), *module.buffers(), *itertools.islice(model.parameters(), 1)):
        if parameter.is_floating_point():
            device = torch.device("cpu") if parameter.is_meta else parameter.device
            return device, torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.device("cpu"), torch.float32


def _forget_compiled() -> None:
    """Let everything that was compiled be compiled again when it is called next.

    torch leaves out guards for hooks that a module did not have (``skip_nnmodule_hook_guards``), so a model that ran
    before maps were attached would go on without them. Which compiled code holds a module, a module does not tell.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class _PassHook:
    """A hook on the model itself that tells the tracker that a pass begins, or that it ends."""

    def __init__(self, tracker: Tracker, what: str) -> None:
        self.tracker, self.what = tracker, what

    def __call__(self, module: nn.Module, args: Any, given: Any) -> None:
        if self.tracker.needs_positions or not torch.compiler.is_compiling():  # a graph is broken only where it must be
            self._tell(args, given)

    @torch.compiler.disable
    def _tell(self, args: Any, given: Any) -> None:
        getattr(self.tracker, self.what)(args, given)


class Handle:
    """Maps that act on the outputs of a model's modules, as `lineas.SteeringMaps.attach` returns them.

    They act from the start, until `remove`, or the end of a with-block, also after an error; the model and its weights
    stay as they are. Several handles may be on one model, and are taken off in any order. What is set in one holds for
    all threads; `at` sets a strength for one of them::

        with maps.attach(model, strength=0.8) as handle:
            model.generate(**batch)
            handle.strength = [0.0, 0.5, 1.0]  # one for each prompt of the batch
            model.generate(**batch)

    Attributes
    ----------
    maps : Mapping[str, AffineMap]
        The maps. Others of the same modules and widths may be set at any time, such as those of another point of a
        sparse path; like `strength` they hold from the next forward pass on, for the same tokens. Anything else is a
        TypeError or a ValueError that names the module, and the maps stay as they were.
    strength : float, array or callable
        0 leaves every output as it is, 1 applies the maps; any finite number will do. An array [B] has one for each row
        of a batch, [B, T] one for each row and position: tokens past its end take the last column, padding takes none.
        Where ``generate`` makes several rows of a prompt (beams, ``num_return_sequences``), all of them take its own.
        A callable is a schedule: at every forward pass it gets the `lineas.Tokens` of the pass and returns a number, an
        array [B], or [B, T] for the tokens of this pass. Rows, tokens and passes at 0 keep their bits. Any of these may
        be set at any time and holds from the next forward pass on; an array that does not fit a batch is a ValueError
        there. Arrays are copied. Reading it gives what was set, float64 if an array, not what `at` sets for a thread.
    tokens : "all", "last", "prompt", "generated", slice or callable
        The tokens that the maps act on.
    attached : bool
        Whether the maps are still on.
    """

    def __init__(
        self,
        maps: Mapping[str, AffineMap],
        modules: Mapping[str, nn.Module],
        model: nn.Module,
        strength: StrengthValue,
        tokens: Selection,
    ) -> None:
        self._maps = maps
        self._tokens = tokens
        self._root = unwrap(model)
        self._setting = StrengthSetting(strength, selective=tokens != "all")
        self._tracker = Tracker(self._root, self._setting)
        self._hooks = [
            _Hook(name, maps[name], self._setting, tokens, self._tracker, _likely_output(module, model))
            for name, module in modules.items()
        ]
        self._removable: list[RemovableHandle] = []
        self._following = False
        self._lock = threading.Lock()
        try:
            if tokens != "all":
                self._follow(show_tokens(tokens))
            self._prepare(strength)
            for module, hook in zip(modules.values(), self._hooks, strict=True):
                self._removable.append(module.register_forward_hook(hook))
            _forget_compiled()
        except BaseException:
            self.remove()
            raise

    def _prepare(self, strength: StrengthValue) -> None:
        """Follow the model's passes where a strength asks for it."""
        if isinstance(strength, Schedule):
            self._follow(None)
        elif isinstance(strength, StrengthArray):
            what = f"a strength of the shape {list(strength.values.shape)}" if strength.by_token else None
            self._follow(what, positions=strength.by_token)

    def _follow(self, what: str | None, *, positions: bool = True) -> None:
        """Follow the model's passes, and their tokens if `positions`; `what` it is that needs a model with one text."""
        if what is not None and self._tracker.two_texts:
            raise ValueError(
                f"{self._hooks[0].name}: {what} needs a model with one text, {self._tracker.label} has an encoder "
                "and a decoder: only tokens='all' and a strength without an axis of tokens work there"
            )
        with self._lock:
            before = self._following, self._tracker.needs_positions
            self._tracker.needs_positions |= positions
            if not self._following:
                begin, end = (_PassHook(self._tracker, what) for what in ("begin", "end"))
                self._removable.append(self._root.register_forward_pre_hook(begin, with_kwargs=True))
                self._removable.append(self._root.register_forward_hook(end, always_call=True))
                self._following = True
            if (self._following, self._tracker.needs_positions) != before:
                _forget_compiled()

    @property
    def maps(self) -> Mapping[str, AffineMap]:
        return self._maps

    @maps.setter
    def maps(self, maps: Mapping[str, AffineMap]) -> None:
        if not isinstance(maps, Mapping):
            raise TypeError(f"maps must be a mapping from module name to AffineMap, got {type(maps).__name__}")
        missing = [name for name in self._maps if name not in maps]
        surplus = [name for name in maps if name not in self._maps]
        if missing or surplus:
            raise ValueError(
                f"maps must be of the modules that are attached: {len(missing)} missing {missing[:3]}, "
                f"{len(surplus)} not attached {surplus[:3]}"
            )
        for hook in self._hooks:
            new = maps[hook.name]
            if not isinstance(new, AffineMap):
                raise TypeError(f"maps[{hook.name!r}] must be an AffineMap, got {type(new).__name__}")
            if new.d != hook.map.d:
                raise ValueError(f"{hook.name}: the map must be for {hook.map.d} neurons as before, got {new.d}")
        for hook in self._hooks:
            hook.set_map(maps[hook.name])
        self._maps = maps

    @property
    def strength(self) -> Any:
        return as_given(self._setting.value)

    @strength.setter
    def strength(self, value: Strength) -> None:
        given = read_strength(value)
        if self.attached:
            self._prepare(given)
        self._setting.set(given)

    @property
    def tokens(self) -> Selection:
        return self._tokens

    @contextmanager
    def at(self, strength: Strength) -> Iterator["Handle"]:
        """Another strength for this thread, or asyncio task, alone, until the block ends.

        For servers, whose threads run one model at the same time::

            with handle.at(strength=0.3):
                model.generate(...)

        Blocks may be nested. Threads that are started inside of one do not take it over. Under gradient checkpointing
        the backward pass belongs into the block too, since it runs layers again.

        Parameters
        ----------
        strength : float, array or callable
            As `Handle.strength`; 0 is off.

        Raises
        ------
        TypeError, ValueError
            When it is no strength.
        RuntimeError
            When the maps are off the model.
        """
        given = read_strength(strength)
        self._check_attached()
        self._prepare(given)
        with self._setting.in_context(given):
            yield self

    @property
    def attached(self) -> bool:
        return bool(self._removable)

    def remove(self) -> None:
        """Take the maps off the model. Does nothing where they are off already."""
        while self._removable:
            self._removable.pop().remove()

    def _check_attached(self) -> None:
        if not self.attached:
            raise RuntimeError("these maps were removed from the model: attach them again")

    def __enter__(self) -> "Handle":
        self._check_attached()
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        if not self.attached:
            return f"Handle({len(self.maps)} modules, removed)"
        chosen = "" if self._tokens == "all" else f", {show_tokens(self._tokens)}"
        return f"Handle({len(self.maps)} modules, strength={self._setting.value}{chosen})"


def attach(
    maps: Mapping[str, AffineMap], model: nn.Module, strength: Strength = 1.0, *, tokens: Selection | None = None
) -> Handle:
    """Put the maps into a torch model at once, until ``remove()`` or the end of a with-block.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model with modules of these names. Only forward hooks are added.
    strength : float, array or callable, default 1.0
        0 is off, 1 the maps; an array has a number for each prompt [B], or each prompt and position [B, T], also where
        ``generate`` makes several rows of a prompt; a callable is asked at every forward pass. ``handle.strength``
        changes it later, ``handle.at(strength=...)`` for one thread. See `lineas.Handle`.
    tokens : "all", "last", "prompt", "generated", slice or callable, optional
        The tokens that the maps act on, with and without a key-value cache, on whatever side the padding is.
        "last" are those whose output a token is predicted from: the last of the prompt and the generated ones. A
        slice is over positions in the row, where negative numbers count from the end of the prompt: "last" is
        ``slice(-1, None)``. A callable gets a `lineas.Tokens` and returns booleans [B, T]. Default:
        the tokens that the maps were fitted for; "all" where the metadata do not say.

    Returns
    -------
    lineas.Handle
        With ``strength`` (live), ``at()``, ``remove()``, and usable as a with-block.

    Raises
    ------
    TypeError
        If `strength` or `tokens` is of a wrong type.
    ValueError
        If the model lacks a module, a module has another width, or the tokens are not given and the maps were
        fitted for those that a callable selects; nothing is attached then.

    Warns
    -----
    UserWarning
        If the metadata name another model than this one, with modules of the same names and widths.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    given = read_strength(strength)
    chosen = fitted_tokens(getattr(maps, "metadata", {})) if tokens is None else check_tokens(tokens)
    modules = {}
    for name, affine in maps.items():
        modules[name] = get_module(model, name)
        width = output_width(modules[name])
        if width is not None and width != affine.d:
            raise ValueError(f"{name}: the map is for {affine.d} neurons, the module has {width}")
    _warn_of_another_model(getattr(maps, "metadata", {}), model)
    return Handle(maps, modules, model, given, chosen)


def _warn_of_another_model(metadata: Mapping[str, Any], model: nn.Module) -> None:
    """Warn where maps that were fitted to models of other names than this one happen to have its names and widths."""
    here = model_name(model)
    others = [name for name in _fitted_models(metadata) if here and _last_part(name) != _last_part(here)]
    if others:
        warn(
            f"these maps were fitted to {others[0]!r}, not to {here!r}: its modules have these names and widths, but "
            "they may do something else",
            UserWarning,
        )


def _fitted_models(metadata: Mapping[str, Any]) -> list[str]:
    """The models that maps, or those that they are composed of, were fitted to, as far as that is known."""
    model, parts = metadata.get("model"), metadata.get("parts")
    if isinstance(model, str) and model:
        return [model]
    parts = parts if isinstance(parts, list) else []
    return [name for part in parts if isinstance(part, dict) for name in _fitted_models(part)]


def _last_part(name: str) -> str:
    """What a hub id and a folder with the same model have in common."""
    # A hub's cache has it under a hash: models--owner--name/snapshots/hash.
    name = re.sub(r"models--(?:.*--)?([^/\\]+)[/\\]snapshots[/\\].*", r"\1", name)
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].casefold()
