"""LoRA adapters in GGUF: A and B are what the slopes do to the weights, and what does not fit is refused."""

import gguf
import gguf_cases
import gguf_files
import numpy as np
import pytest
from gguf_cases import IN, MIDDLE, PRE

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.export import gguf as export
from lineas.export.gguf import lora

NORM = "model.layers.0.post_attention_layernorm"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = gguf_files.model("llama")
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_files.convert(model, folder / "model.gguf", quantize=("Q4_1", "Q8_0", "F32")), model


@pytest.fixture
def path(made):
    return made[0]


def sparse(name=NORM, changed=(3, 17), shift=0.0):
    weight = np.ones(32)
    weight[list(changed)] = np.linspace(0.25, 1.75, len(changed))
    return SteeringMaps({name: AffineMap(weight, np.full(32, shift))})


def refusal(maps, path, folder, **settings):
    with pytest.raises(ValueError) as error:
        lora(maps, path, folder / "adapter.gguf", **settings)
    assert list(folder.iterdir()) == []
    return str(error.value)


def test_b_a_is_what_slopes_add_to_the_weights(made, tmp_path):
    path, _ = made
    maps = sparse() + sparse("model.layers.1.input_layernorm", (0, 5, 31))
    adapter = lora(maps, path, tmp_path / "adapter.gguf", 0.5)
    assert adapter == tmp_path / "adapter.gguf" and list(tmp_path.iterdir()) == [adapter]
    reader = gguf.GGUFReader(adapter)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 1.0,
        "lineas.adapter.version": lineas.__version__,
        "lineas.adapter.strength": 0.5,
        "lineas.adapter.maps": export.digest(maps),
    }
    found, weights = gguf_files.read(adapter), gguf_files.read(path)
    readers = {f"blk.0.{one}.weight": NORM for one in ("ffn_gate", "ffn_up")}
    readers |= {f"blk.1.{one}.weight": "model.layers.1.input_layernorm" for one in ("attn_q", "attn_k", "attn_v")}
    assert set(found) == {f"{name}.{part}" for name in readers for part in ("lora_a", "lora_b")}
    for name, norm in readers.items():
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        rank = len(a)
        assert rank == maps[norm].support and ((a == 0) | (a == 1)).all() and (a.sum(axis=1) == 1).all()
        change = weights[name] * (0.5 * (maps[norm].weight - 1))
        # llama.cpp multiplies by alpha / rank.
        np.testing.assert_allclose(b @ a / rank, change, rtol=1e-5, atol=1e-7)


def test_shifts_are_refused_with_their_share_of_the_change(path, tmp_path):
    maps = sparse(shift=0.1)
    gain = gguf_files.read(path)["blk.0.ffn_norm.weight"].astype(np.float64)
    slopes, shift = ((maps[NORM].weight - 1) * gain) ** 2, maps[NORM].bias ** 2
    share = np.sqrt(shift.sum() / (slopes + shift).sum())
    message = refusal(maps, path, tmp_path)
    assert "1 of 1 maps cannot be written as an adapter, and nothing was written" in message
    assert f"and adapters of llama.cpp have no biases; drop=True leaves it out, {share:.1%}" in message
    with pytest.warns(UserWarning, match=rf"lacks the shifts of 1 of 1 maps .*\n.*{share:.1%} of the change") as caught:
        adapter = lora(maps, path, tmp_path / "adapter.gguf", drop=True)
    assert caught[0].filename == __file__
    without = gguf_files.read(lora(sparse(), path, tmp_path / "other.gguf"))
    found = gguf_files.read(adapter)
    assert found.keys() == without.keys() and all(np.array_equal(found[name], without[name]) for name in found)


