"""A text classifier of transformers as a judge. Both it and torch are imported when texts are judged."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import as_int
from .scoring import OwnJudge, Scores, as_texts, is_a


class Classifier(OwnJudge):
    """The probability of a label, by a text classifier of transformers.

    Texts are cut to the longest that the model takes, on the tokenizer's ``truncation_side``. What a call gives is the
    pipeline's score of the label: softmax over the labels; a sigmoid where the model has one label, or several that do
    not exclude each other (its ``problem_type``); the plain output of a regression. An empty text gets what the model
    says of the special tokens alone; where the tokenizer has none, a text without tokens gets 0.

    Texts run in batches where padding cannot change a score but by rounding: on the right, by the pad token that the
    model knows. Others run one by one.

    Parameters
    ----------
    model : str, path, model or pipeline
        A folder or a hub id, loaded when texts are first judged; a loaded model, with its `tokenizer`; or a
        text-classification pipeline. None of them is modified or moved.
    label : str, optional
        One of the model's labels (``model.config.id2label``), in any case. Default: the only one; of two the one
        called "positive", or else the second. With more it must be given.
    tokenizer : transformers tokenizer, optional
        Of a loaded model. Default for a folder or an id: the tokenizer that lies there.
    batch_size : int, default 32
        Texts in a forward pass.
    device : str, int or torch.device, optional
        Where a folder or an id is loaded. Default: the first accelerator, where there is one.

    Raises
    ------
    TypeError, ValueError
        If `model` is none of these, a loaded one has no tokenizer, it is no text classifier, or the label is none of
        its labels or must be chosen; these are listed. For a folder or an id, when it is loaded, or by `as_judges`.
    """

    def __init__(
        self,
        model: Any,
        label: str | None = None,
        *,
        tokenizer: Any = None,
        batch_size: int = 32,
        device: Any = None,
    ) -> None:
        if label is not None and not isinstance(label, str):
            raise TypeError(f"label must be a str, got {type(label).__name__}")
        self.batch_size = as_int(batch_size, "batch_size", low=1)
        self._asked, self._tokenizer, self._device = label, tokenizer, device
        self._source: str | None = None  # a folder or an id that is not loaded
        if isinstance(model, str | os.PathLike):
            if not str(model).strip():
                raise ValueError("model is an empty string")
            self._source = os.fspath(model)
            return
        if device is not None:
            raise ValueError("device must not be given with a loaded model, which stays where it is")
        if is_a(model, "transformers.pipelines.text_classification", "TextClassificationPipeline"):
            if tokenizer is not None:
                raise ValueError("tokenizer must not be given with a pipeline, which has its own")
            self._pipeline = model
        elif is_a(model, "transformers.modeling_utils", "PreTrainedModel"):
            if tokenizer is None:
                raise ValueError("tokenizer must be given with a loaded model")
            _check_architecture([type(model).__name__], type(model).__name__)
            self._pipeline = _make_pipeline(model, tokenizer, None if hasattr(model, "hf_device_map") else -1)
        else:
            raise TypeError(
                "model must be a folder, a hub id, a loaded text classifier or a text-classification pipeline, got "
                f"{type(model).__name__}"
            )
        self.check()

    @functools.cached_property
    def _pipeline(self) -> Any:
        self.check()
        return _make_pipeline(self._source, self._tokenizer, self._device)

    def check(self) -> None:
        """Find the label in the configuration; ValueError if it is not there, or the model is no text classifier."""
        _ = self.label

    @functools.cached_property
    def label(self) -> str:
        """The label whose probability is the score."""
        if self._source is None:
            return _find_label(self._pipeline.model.config, self._asked, self._model_name)
        if importlib.util.find_spec("transformers") is None:
            raise ImportError('Classifier needs torch and transformers: pip install "lineas[torch]"')
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self._source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model {self._source!r} cannot be read as a text classifier of transformers (words are given as "
                f"WordList(words)): {error}"
            ) from error
        _check_architecture(config.architectures or [], self._source)
        return _find_label(config, self._asked, self._source)

    @property
    def _model_name(self) -> str:
        """A hub id as it is, of a folder its last part."""
        source = self._source
        if source is None:
            source = self._pipeline.model.config.name_or_path or type(self._pipeline.model).__name__
        return Path(source).name if Path(source).is_dir() else source

    @property
    def name(self) -> str:  # type: ignore[override]
        """The model and, once the configuration is read, the label."""
        label = vars(self).get("label", self._asked)
        return self._model_name if label is None else f"{self._model_name}: {label}"

    def __call__(self, texts: Sequence[str]) -> Scores:
        texts = as_texts(texts)
        pipeline, scores = self._pipeline, np.zeros(len(texts))
        tokenizer = pipeline.tokenizer
        rows = list(range(len(texts)))
        if not len(tokenizer("")["input_ids"]):
            rows = [k for k in rows if len(tokenizer(texts[k])["input_ids"])]
        if not rows:
            return scores
        import torch

        from ..inputs.frozen import frozen

        limit = _longest(pipeline.model, tokenizer)
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        batch_size = self.batch_size if _can_pad(pipeline.model, tokenizer) else 1
        # The pipeline makes tensors on the default device, whatever that is, before it moves them.
        with frozen(pipeline.model, gradients=False), torch.device("cpu"):
            found = pipeline([texts[k] for k in rows], top_k=None, batch_size=batch_size, **cut)
        scores[rows] = [next(one["score"] for one in labels if one["label"] == self.label) for labels in found]
        return scores

    def __repr__(self) -> str:
        label = vars(self).get("label", self._asked)
        return f"Classifier({self._model_name!r}{'' if label is None else f', {label!r}'})"


def _make_pipeline(model: Any, tokenizer: Any, device: Any) -> Any:
    from transformers import pipeline

    return pipeline("text-classification", model=model, tokenizer=tokenizer, device=device)


def _check_architecture(names: Sequence[str], model: str) -> None:
    """ValueError where a model has no classifier: transformers would put one with random weights on it."""
    if names and not any(name.endswith("ForSequenceClassification") for name in names):
        raise ValueError(f"model {model!r} is a {names[0]}, which is no text classifier (...ForSequenceClassification)")


def _find_label(config: Any, asked: str | None, model: str) -> str:
    labels = [config.id2label[k] for k in sorted(config.id2label)]
    listed = ", ".join(map(repr, labels))
    if asked is None:
        if len(labels) > 2:
            raise ValueError(f"label must be one of the {len(labels)} labels of {model!r}: {listed}")
        positive = [label for label in labels if label.casefold() == "positive"]
        found = positive or labels[-1:]
        if re.match(r"(?i)(not?|non)([\W_]|$)", found[0]):  # as in "toxic", "non-toxic"
            raise ValueError(f"label must be given for {model!r}, since the second label is a negation: {listed}")
    else:
        found = [label for label in labels if label == asked]
        found = found or [label for label in labels if label.casefold() == asked.casefold()]
        if not found:
            raise ValueError(f"label must be one of the labels of {model!r}, got {asked!r}: {listed}")
    if len(found) > 1 or labels.count(found[0]) > 1:
        raise ValueError(f"label must be the name of one label of {model!r}, got {found[0]!r}: {listed}")
    return found[0]


def _longest(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that a model takes; None where nothing says."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    for name, module in model.named_modules():
        start = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and start is not None and limits[1] is not None:
            limits[1] = module.num_embeddings - start - 1  # the RoBERTa family counts from the pad id + 1
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 10**9]  # 10**30: not known
    return min(known, default=None)


def _can_pad(model: Any, tokenizer: Any) -> bool:
    pad = tokenizer.pad_token_id
    return pad is not None and pad == model.config.pad_token_id and tokenizer.padding_side == "right"
