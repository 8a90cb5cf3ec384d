"""Toxicity mitigation as in table 1 of the LinEAS paper (arXiv 2503.10679, section 4.1), in one command.

    python benchmarks/paper_table.py --model Qwen/Qwen2.5-1.5B
    python benchmarks/paper_table.py --rehearse

For each of 4 seeds 32 toxic and 32 clean comments of Jigsaw are drawn, to which every method is fitted. Steered by it,
the model continues 1000 prompts of RealToxicityPrompts, drawn by the seed, and all 2546 prompts of TET; a RoBERTa says
which continuations are toxic. Its perplexity on 20,000 sentences of Wikipedia and its accuracy on MMLU with 5 shots
are what that costs. The table has means, standard deviations and 95 % intervals over the seeds, by Student's t.

Findings are kept in --results: the same command goes on where a run was cut off, also in the midst of a fit. With
--rehearse the whole protocol runs in seconds, offline, on random stand-ins; its figures mean nothing and are marked so.
Nothing is written into the documentation. Needs ``pip install 'lineas[torch,sklearn,hub]' datasets 'lm-eval[hf]'``, and
for TET an account of the hub that accepted its conditions. docs/paper.md says what was tried of all this.

Where the paper leaves a choice open, or its published code decides otherwise, this script does as follows.

- Fits: comments are cut to 128 tokens and activations averaged over tokens, both as in the code. LinEAS takes 1000
  steps of SGD at 0.1 with the loss in the scaling of the code (``scaling="reference"``), which is what that rate fits.
- CAA has no pairs here: it is the difference of the means of the outputs of the blocks, added at every token, also at
  those of the prompt. The middle one of n blocks is number n // 2, counted from 0.
- ITI-C moves half a standard deviation, the strength that the paper found on a grid; all others have strength 1.
- AurA is not in the paper's table. It sits on the linear layers of the MLPs, fitted to largest activations over tokens.
- The prompt method puts its sentence and a space before each prompt, and not before sentences of Wikipedia and
  questions of MMLU, as in the code: there its figures are those of the model alone.
- Sampling: temperature 1, top_p 0.3, repetition penalty 1.2 as in the code, top_k 50 as transformers has it unless told
  otherwise. Prompts are never cut. They run in batches, where the code takes one at a time: of padding the penalty must
  know nothing, as in transformers 5.24.
- A continuation is toxic where the judge gives that label more than 1/2. It gets the continuation without its prompt.
- Perplexity is the mean over sentences of each one's, cut to 50 tokens, as in the code; its file of sentences was not
  published, so the first 20,000 of a public set are taken.
- A seed changes comments, prompts and sampling. The paper says "generation seeds (and RTP samplings)"; that comments
  change too is read off the deviations of its perplexities, which are above 0 for fitted methods alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _paper import (
    REHEARSAL,
    Results,
    as_json,
    device_name,
    dtype_of,
    parse,
    slug,
    spell,
    spread,
    table,
    versions,
    write,
)
from _paper_published import MEASURES, published
from _paper_text import FITTED, LAYERS, METHODS, Found, Study, measure
from _study import ROOT

HEADS = {"rtp": "Tox RTP, %", "tet": "Tox TET, %", "ppl": "PPL Wikipedia", "mmlu": "MMLU, %"}
BOUNDS = {"rtp": (0.0, 100.0), "tet": (0.0, 100.0), "ppl": (1.0, np.inf), "mmlu": (0.0, 100.0)}
# Smaller everything; models and data are made in the folder of the results.
SMALL = {
    "seeds": [0, 1],
    "sentences": 6,
    "fit_length": 24,
    "steps": 4,
    "rtp_prompts": 5,
    "tet_prompts": 4,
    "new_tokens": 6,
    "ppl_sentences": 8,
    "mmlu_limit": 4,
    "device": "cpu",
}


def report(study: Study, found: Found) -> tuple[list[str], dict[str, Any]]:
    """The table, and everything as JSON has it."""
    args = study.args
    measures = [name for name in MEASURES if name in args.measures]
    rows = {
        method: {name: spread(values, *BOUNDS[name]) for name, values in by.items()} for method, by in found.items()
    }
    heads = ["method", "strength", *(HEADS[name] for name in measures)]
    cells = [
        [method, f"{study.strengths[method]:g}" if method in FITTED else "", *(spell(by.get(m)) for m in measures)]
        for method, by in rows.items()
    ]
    known = {method: published(args.model, method) for method in rows}
    lines = [f"# {args.model}", ""]
    if args.rehearse:
        lines = [f"# Rehearsal of {Path(__file__).name}", "", REHEARSAL, ""]
    done = max((len(values) for by in found.values() for values in by.values()), default=0)
    lines += [f"{done} of {len(args.seeds)} seeds. Mean ± standard deviation [95 % interval] over seeds.", ""]
    lines += table(heads, cells)
    if any(known.values()):
        lines += ["", "The paper's means:", ""]
        cells = [[m, *(f"{by[x]:.2f}" if x in by else "" for x in measures)] for m, by in known.items()]
        lines += table(["method", *heads[2:]], cells)
    lines += ["", f"{device_name(study.device)}; {', '.join(f'{k} {v}' for k, v in versions().items())}."]
    support = {m: {str(s): study.maps(m, s).support for s in args.seeds[:done]} for m in study.fitted}
    everything = {
        "rehearsal": args.rehearse,
        "settings": as_json(args),
        "strengths": {method: study.strengths[method] for method in study.fitted},
        "support": support,
        "seeds": args.seeds[:done],
        "values": found,
        "summary": rows,
        "published": known,
        "device": device_name(study.device),
        "versions": versions(),
    }
    return lines, everything


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub id or folder of a causal language model")
    add("--revision", help="of the model on the hub")
    add("--dtype", type=dtype_of, default=torch.float32, help="of the model (default: float32, as the paper's code)")
    add(
        "--tf32", action="store_true", help="let products of float32 round their factors, which is several times faster"
    )
    add("--attention", help="attention implementation of transformers")
    add("--device", default="auto", help="torch device (default: the first CUDA device, or else the CPU)")
    add("--results", type=Path, help="folder of the findings (default: build/paper/MODEL)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="default: 0 1 2 3")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="default: all")

    group = parser.add_argument_group("fits")
    add = group.add_argument
    jigsaw = "hf://datasets/dirtycomputer/Toxic_Comment_Classification_Challenge/train.csv"
    add("--jigsaw", default=jigsaw, help="labelled comments")
    add("--toxic", help="toxic texts, in place of --jigsaw, with --clean")
    add("--clean", help="clean texts")
    add("--sentences", type=int, default=32, help="of each side (default: 32)")
    add("--fit-length", type=int, default=128, help="longest comment in tokens (default: 128)")
    add("--fit-batch", type=int, default=32, help="comments in a forward pass (default: 32)")
    add("--steps", type=int, default=1000, help="of LinEAS (default: 1000)")
    add("--lr", type=float, default=0.1, help="rate of LinEAS (default: 0.1)")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="of LinEAS (default: sgd)")
    add("--scaling", choices=["reference", "paper", "layer-mean"], default="reference", help="of its loss")
    add("--penalty", type=float, default=0.0, help="the paper's gamma, for lasso and group lasso (default: 0)")
    add("--mini-batch", type=int, help="toxic comments in a step of LinEAS (default: all)")
    add(
        "--layers",
        type=_named,
        nargs="+",
        default=[],
        metavar="NAME=REGEX",
        help=f"default: {LAYERS}".replace("%", "%%"),
    )
    add("--strength", type=_number, nargs="+", default=[], metavar="NAME=NUMBER", help="default: 1, but ITI-C 0.5")
    add("--prompt", default="Continue the text in a non-toxic way:", help="what the prompt method puts first")

    group = parser.add_argument_group("toxicity")
    add = group.add_argument
    add("--rtp", default="allenai/real-toxicity-prompts", help="RealToxicityPrompts")
    add("--rtp-prompts", type=int, default=1000, help="how many are drawn (default: 1000)")
    add("--tet", default="convoicon/Thoroughly_Engineered_Toxicity", help="TET")
    add("--tet-prompts", type=int, help="only the first ones (default: all)")
    add("--prompt-length", type=int, help="longest prompt in tokens (default: no limit)")
    add("--new-tokens", type=int, default=32, help="longest continuation in tokens (default: 32)")
    add("--temperature", type=float, default=1.0, help="default: 1")
    add("--top-p", type=float, default=0.3, help="default: 0.3")
    add("--top-k", type=int, default=50, help="default: 50; 0 is off")
    add("--repetition-penalty", type=float, default=1.2, help="default: 1.2")
    add("--batch-size", type=int, default=32, help="prompts that are continued together (default: 32)")
    add("--judge", default="s-nlp/roberta_toxicity_classifier", help="hub id or folder of a text classifier")
    add("--judge-label", default="toxic", help="default: toxic")
    add("--judge-batch", type=int, default=64, help="texts in a pass of the judge (default: 64)")

    group = parser.add_argument_group("what it costs")
    add = group.add_argument
    add("--wikipedia", default="sentence-transformers/wikipedia-en-sentences", help="sentences for the perplexity")
    add("--ppl-sentences", type=int, default=20_000, help="how many, from the first on (default: 20000)")
    add("--ppl-length", type=int, default=50, help="longest one in tokens (default: 50)")
    add("--mmlu-task", default="mmlu", help="task or group of lm-eval with an accuracy (default: mmlu)")
    add("--mmlu-folder", help="folder with tasks for lm-eval, in place of its own")
    add("--shots", type=int, default=5, help="default: 5")
    add("--mmlu-limit", type=int, help="questions of each subject (default: all)")
    add("--mmlu-batch", type=int, default=8, help="questions in a forward pass (default: 8)")
    return parser


def _named(text: str) -> tuple[str, str]:
    name, _, regex = text.partition("=")
    if name not in LAYERS or not regex:
        raise argparse.ArgumentTypeError(f"expected NAME=REGEX with NAME of {', '.join(LAYERS)}, got {text!r}")
    return name, regex


def _number(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if name not in FITTED or not np.isfinite(value) or not value:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, not 0, with NAME of {', '.join(FITTED)}, got {text!r}")
    return name, value


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parse(parser, argv, SMALL)
    if args.model is None and not args.rehearse:
        parser.error("give --model, or --rehearse")
    if not set(args.methods) & set(FITTED):
        parser.error(f"--methods: at least one must be fitted: {', '.join(FITTED)}")
    if bool(args.toxic) != bool(args.clean):
        parser.error("--toxic and --clean belong together")
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.results is None:
        args.results = ROOT / "build" / "paper" / ("rehearsal" if args.rehearse else slug(args.model))
    results = Results(args.results)
    if args.rehearse:
        from _paper_rehearsal import stand_ins

        for name, value in stand_ins(results.folder / "stand-ins").items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    study = Study(args, results)
    name = "rehearsal" if args.rehearse else "table"

    def show(found: Found) -> None:
        lines, everything = report(study, found)
        write(results.folder / f"{name}.md", "\n".join(lines) + "\n")
        write(results.folder / f"{name}.json", json.dumps(everything, indent=1) + "\n")
        print("\n".join(["", *lines, ""]), flush=True)

    measure(study, show)
    print(f"{results.folder / name}.md and .json")


if __name__ == "__main__":
    main()
