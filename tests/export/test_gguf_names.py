"""Names of modules in transformers and of tensors in GGUF, both ways; the package gguf knows the first."""

import doctest
from pathlib import Path

import gguf
import gguf_cases
import gguf_files
import pytest
import torch
from gguf_cases import CASES

from lineas.export import gguf as export
from lineas.export.gguf import families, sites
from lineas.export.gguf.container import GGUFFile
from lineas.hooks import modules


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_names_are_those_of_the_package_gguf_and_of_the_model(case):
    model = gguf_files.model(case.kind)
    arch = gguf_files.ARCHITECTURES[case.kind]
    names = gguf.get_tensor_name_map(gguf_files.NAMES[arch], 2)
    tensors = gguf_files.tensors(model)
    found = modules.resolve(model, [*case.whole, *case.slopes, *case.shifts])
    for name in found:
        tensor = export.tensor_name(name, arch)
        assert tensor == names.get_name(name) and f"{tensor}.weight" in tensors
        for suffix in ("", ".weight", ".bias"):
            assert export.module_name(tensor + suffix, arch) == name
        assert tensors[f"{tensor}.weight"].shape[0] == gguf_cases.width(model, name)


def linears_that_read(model, norm):
    """The Linears of a model whose input is what a norm gives."""
    given, found = [], []

    def watch(module, inputs, output):
        # By their memory: the output matrix may read a view.
        if given and inputs and inputs[0].data_ptr() == given[0].data_ptr():
            found.append(module)

    hooks = [model.get_submodule(norm).register_forward_hook(lambda module, inputs, output: given.append(output))]
    linears = [module for module in model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    hooks += [module.register_forward_hook(watch) for module in linears]
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]]))
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_what_reads_a_norm_is_what_reads_it_in_the_model(case, tmp_path):
    model = gguf_files.model(case.kind)
    arch = gguf_files.ARCHITECTURES[case.kind]
    tensors = gguf_files.tensors(model)
    with GGUFFile(gguf_files.convert(model, tmp_path / "model.gguf")) as file:
        for name in modules.resolve(model, [*case.whole, *case.slopes]):
            site = families.site(name, arch)
            linears = linears_that_read(model, name)
            try:
                readers = [weight for _, weight in sites.matrices(file, site, gguf_cases.width(model, name))]
            except sites.Refusal:
                # Norms of outputs and of queries and keys, and those before a router, which is no Linear.
                assert not linears
                continue
            shapes = [tensors[weight].shape for weight in readers]
            rows = [module.weight.shape[:: -1 if type(module).__name__ == "Conv1D" else 1] for module in linears]
            assert sorted(shapes) == sorted(map(tuple, rows)) and rows
    assert families.find(arch).final == export.module_name("output_norm", arch)


def test_models_of_texts_and_images_name_their_language_model():
    for prefix in ("model.language_model.layers", "language_model.model.layers", "model.layers"):
        assert export.tensor_name(f"{prefix}.3.pre_feedforward_layernorm", "gemma3") == "blk.3.ffn_norm"
    assert export.tensor_name("language_model.model.norm", "gemma3") == "output_norm"


def test_modules_whose_output_is_that_of_their_last_matrix():
    assert export.tensor_name("model.layers.3.self_attn", "llama") == "blk.3.attn_output"
    assert export.tensor_name("model.layers.3.mlp", "llama") == "blk.3.ffn_down"
    assert export.module_name("blk.3.ffn_down.weight", "llama") == "model.layers.3.mlp.down_proj"


def test_names_that_are_not_known_are_errors():
    with pytest.raises(ValueError, match="the architecture 'mamba' is not known: maps can go into files of gemma, "):
        export.tensor_name("model.layers.3.input_layernorm", "mamba")
    with pytest.raises(ValueError, match=r"'model\.layers\.3\.input_layernormm' is in a file of llama, only where"):
        export.tensor_name("model.layers.3.input_layernormm", "llama")
    with pytest.raises(ValueError, match=r"which module of transformers the tensor 'blk\.3\.nothing' of llama is"):
        export.module_name("blk.3.nothing", "llama")
    with pytest.raises(ValueError, match=r"which module of transformers the tensor 'token_embd\.weight' of llama is"):
        export.module_name("token_embd.weight", "llama")


def test_the_table_of_the_documentation_is_that_of_the_cases():
    page = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text(encoding="utf-8")
    assert "\n".join(gguf_cases.table()) in page


def test_the_families_are_those_of_llama_cpp():
    assert export.architectures() == sorted(set(gguf_files.ARCHITECTURES.values()))
    assert set(export.architectures()) <= set(gguf.MODEL_ARCH_NAMES.values())


def test_the_examples_in_docstrings():
    result = doctest.testmod(families)
    assert result.attempted == 3 and result.failed == 0
