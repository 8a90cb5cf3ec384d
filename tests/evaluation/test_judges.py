"""What may be given as judges, the call of one, and those that need no model."""

import functools
import pickle
import subprocess
import sys

import models_zoo as zoo
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from lineas.evaluation import judges, plain_judges
from lineas.evaluation.judges import JudgeError, Threshold, Vader, WordList, as_judges, score

TEXTS = ["what a great day", "", "awful, simply awful", "the house"]


def length(texts):
    return [len(text) for text in texts]


def agreement(texts, prompts):
    return [float(text == prompt) for text, prompt in zip(texts, prompts, strict=True)]


class Counter:
    name = "counter"

    def __call__(self, texts):
        return length(texts)


class Unnamed:
    def __call__(self, texts):
        return length(texts)


# --- what may be given ------------------------------------------------------------------------------------------------


def test_one_judge():
    assert as_judges(length) == {"length": length}
    assert list(as_judges("vader")) == ["vader"]
    assert isinstance(as_judges("vader")["vader"], Vader)
    assert list(as_judges(Counter())) == ["counter"]
    assert list(as_judges(Unnamed())) == ["Unnamed"]
    assert list(as_judges(lambda texts: length(texts))) == ["judge"]
    assert list(as_judges(functools.partial(length))) == ["length"]
    assert list(as_judges(WordList(["good"]))) == ["word_list"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_judges_are_named_after_themselves(kind):
    given = kind([length, "vader", agreement])
    assert list(as_judges(given)) == ["length", "vader", "agreement"]
    assert as_judges(given)["agreement"] is agreement


def test_equal_names_get_a_suffix():
    def length_2(texts):
        return length(texts)

    assert list(as_judges([length, length, length_2, length])) == ["length", "length_2", "length_2_2", "length_3"]


def test_names_may_be_given():
    found = as_judges({"sentiment": "vader", "characters": length})
    assert list(found) == ["sentiment", "characters"]
    assert isinstance(found["sentiment"], Vader) and found["characters"] is length


class Estimator:
    def predict_proba(self, texts):
        return np.ones((len(texts), 2))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([], ValueError, "judges is empty"),
        ({}, ValueError, "judges is empty"),
        ("", ValueError, "judges is an empty string"),
        ({" ": "vader"}, ValueError, "judges has an empty name"),
        ({1: "vader"}, TypeError, "judges must have strings as names, got int"),
        (None, TypeError, "judges must be a callable or a string, got NoneType"),
        ([length, 3], TypeError, r"judges\[1\] must be a callable or a string, got int"),
        ({"a": 3}, TypeError, r"judges\['a'\] must be a callable or a string, got int"),
        ({"good", "bad"}, TypeError, r"judges must be .* got set: words are given as WordList\(words\)"),
        ({"a": ["good", "bad"]}, TypeError, r"judges\['a'\] must be .* got list: words are given as WordList"),
        (Vader, TypeError, r"judges must be a judge, got the class Vader: make one, Vader\(\.\.\.\)"),
        (Estimator(), TypeError, r"got Estimator: give lambda texts: classifier.predict_proba\(texts\)\[:, 1\]"),
        (zoo.llama(), TypeError, r"judges is a model: give Classifier\(model, tokenizer=...\) or LLMJudge\(model"),
    ],
)
def test_what_are_no_judges(given, kind, message):
    with pytest.raises(kind, match=message):
        as_judges(given)


def test_the_module_has_what_users_need():
    assert set(judges.__all__) <= set(dir(judges))


def test_judges_are_imported_without_torch():
    code = (
        "import sys; from lineas.evaluation.judges import *; as_judges(['vader', WordList(['good'])]); "
        "score('vader', Vader(), ['good', '']); assert not {'torch', 'transformers', 'scipy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- calling a judge --------------------------------------------------------------------------------------------------


def returning(value):
    return lambda texts: value


@pytest.mark.parametrize(
    "value",
    [
        [1, 0, 0.5, 2],
        (1.0, False, 0.5, 2),
        np.array([1, 0, 0.5, 2], np.float32),
        torch.tensor([1, 0, 0.5, 2], dtype=torch.bfloat16),
        torch.tensor([1, 0, 0.5, 2], requires_grad=True) * 1,
        [torch.tensor(value, requires_grad=True) for value in (1.0, 0.0, 0.5, 2.0)],
    ],
    ids=str,
)
def test_scores_of_any_kind_become_float64(value):
    found = score("x", returning(value), TEXTS)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [1, 0, 0.5, 2])


def test_booleans_are_shares():
    np.testing.assert_array_equal(score("x", lambda texts: ["a" in text for text in texts], TEXTS), [1, 0, 1, 0])


