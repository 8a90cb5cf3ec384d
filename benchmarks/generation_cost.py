"""What attached maps cost when text is generated: SmolLM2-135M, maps at 30 norms, against the same model without them.

With gates as well: one for each norm, one for all, and one for each neuron.

The cases take turns: every round runs the same pass once a case, in rotating order, and a ratio is that of one round.
CPU time of the thread, so that a busy machine counts less; one thread. ``--write`` puts the table into
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import torch
from _machine import describe, set_threads
from _study import ROOT, write_between
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import lineas
from lineas.demo.model import load_smollm2
from lineas.hooks import modules

LAYERS = "model.layers.*.post_attention_layernorm"
PAGE = ROOT / "docs" / "benchmarks.md"
MARKS = "<!-- measured: python benchmarks/generation_cost.py --write -->", "<!-- end of generation -->"
BAR = 1.03
NONE, AGAIN = "no maps", "no maps, again"

Hooks = list[tuple[OrderedDict[int, Callable], ...]]
# Where a module has its hooks, and what they are called with.
DICTS = ("_forward_hooks", "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
GATES = "gates that read a token", "gates that read means", "one gate, which reads means", "gates of neurons"


def random_maps(names: list[str], width: int, support: float) -> lineas.SteeringMaps:
    """Maps like fitted ones: slopes about 1 and shifts about 0, for a share of the neurons."""
    rng = np.random.default_rng(0)
    maps = {}
    for name in names:
        chosen = rng.permutation(width) < round(support * width)
        weight, bias = 1 + 0.02 * rng.standard_normal(width), 0.003 * rng.standard_normal(width)
        maps[name] = lineas.AffineMap(
            np.where(chosen, weight, 1).astype(np.float32), np.where(chosen, bias, 0).astype(np.float32)
        )
    return lineas.SteeringMaps(maps)


def random_gates(maps: lineas.SteeringMaps, width: int) -> dict[str, lineas.SteeringMaps]:
    """The maps with gates of every kind, by what they are called in the table."""
    rng = np.random.default_rng(1)

    def scalar(context: str) -> lineas.Gate:
        return lineas.Gate((0.1 * rng.standard_normal(width)).astype(np.float32), 0.0, context=context)

    def neurons() -> lineas.NeuronGate:
        return lineas.NeuronGate(*(0.1 * rng.standard_normal((3, width))).astype(np.float32))

    kinds = (
        {name: scalar("token") for name in maps},
        {name: scalar("mean") for name in maps},
        scalar("mean").at(next(iter(maps))),
        {name: neurons() for name in maps},
    )
    return {f"maps, dense, {name}": maps.gated(gates) for name, gates in zip(GATES, kinds, strict=True)}


class OnSupport:
    """A rival: only the neurons of the support are gathered, mapped and put back, into a copy."""

    def __init__(self, affine: lineas.AffineMap) -> None:
        support = np.flatnonzero((affine.weight != 1) | (affine.bias != 0))
        self.index = torch.from_numpy(support)
        self.weight, self.bias = torch.from_numpy(affine.weight[support]), torch.from_numpy(affine.bias[support])

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        mapped = torch.addcmul(self.bias, output.index_select(-1, self.index), self.weight)
        return output.index_copy(-1, self.index, mapped)


class Dense:
    """The least that a map can be: one operation of torch."""

    def __init__(self, affine: lineas.AffineMap) -> None:
        self.weight, self.bias = torch.from_numpy(affine.weight.copy()), torch.from_numpy(affine.bias.copy())

    def __call__(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return torch.addcmul(self.bias, output, self.weight)


def nothing(module: nn.Module, args: object, output: Tensor) -> None:
    """An empty hook."""


class Switch:
    """Puts ready hooks on a model and its modules and takes them off: attaching anew would take time."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.cases: dict[str, Hooks] = {NONE: self._taken(), AGAIN: self._taken()}

    def _taken(self) -> Hooks:
        return [tuple(OrderedDict(getattr(module, name)) for name in DICTS) for module in self.modules]

    def add(self, case: str, hooks: list[Callable]) -> None:
        """Remember plain hooks, one a module."""
        mapped = self.modules[1:]  # the first is the model
        handles = [module.register_forward_hook(hook) for module, hook in zip(mapped, hooks, strict=True)]
        self.cases[case] = self._taken()
        for handle in handles:
            handle.remove()

    def add_maps(self, case: str, model: nn.Module, maps: lineas.SteeringMaps) -> None:
        """Remember the hooks that attached maps are."""
        with maps.attach(model):
            self.cases[case] = self._taken()

    def put(self, case: str) -> None:
        """Let only the hooks of a case be on."""
        for module, taken in zip(self.modules, self.cases[case], strict=True):
            for name, hooks in zip(DICTS, taken, strict=True):
                getattr(module, name).clear()
                getattr(module, name).update(hooks)


