"""The study of two concepts at once, from end to end on a tiny model: its tables, its judge, that it goes on."""

import sys
from pathlib import Path

import models_zoo as zoo
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The script with a tiny model and few short continuations; results are kept in a folder of the test."""
    pytest.importorskip("vaderSentiment")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("two_concepts", "sparse_path_smollm2"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import two_concepts as script

    model, tokenizer = zoo.llama(), zoo.tokenizer()
    monkeypatch.setattr(script, "load_smollm2", lambda: (model, tokenizer))
    monkeypatch.setattr(script, "eating", lambda: frozenset({"food", "berry"}))
    monkeypatch.setattr(script, "FIT", {**script.FIT, "steps": 2, "progress": False})
    monkeypatch.setattr(script, "NEW_TOKENS", 3)
    monkeypatch.setattr(script.kept, "folder", tmp_path)
    return script


def test_the_judge_takes_words_and_their_plurals(study):
    texts = ["good food", "Foods!", "berries and", "berrys", "seafood", "foo d", ""]
    assert [study.about_food(text) for text in texts] == [True, True, False, True, False, False, False]


def test_the_sentences_are_as_many_as_the_sets_need():
    food, other = (
        (ROOT / "benchmarks" / "data" / f"{name}.txt").read_text().splitlines() for name in ("food", "not_food")
    )
    assert len(set(food)) == len(set(other)) == 48 and not set(food) & set(other)


def test_the_study(study):
    run = study.Study()
    run.prompts, run.neutral = zoo.texts(3, seed=1), zoo.texts(4, seed=2)
    run.concepts = {  # of words that the tiny tokenizer knows, and so different that maps help on held-out texts
        name: (zoo.texts(48, seed=3), [f"{words} {text} {words}" for text in zoo.texts(48, seed=4)])
        for name, words in (("A", "happy nice"), ("B", "food"))
    }
    found = study.Results(run, [0, 1], [1.0, 2.0])

    # Composed maps are what they are called.
    a, b, top = (run.maps(name, 0) for name in ("A", "B", "B|A"))
    name = next(iter(a))
    np.testing.assert_allclose(run.maps("B@A", 0)[name].weight, b[name].weight * a[name].weight)
    assert not np.array_equal(top[name].weight, run.maps("B@A", 0)[name].weight)

    # Losses under the joint maps are those that the fit itself recorded.
    sets = run.sets(0)
    result = study.lineas.fit_jointly(
        run.model,
        {concept: fitted for concept, (fitted, _) in sets.items()},
        held_out={concept: held for concept, (_, held) in sets.items()},
        tokenizer=run.tokenizer,
        max_length=study.MAX_LENGTH,
        **study.FIT,
    )
    np.testing.assert_allclose(run.held_out(0)["joint"], list(result.held_out_task_loss.values()), rtol=1e-5)
    np.testing.assert_allclose(run.held_out(0)["none"], result.history["held_out_task_loss"][0], rtol=1e-5)

    assert found.success["joint", 2.0]["both"].shape == (3,)
    for reached in found.success.values():
        assert (reached["both"] <= np.minimum(reached["A"], reached["B"])).all()
    table = found.table()
    assert len([line for line in table if "naive: B after A" in line]) == 3
    assert any("joint fit" in line for line in found.reading())
    assert study.Results(run, [0, 1], [1.0, 2.0]).table() == table  # out of the folder
