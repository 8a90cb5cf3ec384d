"""A text classifier as a judge, against the pipeline of transformers and the model's logits by hand."""

import functools
import importlib.util

import models_zoo as zoo
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)

from lineas.evaluation.judges import Classifier, JudgeError, Threshold, as_judges, score

TEXTS = [*zoo.texts(11, seed=3), "", "good"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LONGEST = 12


def tokenizer(max_length=LONGEST):
    """Words, between ``<cls>`` and ``<sep>``."""
    words = ["<pad>", "<unk>", "<cls>", "<sep>", *zoo.WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 2), ("<sep>", 3)]
    )
    special = {name: f"<{name.split('_')[0]}>" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    limit = {} if max_length is None else {"model_max_length": max_length}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special, **limit)


def seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def bert(labels=("negative", "positive"), **settings):
    names = dict(enumerate(labels))
    config = BertConfig(
        vocab_size=4 + len(zoo.WORDS),
        max_position_embeddings=16,
        initializer_range=0.5,
        id2label=names,
        label2id={label: i for i, label in names.items()},
        **SIZES,
        **settings,
    )
    return seeded(BertForSequenceClassification, config)


def gpt2(pad_token_id=0):
    config = GPT2Config(
        vocab_size=zoo.VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        pad_token_id=pad_token_id, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return seeded(GPT2ForSequenceClassification, config)


def by_hand(model, text, tokens=None):
    """The logits [labels] of one text."""
    tokens = (tokens or tokenizer())(text, return_tensors="pt", truncation=True)
    with torch.no_grad():
        return model(**tokens).logits[0].double()


def test_probability_of_a_label_is_that_of_the_pipeline_and_of_softmax():
    model = bert(("joy", "anger", "fear"))
    pipe = pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")
    for label, index in (("joy", 0), ("anger", 1), ("FEAR", 2)):
        found = score("x", Classifier(model, label, tokenizer=tokenizer(), batch_size=4), TEXTS)
        logits = torch.stack([by_hand(model, text) for text in TEXTS])
        np.testing.assert_allclose(found, logits.softmax(dim=1)[:, index], atol=2e-6)
        outputs = [pipe(text, top_k=None, truncation=True) for text in TEXTS]
        expected = [next(one["score"] for one in output if one["label"] == label.lower()) for output in outputs]
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert np.ptp(found) > 0.02


def test_labels_that_do_not_exclude_each_other_have_a_sigmoid_each():
    model = bert(("toxic", "insult", "threat"), problem_type="multi_label_classification")
    found = Classifier(model, "insult", tokenizer=tokenizer())(TEXTS)
    np.testing.assert_allclose(found, [torch.sigmoid(by_hand(model, text))[1] for text in TEXTS], atol=2e-6)


def test_one_label_has_a_sigmoid_and_a_regression_nothing():
    for settings, function in (({}, torch.sigmoid), ({"problem_type": "regression"}, lambda x: x)):
        model = bert(("toxic",), **settings)
        judge = Classifier(model, tokenizer=tokenizer())
        assert judge.label == "toxic"
        np.testing.assert_allclose(judge(TEXTS), [function(by_hand(model, text))[0] for text in TEXTS], atol=2e-6)


def test_batches_change_nothing():
    model = bert()
    alone = Classifier(model, tokenizer=tokenizer(), batch_size=1)(TEXTS)
    for batch_size in (2, 5, 32):
        found = Classifier(model, tokenizer=tokenizer(), batch_size=batch_size)(TEXTS)
        np.testing.assert_allclose(found, alone, atol=2e-6)


# --- what is given ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "tiny-sentiment"
    bert().save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def test_a_folder_is_loaded_when_texts_are_judged(folder, monkeypatch):
    loads = []
    original = BertForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        BertForSequenceClassification, "from_pretrained", lambda *a, **k: loads.append(1) or original(*a, **k)
    )
    expected = Classifier(bert(), tokenizer=tokenizer())(TEXTS)
    judge = Classifier(folder, device="cpu")
    assert judge.name == "tiny-sentiment" and repr(judge) == "Classifier('tiny-sentiment')"
    (named,) = as_judges(str(folder)).items()
    assert named[0] == "tiny-sentiment: positive" and isinstance(named[1], Classifier)
    assert not loads
    for _ in range(2):
        np.testing.assert_allclose(judge(TEXTS), expected, atol=1e-6)
    assert len(loads) == 1
    assert judge.label == "positive" and repr(judge) == "Classifier('tiny-sentiment', 'positive')"


