"""Cost of one end-to-end step on SmolLM2-135M (32 prompts x 32 tokens) over the bare forward and backward pass.

The bare step runs the same frozen model on the same batch with a gradient leaf at the first mapped module's output,
leaves the forward after the last loss module, and goes backward from the sum of that module's output. Everything
that a fit adds (maps, pooling, loss, optimiser) is in the other step. The two alternate, in turns as to which is
first, and the median of the paired ratios is printed; the goal is at most 1.10.

    python benchmarks/end_to_end_step.py [--rounds 23] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _machine import cpu_name
from torch import Tensor, nn

import lineas
from lineas.demo.model import load_smollm2
from lineas.fitting.objective import Objective, Task
from lineas.fitting.parameters import MapParameters, ProximalOptimizer
from lineas.fitting.settings import ObjectiveSettings
from lineas.hooks import modules
from lineas.inputs import batches, frozen

LAYERS = "model.layers.*.post_attention_layernorm"
PROMPTS, TOKENS = 32, 32


class _Leave(BaseException):
    pass


def bare_step(model: nn.Module, ids: Tensor, first: nn.Module, last: nn.Module) -> None:
    """Forward from a leaf at ``first`` to ``last``, backward from the sum of the latter's output."""
    found = {}

    def start(module, args, output):
        found["leaf"] = output.detach().requires_grad_()
        return found["leaf"]

    def stop(module, args, output):
        found["end"] = output
        raise _Leave

    handles = [first.register_forward_hook(start), last.register_forward_hook(stop)]
    try:
        model(input_ids=ids, use_cache=False)
    except _Leave:
        pass
    finally:
        for handle in handles:
            handle.remove()
    torch.autograd.grad(found["end"].sum(), found["leaf"])


def seconds(function: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize(device)
    return time.perf_counter() - start


def measure(model: nn.Module, layers: str, prompts: int, tokens: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of the bare step and of the whole one, in each of the rounds."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(model.config.vocab_size, (2, prompts, tokens), generator=generator).to(device)
    mask = torch.ones(prompts, tokens, dtype=torch.long, device=device)
    names = modules.resolve(model, layers)
    batch, other = (batches.Batch(kwargs={"input_ids": x, "attention_mask": mask}, mask=mask) for x in (source, target))

    with frozen.frozen(model):
        objective = Objective(model, names, names, ObjectiveSettings())
        task = Task("source", [batch], objective.target([other], "target"))
        maps = MapParameters(objective.widths, objective.dtype, objective.device)
        stepper = ProximalOptimizer(maps, (1e-3, 1e-3, 1e-3, 1e-3))

        def step() -> None:
            _, _, grad_weight, grad_bias = objective.gradient([task], maps.leaves())
            stepper.step(grad_weight, grad_bias, 1e-3)

        ends = [model.get_submodule(names[0]), model.get_submodule(names[-1])]

        def bare() -> None:
            bare_step(model, source, *ends)

        step(), bare()
        pairs = []
        for turn in range(rounds):
            first, second = (bare, step) if turn % 2 == 0 else (step, bare)
            times = [seconds(first, device), seconds(second, device)]
            pairs.append(times if turn % 2 == 0 else times[::-1])
    bare_times, step_times = zip(*pairs, strict=True)
    return list(bare_times), list(step_times)


def report(bare_times: list[float], step_times: list[float]) -> None:
    """Print medians, and the median of the paired ratios."""
    ratios = sorted(s / b for b, s in zip(bare_times, step_times, strict=True))
    print(f"bare step        {statistics.median(bare_times):7.3f} s (median of {len(ratios)})")
    print(f"end-to-end step  {statistics.median(step_times):7.3f} s")
    print(f"ratio            {statistics.median(ratios):7.3f}   (from {ratios[0]:.3f} to {ratios[-1]:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=23, help="paired measurements (default 23)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lineas.set_num_threads(args.threads)

    model, _ = load_smollm2()
    times = measure(model, LAYERS, PROMPTS, TOKENS, args.rounds)
    print(f"{cpu_name()}, {args.threads} threads, torch {torch.__version__}, kernels {lineas._core.cpu()}")
    print(f"SmolLM2-135M, {PROMPTS} prompts x {TOKENS} tokens, {len(modules.resolve(model, LAYERS))} modules")
    report(*times)


if __name__ == "__main__":
    main()
