"""Models that were compiled, traced or exported: where hooks would be passed over without a word."""

from __future__ import annotations

import sys

import torch
from torch import fx, nn


def forget() -> None:
    """Let everything that was compiled be compiled again when it is called next.

    torch leaves out guards for hooks that a module did not have (``skip_nnmodule_hook_guards``), so a model that ran
    before maps were attached would go on without them. Which compiled code holds a module, a module does not tell.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def check_hooks_run(model: nn.Module, name: str) -> None:
    """Raise ValueError where a hook on module `name` would never be called, or could not be registered.

    Torch takes hooks on modules that only stand for a part of a traced or exported model, and passes over them.
    """
    path = name.split(".")
    module = model
    for k in range(len(path)):
        rest = ".".join(path[k:])
        if isinstance(module, torch.jit.ScriptModule) or (
            isinstance(module, fx.GraphModule) and not _calls(module.graph, rest)
        ):
            raise ValueError(
                f"module {name!r} would not call hooks: it is a part of a {type(module).__name__}, which runs as one "
                "graph; attach to the model that was traced or exported, before that is done"
            )
        inner = getattr(module, path[k], None)
        if not isinstance(inner, nn.Module):
            return
        module = inner
    if isinstance(module, torch.jit.ScriptModule) and not isinstance(module, torch.jit.TopLevelTracedModule):
        raise ValueError(
            f"module {name!r} cannot call hooks: it is a {type(module).__name__}; attach before torch.jit.script"
        )


def _calls(graph: fx.Graph, name: str) -> bool:
    """Whether a graph calls module `name`, or one that it lies in."""
    targets = (str(node.target) for node in graph.nodes if node.op == "call_module")
    return any(name == target or name.startswith(f"{target}.") for target in targets)
