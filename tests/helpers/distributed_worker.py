"""One of the processes of a test on several: joins the others by a file, and runs the cases below.

``python distributed_worker.py RANK SIZE FOLDER``: the results are in FOLDER/RANK.json and FOLDER/RANK-NAME.npz.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path

import models_zoo as zoo
import numpy as np
import torch
from fits import Trouble, noisy
from torch import distributed

import lineas

SOURCE, TARGET = zoo.texts(7, seed=1), zoo.texts(9, seed=2)
HELD_OUT = (SOURCE[:5], TARGET[:3])
FITS = {
    "auto": {"l1": 0.02},
    "adam": {"lr": 0.02, "optimizer": "adam", "l1": 0.01, "batch_size": 2},
    "shuffled": {"mini_batch": 3, "patience": None},
    "fewer prompts than processes hold": {"mini_batch": 2, "batch_size": 1, "lr": 0.1},
    "held out": {"held_out": HELD_OUT, "strengths": (0.7, 1.0)},
    "best start": {"held_out": HELD_OUT, "init": "best", "steps": 2},
    "keep": {"keep": zoo.texts(9, seed=6), "max_kl": 0.05, "held_out": HELD_OUT},
    "keep activations": {"keep_weight": 0.1, "keep_loss": "activations", "mini_batch": 3},
    "every token": {"pooling": "all", "scaling": "paper", "lr": 0.005},
    "incremental start": {"init": "linear-incremental", "batch_size": 3},
}

CASES = [(name, torch.float64) for name in FITS] + [(name, torch.float32) for name in ("auto", "adam", "keep")]


def fit(model, source=SOURCE, target=TARGET, **settings):
    """A short fit of a tiny Llama."""
    settings = {"layers": zoo.NORMS["llama"], "tokenizer": zoo.tokenizer(), "steps": 3, "progress": False, **settings}
    return lineas.fit_end_to_end(model, source, target, **settings)


def together(model, *sets, **settings):
    return fit(model, *sets, process_group="world", **settings)


def arrays(result):
    """What a fit has found, as arrays by name."""
    found = {f"{part} {name}": getattr(one, part) for name, one in result.maps.items() for part in ("weight", "bias")}
    return found | {name: np.asarray(values) for name, values in result.history.items()}


class Results:
    """What is known of this process: arrays of fits, and texts by the name of the case."""

    def __init__(self, folder, rank):
        self.folder, self.rank, self.texts = folder, rank, {}

    def save(self, name, result):
        np.savez(self.folder / f"{self.rank}-{name}.npz", **arrays(result))
        self.say(name, [result.stopped, result.best_step, result.held_out_loss, result.passes, result.held_out_passes])

    def say(self, name, value):
        self.texts[name] = value
        (self.folder / f"{self.rank}.json").write_text(json.dumps(self.texts))

    def error(self, name, call):
        """The error that a call raises, and after how many seconds."""
        start = time.monotonic()
        try:
            call()
        except BaseException as error:
            self.say(name, [type(error).__name__, str(error), time.monotonic() - start])
        else:
            self.say(name, ["none", "", 0])


def fits(results):
    for name, dtype in CASES:
        results.save(f"{name} {dtype}", together(zoo.llama().to(dtype), **FITS[name]))
    half = zoo.llama().bfloat16()
    results.save("bfloat16", together(half))
    model = zoo.llama().double()
    tokens = [dict(zoo.tokenizer()(texts, return_tensors="pt", padding=True)) for texts in (SOURCE, TARGET)]
    results.save("one batch", together(model, *tokens))
    results.save("wrapped", together(torch.nn.parallel.DistributedDataParallel(model)))
    path = lineas.sparse_path_end_to_end(
        model,
        SOURCE,
        TARGET,
        layers=zoo.NORMS["llama"],
        tokenizer=zoo.tokenizer(),
        n_penalties=4,
        progress=False,
        process_group="world",
    )
    np.savez(results.folder / f"{results.rank}-path.npz", weight=path.weight, bias=path.bias, loss=path.loss)
    pairs = {"a": (SOURCE, TARGET), "b": (TARGET, SOURCE[:4])}
    settings = {"layers": zoo.NORMS["llama"], "tokenizer": zoo.tokenizer(), "progress": False, "steps": 2}
    results.save("joint", lineas.fit_jointly(model, pairs, process_group="world", **settings))
    found = lineas.fit_sequence(model, pairs, process_group="world", **settings)
    results.save("sequence", found.results["b"])
    checkpointed(results, model)


def checkpointed(results, model):
    """A fit that is interrupted on one process alone, and goes on."""
    own = results.folder / f"{results.rank}-fit.safetensors"  # as if the processes shared no disk
    kind = {"l1": 0.02, "steps": 6}
    results.save("whole", together(model, forward=noisy, **kind))
    calls = []

    def cut_off(model, batch):
        calls.append(1)
        if len(calls) == 5 and results.rank == 1:
            raise KeyboardInterrupt
        return noisy(model, batch)

    cut = together(model, forward=cut_off, **kind, checkpoint=own)
    results.say("cut", [cut.stopped, len(cut.history["loss"]), own.exists()])
    results.save("resumed", together(model, forward=noisy, **kind, checkpoint=own))
    signalled(results, model)


def signalled(results, model):
    """Ctrl-C on one process while both compute."""
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 4 and results.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return model(**batch)

    found = together(model, forward=forward)
    results.say("signalled", [found.stopped, len(found.history["loss"])])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.active_count() < 50


def failures(results):
    model, first = zoo.llama().double(), results.rank == 0
    path = results.folder / "fit.safetensors"
    differ = {
        "prompts": lambda: together(model, SOURCE if first else SOURCE[1:]),
        "settings": lambda: together(model, l1=0.1 if first else 0.2),
        "layers": lambda: together(model, layers=zoo.NORMS["llama"] if first else "model.layers.*"),
        "weights": lambda: together(zoo.llama(seed=0 if first else 1).double()),
        "init": lambda: together(model, init=maps if first else 0.5 * maps),
        "held out": lambda: together(model, held_out=HELD_OUT if first else None),
        "checkpoint": lambda: together(model, checkpoint=path if first else None),
        "read": lambda: together(model, SOURCE if first else []),
    }
    maps = together(model, steps=1).maps
    for name, call in differ.items():
        results.error(f"other {name}", call)

    def broken(model):
        raise RuntimeError("the forward is broken")

    def not_finite(model):
        model.model.embed_tokens.weight.data.fill_(torch.nan)

    for at in (1, 2, 5):  # of the target, before any step, later
        trouble = Trouble(at, (lambda model: None) if first else broken)
        results.error(f"broken at {at}", lambda: together(model, forward=trouble, checkpoint=path))  # noqa: B023
        path.unlink(missing_ok=True) if first else None
        distributed.barrier()
    spoilt = zoo.llama().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trouble = Trouble(5, (lambda model: None) if first else not_finite)
        results.save("not finite", together(spoilt, forward=trouble, lr=0.01, steps=6))
    folder = results.folder / "none"
    results.error("no folder", lambda: together(model, checkpoint=folder / "fit.safetensors"))
    small = distributed.new_group([0])
    results.error("not a member", lambda: fit(model, process_group=small))
    results.save("after all", together(model))
    results.say("ready", True)
    killed = Trouble(6, (lambda model: None) if first else lambda model: os.kill(os.getpid(), signal.SIGKILL))
    results.error("killed", lambda: together(model, steps=8, l1=0.02, forward=killed, checkpoint=path))


def divided(results):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module
    from transformers import AutoModelForCausalLM

    mesh = init_device_mesh("cpu", (2,))

    def sharded():
        model = zoo.llama().double()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def parallel():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = AutoModelForCausalLM.from_pretrained(results.folder / "model", tp_plan="auto").eval()
        assert type(model.model.layers[0].mlp.down_proj.weight).__name__ == "DTensor"
        return model

    for name, settings in DIVIDED.items():
        results.save(f"fully_shard {name}", together(sharded(), **settings))
        results.save(f"tensor {name}", together(parallel(), **settings))
    model = parallel()
    for site in ("self_attn.q_proj", "mlp.act_fn"):
        results.error(f"part {site}", lambda: together(model, layers=f"model.layers.*.{site}"))  # noqa: B023
    results.error("alone", lambda: fit(model))
    results.error("sharded alone", lambda: fit(sharded()))
    plan = {"model.layers.0.post_attention_layernorm": SequenceParallel()}
    tokens = parallelize_module(zoo.llama(), mesh, plan)
    results.error("DTensor", lambda: together(tokens, layers="model.layers.0.post_attention_layernorm"))
    columns = {f"model.layers.{k}.mlp.gate_proj": ColwiseParallel() for k in range(zoo.LAYERS)}
    plain = parallelize_module(zoo.llama(), mesh, columns)
    results.error("other group", lambda: fit(plain, process_group=distributed.new_group([results.rank])))


DIVIDED = {
    "layers": {"layers": "model.layers.*"},
    "uneven": {"batch_size": 2, "loss_layers": "model.norm"},
    "shuffled": {"mini_batch": 3, "batch_size": 1},
    "keep": {"max_kl": 0.05, "held_out": HELD_OUT},
}


def main(rank, size, folder):
    folder = Path(folder)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}  # transformers looks at them
    store = distributed.FileStore(str(folder / "store"), int(size))
    distributed.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60)
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they run in the background
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(400, repeat=True)  # where it hangs, if it does
    results = Results(folder, int(rank))
    fits(results)
    divided(results)
    failures(results)  # the last of them kills a process
    results.say("done", True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
