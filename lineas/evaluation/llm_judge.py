"""A language model as a judge, asked for ratings of a concept, of following the prompt, and of fluency."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_choice, as_int
from .metrics import harmonic_mean
from .scoring import OwnJudge, Scores, as_texts, is_a

if TYPE_CHECKING:
    from ..inputs.batches import Batch

# The order of the columns of ratings.
CRITERIA = ("concept", "instruction", "fluency")
_CUT = "It may begin and stop in the middle of a sentence: do not mind that."
_QUESTIONS = {
    "concept": "A language model wrote the text below. How strongly does it show the following concept?\n\n"
    "Concept: {concept}\n\nText:\n{text}\n\n"
    "0: the concept is not there.\n"
    "1: the concept is there, but faint, or only named in passing.\n"
    "2: the concept is clear, and a part of what the text says.\n\n"
    "Whether the text is well written, and whether it is true, does not count here.",
    "instruction": "A language model was given a prompt, and went on with the text below. How well does the text "
    "answer or continue the prompt?\n\nPrompt:\n{prompt}\n\nText:\n{text}\n\n"
    "0: the text has nothing to do with the prompt.\n"
    "1: the text takes up the prompt, but not all of it, or drifts away.\n"
    "2: the text does what the prompt asks for, or is a sensible continuation of it.\n\n" + _CUT,
    "fluency": "A language model wrote the text below. How well is it written?\n\nText:\n{text}\n\n"
    "0: hardly readable: broken words, jumbled sentences, or the same thing over and over.\n"
    "1: readable, but with clear errors, or unnatural.\n"
    "2: fluent, as a careful person would write.\n\n"
    "What the text says does not count here. " + _CUT,
}
_REPLY = "\n\nReply with one line: the word Rating, a colon, and one of the numbers 0, 1 and 2."
_RATING = re.compile(
    r"\bratings?(?:\s*\([^)\n]*\))?(?:\s+is)?\W{0,12}?(?P<rating>[-+]?\d+(?:\.\d+)?)(?!\.?\d|\s*(?:-|–|to)\s*\d)",
    re.IGNORECASE,
)


class LLMJudge(OwnJudge):
    """A language model that rates texts: for a concept, for fitting their prompts, and for fluency.

    As in AxBench (Wu et al. 2025, arXiv 2501.17148), each of the three is a rating of 0, 1 or 2, asked for in a
    question of its own, and the score is their harmonic mean: 0 where one of them is 0. The wording is not that of
    AxBench, so the numbers are not those of its tables. An empty text gets 0, without being asked about.

    Small models do not judge: SmolLM2-135M-Instruct rates happy and unhappy sentences alike. Try a model on texts whose
    ratings you know before you rely on it.

    Parameters
    ----------
    model : causal language model of transformers, or callable
        A loaded model, with its `tokenizer`, which are not modified; or ``ask(questions)``, which returns an answer for
        each of a list of questions (both strings), such as a function that calls an API. It gets all questions at once.
    concept : str
        What texts are rated for, in words, such as "a positive sentiment".
    tokenizer : transformers tokenizer, optional
        Of a loaded model. Questions are put by its chat template, where it has one.
    reading : {"argmax", "expectation", "generated"}, optional
        How a rating is found. "argmax" takes the likeliest of the tokens 0, 1 and 2 after an answer that starts with
        "Rating:"; "expectation" their mean under these probabilities, from 0 to 2, which tells more where the model is
        weak; "generated" reads a generated answer. Default: "argmax" for a model, "generated" for a callable.
    batch_size : int, default 8
        Questions in a forward pass of the model.
    max_new_tokens : int, default 64
        Longest answer, where it is generated.

    Raises
    ------
    TypeError, ValueError
        If `model` is none of these, has no tokenizer, or its tokenizer has no tokens of their own for 0, 1 and 2.
    """

    name = "llm_judge"

    def __init__(
        self,
        model: Any,
        concept: str,
        *,
        tokenizer: Any = None,
        reading: str | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 64,
    ) -> None:
        if not isinstance(concept, str) or not concept.strip():
            raise TypeError(f"concept must be a description in words, got {concept!r}")
        loaded = is_a(model, "torch.nn", "Module")
        if not loaded and (not callable(model) or isinstance(model, type)):
            raise TypeError(f"model must be a loaded language model or a callable, got {type(model).__name__}")
        if loaded and not callable(getattr(model, "generate", None)):
            raise TypeError(f"model must be a language model of transformers, got {type(model).__name__}")
        if loaded == (tokenizer is None):
            raise ValueError(f"tokenizer must {'' if loaded else 'not '}be given with a {type(model).__name__}")
        readings = ("argmax", "expectation", "generated") if loaded else ("generated",)
        self.model, self.concept, self.tokenizer = model, concept, tokenizer
        self.reading = as_choice(readings[0] if reading is None else reading, "reading", readings)
        self.batch_size = as_int(batch_size, "batch_size", low=1)
        self.max_new_tokens = as_int(max_new_tokens, "max_new_tokens", low=1)
        if self.reading != "generated":
            self._rating_tokens = self._find_rating_tokens()

    def __call__(self, texts: Sequence[str], prompts: Sequence[Any] | None = None) -> Scores:
        return harmonic_mean(self.ratings(texts, prompts))

    def ratings(self, texts: Sequence[str], prompts: Sequence[Any] | None) -> Scores:
        """The three ratings of each text.

        Parameters
        ----------
        texts : sequence of str [n]
        prompts : sequence of str or conversations [n]
            What the texts continue.

        Returns
        -------
        float64 array [n, 3]
            For the concept, the instruction and fluency, from 0 to 2.

        Raises
        ------
        TypeError, ValueError
            If there is not a prompt for each text, a question is longer than the model's context, or an answer has no
            rating of 0, 1 or 2.
        """
        texts = as_texts(texts)
        if prompts is None:
            raise ValueError("prompts must be given: how well a text answers its prompt is one of the ratings")
        asked = [_in_words(prompt, f"prompts[{k}]") for k, prompt in enumerate(prompts)]
        if len(asked) != len(texts):
            raise ValueError(f"prompts must have one entry a text: expected {len(texts)}, got {len(asked)}")
        rows = [k for k, text in enumerate(texts) if text.strip()]
        found = np.zeros((len(texts), len(CRITERIA)))
        if not rows:
            return found
        labels = [f"{criterion} of texts[{k}]" for k in rows for criterion in CRITERIA]
        questions = [
            _QUESTIONS[criterion].format(concept=self.concept, text=texts[k], prompt=asked[k]) + _REPLY
            for k in rows
            for criterion in CRITERIA
        ]
        if self.reading == "generated":
            answers = self._generate(questions, labels) if self.tokenizer is not None else self._ask(questions)
            ratings = np.array([_parse(answer, label) for answer, label in zip(answers, labels, strict=True)])
        else:
            ratings = self._read(questions, labels)
        found[rows] = ratings.reshape(len(rows), len(CRITERIA))
        return found

    def __repr__(self) -> str:
        model = getattr(self.model, "__name__", type(self.model).__name__)
        return f"LLMJudge({model}, {self.concept!r}, reading={self.reading!r})"

    def _ask(self, questions: list[str]) -> list[str]:
        answers = self.model(list(questions))
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise TypeError(f"the model must return a list of answers, got {type(answers).__name__}")
        if len(answers) != len(questions):
            raise ValueError(
                f"the model must return one answer a question: expected {len(questions)}, got {len(answers)}"
            )
        return list(answers)

    def _encode(self, question: str, answer: str = "") -> list[int]:
        """Token ids of a question, and of the start of its answer."""
        if getattr(self.tokenizer, "chat_template", None):
            talk = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            return list(self.tokenizer(text + answer, add_special_tokens=False)["input_ids"])
        start = list(self.tokenizer("")["input_ids"])[:1]  # without the tokens that some put at the end
        start = start if start == [self.tokenizer.bos_token_id] else []
        return start + list(self.tokenizer(f"{question}\n\n{answer}", add_special_tokens=False)["input_ids"])

    def _find_rating_tokens(self) -> list[int]:
        rows = [self._encode("Reply.", f"Rating: {digit}") for digit in "012"]
        if len({tuple(row[:-1]) for row in rows}) > 1 or len({row[-1] for row in rows}) < 3:
            raise ValueError(
                'tokenizer has no token of its own for each of 0, 1 and 2 after "Rating: ": use reading="generated"'
            )
        return [row[-1] for row in rows]

    def _batches(self, rows: list[list[int]], labels: list[str], new_tokens: int) -> Iterator[tuple[list[int], Batch]]:
        """Batches of rows of similar length, padded on the left, and which rows they are."""
        from ..inputs.tokenize import TokenRows

        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for row, label in zip(rows, labels, strict=True):
            if isinstance(limit, int) and len(row) + new_tokens > limit:
                raise ValueError(
                    f"the question about {label} has {len(row)} tokens, too many for a context of {limit} with "
                    f"{new_tokens} for the answer"
                )
        made = TokenRows({"input_ids": rows}, None, self.tokenizer.pad_token_id or 0, True)
        order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
        for start in range(0, len(rows), self.batch_size):
            part = order[start : start + self.batch_size]
            yield part, made.batch(part)

    def _read(self, questions: list[str], labels: list[str]) -> Scores:
        """Ratings by the probabilities of the tokens 0, 1 and 2."""
        from ..inputs.call import call, unwrap
        from ..inputs.frozen import frozen

        rows = [self._encode(question, "Rating: 0") for question in questions]
        for row, label in zip(rows, labels, strict=True):
            if row.pop() != self._rating_tokens[0]:
                raise ValueError(
                    f'tokenizer: the question about {label} does not end with a token for 0: use reading="generated"'
                )
        # The logits of all other tokens may take more memory than the model.
        last = "logits_to_keep" in inspect.signature(unwrap(self.model).forward).parameters
        probabilities = np.empty((len(rows), 3))
        with frozen(self.model, gradients=False), np.errstate(invalid="ignore"):
            for part, batch in self._batches(rows, labels, 0):
                if last:
                    batch.kwargs["logits_to_keep"] = 1
                logits = call(self.model, batch).logits[:, -1, self._rating_tokens].cpu().double().numpy()
                shares = np.exp(logits - logits.max(axis=1, keepdims=True))
                probabilities[part] = shares / shares.sum(axis=1, keepdims=True)
        if np.isnan(probabilities).any():
            at = int(np.isnan(probabilities).any(axis=1).argmax())
            raise ValueError(f"the model's logits are not finite for the question about {labels[at]}")
        return probabilities @ np.arange(3.0) if self.reading == "expectation" else probabilities.argmax(axis=1)

    def _generate(self, questions: list[str], labels: list[str]) -> list[str]:
        """Greedy answers."""
        from ..inputs.frozen import frozen

        answers, rows = [""] * len(questions), [self._encode(question) for question in questions]
        with frozen(self.model, gradients=False):
            for part, batch in self._batches(rows, labels, self.max_new_tokens):
                ids, mask = (batch.kwargs[key].to(self.model.device) for key in ("input_ids", "attention_mask"))
                tokens = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id or 0,
                )
                texts = self.tokenizer.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=True)
                for k, text in zip(part, texts, strict=True):
                    answers[k] = text
        return answers


def _parse(answer: Any, label: str) -> float:
    """The last rating that an answer names; ValueError where there is none of 0, 1 or 2."""
    if not isinstance(answer, str):
        raise TypeError(f"the answer to the question about {label} must be a str, got {type(answer).__name__}")
    ratings = [match["rating"] for match in _RATING.finditer(answer)]
    alone = re.fullmatch(r"\W*([012])(?:\.0)?\W*", answer)
    rating = float(ratings[-1]) if ratings else float(alone[1]) if alone else None
    if rating not in (0, 1, 2):
        shown = answer if len(answer) <= 80 else answer[:80] + "..."
        raise ValueError(f"no rating of 0, 1 or 2 in the answer to the question about {label}: {shown!r}")
    return rating


def _in_words(prompt: Any, argument: str) -> str:
    """A prompt as a question shows it: a text as it is, a conversation with one message a paragraph."""
    if isinstance(prompt, str):
        return prompt
    messages = list(prompt) if isinstance(prompt, list | tuple) else []
    if not messages or not all(isinstance(one, Mapping) and "role" in one and "content" in one for one in messages):
        raise TypeError(f"{argument} must be a str or a conversation, got {type(prompt).__name__}")
    contents = [_content(one["content"]) for one in messages]
    if len(messages) == 1:
        return contents[0]
    return "\n\n".join(f"{one['role']}: {content}" for one, content in zip(messages, contents, strict=True))


def _content(content: Any) -> str:
    """The text of a message, of which the content may come in parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))
