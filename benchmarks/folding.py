"""Into which weights maps can be folded, and how exactly: the table of docs/compatibility.md.

    python benchmarks/folding.py            # print the table
    python benchmarks/folding.py --write    # and write it into docs/compatibility.md

The rows are the cases of tests/helpers/fold_cases.py, whose tests say what else holds for them.
"""

import argparse
import sys
from pathlib import Path

from _study import ROOT, write_between

sys.path.insert(0, str(Path(ROOT) / "tests" / "helpers"))

MARKS = "<!-- measured: python benchmarks/folding.py --write -->", "<!-- end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/compatibility.md")
    args = parser.parse_args()
    import fold_cases
    import torch
    import transformers

    torch.set_num_threads(1)
    lines = [f"torch {torch.__version__}, transformers {transformers.__version__}, float64, largest differences.", ""]
    lines += [f"| {' | '.join(fold_cases.HEADER)} |", "| --- | --- | --- | --- | ---: | ---: |"]
    for case in fold_cases.CASES:
        change, error = fold_cases.measure(case)
        lines.append(f"| {' | '.join(case.cells())} | {change:.2g} | {error:.0e} |")
        print(lines[-1], flush=True)
    if args.write:
        write_between(ROOT / "docs" / "compatibility.md", MARKS, lines)


if __name__ == "__main__":
    main()
