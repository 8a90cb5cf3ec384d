"""The harness that compares hooks with every way out of lineas, on a few models; and what it makes of what it finds."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import parity

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("peft")
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")


def test_some_families_by_the_light_routes():
    routes = ["fold", "PEFT", "llama.cpp", "vLLM"]
    rows = parity.measure(["llama", "qwen2", "olmo2", "CNN"], routes)
    assert len(rows) == 8 and not any(row.missed for row in rows.values())
    refused = {key: [name for name, cell in row.cells.items() if cell.text == "refused"] for key, row in rows.items()}
    assert {key: names for key, names in refused.items() if names} == {
        ("qwen2", "slopes and shifts"): ["fold", "llama.cpp"],
        ("olmo2", "slopes"): ["PEFT"],
        ("olmo2", "slopes and shifts"): ["fold", "PEFT", "llama.cpp"],
    }
    for (name, _), row in rows.items():
        assert 0 < row.rounding < 1e-5
        for route, cell in row.cells.items():
            if not cell.text:
                assert 0 <= cell.steered < 1e-5 and (cell.plain is not None) == (route == "llama.cpp")
        assert row.cells["vLLM"].text == ("-" if name == "CNN" else "not run")
    lines = parity.table(rows)
    assert lines[2] == "| model | maps | float32 itself | fold | PEFT | llama.cpp | vLLM |" and len(lines) == 18
    assert lines[7].startswith("| qwen2 | slopes and shifts | ") and "| refused (1) |" in lines[7]
    assert lines[13] == (
        "1. fold: post_attention_layernorm: its shift is not 0, 'mlp.gate_proj' has no bias, and the model has no "
        "setting that gives it one"
    )


def test_a_route_that_is_wrong_is_seen(monkeypatch):
    def half(job):
        return job.apart(job.maps.fold(job.model, parity.STRENGTH / 2)), None

    monkeypatch.setitem(parity.ROUTES, "fold", half)
    assert [row.missed for row in parity.measure(["CNN"], ["fold"]).values()] == [["fold"], ["fold"]]
    seen = parity.Cell(steered=2e-3, plain=1e-3), parity.Cell(steered=2e-3, plain=1e-5), parity.Cell("refused")
    assert [cell.is_kept(1e-6) for cell in seen] == [True, False, True]
    assert parity.Cell(steered=2e-5).is_kept(1e-5) and not parity.Cell(steered=2e-5).is_kept(1e-6)


def test_answers_of_vllm(tmp_path):
    """Without vLLM: those of transformers in their place, and an error of an engine."""
    family = parity.FAMILIES["llama"]
    model = family.build()
    maps = parity.some_maps(family, model, shifts=True)
    answers = {"": parity.next_tokens(model)}
    with maps.attach(model, strength=parity.STRENGTH):
        answers["slopes and shifts"] = parity.next_tokens(model) + 0.25
    job = parity.Job(family, "slopes and shifts", model, maps, tmp_path, answers)
    assert parity.by_vllm(job) == pytest.approx((0.25, 0.0), abs=1e-6)
    other = parity.Job(family, "slopes and shifts", model, maps, tmp_path, {**answers, "": answers[""] + 1})
    assert (
        parity.run("vLLM", other, ["vLLM"]).why == "vLLM: differs by 1 without maps, so that it does not run this model"
    )
    for error, text in (("ValueError", "refused"), ("AttributeError", "an error")):
        job = parity.Job(family, "slopes", model, maps, tmp_path, {"error": [error, "no such layer"]})
        cell = parity.run("vLLM", job, ["vLLM"])
        assert (cell.text, cell.why) == (text, "vLLM: no such layer")
        assert cell.is_kept(1.0) == (text == "refused")


def test_the_page_has_every_row():
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    part = page.split(parity.MARKS[0])[1].split(parity.MARKS[1])[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    assert rows[0] == ["model", "maps", "float32 itself", *parity.ROUTES]
    assert [row[:2] for row in rows[2:]] == [[name, kind] for name in parity.FAMILIES for kind in parity.KINDS]