def test_the_share_counts_the_bias_of_a_norm(tmp_path_factory, tmp_path):
    model = gguf_files.model("gpt2")
    path = gguf_files.convert(model, tmp_path_factory.mktemp("gpt2") / "model.gguf")
    name = "transformer.h.0.ln_2"
    maps, weights = sparse(name, shift=0.1), gguf_files.read(path)
    gain, mean = weights["blk.0.ffn_norm.weight"].astype(float), weights["blk.0.ffn_norm.bias"].astype(float)
    slope, shift = maps[name].weight - 1, maps[name].bias
    share = np.sqrt((shift**2).sum() / ((slope * gain) ** 2 + (slope * mean + shift) ** 2).sum())
    assert f"leaves it out, {share:.1%} of the change" in refusal(maps, path, tmp_path)


def test_other_modules_are_refused(made, tmp_path_factory, tmp_path):
    path, _ = made
    attention = sparse("model.layers.0.self_attn")
    assert "it is a matrix: an adapter holds maps of norms" in refusal(attention, path, tmp_path)
    assert "the file has 2 blocks" in refusal(sparse("model.layers.9.input_layernorm"), path, tmp_path)
    gemma = gguf_files.model("gemma3_text")
    folder = tmp_path_factory.mktemp("gemma")
    other = gguf_files.convert(gemma, folder / "model.gguf")
    maps = gguf_cases.maps_of(gemma, slopes=(PRE, "model.layers.*.post_feedforward_layernorm", "model.norm"))
    message = refusal(maps, other, tmp_path)
    assert (
        "3 of 5 maps" in message and "layers.0.post_feedforward_layernorm: no matrices alone read its output" in message
    )
    assert "model.norm: the output matrix that reads it is the embedding of the tokens as well" in message
    mixtral = gguf_files.convert(gguf_files.model("mixtral"), folder / "mixtral.gguf")
    assert "a router and experts read its output" in refusal(sparse(), mixtral, tmp_path)


def test_the_output_matrix_is_adapted_where_it_is_one_of_its_own(made, tmp_path):
    path, model = made
    assert not model.config.tie_word_embeddings
    found = gguf_files.read(lora(sparse("model.norm"), path, tmp_path / "adapter.gguf"))
    assert set(found) == {"output.weight.lora_a", "output.weight.lora_b"}


def test_bad_input_is_an_error_and_nothing_is_written(path, tmp_path):
    nothing = "an adapter of these maps would change nothing: there is nothing to write"
    assert nothing in refusal(sparse(changed=()), path, tmp_path)
    assert nothing in refusal(sparse(), path, tmp_path, strength=0)
    with pytest.raises(TypeError, match="drop must be True or False, got None"):
        lora(sparse(), path, tmp_path / "adapter.gguf", drop=None)
    with pytest.raises(TypeError, match="maps must be SteeringMaps, got dict"):
        lora(dict(sparse()), path, tmp_path / "adapter.gguf")
    with pytest.raises(ValueError, match="itself, which is never written to"):
        lora(sparse(), path, path)
    gated = sparse().gated({NORM: lineas.Gate(np.ones(32), 0.0)})
    assert "an adapter: these maps have gates" in refusal(gated, path, tmp_path)
    assert "an adapter acts on all tokens" in refusal(SteeringMaps(dict(sparse()), {"tokens": "last"}), path, tmp_path)
    huge = SteeringMaps({NORM: AffineMap(np.full(32, 1e300), np.zeros(32))})
    assert "would not be finite in float32" in refusal(huge, path, tmp_path)
    folded = sparse().fold_gguf(path, path.parent / "folded.gguf")
    assert "has maps folded in" in refusal(sparse(), folded, tmp_path)


def test_an_interrupted_adapter_leaves_nothing(path, tmp_path, monkeypatch):
    def stops(self, *args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stops)
    with pytest.raises(KeyboardInterrupt):
        lora(gguf_cases.maps_of(gguf_files.model("llama"), slopes=(IN, MIDDLE)), path, tmp_path / "adapter.gguf")
    assert list(tmp_path.iterdir()) == []
