"""Peak memory of one end-to-end step over that of the bare forward and backward pass.

The bare pass is that of `end_to_end_step.py`: the same frozen model on the same batch, with a gradient leaf at the
first mapped module's output, left after the last loss module, and backward from the sum of that module's output. Ours
is the whole step: maps, pooling, loss, gradient, proximal step. The goal is at most 1.30; in parts, it is to stay near
the bare pass of one part, however many there are.

Each number comes from a process of its own: by how much the resident set grows at most above what it is before, in a
second run (VmHWM of /proc/self/status, reset by /proc/self/clear_refs, so Linux only). glibc is told to give every
block of 64 KiB or more back when it is freed, so that what counts is what is alive.

    python benchmarks/memory.py [--models llama smollm2]
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from _machine import cpu_name
from end_to_end_step import LAYERS, bare_step
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import lineas
from lineas.demo.model import load_smollm2
from lineas.fitting.objective import Objective, Task
from lineas.fitting.parameters import MapParameters, ProximalOptimizer
from lineas.fitting.settings import ObjectiveSettings
from lineas.hooks import modules
from lineas.inputs import batches, frozen
from lineas.inputs.batches import split

TOKENS = 64
# What runs, prompts, prompts in a forward pass, dtype, and the row that it is compared with.
CASES = {
    "bare, 32 prompts": ("bare", 32, None, "float32", None),
    "step, 32 prompts": ("step", 32, None, "float32", "bare, 32 prompts"),
    "step, 32 prompts, gradient checkpointing": ("checkpointed", 32, None, "float32", "bare, 32 prompts"),
    "bare, 8 prompts": ("bare", 8, None, "float32", None),
    "step, 8 prompts": ("step", 8, None, "float32", "bare, 8 prompts"),
    "step, 4 x 8 prompts": ("step", 32, 8, "float32", "bare, 8 prompts"),
    "step, 8 x 8 prompts": ("step", 64, 8, "float32", "bare, 8 prompts"),
    "bare, 32 prompts, bfloat16": ("bare", 32, None, "bfloat16", None),
    "step, 32 prompts, bfloat16": ("step", 32, None, "bfloat16", "bare, 32 prompts, bfloat16"),
}


def load(name: str) -> torch.nn.Module:
    """SmolLM2-135M, or a Llama of 12 layers x 768 with random weights."""
    if name == "smollm2":
        return load_smollm2()[0]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
        )
    ).eval()


def status(key: str) -> float:
    """A line of /proc/self/status in MiB."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"/proc/self/status has no {key}")
    return int(match[1]) / 1024


def growth(run: Any) -> float:
    """By how many MiB the resident set grows at most in the second run."""
    run()
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return status("VmHWM") - before


def measure(model_name: str, case: str) -> float:
    """Run one case in this process."""
    kind, prompts, batch_size, dtype, _ = CASES[case]
    torch.set_num_threads(1)
    lineas.set_num_threads(1)
    disable_progress_bar()
    model = load(model_name).to(getattr(torch, dtype))
    if kind == "checkpointed":
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randint(model.config.vocab_size, (2, prompts, TOKENS), generator=generator)
    mask = torch.ones(prompts, TOKENS, dtype=torch.long)
    names = modules.resolve(model, LAYERS)
    batches, others = (
        split([batches.Batch(kwargs={"input_ids": x, "attention_mask": mask}, mask=mask)], batch_size, "source")
        for x in (source, target)
    )
    ends = [model.get_submodule(names[0]), model.get_submodule(names[-1])]
    with frozen.frozen(model):
        if kind == "bare":
            return growth(lambda: bare_step(model, source, *ends))
        objective = Objective(model, names, names, ObjectiveSettings())
        task = Task("source", batches, objective.target(others, "target"))
        maps = MapParameters(objective.widths, objective.dtype, objective.device)
        stepper = ProximalOptimizer(maps, (1e-3, 1e-3, 1e-3, 1e-3))

        def step() -> None:
            _, _, grad_weight, grad_bias = objective.gradient([task], maps.leaves())
            stepper.step(grad_weight, grad_bias, 1e-3)

        return growth(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["llama", "smollm2"], default=["llama", "smollm2"])
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(*args.measure))
        return
    print(f"{cpu_name()}, torch {torch.__version__}, kernels {lineas._core.cpu()}; {TOKENS} tokens\n")
    print("| model | what | MiB | times the bare pass |\n| --- | --- | ---: | ---: |")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for model in args.models:
        found: dict[str, float] = {}
        for case, (*_, reference) in CASES.items():
            command = [sys.executable, __file__, "--measure", model, case]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            found[case] = float(done.stdout.split()[-1])
            ratio = "" if reference is None else f"{found[case] / found[reference]:.3f} of {reference}"
            print(f"| {model} | {case} | {found[case]:.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
