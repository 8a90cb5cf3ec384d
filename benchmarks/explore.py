"""How long the kernel takes for a move of the explorer's slider: python benchmarks/explore.py

A real kernel is started, as a notebook has one. The time is that from setting ``view.index`` on a path of 57 modules
of 2048 neurons to the end of the last comm message sent, over 100 moves; once alone, and once with the maps on a model
with modules of that size, which get the maps of the new point in that time as well. That the messages were sent is
counted on the other side. The browser's part is measured by tests/notebook/test_explore_browser.py (make browser).
"""

from __future__ import annotations

import statistics
from pathlib import Path

from jupyter_client.manager import start_new_kernel

MOVES = 100
LIMIT_MS = 50.0
SOURCE = f"""
import sys, time
import numpy as np, torch
sys.path.insert(0, {str(Path(__file__).resolve().parents[1] / "tests" / "helpers")!r})
import paths
import lineas

path = paths.path(57, 2048, 50, metadata={{"method": "sparse path"}})
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.post_attention_layernorm = torch.nn.LayerNorm(2048)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList(Layer() for _ in range(57))

def moves(view):
    rng, taken = np.random.default_rng(0), []
    for _ in range({MOVES}):
        index = (view.index + rng.integers(1, len(path))) % len(path)
        start = time.perf_counter()
        view.index = index
        taken.append(1e3 * (time.perf_counter() - start))
    return taken
"""


def run(client, code: str) -> tuple[str, int]:
    """Execute code; return its expression's text and the number of explorer updates that arrived meanwhile."""
    seen, reply = 0, ""

    def hook(message: dict) -> None:
        nonlocal seen, reply
        content = message["content"]
        if message["msg_type"] == "comm_msg" and "_point_data" in content["data"].get("state", {}):
            seen += 1
        elif message["msg_type"] == "execute_result":
            reply = content["data"]["text/plain"]
        elif message["msg_type"] == "error":
            raise RuntimeError("\n".join(content["traceback"]))

    client.execute_interactive(code, timeout=300, output_hook=hook)
    return reply, seen


def main() -> None:
    manager, client = start_new_kernel()
    try:
        run(client, SOURCE)
        for name, code in (("alone", "lineas.explore(path)"), ("on a model", "lineas.explore(path, Model())")):
            text, seen = run(client, f"' '.join(map(str, moves({code})))")
            taken = [float(value) for value in text.strip("'").split()]
            if seen != MOVES:
                raise RuntimeError(f"{MOVES} moves, but {seen} pictures arrived")
            median, worst = statistics.median(taken), sorted(taken)[int(0.95 * MOVES)]
            verdict = "reached" if median <= LIMIT_MS else "missed"
            print(
                f"move on a 57 x 2048 path, {name:10}: median {median:5.1f} ms, 95 % {worst:5.1f} ms "
                f"(goal {LIMIT_MS:g}: {verdict})"
            )
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


if __name__ == "__main__":
    main()
