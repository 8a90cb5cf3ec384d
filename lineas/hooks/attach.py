"""Maps into a model: `attach`, the `Handle` that it returns, and which maps are on."""

import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._checks import as_flag
from .._warn import warn
from ..inputs.call import unwrap
from ..maps.affine import AffineMap
from ..maps.gates import gates_of
from ..maps.metadata import Selection, as_strength, check_tokens, fitted_tokens, show_tokens
from .forward_state import Tracker
from .gating import SiteHook, sites_of
from .graphs import strength_input
from .layout import tokens_first
from .map_hook import MapHook, PassHook, likely_output
from .modules import check_model, check_runs, find, folded_shifts, get_module, model_name, output_width
from .strength import Schedule, Settings, Strength, StrengthArray, StrengthValue, as_given, read_strength


def _forget_compiled() -> None:
    """Let everything that was compiled be compiled again when it is called next.

    torch leaves out guards for hooks that a module did not have (``skip_nnmodule_hook_guards``), so a model that ran
    before maps were attached would go on without them. Which compiled code holds a module, a module does not tell.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


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
        Setting it once the maps were removed is a RuntimeError.
    tokens : "all", "last", "prompt", "generated", slice or callable
        The tokens that the maps act on.
    attached : bool
        Whether the maps are still on.
    acted : frozenset of str
        Modules whose maps have been asked to act so far. A module of which the model uses the weights without calling
        it, such as ``out_proj`` of `torch.nn.MultiheadAttention`, never is; the first whole pass of the model warns of
        those. Compiled graphs are not looked into.
    """

    def __init__(
        self,
        maps: Mapping[str, AffineMap],
        modules: Mapping[str, nn.Module],
        model: nn.Module,
        strength: StrengthValue,
        tokens: Selection,
    ) -> None:
        self._root = unwrap(model)
        self._settings = Settings(strength, maps)
        self._tracker = Tracker(self._root, self._settings, model)
        turned = tokens_first(model, modules)
        self._hooks = [
            MapHook(name, self._settings, tokens, self._tracker, likely_output(module, model), turned[name])
            for name, module in modules.items()
        ]
        self._sites: dict[str, RemovableHandle] = {}  # of modules without a map that gates read
        self._removable: list[RemovableHandle] = []
        self._lock = threading.Lock()
        try:
            if tokens != "all":
                self._follow(show_tokens(tokens))
            self._prepare(strength)
            begin, end = (PassHook(self._tracker, what) for what in ("begin", "end"))
            self._removable.append(self._root.register_forward_pre_hook(begin, with_kwargs=True))
            self._removable.append(self._root.register_forward_hook(end, always_call=True))
            self._prepare_gates(self._check_gates(maps))
            for module, hook in zip(modules.values(), self._hooks, strict=True):
                self._removable.append(module.register_forward_hook(hook))
                _put_recorders_last(module)
                hook.handle = self
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

    def _check_gates(self, maps: Mapping[str, AffineMap]) -> dict[str, nn.Module]:
        """The modules without a map that gates of `maps` read; ValueError where there is none, or of another width."""
        found = {}
        for site, gates in sites_of(gates_of(maps)).items():
            module = get_module(self._root, site)
            width = output_width(module)
            for gate in gates:
                if width is not None and width != gate.d:
                    raise ValueError(f"{site}: the gate is for {gate.d} neurons, the module has {width}")
            if site not in maps:
                found[site] = module
        means = any(gate.context == "mean" for gate in gates_of(maps).values())
        if means and self._tracker.two_texts:
            self._follow("a gate of context 'mean'")  # which is an error
        return found

    def _prepare_gates(self, sites: Mapping[str, nn.Module], maps: Mapping[str, AffineMap] | None = None) -> None:
        """Put hooks on the modules without a map that gates read, and follow the passes where they ask for it."""
        gates = gates_of(self._settings.latest.maps if maps is None else maps).values()
        if any(gate.context == "mean" for gate in gates):
            self._follow("a gate of context 'mean'")
        if any(gate.site is not None for gate in gates):
            self._tracker.needs_passes = True
            self._follow(None, positions=False)
        for name, module in sites.items():
            if name not in self._sites:
                hook = SiteHook(name, self._settings, self._tracker)
                hook.handle = self
                self._sites[name] = module.register_forward_hook(hook)
                self._removable.append(self._sites[name])

    def _follow(self, what: str | None, *, positions: bool = True) -> None:
        """Follow the model's passes, and their tokens if `positions`; `what` it is that needs a model with one text."""
        if what is not None and self._tracker.two_texts:
            raise ValueError(
                f"{self._hooks[0].name}: {what} needs a model with one text, {self._tracker.label} has an encoder "
                "and a decoder: only tokens='all' and a strength without an axis of tokens work there"
            )
        with self._lock:
            before = self._tracker.follows, self._tracker.needs_positions
            self._tracker.follows = True
            self._tracker.needs_positions |= positions
            if (True, self._tracker.needs_positions) != before:
                _forget_compiled()

    @property
    def maps(self) -> Mapping[str, AffineMap]:
        return self._settings.latest.maps

    @maps.setter
    def maps(self, maps: Mapping[str, AffineMap]) -> None:
        if not isinstance(maps, Mapping):
            raise TypeError(f"maps must be a mapping from module name to AffineMap, got {type(maps).__name__}")
        missing = [name for name in self.maps if name not in maps]
        surplus = [name for name in maps if name not in self.maps]
        if missing or surplus:
            raise ValueError(
                f"maps must be of the modules that are attached: {len(missing)} missing {missing[:3]}, "
                f"{len(surplus)} not attached {surplus[:3]}"
            )
        for hook in self._hooks:
            new = maps[hook.name]
            if not isinstance(new, AffineMap):
                raise TypeError(f"maps[{hook.name!r}] must be an AffineMap, got {type(new).__name__}")
            if new.d != hook.d:
                raise ValueError(f"{hook.name}: the map must be for {hook.d} neurons as before, got {new.d}")
        sites = self._check_gates(maps)
        if self.attached:
            self._prepare_gates(sites, maps)
        self._settings.set(maps=maps)
        for hook in self._hooks:
            hook.renew()

    @property
    def strength(self) -> Any:
        return as_given(self._settings.latest.strength)

    @strength.setter
    def strength(self, value: Strength) -> None:
        given = read_strength(value)
        self._check_attached()
        self._prepare(given)
        self._settings.set(strength=given)

    @property
    def tokens(self) -> Selection:
        return self._hooks[0].tokens

    @property
    def acted(self) -> frozenset[str]:
        return frozenset(self._tracker.acted)

    @contextmanager
    def at(self, strength: Strength) -> Iterator["Handle"]:
        """Another strength for this thread, or asyncio task, alone, until the block ends.

        For servers, whose threads run one model at the same time::

            with handle.at(strength=0.3):
                model.generate(...)

        Blocks may be nested. A block holds in the context (`contextvars`) that enters it and in copies of that which
        are made inside: tasks, ``asyncio.to_thread``, ``contextvars.copy_context().run``. A new `threading.Thread` has
        an empty context, so a thread that generates for a streamer enters the block itself; only where Python hands
        threads a copy (``sys.flags.thread_inherit_context``, the default of free-threaded Python 3.14) do they take the
        block over. A generator is under the block in the context that began it, and in no other that goes on with it.
        The end of the block is its end everywhere. Under gradient checkpointing the backward pass belongs into the
        block too, since it runs layers again.

        Parameters
        ----------
        strength : float, array or callable
            As `Handle.strength`; 0 is off. While `torch.export.export` or `torch.onnx.export` make a graph, a tensor []
            that is one of its inputs: the graph then has a strength that is set at every run (docs/onnx.md).

        Raises
        ------
        TypeError, ValueError
            When it is no strength.
        RuntimeError
            When the maps are off the model.
        """
        in_graph = strength_input(strength)
        given = read_strength(strength) if in_graph is None else in_graph
        self._check_attached()
        self._prepare(given)
        self._tracker.leave_behind()
        with self._settings.in_context(given):
            yield self

    @contextmanager
    def recorded_gates(self) -> Iterator[dict[str, Tensor]]:
        """In the block, keep what the gates of the latest pass were: for pictures, and to see whether they are right.

        The dict has by module name [B, T] for a gate with one value a token, [B, T, d] for one of neurons, or whatever
        the shape of the output is, where the model put it; it is filled anew at every pass, and stays after the block.
        Passes that a compiled graph makes are not recorded where the gate is a part of the graph. Outside of such
        blocks nothing is kept, and nothing is lost of a pass's time::

            with handle.recorded_gates() as gates:
                model(**tokenizer("a text", return_tensors="pt"))
            gates["model.layers.3.input_layernorm"]

        Raises
        ------
        RuntimeError
            When the maps are off the model.
        """
        self._check_attached()
        values: dict[str, Tensor] = {}
        before, self._tracker.gate_values = self._tracker.gate_values, values
        for hook in self._hooks:  # the few steps by which they go on as before record nothing
            hook.renew()
        try:
            yield values
        finally:
            self._tracker.gate_values = before

    @property
    def attached(self) -> bool:
        return bool(self._removable)

    def remove(self) -> None:
        """Take the maps off the model. Does nothing where they are off already."""
        while self._removable:
            self._removable.pop().remove()
        self._sites = {}
        self._tracker.forget()

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
        chosen = "" if self.tokens == "all" else f", {show_tokens(self.tokens)}"
        others = len(attached(self._root))
        beside = "" if others == 1 else f", one of {others} on the model"
        return f"Handle({len(self.maps)} modules, strength={self._settings.latest.strength}{chosen}{beside})"


