"""A language model as a judge: ratings by the model's own logits, generated answers, and answers of a callable."""

import models_zoo as zoo
import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lineas.evaluation.judges import JudgeError, LLMJudge, Threshold, as_judges, score

CONCEPT = "weddings"
TEXTS = ["they cut the cake", "", "the bride and the groom said yes, and all of the guests cheered", "no", "   "]
PROMPTS = [
    "My day was",
    "On Sunday",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What happened?"}],
    [{"role": "user", "content": [{"type": "text", "text": "Who came?"}, {"type": "image", "url": "x"}]}],
    "The film",
]
CHAT = (
    "<bos>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}


def tokenizer(template=None, pad_token=True, ends=False):
    """A token for each byte; one at the beginning and, with `ends`, one at the end of every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>" if ends else "<bos> $A", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    special = {"bos_token": "<bos>", "eos_token": "<eos>", **({"pad_token": "<pad>"} if pad_token else {})}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    made.chat_template = template
    return made


def seeded(kind, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def llama(longest=2048):
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=longest, **SIZES,
    )  # fmt: skip
    model = seeded(LlamaForCausalLM, config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(30)  # so that ratings depend on more than the last token
    return model


def gpt2():
    config = GPT2Config(vocab_size=259, n_positions=2048, n_embd=32, n_layer=2, n_head=2, **SIZES)
    return seeded(GPT2LMHeadModel, config).train()  # as it is when freshly built


MODELS = {"llama": llama, "gpt2": gpt2}


def questions_of(texts=TEXTS, prompts=PROMPTS, concept=CONCEPT):
    """The questions that a judge asks."""
    seen = []
    LLMJudge(lambda questions: seen.extend(questions) or ["Rating: 1"] * len(questions), concept)(texts, prompts)
    return seen


def answering(*answers):
    """A judge that gets these answers, each again and again for the texts that are not empty."""
    return LLMJudge(lambda questions: [answers[k % len(answers)] for k in range(len(questions))], CONCEPT)


# --- questions --------------------------------------------------------------------------------------------------------


def test_three_questions_are_asked_of_each_text():
    asked = questions_of()
    assert len(asked) == 9  # two of the texts are empty
    for k, (text, prompt) in enumerate(
        ((TEXTS[0], "My day was"), (TEXTS[2], "system: Be brief.\n\nuser: What happened?"), (TEXTS[3], "Who came?"))
    ):
        concept, instruction, fluency = asked[3 * k : 3 * k + 3]
        assert all(f"Text:\n{text}\n" in question for question in (concept, instruction, fluency))
        assert f"Concept: {CONCEPT}\n" in concept and CONCEPT not in instruction + fluency
        assert f"Prompt:\n{prompt}\n" in instruction and prompt not in concept + fluency
        for question in (concept, instruction, fluency):
            assert all(f"\n{rating}: " in question for rating in (0, 1, 2)) and "Rating" in question


def test_braces_are_texts():
    asked = questions_of(["{text} {0}"], ["{prompt}"], "{concept}")
    assert (
        "Text:\n{text} {0}\n" in asked[0] and "Concept: {concept}\n" in asked[0] and "Prompt:\n{prompt}\n" in asked[1]
    )


# --- answers ----------------------------------------------------------------------------------------------------------


def test_the_score_is_the_harmonic_mean_of_the_ratings():
    judge = answering("Rating: 2", "Rating: 1", "Rating: 1")
    np.testing.assert_array_equal(
        judge.ratings(TEXTS, PROMPTS), [[2, 1, 1], [0, 0, 0], [2, 1, 1], [2, 1, 1], [0, 0, 0]]
    )
    expected = stats.hmean([2, 1, 1])
    np.testing.assert_allclose(score("x", judge, TEXTS, PROMPTS), [expected, 0, expected, expected, 0])
    np.testing.assert_array_equal(answering("Rating: 2", "Rating: 0", "Rating: 2")(TEXTS, PROMPTS), np.zeros(5))


def test_no_text_is_not_asked_about():
    judge = LLMJudge(lambda questions: pytest.fail("asked"), CONCEPT)
    np.testing.assert_array_equal(judge.ratings(["", " \n"], ["a", "b"]), np.zeros((2, 3)))
    assert judge([], []).shape == (0,) and judge.ratings([], []).shape == (0, 3)


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("Rating: 1", 1),
        ("rating:2", 2),
        ("Rating: 2.", 2),
        ("Rating: 2.0", 2),
        ("**Rating:** 1", 1),
        ("**Rating: 1**", 1),
        ("Rating: [[0]]", 0),
        ("Rating: 2/2", 2),
        ("Rating - 1", 1),
        ("Rating:\n2", 2),
        ("Rating (0-2): 1", 1),
        ("Rating = '1'", 1),
        ("The rating is 2", 2),
        ("It names 3 guests.\nRating: 1", 1),
        ("<think>Rating: 0? There are 2 cakes.</think>\nRating: 2", 2),
        ("1", 1),
        (" 0.\n", 0),
        ("**2**", 2),
    ],
)
def test_the_rating_is_read_from_an_answer(answer, rating):
    assert (answering(answer).ratings(["a"], ["b"]) == rating).all()


@pytest.mark.parametrize(
    "answer",
    ["", "I cannot say.", "Rating: 3", "Rating: -1", "Rating: 1.5", "Rating: 0-2", "Rating: 12-3", "Rating: 1.5-2",
     "Rating: 20", "On a rating from 0 to 2 it is fine", "2 of 3", "3", "Separating: 1", "Rating: 1\nRating: 7"],
)  # fmt: skip
def test_an_answer_without_a_rating_is_an_error(answer):
    judge = answering("Rating: 1", "Rating: 2", answer)
    with pytest.raises(
        ValueError, match=r"no rating of 0, 1 or 2 in the answer to the question about fluency of texts"
    ):
        judge.ratings(TEXTS[1:3], PROMPTS[1:3])
    with pytest.raises(JudgeError, match=r"judge 'x' failed: ValueError: no rating .* fluency of texts\[1\]: '"):
        score("x", judge, TEXTS[1:3], PROMPTS[1:3])


def test_a_long_answer_is_shortened_in_the_error():
    with pytest.raises(ValueError, match=r"texts\[0\]: 'a{80}\.\.\.'$"):
        answering("a" * 300).ratings(["b"], ["c"])


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (lambda q: "Rating: 1", TypeError, "the model must return a list of answers, got str"),
        (lambda q: None, TypeError, "the model must return a list of answers, got NoneType"),
        (lambda q: ["Rating: 1"] * 2, ValueError, "the model must return one answer a question: expected 3, got 2"),
        (
            lambda q: [1, 1, 1],
            TypeError,
            r"the answer to the question about concept of texts\[0\] must be a str, got int",
        ),
    ],
)
def test_bad_answers(ask, kind, message):
    with pytest.raises(kind, match=message):
        LLMJudge(ask, CONCEPT).ratings(["a"], ["b"])


# --- probabilities ----------------------------------------------------------------------------------------------------


def by_hand(model, words, question):
    """Probabilities of 0, 1 and 2 after "Rating: ", one question at a time, without padding."""
    if words.chat_template:
        text = f"<|user|>{question}<eos><|assistant|>Rating: "
    else:
        text = f"{question}\n\nRating: "
    ids = [1, *words(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    return logits[words.convert_tokens_to_ids(["0", "1", "2"])].softmax(dim=0).numpy()


@pytest.mark.parametrize("template", [None, CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("name", MODELS)
def test_ratings_are_those_of_the_logits(name, template):
    model, words = MODELS[name](), tokenizer(template)
    model.eval()
    expected = np.array([by_hand(model, words, question) for question in questions_of()])
    assert len(set(expected.argmax(axis=1))) > 1
    if name == "gpt2":
        model.train()
    settings = {"tokenizer": words, "batch_size": 4}
    rows = [0, 2, 3]
    found = LLMJudge(model, CONCEPT, **settings).ratings(TEXTS, PROMPTS)
    np.testing.assert_array_equal(found[rows], expected.argmax(axis=1).reshape(3, 3))
    found = LLMJudge(model, CONCEPT, reading="expectation", **settings).ratings(TEXTS, PROMPTS)
    np.testing.assert_allclose(found[rows], (expected @ [0, 1, 2]).reshape(3, 3), atol=1e-5)
    assert not found[[1, 4]].any()


@pytest.mark.parametrize("name", MODELS)
def test_batches_change_nothing(name):
    model, words = MODELS[name](), tokenizer(CHAT, pad_token=False)
    alone = LLMJudge(model, CONCEPT, tokenizer=words, reading="expectation", batch_size=1)(TEXTS, PROMPTS)
    for batch_size in (2, 5, 32):
        judge = LLMJudge(model, CONCEPT, tokenizer=words, reading="expectation", batch_size=batch_size)
        np.testing.assert_allclose(judge(TEXTS, PROMPTS), alone, atol=1e-5)
        turned = judge(TEXTS[::-1], PROMPTS[::-1])
        np.testing.assert_allclose(turned[::-1], alone, atol=1e-5)


def test_a_token_at_the_end_of_texts_is_left_out():
    model = llama()
    expected, found = (
        LLMJudge(model, CONCEPT, tokenizer=tokenizer(ends=ends), reading="expectation")(TEXTS, PROMPTS)
        for ends in (False, True)
    )
    np.testing.assert_array_equal(found, expected)


def test_only_the_last_logits_are_computed():
    model, shapes = llama(), []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    LLMJudge(model, CONCEPT, tokenizer=tokenizer(), batch_size=9)(TEXTS, PROMPTS)
    assert shapes == [(9, 1, 259)]


def test_the_model_stays_as_it_is():
    model, words = gpt2(), tokenizer()
    state, side = torch.get_rng_state(), words.padding_side
    LLMJudge(model, CONCEPT, tokenizer=words)(TEXTS, PROMPTS)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and words.padding_side == side


def test_default_device_and_dtype_of_torch_change_nothing():
    judge = LLMJudge(llama(), CONCEPT, tokenizer=tokenizer(), reading="expectation")
    expected = judge(TEXTS, PROMPTS)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(judge(TEXTS, PROMPTS), expected)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_logits_that_are_not_finite_are_an_error():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for reading in ("argmax", "expectation"):
        judge = LLMJudge(model, CONCEPT, tokenizer=tokenizer(), reading=reading)
        with pytest.raises(ValueError, match=r"logits are not finite for the question about concept of texts\[0\]"):
            judge.ratings(TEXTS, PROMPTS)


# --- generated answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHAT], ids=["text", "chat"])
def test_a_generated_answer_is_read(monkeypatch, template):
    model, words = llama(), tokenizer(template)
    questions, calls = questions_of(), []

    def generate(input_ids, attention_mask, **settings):
        calls.append((settings, not torch.is_grad_enabled() and not model.training))
        rows = [words.decode(row[mask == 1]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        answers = []
        for row in rows:
            (at,) = [k for k, question in enumerate(questions) if question in row]
            assert row.endswith("<|assistant|>" if template else "\n\n") and row.startswith("<bos>")
            answers.append(words(f"Rating: {at % 3}<eos>", add_special_tokens=False)["input_ids"])
        return torch.cat([input_ids, torch.tensor(answers)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    judge = LLMJudge(model, CONCEPT, tokenizer=words, reading="generated", batch_size=2, max_new_tokens=11)
    np.testing.assert_array_equal(judge.ratings(TEXTS, PROMPTS)[[0, 2, 3]], [[0, 1, 2]] * 3)
    assert len(calls) == 5
    assert calls[0] == ({"do_sample": False, "max_new_tokens": 11, "pad_token_id": 0}, True)


@pytest.mark.parametrize("name", MODELS)
def test_generated_answers_are_the_same_in_batches(name):
    model, words = MODELS[name](), tokenizer()
    model.eval()
    judge = LLMJudge(model, CONCEPT, tokenizer=words, reading="generated", batch_size=3, max_new_tokens=4)
    questions = questions_of()
    answers = judge._generate(questions, questions)
    for question, answer in zip(questions, answers, strict=True):
        ids = words(f"{question}\n\n", return_tensors="pt")
        tokens = model.generate(**ids, do_sample=False, max_new_tokens=4, pad_token_id=0)[
            0, ids["input_ids"].shape[1] :
        ]
        assert answer == words.decode(tokens, skip_special_tokens=True)
    assert len(set(answers)) > 1


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: LLMJudge("gpt2", CONCEPT), TypeError, "model must be a loaded language model or a callable, got str"),
        (lambda: LLMJudge(dict, CONCEPT), TypeError, "model must be a loaded language model or a callable, got type"),
        (
            lambda: LLMJudge(torch.nn.Linear(2, 2), CONCEPT, tokenizer=tokenizer()),
            TypeError,
            "model must be a language model of transformers, got Linear",
        ),
        (lambda: LLMJudge(llama(), CONCEPT), ValueError, "tokenizer must be given with a LlamaForCausalLM"),
        (lambda: LLMJudge(len, CONCEPT, tokenizer=tokenizer()), ValueError, "tokenizer must not be given with a built"),
        (lambda: LLMJudge(len, " "), TypeError, "concept must be a description in words, got ' '"),
        (lambda: LLMJudge(len, tokenizer()), TypeError, "concept must be a description in words, got"),
        (
            lambda: LLMJudge(len, CONCEPT, reading="argmax"),
            ValueError,
            "reading must be one of 'generated', got 'argmax'",
        ),
        (
            lambda: LLMJudge(llama(), CONCEPT, tokenizer=tokenizer(), reading="mean"),
            ValueError,
            "reading must be one of 'argmax', 'expectation', 'generated', got 'mean'",
        ),
        (lambda: LLMJudge(len, CONCEPT, batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: LLMJudge(len, CONCEPT, max_new_tokens=0), ValueError, "max_new_tokens must be at least 1, got 0"),
        (
            lambda: LLMJudge(zoo.llama(), CONCEPT, tokenizer=zoo.tokenizer()),  # 0, 1 and 2 are all <unk>
            ValueError,
            'tokenizer has no token of its own for each of 0, 1 and 2 after "Rating: ": use reading="generated"',
        ),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("texts", "prompts", "kind", "message"),
    [
        (["a"], None, ValueError, "prompts must be given: how well a text answers its prompt is one of the ratings"),
        (["a"], ["b", "c"], ValueError, "prompts must have one entry a text: expected 1, got 2"),
        (["a"], [[1, 2]], TypeError, r"prompts\[0\] must be a str or a conversation, got list"),
        (["a"], [[]], TypeError, r"prompts\[0\] must be a str or a conversation, got list"),
        (["a", "b"], ["a", None], TypeError, r"prompts\[1\] must be a str or a conversation, got NoneType"),
        ("a", ["b"], TypeError, "texts is one string: give a list of texts"),
    ],
)
def test_bad_texts_and_prompts(texts, prompts, kind, message):
    with pytest.raises(kind, match=message):
        answering("Rating: 1").ratings(texts, prompts)


@pytest.mark.parametrize("reading", ["argmax", "generated"])
def test_a_question_beyond_the_context_is_an_error(reading):
    judge = LLMJudge(llama(longest=1200), CONCEPT, tokenizer=tokenizer(), reading=reading, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"concept of texts\[1\] has \d+ tokens, too many for a context of 1200 with"):
        judge.ratings(["a", "a" * 1200], ["b", "b"])


# --- as a judge among others ------------------------------------------------------------------------------------------


def test_it_is_a_judge():
    judge = answering("Rating: 2")
    assert list(as_judges([judge, judge, Threshold(judge, 1)])) == ["llm_judge", "llm_judge_2", "llm_judge > 1"]
    np.testing.assert_array_equal(score("x", Threshold(judge, 1), TEXTS, PROMPTS), [1, 0, 1, 1, 0])
    assert repr(judge) == "LLMJudge(<lambda>, 'weddings', reading='generated')"
    assert repr(LLMJudge(llama(), CONCEPT, tokenizer=tokenizer())).startswith("LLMJudge(LlamaForCausalLM, 'weddings'")
    with pytest.raises(JudgeError, match="judge 'x' failed: ValueError: prompts must be given"):
        score("x", judge, TEXTS)
