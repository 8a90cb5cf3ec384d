"""The demo's sentence sets: what lineas.demo and its readers rely on."""

from importlib import resources

import pytest


def lines(name):
    return (resources.files("lineas.demo") / "data" / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", ["negative.txt", "positive.txt"])
def test_sets_hold_distinct_sentences_of_everyday_length(name):
    sentences = lines(name)
    assert len(sentences) >= 64 and len(sentences) % 2 == 0
    assert len(set(sentences)) == len(sentences)
    assert all(30 <= len(s) <= 140 and s == s.strip() for s in sentences)


def test_sets_differ_in_feeling_but_not_in_size_or_length():
    negative, positive = lines("negative.txt"), lines("positive.txt")
    assert len(negative) == len(positive)
    assert not set(negative) & set(positive)
    mean_lengths = [sum(map(len, s)) / len(s) for s in (negative, positive)]
    assert abs(mean_lengths[0] - mean_lengths[1]) < 3.0


def test_a_judge_of_others_agrees_with_the_labels():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    score = {
        name: [vader.polarity_scores(s)["compound"] for s in lines(name)] for name in ("negative.txt", "positive.txt")
    }
    for half in (slice(0, 40), slice(40, 80)):  # fitted, held out
        assert sum(score["negative.txt"][half]) / 40 < -0.3
        assert sum(score["positive.txt"][half]) / 40 > 0.5


def test_neutral_prompts_and_text():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    prompts, text = lines("neutral_prompts.txt"), lines("neutral_text.txt")
    assert len(prompts) >= 10 and len(text) >= 24
    assert len(set(prompts)) == len(prompts) and len(set(text)) == len(text)
    assert not any(p.endswith((".", " ")) for p in prompts)
    assert all(vader.polarity_scores(p)["compound"] == 0.0 for p in prompts)
    assert abs(sum(vader.polarity_scores(t)["compound"] for t in text) / len(text)) < 0.1
