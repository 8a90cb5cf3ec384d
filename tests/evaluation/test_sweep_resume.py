"""Evaluations that are cut off: the file of findings, and Ctrl-C."""

import json

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import language_model, random_maps
from evaluations import NEUTRAL, PROMPTS, QUIET, TOKENIZER
from fits import snapshot

import lineas
from lineas.evaluation import neutral

MODEL, MAPS = language_model("llama")
OTHER = random_maps({name: one.d for name, one in MAPS.items()}, seed=5)


class Speaker:
    """Writes random words for prompts, depending on the model; with what it and the model ran, and trouble at a run."""

    def __init__(self, at=None, error=None):
        self.at, self.error, self.runs = at, error, []

    def count(self, what):
        self.runs.append(what)
        if len(self.runs) == self.at:
            raise self.error

    def generate(self, model, prompts):
        self.count("texts")
        strengths = [handle.strength for handle in lineas.attached(model)]
        numbers = torch.randint(0, 9, (len(prompts), 6)).tolist()
        return [f"{prompt}\u2028\x85 {row} {strengths}" for prompt, row in zip(prompts, numbers, strict=True)]


def evaluate(maps=MAPS, model=MODEL, speaker=None, **settings):
    """An evaluation of three batches of neutral texts and two of prompts."""
    speaker = Speaker() if speaker is None else speaker
    usual = {"prompts": PROMPTS, "neutral": NEUTRAL, "tokenizer": TOKENIZER, "batch_size": 3, "strengths": [1, 2]}
    settings = {**usual, **QUIET, **settings}
    handle = model.register_forward_pre_hook(lambda *args: speaker.count("pass"))
    try:
        return lineas.evaluate(model, maps, generate=speaker.generate, **settings)
    finally:
        handle.remove()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(neutral, "_NUMBERS", 18 * zoo.VOCABULARY)


def lines(path):
    return path.read_bytes().splitlines(keepends=True)


# --- the file ---------------------------------------------------------------------------------------------------------

FULL = 1 + 3 * 3 + 3 * 2  # the head, prices, and texts of three points


def test_an_evaluation_goes_on_after_any_line(tmp_path):
    path, cut = tmp_path / "log", tmp_path / "cut"
    whole = evaluate(checkpoint=path)
    assert whole == evaluate() and len(lines(path)) == FULL
    for count in range(1, FULL + 1):
        cut.write_bytes(b"".join(lines(path)[:count]))
        speaker = Speaker()
        assert evaluate(checkpoint=cut, speaker=speaker) == whole
        assert sorted(lines(cut)) == sorted(lines(path))
        assert speaker.runs.count("texts") == min(FULL - count, 6)
        if count == FULL:
            assert not speaker.runs


@pytest.mark.parametrize("missing", [1, 2, 40])
@pytest.mark.parametrize("count", [2, 5, FULL])
def test_a_line_that_was_not_written_to_its_end_is_dropped(count, missing, tmp_path):
    path = tmp_path / "log"
    whole = evaluate(checkpoint=path)
    content = lines(path)
    path.write_bytes(b"".join(content[:count])[:-missing])
    assert evaluate(checkpoint=path) == whole
    assert sorted(lines(path)) == sorted(content)


def test_texts_of_generate_are_kept_as_well(tmp_path):
    path = tmp_path / "log"
    settings = {"tokenizer": TOKENIZER, "prompts": PROMPTS, "max_new_tokens": 3, "batch_size": 3, "samples": 2, **QUIET}
    whole = lineas.evaluate(MODEL, MAPS, checkpoint=path, instruction="be nice", **settings)
    content = lines(path)
    for count in (3, len(content) - 1):
        path.write_bytes(b"".join(content[:count]))
        assert lineas.evaluate(MODEL, MAPS, checkpoint=path, instruction="be nice", **settings) == whole


def test_more_points_reuse_what_is_there(tmp_path):
    path = tmp_path / "log"
    evaluate(checkpoint=path, strengths=[1])
    speaker = Speaker()
    found = evaluate({"maps": MAPS, "other": OTHER}, checkpoint=path, strengths=[0.5, 1], speaker=speaker)
    assert found == evaluate({"maps": MAPS, "other": OTHER}, strengths=[0.5, 1])
    # Three batches of prices, each with a pass of the unsteered model again; and two of texts.
    assert speaker.runs == ["pass"] * 3 * (1 + 3) + ["texts"] * 2 * 3
    renamed = Speaker()
    assert evaluate({"a": OTHER, "b": MAPS}, checkpoint=path, strengths=[1, 0.5], speaker=renamed).methods[1] == "a"
    assert not renamed.runs


def test_scores_are_given_anew(tmp_path):
    path, speaker = tmp_path / "log", Speaker()
    evaluate(checkpoint=path)
    found = evaluate(checkpoint=path, judges=lambda texts: [len(text) for text in texts], speaker=speaker)
    assert not speaker.runs and found.scores["judge"].shape == (3, 5, 1)


def changed_model():
    model = zoo.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    return {"model": model}


def other_attached():
    model = zoo.llama()
    OTHER.attach(model, 0.5)
    return {"model": model}


