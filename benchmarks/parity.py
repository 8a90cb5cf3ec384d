"""Hooks beside every way in which maps leave lineas: the table of docs/compatibility.md.

    python benchmarks/parity.py                                     # print the table
    python benchmarks/parity.py --vllm-python .venv-vllm/bin/python --write
    python benchmarks/parity.py --families llama gpt2 --routes fold PEFT

Each row is a tiny model with random weights and dense maps on its norms, in float32. Torch and onnxruntime give logits
of texts with padding and without; llama.cpp and vLLM log-probabilities of the next token after three beginnings, and
they differ from transformers without maps as well: that is the number in brackets.

vLLM has an environment of its own, whose Python --vllm-python or the variable LINEAS_VLLM_PYTHON names. Where there is
none, or llama.cpp, PEFT or onnxruntime is missing, the column says "not run".
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _study import ROOT, write_between
from numpy.typing import NDArray
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "tests" / "helpers"))

MARKS = "<!-- measured: python benchmarks/parity.py --write -->", "<!-- end -->"
LIMIT = 1e-5  # of logits, in float32
FACTOR = 5  # times what float32, or a runtime without maps, is off by: two largest of many differences
ANOTHER_MODEL = 0.02  # where a runtime without maps is further off, more than rounding is in the way
STRENGTH, WIDTH, VOCABULARY = 0.7, 64, 50
BEGINNINGS = [[5], [5, 9, 17], [5, 9, 17, 33, 4, 40]]
NOT_RUN, NO_ROUTE, REFUSED, BROKEN = "not run", "-", "refused", "an error"
KINDS = {"slopes": False, "slopes and shifts": True}


@dataclass(frozen=True)
class Family:
    """A kind of model, the globs of the modules that get maps, and the routes that there are for it."""

    name: str
    globs: tuple[str, ...]
    build: Callable[[], nn.Module]
    inputs: Callable[[], list[dict[str, Tensor]]]
    routes: tuple[str, ...]

    @property
    def is_text(self) -> bool:
        return "vLLM" in self.routes


@dataclass
class Job:
    """One row: a model with maps, and what hooks make of it."""

    family: Family
    kind: str
    model: nn.Module
    maps: Any
    folder: Path
    answers: dict[str, Any]  # what vLLM has said of this row
    path: Path | None = None  # of the model's GGUF file
    hooked: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        with self.maps.attach(self.model, strength=STRENGTH):
            self.hooked = [outputs(self.model, one) for one in self.family.inputs()]

    def apart(self, model: Callable[..., Any]) -> float:
        """The largest difference of what another model gives to what hooks give."""
        found = (outputs(model, one) for one in self.family.inputs())
        return max(float((a - b).abs().max()) for a, b in zip(found, self.hooked, strict=True))

    @functools.cached_property
    def rounding(self) -> float:
        """The largest difference of the hooks in float32 to the hooks in float64, where there is no padding.

        Gemma 2 of transformers gives NaN in float64 where there is: its mask is -inf in the float32 of its softmax.
        """
        model, found = copy.deepcopy(self.model).double(), []
        with self.maps.attach(model, strength=STRENGTH):
            for one, hooked in zip(self.family.inputs(), self.hooked, strict=True):
                if one.get("attention_mask", torch.ones(1)).all():
                    wide = {key: value.double() if value.is_floating_point() else value for key, value in one.items()}
                    found.append(float((outputs(model, wide) - hooked).abs().max()))
        return max(found)

    @functools.cached_property
    def log_probabilities(self) -> tuple[NDArray, NDArray]:
        """Those of the next token after each beginning, with maps and without, by transformers."""
        plain = next_tokens(self.model)
        with self.maps.attach(self.model, strength=STRENGTH):
            return next_tokens(self.model), plain


@torch.no_grad()
def outputs(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    """What a model gives, of a text the logits of the tokens that are no padding."""
    found = model(**inputs)
    found = found if isinstance(found, Tensor) else found[0]
    return found[inputs["attention_mask"] != 0] if "attention_mask" in inputs else found


@torch.no_grad()
def next_tokens(model: nn.Module) -> NDArray:
    logits = [model(torch.tensor([ids])).logits[0, -1].double() for ids in BEGINNINGS]
    return torch.stack(logits).log_softmax(-1).numpy()


# --- routes -----------------------------------------------------------------------------------------------------------
# Each gives the largest difference to the hooks and, where its arithmetic is its own, that without maps; or it raises
# the ValueError by which lineas refuses. A further route, or a family for one, is an entry in the tables below.

Found = tuple[float, float | None]


def by_folding(job: Job) -> Found:
    return job.apart(job.maps.fold(job.model, STRENGTH)), None


def by_peft(job: Job) -> Found:
    import peft

    job.maps.to_peft_lora(job.model, job.folder / "adapter", STRENGTH)
    return job.apart(peft.PeftModel.from_pretrained(copy.deepcopy(job.model), job.folder / "adapter")), None


def by_onnx(job: Job) -> Found:
    import onnx_files

    model = onnx_files.Logits(job.model) if job.family.is_text else job.model
    with job.maps.attach(job.model, strength=STRENGTH):
        path = onnx_files.export(model, job.folder / "steered.onnx", job.family.inputs()[0])
    return job.apart(onnx_files.Session(path)), None


def by_llama_cpp(job: Job) -> Found:
    import gguf_files

    steered = job.folder / "steered.gguf"
    if job.path is None:
        job.path = gguf_files.convert(job.model, job.folder / "model.gguf")
    job.maps.fold_gguf(job.path, steered, STRENGTH)
    hooked, plain = job.log_probabilities
    return float(np.abs(from_llama_cpp(steered) - hooked).max()), float(np.abs(from_llama_cpp(job.path) - plain).max())


def from_llama_cpp(path: Path) -> NDArray:
    from llama_cpp import LlamaCpp

    with LlamaCpp(path) as runtime:
        return np.stack([runtime.log_probabilities(ids, VOCABULARY) for ids in BEGINNINGS])


def by_vllm(job: Job) -> Found:
    if "error" in job.answers:
        kind, text = job.answers["error"]
        raise (ValueError if kind == "ValueError" else RuntimeError)(text)
    hooked, plain = job.log_probabilities
    steered, unsteered = (np.array(job.answers[kind]) for kind in (job.kind, ""))
    return float(np.abs(steered - hooked).max()), float(np.abs(unsteered - plain).max())


ROUTES: dict[str, Callable[[Job], Found]] = {
    "fold": by_folding,
    "PEFT": by_peft,
    "llama.cpp": by_llama_cpp,
    "vLLM": by_vllm,
    "ONNX": by_onnx,
}
NEEDS = {"PEFT": "peft", "llama.cpp": "xllamacpp", "ONNX": "onnxruntime"}


# --- families ---------------------------------------------------------------------------------------------------------


def texts() -> list[dict[str, Tensor]]:
    import onnx_files

    return [onnx_files.texts(2, 10, padding) for padding in (3, 0)]


def language_model(kind: str) -> nn.Module:
    """Heads of 32 neurons, the smallest that vLLM takes on a CPU."""
    import gguf_files

    sizes: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 96, "vocab_size": VOCABULARY}
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH}
    elif kind == "gpt_neox":  # which has no grouped heads, but vLLM goes by a number that stands in the config
        sizes["num_key_value_heads"] = 2
    elif kind.startswith(("qwen3", "gemma")):
        sizes["head_dim"] = 32
        if kind.startswith("gemma"):
            sizes["query_pre_attn_scalar"] = 32
    return gguf_files.model(kind, **sizes)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def others(name: str) -> nn.Module:
    import fold_cases

    return fold_cases.build(name).float()


BLOCKS = "model.layers.*."
BOTH = (f"{BLOCKS}input_layernorm", f"{BLOCKS}post_attention_layernorm")
GEMMA = (f"{BLOCKS}input_layernorm", f"{BLOCKS}pre_feedforward_layernorm")
POST = (f"{BLOCKS}post_attention_layernorm", f"{BLOCKS}post_feedforward_layernorm")
NORMS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "phi3"), BOTH),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": POST,
    "gpt2": ("transformer.h.*.ln_[12]",),
    "gpt_neox": ("gpt_neox.layers.*.*_layernorm",),
}
FAMILIES = {
    name: Family(name, globs, functools.partial(language_model, name), texts, tuple(ROUTES))
    for name, globs in NORMS.items()
} | {
    "SD-type UNet": Family(
        "SD-type UNet",
        ("**.*norm*",),
        functools.partial(others, "SD-type UNet"),
        lambda: [{"sample": noise(2, 3, 8, 8), "timestep": torch.tensor(7), "encoder_hidden_states": noise(2, 5, 8)}],
        ("fold", "ONNX"),
    ),
    "CNN": Family(
        "CNN",
        ("batch", "group", "instance", "layer"),
        functools.partial(others, "torch.nn"),
        lambda: [{"x": noise(2, 3, 4, 4)}],
        ("fold", "ONNX"),
    ),
}


def some_maps(family: Family, model: nn.Module, shifts: bool) -> Any:
    """Dense maps with slopes from 0.5 to 1.5."""
    import fold_cases

    return fold_cases.random_maps(model, list(family.globs), shift=shifts)


# --- vLLM, in a process of its own ------------------------------------------------------------------------------------


def ask_vllm(families: Sequence[Family], python: str, folder: Path) -> dict[str, Any]:
    """By family, log-probabilities by kind of maps, "" without any, or type and text of its engine's "error"."""
    tasks = {}
    for family in families:
        model = family.build()
        model.save_pretrained(folder / family.name)
        files = {kind: str(folder / f"{family.name} {kind}.safetensors") for kind in KINDS}
        for kind, shifts in KINDS.items():
            some_maps(family, model, shifts).save(files[kind])
        tasks[family.name] = {"folder": str(folder / family.name), "files": files}
    file = folder / "tasks.json"
    file.write_text(json.dumps(tasks))
    command = [python, __file__, "--worker", str(file)]
    subprocess.run(command, env={**os.environ, "VLLM_PLUGINS": "lineas"}, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.with_suffix(".out").read_text())