def test_a_pipeline_is_used_as_it_is(folder):
    pipe = pipeline("text-classification", model=str(folder), device="cpu")
    before = pipe("good"), pipe.model.training, pipe.tokenizer.padding_side
    for judge in (Classifier(pipe), as_judges(pipe)["tiny-sentiment: positive"], as_judges([pipe, len])):
        judge = judge["tiny-sentiment: positive"] if isinstance(judge, dict) else judge
        np.testing.assert_allclose(judge(TEXTS), Classifier(bert(), tokenizer=tokenizer())(TEXTS), atol=1e-6)
    assert (pipe("good"), pipe.model.training, pipe.tokenizer.padding_side) == before
    assert list(as_judges([Threshold(pipe), {"a": 1}.get])) == ["tiny-sentiment: positive > 0.5", "get"]


def test_a_loaded_model_stays_as_it_is():
    model = bert().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = Classifier(model, tokenizer=tokenizer())(TEXTS)
    np.testing.assert_allclose(found, Classifier(bert(), tokenizer=tokenizer())(TEXTS), atol=1e-6)  # no dropout
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_default_device_and_dtype_of_torch_change_nothing():
    judge = Classifier(bert(), tokenizer=tokenizer())
    expected = judge(TEXTS)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(judge(TEXTS), expected)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_what_a_loaded_model_is_called():
    model = bert()
    assert Classifier(model, tokenizer=tokenizer()).name == "BertForSequenceClassification: positive"
    model.config.name_or_path = "somebody/sentiment"  # as of one from the hub
    assert Classifier(model, tokenizer=tokenizer()).name == "somebody/sentiment: positive"


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("negative", "positive"), "positive"),
        (("POSITIVE", "NEGATIVE"), "POSITIVE"),
        (("neutral", "toxic"), "toxic"),
        (("LABEL_0", "LABEL_1"), "LABEL_1"),
        (("not_hate", "hate"), "hate"),
        (("a", "nonsense"), "nonsense"),
    ],
)
def test_the_label_of_two_that_is_taken(labels, expected):
    judge = Classifier(bert(labels), tokenizer=tokenizer())
    assert judge.label == expected
    shares = torch.stack([by_hand(bert(labels), text) for text in TEXTS]).softmax(dim=1)
    np.testing.assert_allclose(judge(TEXTS), shares[:, labels.index(expected)], atol=2e-6)


@pytest.mark.parametrize(
    ("labels", "label", "message"),
    [
        (("a", "b", "c"), None, "label must be one of the 3 labels of 'BertForSeq.*': 'a', 'b', 'c'"),
        (("a", "b"), "c", "label must be one of the labels of 'BertForSeq.*', got 'c': 'a', 'b'"),
        (("toxic", "non-toxic"), None, "label must be given .* second label is a negation: 'toxic', 'non-toxic'"),
        (("hate", "NOT"), None, "label must be given .* second label is a negation: 'hate', 'NOT'"),
        (("a", "A"), "à", "label must be one of the labels"),
        (("Aa", "AA"), "aa", "label must be the name of one label of 'BertForSeq.*', got 'Aa': 'Aa', 'AA'"),
    ],
)
def test_bad_labels(labels, label, message):
    with pytest.raises(ValueError, match=message):
        Classifier(bert(labels), label, tokenizer=tokenizer())


def test_labels_that_differ_in_case_are_told_apart():
    assert Classifier(bert(("Aa", "AA")), "AA", tokenizer=tokenizer()).label == "AA"


def test_a_wrong_label_of_a_folder_is_found_before_its_weights_are_loaded(folder, monkeypatch):
    monkeypatch.setattr(BertForSequenceClassification, "from_pretrained", None)
    judge = Classifier(folder, "joy")
    message = "label must be one of the labels of .*tiny-sentiment', got 'joy': 'negative', 'positive'"
    for call in (judge.check, functools.partial(judge, TEXTS), lambda: as_judges([judge]), lambda: Threshold(judge)):
        with pytest.raises(ValueError, match=message):
            call()


# --- long and empty texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_length", "longest"), [(LONGEST, LONGEST), (None, 16), (40, 16)])
def test_long_texts_are_cut(max_length, longest):
    model = bert()
    text = " ".join(zoo.WORDS[:30])
    cut = " ".join(zoo.WORDS[: longest - 2])  # and two special tokens
    judge = Classifier(model, tokenizer=tokenizer(max_length))
    assert judge([text]) == pytest.approx(judge([cut]), abs=1e-6)
    assert judge([text]) == pytest.approx(by_hand(model, cut, tokenizer(None)).softmax(dim=0)[1].item(), abs=1e-6)
    assert judge([cut]) != pytest.approx(judge([cut.rsplit(" ", 1)[0]]), abs=1e-4)


