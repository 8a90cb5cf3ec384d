"""All benchmarks: one table on the screen, and on request the measured parts of the documentation.

    python benchmarks/run.py            # print the table
    python benchmarks/run.py --write    # and write it into docs/benchmarks.md and README.md, with docs/growth.png

Every script runs in a process of its own. Those that bring rows are listed in ROWS; the end-to-end step comes last.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROWS = (
    "sort",
    "wasserstein",
    "affine_wasserstein",
    "step",
    "local_fit",
    "sparse_path",
    "pool",
    "moments",
    "quantiles",
    "affine",
    "call_overhead",
    "scaling",
)
# What README quotes: kernel, size, and the rivals by name.
QUOTED = (
    ("column sort", "32 x 2048", ("np.sort transposed", "torch transposed")),
    ("W2 + gradient", "32 x 2048", ("numpy transposed", "torch transposed")),
    ("W2 + gradient", "1000 x 256", ("numpy transposed", "torch transposed")),
    ("affine + W2, all gradients", "32 x 2048", ("numpy transposed", "torch transposed")),
    ("SGD + prox step, in place", "57 x 2048", ("numpy batched", "torch batched")),
    ("local linear map", "512 x 2048", ("numpy transposed", "torch transposed")),
    ("sparse path, 50 penalties", "32 x 2048", ("FISTA",)),
    ("masked pooling", "32 x 128 x 2048, 56% kept", ("np.einsum", "torch bmm")),
    ("streaming moments", "100000 x 1024", ("chunked numpy", "chunked torch")),
)
ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *args: str) -> list[str]:
    """Run a script and return the lines that it prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *args]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def write_part(path: Path, lines: list[str]) -> None:
    """Replace what stands between the two marks of a Markdown file."""
    text = path.read_text(encoding="utf-8")
    start, end = "<!-- measured: make bench BENCH_ARGS=--write -->\n", "<!-- end -->"
    before, rest = text.split(start)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{start}\n" + "\n".join(lines) + f"\n\n{end}{after}", encoding="utf-8")


def quote(machine: str, rows: list[str]) -> list[str]:
    """README's short table."""
    cells = {(row[0], row[1]): row for row in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)}
    lines = ["| kernel, float32 | size | time | rivals, times ours |", "| --- | --- | ---: | --- |"]
    for kernel, size, rivals in QUOTED:
        row = cells[kernel, size]
        ratios = dict(re.findall(r"([^\d\s][^|]*?) ([\d.e+]+)(?:, |$)", row[4]))
        shown = ", ".join(f"{rival} {ratios[rival]}" for rival in rivals)
        lines.append(f"| {kernel} | {size} | {row[2]} µs | {shown} |")
    return [f"{machine}; one thread.", "", *lines]


def document(machine: str, header: list[str], rows: list[str], step: list[str]) -> None:
    """Write the measured parts of docs/benchmarks.md and README.md."""
    reached = [answer for row in rows for answer in row.split("|")[-2].strip().split(", ") if answer]
    count = f"{reached.count('yes')} of {len(reached)} goals are reached."
    block = ["```text", *step, "```"]
    write_part(ROOT / "docs" / "benchmarks.md", [f"{machine}. {count}", "", *header, *rows, "", *block])
    ratio = next(line for line in step if line.startswith("ratio")).split()[1]
    last = f"One step of an end-to-end fit of SmolLM2-135M takes {ratio} times the bare forward and backward pass."
    write_part(ROOT / "README.md", [*quote(machine, rows), "", last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md, README.md and docs/growth.png")
    parser.add_argument("--budget", type=float, default=1.5, help="seconds of rounds a row (default 1.5)")
    args = parser.parse_args()

    machine, header, rows = "", [], []
    for script in ROWS:
        lines = run(script, "--budget", str(args.budget))
        table = [line for line in lines if line.startswith("|")]
        if not rows:
            machine, header = lines[0], table[:2]
            print("\n".join([machine, "", *header]))
        print("\n".join(table[2:]), flush=True)
        rows += table[2:]
    step = run("end_to_end_step", "--rounds", "11")
    print("\n".join(["", *step]))
    if args.write:
        run("scaling", "--plot", str(ROOT / "docs" / "growth.png"))
        document(machine, header, rows, step)


if __name__ == "__main__":
    main()