def work(file: Path) -> None:
    """What the process does that has vLLM."""
    from vllm_engines import next_token_log_probabilities, start

    found = {}
    for name, task in json.loads(file.read_text()).items():
        print(f"vLLM: {name}", file=sys.stderr, flush=True)
        try:
            llm = start(task["folder"], task["files"], max_model_len=64, max_logprobs=VOCABULARY)
            wanted = {"": None} | {kind: {"lineas": {"maps": kind, "strength": STRENGTH}} for kind in KINDS}
            found[name] = {
                kind: next_token_log_probabilities(llm, BEGINNINGS, VOCABULARY, extra_args).tolist()
                for kind, extra_args in wanted.items()
            }
        except Exception as error:
            found[name] = {"error": [type(error).__name__, str(error)]}
        file.with_suffix(".out").write_text(json.dumps(found))


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """What a route was found to do in a row: differences, or a text."""

    text: str = ""
    steered: float = 0.0
    plain: float | None = None
    why: str = ""

    def show(self, notes: list[str]) -> str:
        if self.why:
            if self.why not in notes:
                notes.append(self.why)
            return f"{self.text} ({notes.index(self.why) + 1})"
        if self.text:
            return self.text
        return f"{self.steered:.0e}" + ("" if self.plain is None else f" ({self.plain:.0e})")

    def is_kept(self, rounding: float) -> bool:
        """Whether the promise is kept: within the limit, or about as near as without maps, or as float32 allows."""
        if self.text:
            return self.text != BROKEN
        return self.steered < max(LIMIT, FACTOR * max(rounding, self.plain or 0))


