"""Text out of tokens: the pieces are the whole, characters come whole, and stop sequences end it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lineas.serving.text import CONTEXT, Codec, Text


def bytes_tokenizer():
    """A token a byte: every character beyond ASCII is of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<eos>": 0, **{letter: k + 1 for k, letter in enumerate(alphabet)}}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def spaced_tokenizer():
    """Words that bring the space before them, which the first one of a text loses, as in SentencePiece."""
    words = ["▁the", "▁dog", "s", "▁", "▁is"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="▁the"))
    core.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


CODEC = Codec(bytes_tokenizer(), 257)


def pieces(text, tokens):
    """All that is said, token by token until it is stopped, and at the end."""
    made = []
    for token in tokens:
        made.append(text.add(token))
        if text.stopped:
            return made
    return [*made, text.end()]


@given(st.text(max_size=30), st.text(max_size=10))
def test_pieces_are_the_whole_and_made_of_whole_characters(said, before):
    ids, prompt = CODEC.tokenizer.encode(said), CODEC.tokenizer.encode(before)
    made = pieces(Text(CODEC.decode, prompt[-CONTEXT:]), ids)
    assert "".join(made) == said
    assert all("\ufffd" not in piece for piece in made) or "\ufffd" in said
    assert pieces(Text(CODEC.decode), ids) == made


@given(st.lists(st.integers(1, 256), max_size=30))
def test_bytes_that_are_no_text_are_said_as_the_tokenizer_says_them(ids):
    assert "".join(pieces(Text(CODEC.decode), ids)) == CODEC.decode(ids)


@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_text_ends_before_the_first_stop_sequence(said, stop):
    text = Text(CODEC.decode, stop=stop)
    made = pieces(text, CODEC.tokenizer.encode(said))
    # Where the first one is complete, the text ends where the first one that is complete there begins.
    ends = [k for k in range(len(said) + 1) if any(said[:k].endswith(one) for one in stop)]
    expected = said if not ends else said[: min(said[: ends[0]].find(one) for one in stop if one in said[: ends[0]])]
    assert "".join(made) == expected
    assert text.stopped == bool(ends)


def test_only_what_may_be_a_stop_sequence_is_held_back():
    text = Text(CODEC.decode, stop=["abc", "bd"])
    said = [text.add(token) for token in CODEC.tokenizer.encode("xababx")]
    assert said == ["x", "", "", "ab", "", "abx"]
    assert text.end() == "" and text.length == 6
    text = Text(CODEC.decode, stop=["abc"])
    assert [text.add(token) for token in CODEC.tokenizer.encode("ab")] == ["", ""]
    assert text.end() == "ab"


def test_a_continuation_keeps_its_space_and_an_answer_has_none():
    codec = Codec(spaced_tokenizer(), 5)
    prompt, made = [0, 1], [2, 4, 1]
    assert "".join(pieces(Text(codec.decode, prompt), made)) == "s is dog"
    assert "".join(pieces(Text(codec.decode, [0]), [1, 2])) == " dogs"
    assert "".join(pieces(Text(codec.decode), [1, 2, 4])) == "dogs is"


def test_special_tokens_are_no_text():
    text = Text(CODEC.decode, [0])
    assert [text.add(token) for token in (0, *CODEC.tokenizer.encode("a"), 0)] == ["", "a", ""]
    assert CODEC.show(0) == "<eos>"


def test_several_threads_encode_and_decode():
    from concurrent.futures import ThreadPoolExecutor

    tokenizer = bytes_tokenizer()
    tokenizer.pad_token = "<eos>"
    codec = Codec(tokenizer, 257)

    def work(k):
        if k % 3 == 0:
            with codec._lock:  # what a caller's own use of it may do in between
                tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)
        return codec.decode(codec.encode(f"text {k}" * 50, "prompt"))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(200))) == [f"text {k}" * 50 for k in range(200)]
