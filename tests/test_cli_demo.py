"""``lineas demo``, on a tiny random model."""

import importlib.util

import models_zoo
import pytest
from commands import fails

import lineas
from lineas import cli


@pytest.fixture
def tiny_demo(monkeypatch):
    pytest.importorskip("vaderSentiment")
    from lineas.demo import run as demo

    monkeypatch.setattr(demo, "load_smollm2", lambda: (models_zoo.llama(), models_zoo.tokenizer()))
    monkeypatch.setattr(demo, "LEARNING_RATE", "auto")  # the demo's own is too long for it
    seeds = {"positive.txt": 1, "negative.txt": 2, "neutral_text.txt": 3, "neutral_prompts.txt": 4}
    monkeypatch.setattr(demo, "sentences", lambda name: models_zoo.texts(80, seed=seeds[name]))  # words that it knows
    return demo


def test_demo_writes_maps_picture_evaluation_and_report(tiny_demo, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["demo", "--quick", "--steps", "2", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert len(lineas.load(output / "maps.safetensors")) == models_zoo.LAYERS
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    maps = lineas.load(output / "maps.safetensors")
    chosen = maps.metadata["calibration"]["strength"]
    found = lineas.load(output / "evaluation.safetensors")
    assert found.strengths.tolist() == [0.0, *sorted({0.5, 1.0, chosen})]
    assert found.scores["VADER"].shape == (len(found), 4, 2)
    for row in found.rows():
        assert row["VADER_low"] <= row["VADER"] <= row["VADER_high"]
        assert f"{row['kl']:.3f}" in out
    assert (output / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert str(output) in out


def test_demo_repeats_itself_with_the_same_seed(tiny_demo, tmp_path, capsys):
    for name in ("a", "b"):
        assert cli.main(["demo", "--quick", "--steps", "1", "--seed", "5", "--output", str(tmp_path / name)]) == 0
    a, b = (lineas.load(tmp_path / name / "evaluation.safetensors") for name in ("a", "b"))
    assert a == b
    a, b = (lineas.load(tmp_path / name / "maps.safetensors") for name in ("a", "b"))
    assert a == b and a.metadata == b.metadata


def test_demo_steers_at_full_strength_only_while_it_samples(tiny_demo, tmp_path, monkeypatch, capsys):
    model = models_zoo.llama()
    monkeypatch.setattr(tiny_demo, "load_smollm2", lambda: (model, models_zoo.tokenizer()))
    assert cli.main(["demo", "--quick", "--steps", "1", "--output", str(tmp_path)]) == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_demo_names_a_missing_package(tiny_demo, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vaderSentiment" else find(name))
    fails(capsys, cli.main(["demo", "--output", str(tmp_path)]), 'package vaderSentiment: pip install "lineas[demo]"')