def measure(switch: Switch, cases: list[str], once: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every case in every round, after two that do not count."""
    times: dict[str, list[float]] = {case: [] for case in cases}
    gc.collect()
    gc.disable()
    for k in range(-2, rounds):
        turn = k % len(cases)
        for case in cases[turn:] + cases[:turn]:
            switch.put(case)
            start = time.thread_time()
            once()
            seconds = time.thread_time() - start
            if k >= 0:
                times[case].append(seconds)
    gc.enable()
    switch.put(NONE)
    return times


def interval(ratios: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median by order statistics (binomial, normal approximation)."""
    ordered, n = sorted(ratios), len(ratios)
    away = 0.98 * n**0.5
    return ordered[max(int(n / 2 - away), 0)], ordered[min(int(n / 2 + away), n - 1)]


def rows(what: str, times: Mapping[str, list[float]]) -> list[str]:
    """Rows of the table: milliseconds, and the ratio to no maps."""
    lines = []
    for case, seconds in times.items():
        cells = [what, case, f"{1e3 * statistics.median(seconds):.2f}"]
        if case == NONE:
            cells += ["", ""]
        else:
            ratios = [a / b for a, b in zip(seconds, times[NONE], strict=True)]
            low, high = interval(ratios)
            middle = statistics.median(ratios)
            ours = case.startswith("maps")
            cells += [f"{middle:.3f} ({low:.3f} to {high:.3f})", ("yes" if middle <= BAR else "no") if ours else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def decode(model: PreTrainedModel, switch: Switch, batch: int, length: int) -> Callable[[], object]:
    """One greedy token for each of `batch` rows, behind `length` in the cache, which then are as many again."""
    ids = torch.randint(1000, 40000, (batch, length), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    with torch.inference_mode():
        for case in switch.cases:  # so that every gate has seen what is in the cache
            cache.crop(-cache.get_seq_length())
            switch.put(case)
            token = model(ids, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)

    def once() -> None:
        with torch.inference_mode():
            model(token, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
        cache.crop(-1)

    return once


def prefill(model: PreTrainedModel, batch: int, length: int) -> Callable[[], object]:
    """A pass over prompts."""
    ids = torch.randint(1000, 40000, (batch, length), generator=torch.Generator().manual_seed(0))

    def once() -> None:
        with torch.inference_mode():
            model(ids, use_cache=True, logits_to_keep=1)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="rounds of tokens (default 300); prompts take a 15th")
    parser.add_argument("--only", default="", help="only rows whose name contains this text")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    args = parser.parse_args()
    set_threads(1)
    model, _ = load_smollm2()
    names = modules.resolve(model, LAYERS)
    width = model.config.hidden_size
    switch = Switch([model, *(model.get_submodule(name) for name in names)])
    dense, tenth, hundredth = (random_maps(names, width, share) for share in (1.0, 0.1, 0.01))
    switch.add("an empty hook", [nothing] * len(names))
    switch.add("torch.addcmul alone", [Dense(one) for one in dense.values()])
    switch.add_maps("maps, dense", model, dense)
    switch.add_maps("maps, 10 % of the neurons", model, tenth)
    switch.add_maps("maps, 1 % of the neurons", model, hundredth)
    gated = random_gates(dense, width)
    for case, maps in gated.items():
        switch.add_maps(case, model, maps)
    switch.add("gathered, 10 %", [OnSupport(one) for one in tenth.values()])
    switch.add("gathered, 1 %", [OnSupport(one) for one in hundredth.values()])
    every = list(switch.cases)
    few = [NONE, AGAIN, "maps, dense", *gated]
    prompts = max(args.rounds // 15, 5)
    plan = {
        "a token": (every, decode(model, switch, 1, 64), args.rounds),
        "a token in each of 8 rows": (few, decode(model, switch, 8, 64), args.rounds // 3),
        "a prompt of 512 tokens": (few, prefill(model, 1, 512), prompts),
        "8 prompts of 512 tokens": (few, prefill(model, 8, 512), 3),
    }
    table = [describe(), "", "| pass | what | ms | times no maps (95 %) | ≤ 1.03 |", "| --- | --- | ---: | --- | --- |"]
    print("\n".join(table), flush=True)
    for what, (cases, once, rounds) in plan.items():
        if args.only in what:
            found = rows(what, measure(switch, cases, once, rounds))
            print("\n".join(found), flush=True)
            table += found
    if args.write:
        write_between(PAGE, MARKS, table)


if __name__ == "__main__":
    main()
