"""The study of two concepts at once, from end to end on a tiny model: its tables, its judge, that it goes on."""

import models_zoo as zoo
import numpy as np
import pytest
from scripts import BENCHMARKS, load_script


@pytest.fixture
def study(monkeypatch, tmp_path):
    """The script with a tiny model and few short continuations; results are kept in a folder of the test."""
    pytest.importorskip("vaderSentiment")
    script = load_script(monkeypatch, "two_concepts", "sparse_path_smollm2", "_toxicity_results")
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
    food, other = ((BENCHMARKS / "data" / f"{name}.txt").read_text().splitlines() for name in ("food", "not_food"))
    assert len(set(food)) == len(set(other)) == 48 and not set(food) & set(other)


@pytest.fixture
def run(study):
    made = study.Study()
    made.prompts, made.neutral = zoo.texts(3, seed=1), zoo.texts(4, seed=2)
    made.calibration = zoo.texts(4, seed=5)
    made.concepts = {  # of words that the tiny tokenizer knows, and so different that maps help on held-out texts
        name: (zoo.texts(48, seed=3), [f"{words} {text} {words}" for text in zoo.texts(48, seed=4)])
        for name, words in (("A", "happy nice"), ("B", "food"))
    }
    return made


@pytest.mark.slow
def test_the_study(study, run, monkeypatch):
    rows = ["none", "A", "B", "naive", "sequence", "disjoint", "joint", "kept B", "preserved"]
    monkeypatch.setitem(study.FITS, "disjoint", ("AB", {"l1": 0.5, "disjoint": True, "steps": 3}))
    monkeypatch.setitem(study.FITS, "preserved", ("AB", {"max_kl": 0.01, "preserve": True}))
    found = study.Results(run, [0, 1], [0.01, 0.02], rows)

    # Composed maps are what they are called.
    a, b, both, sequence = (run.maps(row, 0) for row in ("A", "B", "naive", "sequence"))
    name = next(iter(a))
    np.testing.assert_allclose(both[name].weight, b[name].weight * a[name].weight)
    assert not np.array_equal(sequence[name].weight, both[name].weight)
    supports = [
        np.logical_or(run.fitted("disjoint", 0)[f"{c} weight"] != 1, run.fitted("disjoint", 0)[f"{c} bias"] != 0)
        for c in "AB"
    ]
    assert supports[0].any() and supports[1].any() and not (supports[0] & supports[1]).any()

    # Losses under the joint maps are those that the fit itself recorded.
    sets = run.sets(0)
    tasks, held_out = ({concept: pairs[k] for concept, pairs in sets.items()} for k in (0, 1))
    how = {**study.FIT, "tokenizer": run.tokenizer, "max_length": study.MAX_LENGTH}
    result = study.lineas.fit_jointly(run.model, tasks, held_out=held_out, **how)
    np.testing.assert_allclose(run.held_out("joint", 0), list(result.held_out_task_loss.values()), rtol=1e-5)
    np.testing.assert_allclose(run.held_out("none", 0), result.history["held_out_task_loss"][0], rtol=1e-5)

    # At the strengths of the rows the loss on the texts they were set by has risen by about as much as it should.
    before = run._loss(run.calibration)
    for row in ("naive", "joint"):
        strength = run.strength(row, 0.01, 0)
        with run.maps(row, 0).attach(run.model, strength=strength):
            assert strength == study.STRENGTHS[-1] or 0.003 < run._loss(run.calibration) - before < 0.03

    assert found.success["joint", 0.02]["both"].shape == (3,)
    for reached in found.success.values():
        assert (reached["both"] <= np.minimum(reached["A"], reached["B"])).all()
    table = found.table()
    assert len([line for line in table if line.startswith("| naive: B after A")]) == 3
    assert any("the most continuations with both" in line for line in found.reading())
    assert study.Results(run, [0, 1], [0.01, 0.02], rows).table() == table  # out of the folder


def test_every_row_is_of_fits_and_concepts_that_there_are(study):
    for row in study.ROWS.values():
        for fit, concept in row.parts:
            order, _ = study.FITS[fit]
            assert concept == "AB" if order == "joint" else concept in order


def test_the_ratio_to_the_naive_composition(study):
    found = object.__new__(study.Results)
    rng = np.random.default_rng(0)
    naive, ours = (rng.permutation(np.repeat([0.0, 1.0], counts)) for counts in ((90, 30), (60, 60)))
    found.success = {("naive", 0.3): {"both": naive}, ("joint", 0.3): {"both": ours}}
    # By the delta method the logarithm has the standard error sqrt(1 / 30 - 1 / 120 + 1 / 60 - 1 / 120) = 0.18.
    middle, low, high = found.ratio("joint", 0.3)
    assert middle == 2.0 and 1.3 < low < 1.7 and 2.5 < high < 3.2


def test_settings_are_chosen_by_other_prompts_and_texts(study):
    select, report = study.Study(select=True), study.Study()
    assert not set(select.prompts) & set(report.prompts) and len(set(select.prompts)) == 24
    assert not set(select.neutral) & set(report.neutral) and select.neutral == report.calibration
    assert study.SELECTION_SEED not in (0, 1)
