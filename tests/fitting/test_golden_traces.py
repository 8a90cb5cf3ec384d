"""End-to-end fits against traces of the published reference (tests/golden/README.md says how they were made)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lineas import fit_end_to_end

GOLDEN = Path(__file__).parents[1] / "golden"
STEPS = 50
# Loss; then w and b. The reference itself differs between two runs by 2e-7 (loss, float32).
TOLERANCE = {"f32": (dict(rtol=1e-4), dict(rtol=0, atol=1e-3)), "f64": (dict(rtol=1e-9), dict(rtol=0, atol=1e-9))}
DTYPE = {"f32": torch.float32, "f64": torch.float64}


@pytest.fixture(scope="module")
def mlp_data():
    return np.load(GOLDEN / "e2e_mlp.npz")


@pytest.fixture(scope="module")
def qwen2_data():
    return np.load(GOLDEN / "e2e_qwen2.npz")


def check_trace(result, data, prefix, which):
    loss, maps = TOLERANCE[which]
    np.testing.assert_allclose(result.history["loss"], data[f"{prefix}_loss"], **loss)
    np.testing.assert_allclose(result.history["layer_loss"], data[f"{prefix}_layer_loss"], **loss)
    np.testing.assert_allclose(result.history["lr"], data[f"{prefix}_lr"], rtol=1e-12)
    np.testing.assert_allclose(result.history["penalty"], data[f"{prefix}_reg"], rtol=loss["rtol"], atol=1e-4)
    return maps


# --- a small network --------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, data, dtype):
        super().__init__()
        for i in range(3):
            out, width = data[f"mlp_W{i}"].shape
            layer = nn.Linear(width, out, dtype=dtype)
            layer.weight.data = torch.from_numpy(data[f"mlp_W{i}"]).to(dtype)
            layer.bias.data = torch.from_numpy(data[f"mlp_c{i}"]).to(dtype)
            self.add_module(f"layer{i}", layer)

    def forward(self, x, attention_mask):
        return self.layer2(torch.tanh(self.layer1(torch.tanh(self.layer0(x)))))


MLP_SETTINGS = {
    "SGD_plain": {},
    "SGD_l1": dict(l1=0.1),
    "SGD_sg": dict(l1=0.03, group=0.06),
    "Adam_plain": {},
}


def fit_mlp(data, which, tag, steps=STEPS):
    def batch(side):
        x = torch.from_numpy(data[f"mlp_x_{side}"]).to(DTYPE[which])
        return {"x": x, "attention_mask": torch.from_numpy(data[f"mlp_mask_{side}"])}

    adam = dict(optimizer="adam", lr=0.02, betas=(0.9, 0.9)) if tag.startswith("Adam") else dict(lr=0.1)
    return fit_end_to_end(
        MLP(data, DTYPE[which]),
        batch("src"),
        batch("dst"),
        layers="layer*",
        scaling="reference",
        steps=steps,
        progress=False,
        **adam,
        **MLP_SETTINGS[tag],
    )


def mlp_maps(result, data, prefix):
    """Triples of our last value, the reference's, and the identity's, of every recorded parameter."""
    for i in range(3):
        found = result.maps[f"layer{i}"]
        yield found.weight, data[f"{prefix}_w{i}"][-1], 1
        if f"{prefix}_b{i}" in data:  # the shifts of SGD_sg were not recorded
            yield found.bias, data[f"{prefix}_b{i}"][-1], 0


@pytest.mark.parametrize("which", ["f32", "f64"])
@pytest.mark.parametrize("tag", MLP_SETTINGS)
def test_mlp_trace(mlp_data, tag, which):
    result = fit_mlp(mlp_data, which, tag)
    prefix = f"mlp_{which}_{tag}"
    tolerance = check_trace(result, mlp_data, prefix, which)
    for ours, reference, _ in mlp_maps(result, mlp_data, prefix):
        assert ours.dtype == np.dtype(which.replace("f", "float"))
        np.testing.assert_allclose(ours, reference, **tolerance)


@pytest.mark.parametrize("tag", ["SGD_l1", "SGD_sg"])
def test_mlp_zeros_are_exact(mlp_data, tag):
    result = fit_mlp(mlp_data, "f64", tag)
    triples = list(mlp_maps(result, mlp_data, f"mlp_f64_{tag}"))
    for ours, reference, identity in triples:
        np.testing.assert_array_equal(ours == identity, reference == identity)
    assert sum(np.count_nonzero(ours == identity) for ours, _, identity in triples) > 0


@pytest.mark.parametrize("tag", ["SGD_plain", "SGD_sg"])
def test_mlp_first_step(mlp_data, tag):
    # The rates depend on the number of steps, so of a shorter fit only the first step is that of the trace.
    result = fit_mlp(mlp_data, "f64", tag, steps=1)
    for i in range(3):
        found, prefix = result.maps[f"layer{i}"], f"mlp_f64_{tag}"
        np.testing.assert_allclose(found.weight, mlp_data[f"{prefix}_w{i}"][0], rtol=0, atol=1e-12)
        if tag == "SGD_plain":
            np.testing.assert_allclose(found.weight, 1 - 0.1 * mlp_data[f"{prefix}_gw{i}_step0"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(found.bias, -0.1 * mlp_data[f"{prefix}_gb{i}_step0"], rtol=0, atol=1e-12)


# --- a transformer ----------------------------------------------------------------------------------------------------

QWEN2_SETTINGS = {
    "plain": {},
    "l1": dict(l1=0.02),
    "sg": dict(l1=0.01, group=0.005),
    "l1_strong": dict(l1=0.1),
    "sg_strong": dict(l1=0.05, group=0.03),
}


def qwen2(data, dtype):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=104,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen2ForCausalLM(config).to(dtype)
    state = {name.replace("model.lm_head", "lm_head"): data[name] for name in data.files if name.startswith("model.")}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return model


def fit_qwen2(data, which, tag):
    def batch(side):
        ids = torch.from_numpy(data[f"{side}_input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": torch.from_numpy(data[f"{side}_attention_mask"]),
            "position_ids": torch.arange(ids.shape[1]).expand(ids.shape),  # the reference does not look at the mask
        }

    return fit_end_to_end(
        qwen2(data, DTYPE[which]),
        batch("src"),
        batch("dst"),
        layers="model.layers.*.post_attention_layernorm",
        scaling="reference",
        steps=STEPS,
        progress=False,
        lr=0.1,
        **QWEN2_SETTINGS[tag],
    )


@pytest.mark.parametrize("tag", ["plain", "l1", "sg", "l1_strong"])
def test_qwen2_trace(qwen2_data, tag):
    result = fit_qwen2(qwen2_data, "f32", tag)
    tolerance = check_trace(result, qwen2_data, tag, "f32")
    for k in range(3):
        found = result.maps[f"model.layers.{k}.post_attention_layernorm"]
        np.testing.assert_allclose(found.weight, qwen2_data[f"{tag}_w"][-1, k], **tolerance)
        np.testing.assert_allclose(found.bias, qwen2_data[f"{tag}_b"][-1, k], **tolerance)


@pytest.mark.parametrize("tag", ["plain", "sg_strong"])
def test_qwen2_trace_in_float64(qwen2_data, mlp_data, tag):
    result = fit_qwen2(qwen2_data, "f64", tag)
    loss, tolerance = TOLERANCE["f64"]
    np.testing.assert_allclose(result.history["loss"], mlp_data[f"qwen2_f64_{tag}_loss"], **loss)
    for k in range(3):
        found = result.maps[f"model.layers.{k}.post_attention_layernorm"]
        np.testing.assert_allclose(found.weight, mlp_data[f"qwen2_f64_{tag}_w_final"][k], **tolerance)
        np.testing.assert_allclose(found.bias, mlp_data[f"qwen2_f64_{tag}_b_final"][k], **tolerance)