def test_no_texts_have_no_scores():
    for judge in (length, Vader(), WordList(["good"]), Threshold(length)):
        assert score("x", judge, []).shape == (0,)


def test_prompts_go_to_those_who_take_them_by_name():
    def seen(texts, **settings):
        assert not settings
        return length(texts)

    def by_keyword(texts, *, prompts=("never",)):
        return agreement(texts, prompts)

    def by_position(prompts, /):
        return length(prompts)

    prompts = ["the house"] * 4
    np.testing.assert_array_equal(score("x", agreement, TEXTS, prompts), [0, 0, 0, 1])
    np.testing.assert_array_equal(score("x", by_keyword, TEXTS, tuple(prompts)), [0, 0, 0, 1])
    for judge in (seen, length, by_position, Unnamed()):
        np.testing.assert_array_equal(score("x", judge, TEXTS, prompts), length(TEXTS))


def test_a_judge_without_a_signature_gets_no_prompts():
    scores = {"great": 1.0, "": 0.0}
    judge = functools.partial(map, scores.get)
    with pytest.raises(TypeError, match="judge 'x' must return an array of real numbers, got map"):
        score("x", judge, ["great", ""], ["a", "b"])


def test_a_judge_cannot_change_the_lists():
    texts, prompts = list(TEXTS), ["a"] * 4

    def greedy(texts, prompts):
        prompts.clear()
        return [float(bool(texts.pop())) for _ in range(len(texts))]

    np.testing.assert_array_equal(score("x", greedy, texts, prompts), [1, 1, 0, 1])
    assert texts == TEXTS and prompts == ["a"] * 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3], "judge 'x' must return one score a text: expected 4, got 3$"),
        ([], "judge 'x' must return one score a text: expected 4, got 0$"),
        (0.5, r"judge 'x' must return one score a text: expected 4, got shape \(\)"),
        (np.ones((4, 1)), r"judge 'x' must return one score a text: expected 4, got shape \(4, 1\)"),
        ([1, np.nan, 1, np.inf], "judge 'x' must return finite scores, got nan for text 1"),
        (torch.tensor([1, 1, 1, -torch.inf]), "judge 'x' must return finite scores, got -inf for text 3"),
    ],
)
def test_what_are_no_scores(value, message):
    with pytest.raises(JudgeError, match=message) as caught:
        score("x", returning(value), TEXTS)
    assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "judge 'x' must return an array of real numbers, got NoneType"),
        (["good"] * 4, "judge 'x' must return an array of real numbers, got list: .* got dtype <U4"),
        ([1, None, 1, 1], "judge 'x' must return an array of real numbers, got list: .* got dtype object"),
        ([{"label": "good", "score": 1.0}] * 4, "judge 'x' must return an array of real numbers, got list"),
        ([[1], [1, 2], [1], [1]], "judge 'x' must return an array of real numbers, got list"),
        (np.ones(4, complex), "judge 'x' must return an array of real numbers, got ndarray: .* got dtype complex128"),
    ],
)
def test_what_is_no_array_of_numbers(value, message):
    with pytest.raises(TypeError, match=message) as caught:
        score("x", returning(value), TEXTS)
    assert isinstance(caught.value, JudgeError)


