"""The command ``lineas fold``: maps into the weights of a model of transformers, or into a GGUF file."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .maps.metadata import as_strength
from .maps.steering import SteeringMaps


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


def check_output(output: Path) -> None:
    """ValueError where there is something already, or no folder to put it."""
    if output.exists():
        raise ValueError(f"--output: {output} exists")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output: the folder of {output} does not exist")


def fold(args: argparse.Namespace, maps: SteeringMaps, load: Callable[[], tuple[Any, Any]]) -> None:
    """Fold maps into the model of transformers that `load` gives, after its tokenizer, and write both to a folder."""
    strength = as_strength(args.strength, maps.metadata)
    tokenizer, model = load()
    folded: Any = maps.fold(model, strength, inplace=not args.convert, convert=args.convert)
    # Beside its place, and there in one step: a folder that is there is whole.
    with tempfile.TemporaryDirectory(dir=args.output.absolute().parent, prefix=f".{args.output.name}-") as place:
        made = Path(place, "model")
        folded.save_pretrained(made)
        tokenizer.save_pretrained(made)
        made.rename(args.output)
    _report(type(folded).__name__, maps, strength, args.output)


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
