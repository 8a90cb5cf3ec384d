"""Steered GGUF files in llama.cpp beside hooks in transformers, on two real models: the table of docs/gguf.md.

    python benchmarks/gguf_parity.py [--models smollm2 gemma3]
    python benchmarks/gguf_parity.py --write

llama.cpp rounds activations to 8 bits before it multiplies them with quantised weights; transformers has the same
weights decoded, in float32. So both differ without any maps as well: that is the first row of each model, and what a
steered file has to be measured by. A copy of the file in float32 shows what is left without that rounding. Maps are
closed-form ones of the demo's sentences, fitted in a minute. Of 50 neutral prompts, the next token's probabilities are
compared, and 20 tokens of the likeliest text.

What is found is kept in build/gguf-parity: a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _study import ROOT, Kept, data_lines, set_up, write_between
from numpy.typing import NDArray

import lineas
from lineas import SteeringMaps
from lineas.demo import model as demo_model
from lineas.demo import sentences
from lineas.export import gguf
from lineas.export.gguf.container import GGUFFile, write_copy

sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from llama_cpp import LlamaCpp

MARKS = "<!-- measured: python benchmarks/gguf_parity.py --write -->", "<!-- end -->"
PAGE, FOLDER = ROOT / "docs" / "gguf.md", ROOT / "build" / "gguf-parity"
PROMPTS, NEW_TOKENS, LIKELIEST, KNOWN = 50, 20, 10, 1000
FITTED = 64  # sentences a side


@dataclass(frozen=True)
class Model:
    """A packaged model, the norms that get maps, and the strength at which these are moderate."""

    packaged: demo_model.PackagedModel
    load: Callable[[], tuple[Any, Any]]
    layers: str
    strength: float
    tokens: Any = "all"


MODELS = {
    "smollm2": Model(
        demo_model.SMOLLM2, demo_model.load_smollm2, "model.layers.*.post_attention_layernorm", strength=1.0
    ),
    # Without the first token, whose activations are far from those of any word.
    "gemma3": Model(
        demo_model.GEMMA3,
        demo_model.load_gemma3,
        "model.layers.*.input_layernorm",
        strength=0.5,
        tokens=slice(1, None),
    ),
}
PLAIN, FOLDED, ADAPTER = "plain", "folded", "adapter"
WHAT = {PLAIN: "none", FOLDED: "folded in", ADAPTER: "adapter of sparse slopes"}
QUANTIZED, FLOAT32 = "quantised", "float32"
ROWS = [(QUANTIZED, PLAIN), (QUANTIZED, FOLDED), (QUANTIZED, ADAPTER), (FLOAT32, PLAIN), (FLOAT32, FOLDED)]


def prompts() -> list[str]:
    """The first half of each sentence, so that there is something to go on with."""
    found = [*data_lines("stories"), *data_lines("questions")]
    return [" ".join(text.split()[: len(text.split()) // 2]) for text in found[:PROMPTS]]


def fitted(model: Any, tokenizer: Any, chosen: Model, sparse: bool) -> SteeringMaps:
    """Closed-form maps for all tokens; sparse ones are slopes alone, of a tenth of the neurons."""
    sides = [
        lineas.collect(
            model,
            sentences(f"{side}.txt")[:FITTED],
            tokenizer=tokenizer,
            layers=chosen.layers,
            tokens=chosen.tokens,
            progress=False,
        )
        for side in ("negative", "positive")
    ]
    maps = lineas.fit(*sides, method="linear")
    if not sparse:
        return SteeringMaps(dict(maps))
    largest = {}
    for name, one in maps.items():
        weight = one.weight.copy()
        few = np.argsort(np.abs(weight - 1))[: -max(1, one.d // 10)]
        weight[few] = 1
        largest[name] = lineas.AffineMap(weight, np.zeros_like(one.bias))
    return SteeringMaps(largest)


def by_transformers(model: Any, ids: list[list[int]]) -> tuple[NDArray, NDArray]:
    """Log-probabilities of the next token after each prompt, and the likeliest texts, -1 where they end."""
    scores, texts = [], np.full((len(ids), NEW_TOKENS), -1)
    with torch.inference_mode():
        for k, row in enumerate(ids):
            tokens = torch.tensor([row])
            scores.append(torch.log_softmax(model(tokens).logits[0, -1].double(), -1).numpy())
            made = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, **GREEDY
            )[0, len(row) :]
            texts[k, : len(made)] = made.numpy()
    return np.stack(scores), texts


# Whatever the generation config of a model says.
GREEDY: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": 0}


def compared(path: Path, ids: list[list[int]], scores: NDArray, texts: NDArray, *, loras: Any) -> dict[str, Any]:
    """How far llama.cpp is with a file from what transformers made of the prompts."""
    differences, divergences, same = [], [], []
    with LlamaCpp(path, loras=loras, context=128) as runtime:
        for row, expected, text in zip(ids, scores, texts, strict=True):
            found = runtime.log_probabilities(row, len(expected), count=KNOWN)
            known = np.isfinite(found)
            first = np.argsort(expected)[-LIKELIEST:]
            differences.append(np.abs(found[first] - expected[first]).mean())
            # Those that llama.cpp does not name count as one.
            p, q = (np.append(np.exp(x[known]), max(1 - np.exp(x[known]).sum(), 1e-12)) for x in (expected, found))
            divergences.append((p * np.log(p / q)).sum())
            made = runtime.greedy(row, NEW_TOKENS)
            there = [token for token in text.tolist() if token >= 0]
            same.append(all(a == b for a, b in zip(made, there, strict=False)))
    return {"difference": np.array(differences), "divergence": np.array(divergences), "same": np.array(same)}


def measured(name: str, kept: Kept) -> list[dict[str, Any]]:
    """What is known of each row of a model."""
    chosen, loaded = MODELS[name], {}
    FOLDER.mkdir(parents=True, exist_ok=True)

    def load() -> Any:
        if not loaded:
            model, tokenizer = chosen.load()
            loaded.update(model=model, tokenizer=tokenizer, ids=[tokenizer(text)["input_ids"] for text in prompts()])
            loaded["file"] = chosen.packaged.gguf_file(chosen.packaged, FOLDER)
        return SimpleNamespace(**loaded)

    def maps(kind: str) -> SteeringMaps:
        path = FOLDER / f"{name}-{kind}.safetensors"
        if not path.exists():
            fitted(load().model, load().tokenizer, chosen, sparse=kind == ADAPTER).save(path)
        return lineas.load(path)

    def hooked(kind: str) -> dict[str, Any]:
        """What transformers makes of the prompts, with maps or without."""
        on = contextlib.nullcontext() if kind == PLAIN else maps(kind).attach(load().model, strength=chosen.strength)
        with on:
            scores, texts = by_transformers(load().model, load().ids)
        return {"scores": scores.astype(np.float32), "texts": texts}

    def row(kind: str, file: str) -> dict[str, Any]:
        path, loras = load().file if file == QUANTIZED else decoded(load().file, FOLDER / f"{name}-float32.gguf"), None
        if kind == FOLDED:
            path = maps(kind).fold_gguf(path, FOLDER / f"{name}-folded.gguf", chosen.strength)
        elif kind == ADAPTER:
            loras = {gguf.lora(maps(kind), path, FOLDER / f"{name}-adapter.gguf", chosen.strength): 1.0}
        return compared(path, load().ids, *there[kind].values(), loras=loras)

    there = {kind: kept(f"{name}-transformers-{kind}", lambda kind=kind: hooked(kind)) for kind in WHAT}
    rows = []
    for file, kind in ROWS:
        found = kept(f"{name}-{file}-{kind}", lambda kind=kind, file=file: row(kind, file))
        plain, steered = there[PLAIN], there[kind]
        change = np.exp(plain["scores"]) * (plain["scores"] - steered["scores"])
        changed = (plain["texts"] != steered["texts"]).any(axis=1)
        about = {"model": chosen.packaged.name, "file": file, "what": WHAT[kind]}
        rows.append({**about, **found, "change": change.sum(axis=1), "changed": changed})
    return rows


def decoded(path: Path, target: Path) -> Path:
    """A copy of a GGUF file with all of its weights in float32."""
    if not target.exists():
        with GGUFFile(path) as file:
            values = {name: np.concatenate(list(file.blocks(name))) for name in file.tensors}
            values = {name: x.reshape(file.tensors[name].shape) for name, x in values.items()}
            write_copy(file, str(target), values, {})
    return target


def table(rows: list[dict[str, Any]]) -> list[str]:
    import transformers
    import xllamacpp

    lines = [
        f"{cpu_name()}; xllamacpp {xllamacpp.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {PROMPTS} prompts.",
        "",
        "| model | weights | maps | KL by the maps | log p apart | KL apart | same text | text changed by maps |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in rows:
        cells = [
            found["model"],
            found["file"],
            found["what"],
            f"{found['change'].mean():.3f}",
            f"{found['difference'].mean():.2g}",
            f"{found['divergence'].mean():.2g}",
            f"{found['same'].sum()} of {PROMPTS}",
            f"{found['changed'].sum()} of {PROMPTS}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/gguf.md")
    args = parser.parse_args()
    set_up(args.threads, bf16=False)
    kept = Kept("gguf-parity")
    lines = table([row for name in args.models for row in measured(name, kept)])
    print("\n".join(lines))
    if args.write:
        write_between(PAGE, MARKS, lines)


if __name__ == "__main__":
    main()
