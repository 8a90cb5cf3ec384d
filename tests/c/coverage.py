"""Line coverage of csrc/core and csrc/kernels after a run of a build with --coverage: a table, and what was missed.

Usage: coverage.py FOLDER LEAST  (the folder with the .gcda files; fails where less than LEAST percent of lines ran)

A line of a template body counts once, and ran if any of its instances did: no processor runs all variants.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import groupby
from pathlib import Path


def executed_lines(folder: Path) -> dict[str, dict[int, bool]]:
    """Whether each line that holds code ran, by file."""
    ran: dict[str, dict[int, bool]] = defaultdict(dict)
    notes = sorted(folder.rglob("*.gcda"))
    if not notes:
        sys.exit(f"no .gcda files in {folder}: nothing was run")
    gcov = os.environ.get("GCOV", "gcov")
    output = subprocess.run([gcov, "--json-format", "--stdout", *notes], check=True, capture_output=True, text=True)
    for unit in output.stdout.splitlines():
        for file in json.loads(unit)["files"]:
            if file["file"].startswith(("csrc/core/", "csrc/kernels/")):
                lines = ran[file["file"]]
                for line in file["lines"]:
                    number = line["line_number"]
                    lines[number] = lines.get(number, False) or line["count"] > 0
    return ran


def stretches(numbers: list[int]) -> str:
    """[3, 4, 5, 9] as "3-5, 9"."""
    groups = [[n for _, n in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(g[0]) if len(g) == 1 else f"{g[0]}-{g[-1]}" for g in groups)


def main(folder: str, least: str) -> None:
    ran = executed_lines(Path(folder))
    total = hit = 0
    for file, lines in sorted(ran.items()):
        missed = sorted(number for number, did_run in lines.items() if not did_run)
        total += len(lines)
        hit += len(lines) - len(missed)
        print(f"{100 * (1 - len(missed) / len(lines)):6.1f} %  {file:38} {stretches(missed)}")
    share = 100 * hit / total
    print(f"{share:6.1f} %  {hit} of {total} lines")
    if share < float(least):
        sys.exit(f"less than {least} % of the lines ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
