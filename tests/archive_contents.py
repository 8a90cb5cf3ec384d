"""What a source archive and a wheel must and must not carry.

Run as: python tests/archive_contents.py dist/*
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXTENSION = r"lineas/_core\.[\w.-]*\.so"


def tracked(*patterns: str) -> set[str]:
    """The checkout's files that match a pattern, but for what Python and the build leave between them."""
    files = (path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file())
    names = {path.relative_to(ROOT).as_posix() for path in files}
    return {name for name in names if not re.search(r"__pycache__|\.py[co]$|\.so$|_libs/", name)}


def check(name: str, found: set[str], expected: set[str], extra: str) -> None:
    """Fail over a file that is missing, and over one that is neither expected nor matched by `extra`."""
    missing = sorted(expected - found)
    surplus = sorted(entry for entry in found - expected if not re.fullmatch(extra, entry))
    if missing or surplus:
        raise SystemExit(f"{name}: missing {missing}, not expected {surplus}")
    print(f"{name}: {len(found)} files, as expected")


def check_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        extensions = [archive.read(name) for name in names if re.fullmatch(EXTENSION, name)]
        tags = re.findall(r"^Tag: .*-(\w+)$", archive.read(wheel_file(names)).decode(), re.MULTILINE)
    if not tags or any(tag.startswith("linux_") for tag in tags):
        raise SystemExit(f"{path.name}: tagged {tags}, which no package index takes")
    info = wheel_file(names).removesuffix("WHEEL")
    must = {f"{info}{name}" for name in ("METADATA", "RECORD", "licenses/LICENSE", "licenses/LICENSES/OpenBLAS.txt")}
    run_paths = [re.findall(rb"[^\0]*\$ORIGIN[^\0]*", extension) for extension in extensions]
    if run_paths != [[b"$ORIGIN/_libs"]]:
        raise SystemExit(f"{path.name}: run paths of extensions are {run_paths}")
    libraries = EXTENSION, r"lineas/_libs/libscipy_openblas\.\w+"
    for library in libraries:
        if not any(re.fullmatch(library, name) for name in names):
            raise SystemExit(f"{path.name}: no {library}")
    check(path.name, names, must | tracked("lineas/**/*"), "|".join([*libraries, re.escape(info) + r"[\w./-]+"]))


def wheel_file(names: set[str]) -> str:
    return next(name for name in names if name.endswith(".dist-info/WHEEL"))


def check_source(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    must = tracked(
        "*.md",
        "*.toml",
        "setup.py",
        "Makefile",
        "LICENSE",
        "LICENSES/*",
        "csrc/**/*",
        "examples/*",
        "lineas/**/*",
        "tests/**/*",
    )
    check(path.name, names, must, r"PKG-INFO|setup\.cfg|MANIFEST\.in|\.clang-format|docs/.*|lineas\.egg-info/.*")


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        (check_wheel if argument.suffix == ".whl" else check_source)(argument)
