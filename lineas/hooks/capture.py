"""Run a model with hooks on named modules, and no further than needed.

Once the last module of interest was called, its hook raises a private exception, so neither later layers nor a
language-model head run, whatever wraps the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._warn import warn
from ..inputs.batches import Batch
from ..inputs.call import Forward, call
from . import outputs
from .modules import get_module

OnOutput: TypeAlias = Callable[[str, nn.Module, Tensor], Tensor | None]


class _Leave(BaseException):
    """Leaves a forward pass. Not an Exception, so that no ``except Exception`` on the way swallows it."""


class Capture:
    """Runs a model with hooks on named modules.

    On its own, ``Capture().run(...)`` removes its hooks when the run ends. As a context manager it keeps the hooks
    of the latest run until the block ends, which a backward pass through gradient checkpointing needs: there the
    layers run again, and must find the maps in place. Passes that other threads make meanwhile are left alone.

    >>> with Capture() as capture:                                # doctest: +SKIP
    ...     capture.run(model, batch, names, on_output)
    ...     loss.backward()

    Attributes
    ----------
    repeated : dict of str to None
        Modules that were called more than once in one of the runs, as far as these went, in that order.
    output : object
        What the model returned in the latest run that went to its end; None for one that was left.
    """

    def __init__(self) -> None:
        self.repeated: dict[str, None] = {}
        self.output: Any = None
        self._hooks = ExitStack()  # those that are held
        self._held = False

    def __enter__(self) -> Capture:
        self._held = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._held = False
        self.remove()

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._hooks.close()

    def run(
        self,
        model: nn.Module,
        batch: Batch,
        names: Sequence[str],
        on_output: OnOutput,
        last: str | None = None,
        forward: Forward | None = None,
        *,
        leave: bool = True,
    ) -> list[str]:
        """Call the model, hand the outputs of the modules to `on_output`, and leave once `last` has been called.

        ``on_output(name, module, tensor)`` is called at every call of a module of `names`, with the hidden state of its
        output; what it returns replaces that, None leaves it. It is called again when checkpointed layers are
        recomputed, and must return the same values then; what it saves for its backward is its own.

        The forward is left after the first call of `last`, without it once each module has been called: a second call
        of a module may be missed. With ``leave=False`` it goes to its end, and `output` is what it returned. Returns
        the modules in the order of their first calls; ValueError when one was not called.
        """
        order: dict[str, None] = {}
        waiting = {last} if last is not None else set(names)
        left = _Leave()
        self.output = None
        running = True
        thread = threading.get_ident()
        # Accelerators have threads of their own for the backward pass, in which checkpointed layers run again.
        first = next(model.parameters(), None)
        accelerated = first is not None and first.device.type not in ("cpu", "meta")

        def hook(name: str, module: nn.Module, args: Any, output: Any) -> Any:
            if threading.get_ident() != thread:
                backward = not running and torch._C._current_graph_task_id() != -1
                if not (accelerated and backward):
                    return None
            tensor = outputs.take(output, name)
            # Under checkpointing, tensors saved here must not be counted among those a recomputation saves again.
            with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
                replaced = on_output(name, module, tensor)
            if running:  # not in a recomputation, which is no call of its own
                if name in order:
                    self.repeated.setdefault(name)
                order.setdefault(name)
                waiting.discard(name)
                if leave and not waiting:
                    raise left
            return None if replaced is None else outputs.put(output, replaced)

        self.remove()
        with ExitStack() as hooks:  # takes them off on any exit, unless they are held
            for name in names:
                hooks.enter_context(get_module(model, name).register_forward_hook(partial(hook, name)))
            try:
                self.output = call(model, batch, forward)
            except _Leave as reason:
                if reason is not left:
                    raise
                left.__traceback__ = None  # it holds every frame of the forward, and those the activations
            running = False
            missing = [name for name in names if name not in order]
            if missing:
                before = f" before {last!r}" if last in order else ""
                others = f" (nor were {len(missing) - 1} others)" if len(missing) > 1 else ""
                raise ValueError(f"module {missing[0]!r} was not called{before} when the model ran{others}")
            if self._held:
                self._hooks = hooks.pop_all()
        return list(order)


def warn_of_repeated(names: Collection[str]) -> None:
    """Warn of modules that were called more than once in a forward pass, if there are any."""
    if names:
        others = f", like others ({len(names)} in all)," if len(names) > 1 else ""
        warn(
            f"module {next(iter(names))!r}{others} runs more than once in a forward pass: its activations are those of "
            "the first call, while attached maps act at every call",
            UserWarning,
        )