def attached(model: nn.Module) -> list[Handle]:
    """The maps that are on a model, in the order in which they were attached.

    Also those whose handle was lost, such as by running the cell of a notebook twice, and those that a copy of a model
    has brought along.

    Parameters
    ----------
    model : torch.nn.Module
        A model, wrapped or not, or a part of one.

    Returns
    -------
    list of Handle
        Empty where there are none.

    Raises
    ------
    TypeError
        If `model` is no module.
    """
    check_model(model)
    found: dict[int, tuple[int, Handle]] = {}
    for module in model.modules():
        for key, hook in module._forward_hooks.items():
            if isinstance(hook, MapHook):
                if hook.handle is None:
                    _adopt(model, hook.settings)
                found.setdefault(id(hook.settings), (key, hook.handle))
    return [handle for _, handle in sorted(found.values(), key=lambda entry: entry[0])]


def detach(model: nn.Module) -> int:
    """Take all maps off a model, whether their handles are known or not.

    Parameters
    ----------
    model : torch.nn.Module
        A model, wrapped or not, or a part of one.

    Returns
    -------
    int
        How many handles were on it.

    Raises
    ------
    TypeError
        If `model` is no module.
    """
    handles = attached(model)
    for handle in handles:
        handle.remove()
    return len(handles)


