"""The command ``lineas fold``: maps into the weights of a model of transformers, or into a GGUF file."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .maps.metadata import as_strength
from .maps.steering import SteeringMaps

# Those of all tokenizers of transformers.
_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "*.spm", "merges.txt", "bpe.codes", "dict.txt")


def add_fold_options(command: argparse.ArgumentParser, *, maps: Mapping[str, Any], strength: Any) -> None:
    """Put the options on the parser; `maps` describes one argument of maps, `strength` reads one."""
    command.add_argument("--maps", required=True, **maps)
    command.add_argument(
        "--strength", type=strength, default=1.0, metavar="X", help="a number or calibrated (default: 1)"
    )
    command.add_argument(
        "--convert", action="store_true", help="make a Mistral or Qwen2 a Llama, which has all the biases"
    )
    command.add_argument("-o", "--output", required=True, type=Path, metavar="PATH", help="folder or GGUF file to make")


def is_gguf(model: str) -> bool:
    """Whether MODEL is a GGUF file: by its name, or by what it begins with."""
    if model.lower().endswith(".gguf"):
        return True
    if not Path(model).is_file():
        return False
    with open(model, "rb") as file:
        return file.read(4) == b"GGUF"


def check_output(output: Path, model: str) -> None:
    """ValueError where there is something already, no folder to put it, or the name is not that of what MODEL gives."""
    named = output.suffix.lower() == ".gguf"
    if is_gguf(model) and not named:
        raise ValueError(
            f"--output: of the GGUF file {model} a GGUF file is made, which must end in .gguf, got {output}"
        )
    if named and not is_gguf(model):
        raise ValueError(
            f"--output: {output} is the name of a GGUF file, and {model} is none: of a model of transformers a folder "
            "is made"
        )
    if output.exists():
        raise ValueError(f"--output: {output} exists")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output: the folder of {output} does not exist")


def fold(
    args: argparse.Namespace,
    maps: SteeringMaps,
    *,
    load_tokenizer: Callable[[], Any],
    load_model: Callable[[], Any],
) -> None:
    """Fold maps into a model of transformers, and write it to a folder, with its tokenizer where it has one."""
    strength = as_strength(args.strength, maps.metadata)
    tokenizer = load_tokenizer() if _may_have_tokenizer(args.model) else None
    folded: Any = maps.fold(load_model(), strength, inplace=not args.convert, convert=args.convert)
    if tokenizer is None:
        print(f"lineas: {args.model} has no tokenizer files, and {args.output} gets none", file=sys.stderr)
    # Beside its place, and there in one step: a folder that is there is whole.
    with tempfile.TemporaryDirectory(dir=args.output.absolute().parent, prefix=f".{args.output.name}-") as place:
        made = Path(place, "model")
        folded.save_pretrained(made)
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        made.rename(args.output)
    _report(type(folded).__name__, maps, strength, args.output)


def _may_have_tokenizer(model: str) -> bool:
    """Whether MODEL is on the hub, or a folder with a file as tokenizers have them."""
    folder = Path(model)
    return not folder.is_dir() or any(path for name in _TOKENIZER_FILES for path in folder.glob(name))


def fold_gguf(args: argparse.Namespace, maps: SteeringMaps) -> None:
    """Fold maps into a copy of a GGUF file."""
    for option, usual in (("convert", False), ("dtype", "float32"), ("device", "cpu")):
        if getattr(args, option) != usual:
            raise ValueError(f"--{option} is for models of transformers, got the GGUF file {args.model}")
    strength = as_strength(args.strength, maps.metadata)
    maps.fold_gguf(args.model, args.output, strength, progress=not args.quiet)
    _report("GGUF file", maps, strength, args.output)


def _report(what: str, maps: SteeringMaps, strength: float, output: Path) -> None:
    print(f"{what} with {len(maps)} maps at strength {strength:g}\nwritten to {output}")
