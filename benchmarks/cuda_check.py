"""Does a fit do on an accelerator what it does on the CPU, without waiting in between, and at what cost?

1. The losses of a fit of a tiny random Qwen2 in float32, on the CPU and on the device: the largest relative difference.
2. How often a step waits for the device, by torch.cuda.set_sync_debug_mode, for maps of one module and of all: the
   second number is to be no larger. For CUDA only.
3. A step of a random Qwen2 of 1.5 billion parameters in bfloat16, 32 prompts of 32 tokens and maps of 28 modules,
   against the bare forward and backward pass. Goal: 1.05.

    python benchmarks/cuda_check.py [--device cuda] [--rounds 15] [--tiny]

--tiny takes the tiny model for the third part too, which is how this script itself is tested.
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import torch
from end_to_end_step import measure, report
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

import lineas
from lineas.fitting.end_to_end import FitResult

LAYERS = "model.layers.*.post_attention_layernorm"
ONE = "model.layers.0.post_attention_layernorm"
TINY = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, initializer_range=0.2,
)  # fmt: skip
LARGE = dict(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def random_model(shape: dict, device: str, dtype: torch.dtype) -> nn.Module:
    """A Qwen2 with random weights, made on the CPU so that they are the same wherever it goes."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**shape)).eval().to(device, dtype)


def fit(device: str, layers: str, steps: int) -> FitResult:
    """A fit of the tiny model to random tokens."""
    ids = torch.randint(64, (2, 8, 12), generator=torch.Generator().manual_seed(0)).to(device)
    source, target = ({"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids)
    model = random_model(TINY, device, torch.float32)
    return lineas.fit_end_to_end(model, source, target, layers=layers, steps=steps, progress=False)


def difference(device: str) -> float:
    """The largest relative difference of the losses of a fit from those on the CPU."""
    ours, there = (fit(where, LAYERS, 6).history["loss"] for where in ("cpu", device))
    return float(np.abs(there / ours - 1).max())


def waits(layers: str) -> float:
    """How often a step of a fit waits for the device: the difference between six steps and two."""

    def count(steps: int) -> int:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                fit("cuda", layers, steps)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in found)

    count(2)  # what happens once in a process
    return (count(6) - count(2)) / 4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--rounds", type=int, default=15, help="paired measurements (default: 15)")
    parser.add_argument("--tiny", action="store_true", help="the tiny model everywhere")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    print(f"losses of a fit: at most {difference(args.device):.1e} from those on the CPU, relative")
    if device.type == "cuda":
        print(f"waits for the device in a step: {waits(ONE):g} with maps of 1 module, {waits(LAYERS):g} with 4")
    model = random_model(TINY if args.tiny else LARGE, args.device, torch.bfloat16)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"a step through {count / 1e9:.3g} billion parameters in bfloat16, 32 prompts of 32 tokens:")
    report(*measure(model, LAYERS, 32, 32, args.rounds))


if __name__ == "__main__":
    main()
