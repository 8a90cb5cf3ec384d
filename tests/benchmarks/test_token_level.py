"""The study of token-level fits, from end to end on a tiny model: its tables, its streams, that it goes on."""

from itertools import islice
from pathlib import Path

import models_zoo as zoo
import numpy as np
import pytest
from scripts import load_script

import lineas


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The script with a tiny model, few texts and a folder of the test."""
    pytest.importorskip("vaderSentiment")
    script = load_script(monkeypatch, "token_level", "price_and_effect", "sparse_path_smollm2")
    model, tokenizer = zoo.llama(), zoo.tokenizer()
    monkeypatch.setattr(script, "load_smollm2", lambda: (model, tokenizer))
    monkeypatch.setattr(script, "clean_texts", lambda part, count, seed, without=(): zoo.texts(4, seed=seed))
    texts = {"negative.txt": zoo.texts(12, seed=1), "positive.txt": [f"nice {one}" for one in zoo.texts(12, seed=2)]}
    monkeypatch.setattr(script, "sentences", texts.__getitem__)
    concept = script.CONCEPTS["sentiment"]
    small = type(concept)(concept.label, concept.sets, lambda: zoo.texts(3, seed=3), concept.judges, "", 2)
    monkeypatch.setitem(script.CONCEPTS, "sentiment", small)
    monkeypatch.setattr(script, "comments", lambda part: {name: zoo.texts(30, seed=4) for name in ("insult", "clean")})
    for name, value in {"SIZE": 8, "NEW_TOKENS": 3, "FOLDER": tmp_path, "BUDGETS": {"sentiment": (1e-4, 2e-4)}}.items():
        monkeypatch.setattr(script, name, value)
    for name, value in {"ROW": 8, "ROWS": 4, "EXACT": 320}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "cpu_name", lambda: "a processor")
    return script


def test_the_study(study, monkeypatch):
    made = study.Study("sentiment")
    distances = made.distances()
    assert set(distances) == set(study.METHODS)
    for method, (pooling, incremental) in study.METHODS.items():
        maps = made.maps(method)
        assert maps.metadata["pooling"] == pooling
        assert (maps.metadata["method"] == "incremental") == incremental
        low, middle, high = (distances[method][name] for name in ("low", "slope", "high"))
        assert low <= middle <= high
    arrays = [lineas.collect(made.model, texts, **made.reading, pooling="all") for texts in made.fit]
    expected = lineas.fit(*arrays)
    for name, one in made.maps("every token").items():
        np.testing.assert_allclose(one.weight, expected[name].weight, rtol=1e-4, atol=1e-5)
    found = made.evaluate()
    assert len(found.rows()) == 1 + len(study.METHODS) * 2

    def refused(*_, **__):
        raise AssertionError("it is there already")

    monkeypatch.setattr(study.lineas, "fit", refused)
    monkeypatch.setattr(study.lineas, "fit_incremental", refused)
    assert made.distances() == distances
    lines = study.page()
    assert len([line for line in lines if line.startswith("| every token, module by module | ")]) == 3
    assert len([line for line in lines if "*every token* less *means of texts*" in line]) == 2
    assert any(line.startswith("| unsteered |  | ") for line in lines)


def test_differences_are_those_of_the_scores(study):
    made = study.Study("sentiment")
    found = made.evaluate()
    line = study.differences("sentiment", found)[0]
    scores = {row["method"]: [] for row in found.rows()}
    for k, row in enumerate(found.rows()):
        scores[row["method"]].append(found.scores["VADER"][k].mean())
    assert f": {scores['every token'][0] - scores['means of texts'][0]:+.3f} [" in line


def test_rows_without_end(study):
    rows = list(islice(study.rows_of(zoo.tokenizer(), "clean", 0), 60))
    assert all(len(row) == 8 for row in rows)
    # The first pass over the comments of both files holds each of them once, in an order of the seed.
    texts = zoo.tokenizer()(2 * zoo.texts(30, seed=4))["input_ids"]
    ids = np.concatenate(texts)
    whole = len(ids) // 8
    left = np.bincount(ids, minlength=99) - np.bincount(np.concatenate(rows[:whole]), minlength=99)
    assert whole < 60 and (left >= 0).all() and left.sum() == len(ids) - 8 * whole
    assert rows == list(islice(study.rows_of(zoo.tokenizer(), "clean", 0), 60))
    assert rows != list(islice(study.rows_of(zoo.tokenizer(), "clean", 1), 60))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak")
def test_the_streams(study, capsys):
    study.scale(640, 1)
    found = study.json.loads((study.FOLDER / "scale.json").read_text())
    assert found["tokens"] == 1280 and found["width"] == zoo.WIDTH
    assert len(found["marks"]) == 9 and found["marks"] == sorted(found["marks"])
    assert [one["memory"] for one in found["apart"]] == [2, 8, 32]
    assert all(one["rank_error"] == 0 and one["worst"] < 1e-4 for one in found["apart"])
    lines = study.scale_lines(found)
    assert len([line for line in lines if line.startswith("| ")]) == 5
    assert not list(study.FOLDER.glob("*.safetensors"))