def _adopt(model: nn.Module, settings: Settings) -> None:
    """Make a handle for the hooks of a copied model, which have none."""
    handle = Handle.__new__(Handle)
    handle._root, handle._settings, handle._hooks, handle._removable = unwrap(model), settings, [], []
    handle._lock, handle._sites = threading.Lock(), {}
    for module in model.modules():
        for hooks, extra in (
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        ):
            for key, hook in hooks.items():
                if isinstance(hook, MapHook | PassHook | SiteHook) and hook.tracker.settings is settings:
                    handle._tracker = hook.tracker
                    removable = RemovableHandle(hooks, extra_dict=list(extra))
                    removable.id = key
                    handle._removable.append(removable)
                    if isinstance(hook, MapHook):
                        hook.handle = handle
                        handle._hooks.append(hook)
                    if isinstance(hook, SiteHook):
                        hook.handle = handle
                        handle._sites[hook.name] = removable


def _put_recorders_last(module: nn.Module) -> None:
    """Let the hooks by which transformers records hidden states see what the maps made of them, as later layers do.

    They stay on a model from the first time that states are asked for.
    """
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__module__", "").startswith("transformers."):
            hooks[key] = hooks.pop(key)


def attach(
    maps: Mapping[str, AffineMap],
    model: nn.Module,
    strength: Strength | str = 1.0,
    *,
    tokens: Selection | None = None,
    replace: bool = False,
) -> Handle:
    """Put the maps into a torch model at once, until ``remove()`` or the end of a with-block.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model with modules of these names. Only forward hooks are added.
    strength : float, array, callable or "calibrated", default 1.0
        0 is off, 1 the maps; an array has a number for each prompt [B], or each prompt and position [B, T], also where
        ``generate`` makes several rows of a prompt; a callable is asked at every forward pass; "calibrated" is the one
        that `SteeringMaps.calibrate` found and noted in the metadata. ``handle.strength`` changes it later,
        ``handle.at(strength=...)`` for one thread. See `lineas.Handle`.
    tokens : "all", "last", "prompt", "generated", slice or callable, optional
        The tokens that the maps act on, with and without a key-value cache, on whatever side the padding is.
        "last" are those whose output a token is predicted from: the last of the prompt and the generated ones. A
        slice is over positions in the row, where negative numbers count from the end of the prompt: "last" is
        ``slice(-1, None)``. A callable gets a `lineas.Tokens` and returns booleans [B, T]. Default:
        the tokens that the maps were fitted for; "all" where the metadata do not say.
    replace : bool, default False
        Take off all maps that are on the model already (`lineas.attached`), once these are on; without it maps act
        one after the other. For cells of a notebook that are run again.

    Returns
    -------
    lineas.Handle
        With ``strength`` (live), ``at()``, ``remove()``, and usable as a with-block.

    Raises
    ------
    TypeError
        If `strength` or `tokens` is of a wrong type.
    ValueError
        If the model lacks a module, a module has another width, the tokens are not given and the maps were
        fitted for those that a callable selects, or the maps were not calibrated and the strength is to be
        "calibrated"; nothing is attached then.

    Warns
    -----
    UserWarning
        If the metadata name another model than this one, with modules of the same names and widths; or if maps are
        folded into the model, and their shifts are where slopes of these maps do not reach them.
    """
    check_model(model)
    given = read_strength(
        as_strength(strength, getattr(maps, "metadata", {})) if isinstance(strength, str) else strength
    )
    chosen = fitted_tokens(getattr(maps, "metadata", {})) if tokens is None else check_tokens(tokens)
    as_flag(replace, "replace")
    modules, folded = {}, set(folded_shifts(model))
    for name, affine in maps.items():
        inner, modules[name] = find(model, name)
        width = output_width(modules[name])
        if width is not None and width != affine.d:
            raise ValueError(f"{name}: the map is for {affine.d} neurons, the module has {width}")
        if inner in folded and (affine.weight != 1).any():
            warn(
                f"{name}: earlier maps are folded into this model, and their shift is in the weights that read this "
                "module: slopes do not reach it. That is right for maps that were fitted to this model; other maps "
                "compose, second @ first, on the model without any",
                UserWarning,
            )
            folded.clear()  # one warning is enough
    warn_of_another_model(getattr(maps, "metadata", {}), model)
    before = attached(model) if replace else []
    handle = Handle(maps, modules, model, given, chosen)
    for other in before:
        other.remove()
    return handle


def check_to_fit(model: nn.Module) -> None:
    """`check_runs`; warns where a fit would run the model with maps on it, which its own maps would not tell."""
    check_runs(model)
    on = attached(model)
    if on:
        name = next(iter(on[0].maps))
        warn(
            f"maps are attached to {name!r} of this model: what is fitted now is fitted on top of them, and is right "
            "only together with them. lineas.detach(model) takes them off",
            UserWarning,
        )


def warn_of_another_model(metadata: Mapping[str, Any], model: nn.Module) -> None:
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