@dataclass
class Row:
    """The cells of a row by route, and how far float32 itself is from float64 there."""

    cells: dict[str, Cell]
    rounding: float

    @property
    def missed(self) -> list[str]:
        """Routes that do not keep the promise."""
        return [route for route, cell in self.cells.items() if not cell.is_kept(self.rounding)]


def reason(error: Exception) -> str:
    """The first reason that a refusal names, without what is of one layer or class."""
    found = re.search(r"\n\s+(\S+: .*)", str(error))
    text = (found.group(1) if found else str(error)).split("\n")[0]
    for pattern, instead in (
        (r", so it would be lost.*| \(readers=.*| in \w+DecoderLayer", ""),
        (r"model\.layers\.\d+\.", ""),
        (r"\.\d+\.", ".*."),
        (r"\w+ForCausalLM", "the model"),
        (r"\w+RMSNorm", "it"),
        (r" in a \w+$", " there"),
    ):
        text = re.sub(pattern, instead, text)
    return text


def run(route: str, job: Job, available: Sequence[str]) -> Cell:
    if route not in job.family.routes:
        return Cell(NO_ROUTE)
    if route not in available:
        return Cell(NOT_RUN)
    try:
        steered, plain = ROUTES[route](job)
    except ValueError as error:
        return Cell(REFUSED, why=f"{route}: {reason(error)}")
    except RuntimeError as error:
        return Cell(BROKEN, why=f"{route}: {reason(error)}")
    if plain is not None and plain > ANOTHER_MODEL:
        return Cell(BROKEN, why=f"{route}: differs by {plain:.1g} without maps, so that it does not run this model")
    return Cell(steered=steered, plain=plain)


