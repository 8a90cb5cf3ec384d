"""What `lineas.evaluate` adds to the generations that it is made of.

300 prompts x 20 new tokens x 5 strengths, 0 among them, on SmolLM2-135M, with 64 neutral texts and VADER as judge;
and ``generate`` alone on the same prompts in the same batches, five times, without maps. Both run in turn.

    python benchmarks/evaluation_cost.py [--rounds 1] [--prompts 300] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _study import set_up

import lineas
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.evaluation.continuations import SAMPLING

STRENGTHS, NEW_TOKENS, BATCH = (0.0, 0.5, 1.0, 1.5, 2.0), 20, 32


def bare(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """Continue the prompts, sorted by length, in batches, once for each strength."""
    rows = sorted(tokenizer(prompts)["input_ids"], key=len)
    for _ in STRENGTHS:
        for start in range(0, len(rows), BATCH):
            torch.manual_seed(start)
            batch = tokenizer.pad({"input_ids": rows[start : start + BATCH]}, padding_side="left", return_tensors="pt")
            with torch.inference_mode():
                model.generate(**batch, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.pad_token_id, **SAMPLING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    set_up(args.threads, bf16=False)
    model, tokenizer = load_smollm2()
    rng = np.random.default_rng(0)
    layers = [f"model.layers.{k}.post_attention_layernorm" for k in range(30)]
    maps = lineas.SteeringMaps(
        {name: lineas.AffineMap(rng.normal(1, 0.03, 576), rng.normal(0, 0.01, 576)) for name in layers}
    )
    first = [*sentences("neutral_prompts.txt"), *(" ".join(t.split()[:5]) for t in sentences("neutral_text.txt"))]
    prompts = [first[k % len(first)] for k in range(args.prompts)]
    ratios = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        bare(model, tokenizer, prompts)
        middle = time.perf_counter()
        lineas.evaluate(
            model,
            maps,
            tokenizer=tokenizer,
            prompts=prompts,
            neutral=sentences("neutral_text.txt"),
            judges="vader",
            strengths=STRENGTHS,
            max_new_tokens=NEW_TOKENS,
            batch_size=BATCH,
            progress=False,
        )
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        print(f"bare generations {middle - start:.1f} s, evaluate {end - middle:.1f} s: {ratios[-1]:.3f}", flush=True)
    print(f"{cpu_name()}, {args.threads} threads; median of {args.rounds}: {np.median(ratios):.3f}")


if __name__ == "__main__":
    main()
