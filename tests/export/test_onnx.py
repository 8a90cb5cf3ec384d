"""Models with maps as ONNX files: what onnxruntime makes of them is what the hooks do; and the code of docs/onnx.md.

Other models are in the table of benchmarks/parity.py, which `make runtimes` runs.
"""

import warnings

import fold_cases
import models_zoo as zoo
import numpy as np
import pytest
import torch
from fold_cases import language_model
from onnx_files import TEXT, Logits, Session, export, quiet, real_logits, texts
from pages import python_blocks

import lineas
from lineas.hooks import modules

pytestmark = pytest.mark.slow
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BLOCKS = python_blocks("docs/onnx.md")
MADE_WITH = texts(2, 6, 2)
CLOSE = {"atol": 1e-5, "rtol": 0.0}


@torch.no_grad()
def check(model, session, maps, at, inputs, **given):
    """The file does what hooks do, which is far from what the model does."""
    plain = real_logits(Logits(model), inputs)
    with maps.attach(model, strength=at):
        hooked = real_logits(Logits(model), inputs)
    torch.testing.assert_close(real_logits(session, inputs, **given), hooked, **CLOSE)
    assert at == 0 or (plain - hooked).abs().max() > 0.1


def test_the_code_of_the_page(tmp_path, monkeypatch, capsys):
    """Export with a slider, run at other sizes and strengths; then a constant strength, of a model of images."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = zoo.llama(), zoo.tokenizer()
    rng = np.random.default_rng(0)
    d = model.config.hidden_size
    maps = lineas.SteeringMaps(
        {name: lineas.AffineMap(rng.uniform(0.5, 1.5, d), rng.normal(0, 0.5, d))
         for name in modules.resolve(model, zoo.NORMS["llama"])}
    )  # fmt: skip
    slider, run, constant = BLOCKS
    known = {"model": model, "tokenizer": tokenizer, "maps": maps}
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(slider, "onnx.md", "exec"), known)
    assert not [str(one.message) for one in caught if "training" in str(one.message)]
    lineas.detach(model)
    exec(compile(run, "onnx.md", "exec"), known)
    assert len(capsys.readouterr().out.splitlines()) >= 3
    session = Session("steered.onnx")
    for strength in (0.0, 0.6, 1.0, -1.0):
        for inputs in (texts(3, 9, 4), texts(1, 2)):
            inputs["input_ids"] %= zoo.VOCABULARY
            check(model, session, maps, strength, inputs, strength=np.float32(strength))

    model = fold_cases.pictures().float()
    maps = fold_cases.random_maps(model, "[bgil]*")
    known = {"model": model, "maps": maps, "torch": torch, "batch_of_images": torch.randn(2, 3, 4, 4)}
    with quiet():
        exec(compile(constant, "onnx.md", "exec"), known)
    known["program"].save("images.onnx")
    images = torch.randn(5, 3, 4, 4)
    with torch.no_grad(), maps.attach(model, strength=0.8):
        torch.testing.assert_close(Session("images.onnx")(images), model(images), **CLOSE)


def test_selections_and_gates_are_exact(tmp_path):
    """Gates of means from the third token on; padding counts in no mean and no position."""
    model = language_model("llama", dtype=torch.float32, num_hidden_layers=1)
    maps = fold_cases.random_maps(model, "**.*layernorm")
    rng = np.random.default_rng(1)
    contexts = ("mean", "token")
    gates = {name: lineas.Gate(rng.normal(size=16), 0.2, context=c) for name, c in zip(maps, contexts, strict=True)}
    with maps.gated(gates).attach(model, strength=2.0, tokens=slice(2, None)):
        session = Session(export(Logits(model), tmp_path / "model.onnx", MADE_WITH, TEXT))
        with torch.no_grad():
            for inputs in (texts(3, 9, 4), texts(1, 4)):
                torch.testing.assert_close(real_logits(session, inputs), real_logits(Logits(model), inputs), **CLOSE)


def test_a_folded_model(tmp_path):
    model = language_model("gpt2", dtype=torch.float32, n_layer=1)
    maps = fold_cases.random_maps(model, "**.ln_[12]")
    path = export(Logits(maps.fold(model, 0.7)), tmp_path / "model.onnx", MADE_WITH, TEXT)
    check(model, Session(path), maps, 0.7, texts(3, 9, 4))


def test_what_is_refused_says_why_through_torch(tmp_path):
    model = language_model("gpt2", dtype=torch.float32, n_layer=1)
    maps = fold_cases.random_maps(model, "**.ln_1")
    with maps.attach(model, tokens="generated"):
        with pytest.raises(torch.onnx.OnnxExporterError, match="tokens='generated' must know where the prompt ends"):
            export(Logits(model), tmp_path / "model.onnx", MADE_WITH, TEXT)
    assert not list(tmp_path.iterdir())
