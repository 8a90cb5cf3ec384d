"""How well gates tell negative from positive sentences in SmolLM2-135M, and docs/gate-tokens.png: one over a text.

The demo's sentences, of which every second one is fitted to; the text of the picture is of others. ``--write`` puts the
table into docs/gates.md and draws the picture.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from _machine import describe, set_threads
from _study import ROOT, write_between

import lineas
from lineas.demo import sentences
from lineas.demo.model import load_smollm2
from lineas.hooks.capture import Capture
from lineas.hooks.modules import resolve
from lineas.inputs.prompts import read
from lineas.maps.gates import AnyGate

LAYERS = "model.layers.*.post_attention_layernorm"
PAGE = ROOT / "docs" / "gates.md"
MARKS = "<!-- measured: python benchmarks/gate_tokens.py --write -->", "<!-- end of gates -->"
TEXT = (
    "The train was late again, nobody told us anything, and I missed the whole first act. But then a stranger gave me "
    "her seat, the singers were wonderful, and we laughed all the way home."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/gates.md and docs/gate-tokens.png")
    args = parser.parse_args()
    set_threads(1)
    model, tokenizer = load_smollm2()
    negative, positive = sentences("negative.txt"), sentences("positive.txt")
    fitted, held_out = ((negative[k::2], positive[k::2]) for k in (0, 1))
    names = resolve(model, LAYERS)[::5]
    table = [
        describe(),
        "",
        f"{len(fitted[0])} and {len(fitted[1])} sentences to fit, {len(held_out[0])} and {len(held_out[1])} others; "
        f"{len(names)} of the 30 norms after attention.",
        "",
        "| gate | AUROC, cross-validated | AUROC, other sentences | CPU seconds to collect and fit |",
        "| --- | --- | --- | ---: |",
    ]
    kinds = {
        "a token": {},
        "a token, 5 components": {"components": 5},
        "the mean so far": {"context": "mean"},
        "neurons (of those that are open)": {"kind": "neuron"},
    }
    common = {"layers": names, "tokenizer": tokenizer, "progress": False}
    drawn: dict[str, AnyGate] = {}
    for what, settings in kinds.items():
        start = time.process_time()
        gates = lineas.fit_gates(model, *fitted, **common, **settings)
        seconds = time.process_time() - start
        found = {name: _area(gate) for name, gate in gates.items()}
        others = _others(model, tokenizer, gates, held_out)
        table.append(f"| {what} | {_span(list(found.values()))} | {_span(others)} | {seconds:.0f} |")
        print(table[-1], flush=True)
        drawn = drawn or gates
    if args.write:
        write_between(PAGE, MARKS, table)
        maps = lineas.fit(*(lineas.collect(model, texts, **common) for texts in fitted), method="mean")
        ax = lineas.plot_gate(model, maps.gated(drawn), TEXT, tokenizer=tokenizer, strength=0.0)
        ax.figure.savefig(ROOT / "docs" / "gate-tokens.png", dpi=140)


def _area(gate: AnyGate) -> float:
    return float(gate.auroc if isinstance(gate, lineas.Gate) else gate.auroc[~gate.closed].mean())


def _span(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _others(model, tokenizer, gates: dict[str, AnyGate], texts: tuple[list[str], list[str]]) -> list[float]:
    """The areas under the ROC curves of all tokens of other texts, by module; of neurons the mean of theirs."""
    from sklearn.metrics import roc_auc_score

    sides: list[dict[str, list[np.ndarray]]] = []
    for side in texts:
        found: dict[str, list[np.ndarray]] = {name: [] for name in gates}
        for batch in (read([text], "text", tokenizer=tokenizer).first() for text in side):

            def note(name, module, tensor, found=found) -> None:
                found[name].append(gates[name].values(tensor.numpy())[0])

            with torch.no_grad():
                Capture().run(model, batch, list(gates), note)
        sides.append(found)
    areas = []
    for name, gate in gates.items():
        source, target = (np.concatenate(side[name]) for side in sides)
        y = np.repeat([1, 0], [len(source), len(target)])
        columns = np.concatenate([source, target]).T
        kept = columns if isinstance(gate, lineas.Gate) else columns[~gate.closed]
        areas.append(float(np.mean([roc_auc_score(y, column) for column in kept])))
    return areas


if __name__ == "__main__":
    main()