def measure(names: Sequence[str], routes: Sequence[str], vllm_python: str | None = None) -> dict[Any, Row]:
    """The cells of every family and kind of maps, by route."""
    available = [name for name in routes if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    if not vllm_python and "vLLM" in available:
        available.remove("vLLM")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = [FAMILIES[name] for name in names]
        answers: dict[str, Any] = {}
        if "vLLM" in available and vllm_python:
            answers = ask_vllm([family for family in chosen if family.is_text], vllm_python, Path(folder))
        for family in chosen:
            model = family.build()
            for kind, shifts in KINDS.items():
                place = Path(folder, "rows", family.name, kind)
                place.mkdir(parents=True)
                job = Job(family, kind, model, some_maps(family, model, shifts), place, answers.get(family.name, {}))
                row = Row({route: run(route, job, available) for route in routes}, job.rounding)
                rows[family.name, kind] = row
                print(family.name, kind, f"{row.rounding:.0e}", *(c.show([]) for c in row.cells.values()), flush=True)
    return rows


def table(rows: dict[Any, Row]) -> list[str]:
    """The lines of the page."""
    import transformers

    notes: list[str] = []
    routes = list(next(iter(rows.values())).cells)
    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}, float32, strength {STRENGTH}.",
        "",
        f"| model | maps | float32 itself | {' | '.join(routes)} |",
        "| --- | --- | ---: |" + " ---: |" * len(routes),
    ]
    for (name, kind), row in rows.items():
        cells = [name, kind, f"{row.rounding:.0e}", *(cell.show(notes) for cell in row.cells.values())]
        lines.append(f"| {' | '.join(cells)} |")
    if notes:
        lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--vllm-python", default=os.environ.get("LINEAS_VLLM_PYTHON"), metavar="PATH")
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        return work(args.worker)
    rows = measure(args.families, args.routes, args.vllm_python)
    lines = table(rows)
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "compatibility.md", MARKS, lines)
    missed = {f"{name}, {kind}": row.missed for (name, kind), row in rows.items() if row.missed}
    if missed:
        sys.exit(f"further from the hooks than {LIMIT}, than float32 allows and than without maps: {missed}")


if __name__ == "__main__":
    main()