DIFFERENT = [
    (changed_model, "model"),
    (other_attached, "attached"),
    (lambda: {"prompts": PROMPTS[::-1]}, "prompts"),
    (lambda: {"seed": 1}, "prompts"),
    (lambda: {"samples": 2}, "prompts"),
    (lambda: {"batch_size": 4}, "prompts"),
    (lambda: {"max_new_tokens": 3}, "prompts"),
    (lambda: {"neutral": NEUTRAL[:-1]}, "neutral"),
    (lambda: {"max_length": 3}, "neutral"),
]


@pytest.mark.parametrize(("change", "differs"), DIFFERENT)
def test_the_file_of_another_evaluation_is_refused(change, differs, tmp_path):
    path, speaker = tmp_path / "log", Speaker()
    evaluate(checkpoint=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"checkpoint: {path} is that of another evaluation, of which {differs} dif"):
        evaluate(checkpoint=path, speaker=speaker, **change())
    assert path.read_bytes() == content and not speaker.runs


def test_batches_of_another_size_are_another_evaluation(tmp_path, monkeypatch):
    path = tmp_path / "log"
    evaluate(checkpoint=path)
    monkeypatch.setattr(neutral, "_NUMBERS", 9 * zoo.VOCABULARY)
    with pytest.raises(ValueError, match="of which neutral differs"):
        evaluate(checkpoint=path)


@pytest.mark.parametrize(
    "content",
    [
        b"a text\n",
        b"\xff\xfe\n",
        b"[1, 2]\n",
        b'{"format": "lineas"}\n',
        b'{"format": "lineas evaluation log", "identity": {}}\n{"key": 1}\n',
        b'{"format": "lineas evaluation log", "identity": {}}\nno json\n',
        b'{"format": "lineas evaluation log"',
        b"no end of line",
    ],
)
def test_other_files_are_refused_and_left_alone(content, tmp_path):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"checkpoint: {path} is not the file of an evaluation; give another, or re"):
        evaluate(checkpoint=path)
    assert path.read_bytes() == content


def test_files_that_cannot_be_written(tmp_path):
    speaker = Speaker()
    for path in (tmp_path, tmp_path / "no" / "log"):
        with pytest.raises(OSError, match=r"log|directory"):
            evaluate(checkpoint=path, speaker=speaker)
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike"):
        evaluate(checkpoint=3, speaker=speaker)
    assert not speaker.runs


def test_an_empty_file_is_begun(tmp_path):
    path = tmp_path / "log"
    path.touch()
    evaluate(checkpoint=str(path))
    assert json.loads(lines(path)[0])["format"] == "lineas evaluation log" and len(lines(path)) == FULL


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_any_run_gives_whole_points_or_none(tmp_path):
    whole, counted = evaluate(), Speaker()
    evaluate(speaker=counted)
    before, returned = snapshot(MODEL), []
    for at in range(1, len(counted.runs) + 1):
        speaker, path = Speaker(at, KeyboardInterrupt()), tmp_path / f"log{at}"
        try:
            found = evaluate(speaker=speaker, checkpoint=path)
        except KeyboardInterrupt:
            assert not returned  # once there are points, there always are
        else:
            returned.append(len(found))
            assert found.stopped == "interrupted" and repr(found).endswith(", interrupted)")
            for k in range(len(found)):
                assert found.continuations[k] == whole.continuations[k]
                np.testing.assert_array_equal(found.price[k], whole.price[k])
                np.testing.assert_array_equal(found.statistics[k], whole.statistics[k])
        assert snapshot(MODEL) == before and not lineas.attached(MODEL)
        assert evaluate(checkpoint=path) == whole
    assert sorted(set(returned)) == [2] and returned == sorted(returned)


def test_ctrl_c_among_prices_alone_keeps_the_points_before():
    settings = {"tokenizer": TOKENIZER, "neutral": NEUTRAL[:2], "strengths": [1, 2, 3], **QUIET}
    whole = lineas.evaluate(MODEL, MAPS, **settings)
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = MODEL.register_forward_pre_hook(interrupt)
    found = lineas.evaluate(MODEL, MAPS, **settings)
    handle.remove()
    assert found.strengths.tolist() == [0, 1, 2] and found.stopped == "interrupted"
    np.testing.assert_array_equal(found.price, whole.price[:3])


def test_ctrl_c_while_texts_are_judged_keeps_the_scores_before():
    def interrupts(texts):
        if len(texts) > 2:
            raise KeyboardInterrupt
        return [0.0] * len(texts)

    def words(texts):
        return [len(text.split()) for text in texts]

    found = evaluate(judges=[words, interrupts, words])
    assert list(found.scores) == ["words"] and found.stopped == "interrupted"
    assert found.continuations == evaluate().continuations
    assert list(found.judge({"other": words}).scores) == ["words", "other"]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=str)
def test_what_was_kept_before_an_error_is_used(error, tmp_path):
    path = tmp_path / "log"
    with pytest.raises(type(error)):
        evaluate(speaker=Speaker(3, error), checkpoint=path)
    assert 1 < len(lines(path)) < FULL
    speaker = Speaker()
    assert evaluate(speaker=speaker, checkpoint=path) == evaluate()
    assert len(speaker.runs) < 3 * 3 + 3 * 2 + 3