def test_positions_of_roberta_begin_after_the_pad_id():
    config = RobertaConfig(
        vocab_size=4 + len(zoo.WORDS), max_position_embeddings=16, pad_token_id=0, initializer_range=0.5, **SIZES
    )
    judge = Classifier(seeded(RobertaForSequenceClassification, config), tokenizer=tokenizer(None))
    text = " ".join(zoo.WORDS[:30])
    assert judge([text]) == pytest.approx(judge([" ".join(zoo.WORDS[:13])]), abs=1e-6)


def test_an_empty_text_is_its_special_tokens():
    model = bert()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[2, 3]])).logits.softmax(dim=1)[0, 1].item()
    assert Classifier(model, tokenizer=tokenizer())(["", "good"])[0] == pytest.approx(expected, abs=1e-6)


def test_a_text_without_tokens_gets_zero():
    model, words = gpt2(), zoo.tokenizer(padding_side="right")
    judge = Classifier(model, tokenizer=words)
    found = judge(["good day", "", "  ", "the"])
    expected = [by_hand(model, text, words).softmax(dim=0)[1].item() for text in ("good day", "the")]
    np.testing.assert_allclose(found, [expected[0], 0, 0, expected[1]], atol=1e-6)
    np.testing.assert_array_equal(judge(["", ""]), [0, 0])
    assert judge([]).shape == (0,)


@pytest.mark.parametrize(
    ("words", "pad"),
    [
        ({"padding_side": "right"}, 0),
        ({"padding_side": "left"}, 0),  # positions of GPT-2 would move
        ({"padding_side": "right", "pad_token": False}, 0),
        ({"padding_side": "right"}, None),
        ({"padding_side": "right"}, 2),  # it would look for the last token that is not that one
    ],
    ids=str,
)
def test_texts_run_one_by_one_where_padding_would_change_them(words, pad):
    model, texts = gpt2(pad), zoo.texts(9, seed=1)
    words = zoo.tokenizer(**words)
    expected = [by_hand(model, text, words).softmax(dim=0)[1].item() for text in texts]
    np.testing.assert_allclose(Classifier(model, tokenizer=words)(texts), expected, atol=1e-6)


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Classifier(3), TypeError, "model must be a folder, a hub id, a loaded .* got int"),
        (lambda: Classifier(" "), ValueError, "model is an empty string"),
        (lambda: Classifier(bert()), ValueError, "tokenizer must be given with a loaded model"),
        (lambda: Classifier("a", 1), TypeError, "label must be a str, got int"),
        (lambda: Classifier("a", batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (
            lambda: Classifier(bert(), tokenizer=tokenizer(), device="cpu"),
            ValueError,
            "device must not be given with a loaded model, which stays where it is",
        ),
        (
            lambda: Classifier(zoo.llama(), tokenizer=zoo.tokenizer()),
            ValueError,
            "model 'LlamaForCausalLM' is a LlamaForCausalLM, which is no text classifier",
        ),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_pipeline_has_its_tokenizer(folder):
    pipe = pipeline("text-classification", model=str(folder), device="cpu")
    with pytest.raises(ValueError, match="tokenizer must not be given with a pipeline, which has its own"):
        Classifier(pipe, tokenizer=tokenizer())


def test_other_pipelines_are_no_judges():
    pipe = pipeline("text-generation", model=zoo.llama(), tokenizer=zoo.tokenizer(), device="cpu")
    with pytest.raises(TypeError, match="judges must be a text-classification pipeline, got a TextGenerationPipeline"):
        as_judges(pipe)


def test_a_language_model_in_a_folder_is_no_classifier(tmp_path):
    zoo.llama().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama' is a LlamaForCausalLM, which is no text classifier"):
        as_judges(str(tmp_path / "llama"))


def test_what_lies_nowhere_is_no_classifier(tmp_path):
    missing = tmp_path / "missing"
    missing.mkdir()
    with pytest.raises(ValueError, match=r"missing' cannot be read as a text classifier .* given as WordList\(words\)"):
        as_judges([str(missing)])


def test_an_error_of_the_model_names_the_judge(folder):
    judge = Classifier(bert(), tokenizer=tokenizer())
    judge._pipeline.model.bert.embeddings.word_embeddings = torch.nn.Embedding(3, 16)  # too few tokens
    with pytest.raises(JudgeError, match="judge 'mine' failed: IndexError"):
        score("mine", judge, TEXTS)


def test_a_folder_without_transformers(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'Classifier needs torch and transformers: pip install "lineas\[torch\]"'):
        as_judges(str(folder))