def test_an_error_of_the_judge_is_the_cause():
    def broken(texts):
        raise KeyError("lexicon")

    with pytest.raises(JudgeError, match="judge 'mine' failed: KeyError: 'lexicon'") as caught:
        score("mine", broken, TEXTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_interruption_is_no_error_of_the_judge():
    def interrupted(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score("x", interrupted, TEXTS)


def test_an_error_carries_what_was_evaluated():
    error = JudgeError("no")
    assert isinstance(error, ValueError) and error.evaluation is None
    error.evaluation = {"rows": 3}
    assert pickle.loads(pickle.dumps(error)).evaluation == {"rows": 3}
    assert JudgeError.evaluation is None


# --- VADER ------------------------------------------------------------------------------------------------------------


def test_vader_is_the_package():
    texts = [*zoo.texts(20), *TEXTS]
    analyzer = SentimentIntensityAnalyzer()
    expected = [analyzer.polarity_scores(text)["compound"] for text in texts]
    found = score("vader", Vader(), texts)
    np.testing.assert_array_equal(found, expected)
    assert len(set(expected)) > 5 and found[texts.index("")] == 0 and repr(Vader()) == "Vader()"


def test_vader_without_its_package(monkeypatch):
    monkeypatch.setattr(plain_judges.importlib.util, "find_spec", lambda name: None)
    for call in (lambda: as_judges("vader"), lambda: Vader()(TEXTS), lambda: Threshold("vader")):
        with pytest.raises(ImportError, match="Vader needs the package vaderSentiment: pip install vaderSentiment"):
            call()


@pytest.mark.parametrize("judge", [Vader(), WordList(["good"])])
def test_texts_are_a_list_of_strings(judge):
    with pytest.raises(TypeError, match="texts is one string: give a list of texts"):
        judge("good")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, got NoneType"):
        judge(["good", None])


# --- word lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "text", "count"),
    [
        ("cat", "A Cat, a CAT and the cat's tail", 3),
        ("cat", "concatenate cats", 0),
        ("cat", "_cat_ **cat** snake_cat", 3),
        ("cat", "", 0),
        ("7", "7, not 17 or 7th", 1),
        ("san francisco", "San\n  Francisco; San, Francisco", 1),
        ("don't", "don\u2019t; Don't", 2),
        ("c++", "C++ is not c++11, nor c", 1),
        ("a.c", "abc a.c", 1),
        ("straße", "STRASSE und Straße", 2),
        ("caf\u00e9", "cafe\u0301 CAFE\u0301", 2),
        ("cafe", "caf\u00e9 cafe\u0301", 0),
        ("ﬁn", "fin FIN ﬁn", 3),
        ("kb", "\u3385 KB", 2),  # a square that holds "KB"
        ("кот", "Кот, который", 1),
        ("मन", "मन मना", 1),
        ("ναί", "ΝΑΊ", 1),
        ("天气", "今天天气很好", 1),
        ("cat", "我喜欢cat和dog", 1),
        ("แมว", "ฉันรักแมวมาก", 1),
    ],
)
def test_whole_words_are_found(word, text, count):
    assert WordList([word], count=True)([text]) == [count]
    assert WordList([word])([text]) == [min(count, 1)]


def test_longer_words_count_once_where_they_hold_shorter_ones():
    words = ["new", "new york", "new york city", "york"]
    assert WordList(words, count=True)(["New York City, new yorkers, new cities"]) == [3]


@given(st.lists(st.sampled_from(zoo.WORDS), max_size=8), st.lists(st.sampled_from(zoo.WORDS), min_size=1, max_size=4))
def test_words_of_simple_texts_are_counted(text, words):
    expected = sum(word in words for word in text)
    assert WordList(words, count=True)([", ".join(text).upper()]) == [expected]


def test_words_may_be_a_set_and_repeat():
    assert WordList({"b", "a"}).words == ("a", "b")
    assert WordList(["Good", "good"], count=True)(["good GOOD"]) == [2]
    assert repr(WordList({"d", "b", "c", "a"}, count=True)) == "WordList(['a', 'b', 'c', ...], count=True)"
    assert repr(WordList(["good"])) == "WordList(['good'])"


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("good", TypeError, "words must be a list of words, got one string"),
        (3, TypeError, "words must be a list of words, got int"),
        ([], ValueError, "words is empty"),
        (set(), ValueError, "words is empty"),
        (["good", " "], ValueError, "words has an empty entry, ' '"),
        (["good", 3], TypeError, "words must hold strings, got int"),
        ({"good", 3}, TypeError, "words must hold strings, got int"),
    ],
)
def test_bad_words(words, kind, message):
    with pytest.raises(kind, match=message):
        WordList(words)


def test_count_is_a_flag():
    with pytest.raises(TypeError, match="count must be True or False, got 'words'"):
        WordList(["good"], count="words")


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_threshold_turns_scores_into_shares():
    found = score("x", Threshold(length, above=9), TEXTS)
    np.testing.assert_array_equal(found, [1, 0, 1, 0])  # "the house" has nine
    assert list(as_judges([Threshold("vader", 0.05), Threshold(length, 9)])) == ["vader > 0.05", "length > 9"]
    assert repr(Threshold("vader")) == "Threshold(Vader(), above=0.5)"


def test_threshold_hands_on_prompts():
    np.testing.assert_array_equal(score("x", Threshold(agreement), TEXTS, ["the house"] * 4), [0, 0, 0, 1])


def test_threshold_tells_which_judge_failed():
    with pytest.raises(JudgeError, match=r"^judge 'length' must return one score a text: expected 4, got 3"):
        score("x", Threshold(_named("length", [1, 2, 3])), TEXTS)


def _named(name, value):
    judge = returning(value)
    judge.__name__ = name
    return judge


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3,), TypeError, "judge must be a callable or a string, got int"),
        ((["vader", length],), TypeError, "judge must be a callable or a string, got list"),
        ((length, np.nan), ValueError, "above must be finite, got nan"),
        ((length, "half"), TypeError, "above must be a real number, got str"),
    ],
)
def test_bad_thresholds(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Threshold(*arguments)
