"""A plugin of vLLM: maps by name, not folded, with a strength of its own for each request. docs/vllm.md shows its use.

`requests` reads what a request asks for, `catalogue` the maps that an engine was started with, `steering` applies maps
to the tokens of a batch: they need no vLLM. `modules` finds the modules of maps in a model of vLLM. `plugin` is what
vLLM calls, and the only file that replaces anything in vLLM.
"""
