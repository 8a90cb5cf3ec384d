"""Maps in lm-evaluation-harness: scores and texts equal those of the model under its hooks, computed by hand."""

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")
import attached
import lm_eval.evaluator
import models_zoo
import torch
from caches import cache_of, cached
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import lineas
from lineas.evaluation import harness
from lineas.evaluation.harness import LineasLM

pytestmark = pytest.mark.filterwarnings("ignore:map_tokens='generated' leaves")
ROOT = Path(__file__).parents[2]
CHAT = (
    "{% for m in messages %}{{ 'we' if m['role'] == 'user' else 'you' }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}you {% endif %}"
)
SELECTIONS = {
    "all": "all",
    "last": "last",
    "prompt": "prompt",
    "generated": "generated",
    "end": slice(-2, None),
    "middle": slice(1, -1),
    "start": slice(1, 4),
    "callable": lambda tokens: tokens.positions >= tokens.prompt_length[:, None] - 2,
}
# Of different lengths, one with a single token; two share all tokens that the model gets and not where they are split.
PAIRS = [
    ("the film was very", "good and not bad"),
    ("my dog is", "happy"),
    ("my dog is", "sad today and cold"),
    ("my dog is sad", "today and warm"),
    ("was it a long day ? we were never warm and", "so we were sad"),
]
TEXTS = models_zoo.texts(5, seed=3, shortest=4, longest=20)


def tokenizer():
    made = models_zoo.tokenizer()
    made.chat_template = CHAT
    return made


LANGUAGE_MODELS = {family: attached.language_model(family) for family in ("llama", "gpt2")}


def language_model(family="llama"):
    return LANGUAGE_MODELS[family]


def lm_of(kind, family="llama", **options):
    """One of lm-eval's models around the tiny model."""
    model, maps = language_model(family)
    own = {"maps": maps} if kind is LineasLM else {}
    return kind(**{"pretrained": model, "tokenizer": tokenizer(), "batch_size": 3} | own | options)


def ask(lm, what, arguments):
    return getattr(lm, what)([Instance(what, {}, one, k) for k, one in enumerate(arguments)], disable_tqdm=True)


def scores(lm, pairs=PAIRS):
    return [score for score, _ in ask(lm, "loglikelihood", [(context, f" {answer}") for context, answer in pairs])]


def texts_of(lm, contexts=TEXTS, **settings):
    return ask(lm, "generate_until", [(text, {"until": [], "max_gen_toks": 6} | settings) for text in contexts])


@torch.no_grad()
def score_of(model, context, continuation):
    """The log-likelihood of a continuation, fed token by token as if it had been generated."""
    output, total = model(torch.tensor([context]), use_cache=True), 0.0
    for token in continuation:
        total += output.logits[0, -1].double().log_softmax(-1)[token].item()
        output = model(torch.tensor([[token]]), use_cache=True, **cached(cache_of(output)))
    return total


def expected_scores(family, strength=1.0, tokens=None, pairs=PAIRS, longest=10**6):
    """Scores under the hooks, without lm-eval; contexts are cut so that the input has `longest` tokens."""
    model, maps = language_model(family)
    encode = tokenizer().encode
    with maps.attach(model, strength, tokens=tokens):
        return [
            score_of(model, encode(context)[-(longest + 1 - len(encode(answer))) :], encode(answer))
            for context, answer in pairs
        ]


@pytest.fixture(autouse=True)
def no_survey(monkeypatch):
    """lm-eval puts what torch can find out of the machine into its results, which takes seconds."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, maps for it, and three tasks on local files."""
    folder = tmp_path_factory.mktemp("harness")
    model, maps = language_model()
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    maps.save(folder / "maps.safetensors")
    attached.random_maps(dict.fromkeys(maps, models_zoo.WIDTH), seed=1).save(folder / "others.safetensors")
    rows = [{"text": context, "choices": [answer, "never", "a good day"], "answer": 0} for context, answer in PAIRS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    writing = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
    }
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    (folder / "tasks").mkdir()
    for name, more in (("choice", choice), ("writing", writing), ("rolling", rolling)):
        text = json.dumps({"task": f"tiny_{name}"} | task | more)  # JSON is YAML
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


def evaluate(folder, model, tasks=("choice", "writing", "rolling"), **options):
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    tasks = [f"tiny_{name}" for name in tasks]
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


def answers(results):
    """All that the model answered, by task, in the order of the documents."""
    return {
        task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


def numbers(results):
    """The scores among the answers."""
    return np.array(
        [
            float(number)
            for task in ("tiny_choice", "tiny_rolling")
            for resps in answers(results)[task]
            for resp in resps
            for number in [np.ravel(np.array(resp, dtype=object))[0]]
        ]
    )


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_of_an_answer_that_is_generated(family, tokens):
    # Without logits_cache, by which lm-eval 0.4.13 takes the wrong scores of one of the two that share their tokens.
    lm = lm_of(LineasLM, family, map_tokens=tokens, strength=0.7, logits_cache=False)
    found = scores(lm)
    np.testing.assert_allclose(found, expected_scores(family, 0.7, tokens), rtol=0, atol=2e-5)
    assert np.abs(np.subtract(found, scores(lm_of(HFLM, family)))).max() > 1e-2
    assert not lineas.attached(lm.model)


@pytest.mark.parametrize("batch_size", [1, 2, 5, "auto"])
@pytest.mark.parametrize("tokens", ["last", "generated"])
def test_requests_that_share_their_tokens_are_told_apart(tokens, batch_size):
    lm = lm_of(LineasLM, map_tokens=tokens, batch_size=batch_size, max_batch_size=4)
    np.testing.assert_allclose(scores(lm), expected_scores("llama", tokens=tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", ["last", "prompt", "generated"])
def test_real_tokens_that_look_like_padding_are_no_padding(tokens):
    # <pad> is token 0, with which lm-eval pads.
    pairs = [
        ("the <pad>", "cat was"),
        ("the", "<pad> cat"),
        ("the", "<pad> <pad> cat"),
        ("the", "<pad>"),
        ("the <pad>", "<pad> cat warm"),
    ]
    lm = lm_of(LineasLM, map_tokens=tokens, batch_size=5)
    np.testing.assert_allclose(scores(lm, pairs), expected_scores("llama", 1.0, tokens, pairs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tokens", ["last", "prompt", "generated"])
def test_contexts_are_cut_as_lm_eval_cuts_them(tokens):
    lm = lm_of(LineasLM, map_tokens=tokens, max_length=6)
    expected = expected_scores("llama", 1.0, tokens, longest=6)
    np.testing.assert_allclose(scores(lm), expected, rtol=0, atol=2e-5)
    assert not np.allclose(expected, expected_scores("llama", 1.0, tokens), rtol=0, atol=1e-2)


@pytest.mark.parametrize("tokens", ["all", "prompt", "generated"])
def test_of_a_text_without_context_all_is_generated(tokens):
    model, maps = language_model()
    found = ask(lm_of(LineasLM, map_tokens=tokens), "loglikelihood_rolling", [(text,) for text in TEXTS])
    made = tokenizer()
    with maps.attach(model, tokens=tokens):
        expected = [score_of(model, [made.eos_token_id], made.encode(text)) for text in TEXTS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_text_that_is_longer_than_the_model_goes_on_with_its_last_token_for_a_prompt():
    model, maps = language_model()
    made, text = tokenizer(), " ".join(TEXTS)[:200]
    ids = made.encode(text)
    found = ask(lm_of(LineasLM, map_tokens="generated", max_length=8), "loglikelihood_rolling", [(text,)])
    windows = [ids[k : k + 8] for k in range(0, len(ids), 8)]
    with maps.attach(model, tokens="generated"):
        expected = 0.0
        for k, window in enumerate(windows):
            # lm-eval fills the last window up with tokens that are scored already: they are its context.
            context = [made.eos_token_id] if k == 0 else ids[: 8 * k][-(9 - len(window)) :]
            expected += score_of(model, context, window)
    assert len(windows[-1]) < 8 < len(ids)
    np.testing.assert_allclose(found, [expected], rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", SELECTIONS.values(), ids=SELECTIONS)
def test_generated_texts_are_those_of_the_model_with_its_maps(tokens):
    model, maps = language_model()
    made = tokenizer()
    found = texts_of(lm_of(LineasLM, map_tokens=tokens, strength=2.0))
    batch = made(TEXTS, padding=True, return_tensors="pt")
    with maps.attach(model, 2.0, tokens=tokens):
        rows = model.generate(**batch, do_sample=False, max_new_tokens=6, pad_token_id=made.pad_token_id)
    expected = made.batch_decode(rows[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found == expected
    assert len(set(found)) > 1


def test_the_tests_of_generated_texts_can_fail():
    plain = texts_of(lm_of(HFLM))
    for name, tokens in SELECTIONS.items():
        assert texts_of(lm_of(LineasLM, map_tokens=tokens, strength=2.0)) != plain, name


def test_a_prompt_in_several_passes_is_refused_where_its_end_matters():
    lm = lm_of(LineasLM, map_tokens="generated")
    with pytest.raises(ValueError, match=r"tokens='generated' must know where the prompt ends"):
        texts_of(lm, prefill_chunk_size=2)
    assert not lineas.attached(lm.model)


def test_answers_of_one_token_are_warned_of_where_the_maps_cannot_reach_them():
    for tokens in ("generated", "last"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = scores(lm_of(LineasLM, map_tokens=tokens))
        seen = [str(one.message) for one in caught if "as they are" in str(one.message)]
        changed = found[1] != scores(lm_of(HFLM))[1]
        assert changed == (tokens == "last") and len(seen) == (tokens == "generated")
    assert all("leaves 1 of 5 scores" in message for message in seen)


def test_rows_that_are_none_of_the_requests_are_an_error(monkeypatch):
    monkeypatch.setattr(LineasLM, "_model_call", lambda self, rows: HFLM._model_call(self, rows + 1))
    lm = lm_of(LineasLM, map_tokens="last")
    with pytest.raises(RuntimeError, match="lm-eval ran the model on a row that is none of its requests"):
        scores(lm)
    assert not lineas.attached(lm.model)


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_the_plain_way_is_hf_with_the_maps_on(folder):
    model, maps = language_model()
    lm = lm_of(HFLM, logits_cache=False)
    with maps.attach(model, 0.5):
        results = evaluate(folder, lm, ["choice"])
    found = [float(resps[0][0][0]) for resps in answers(results)["tiny_choice"]]
    np.testing.assert_allclose(found, expected_scores("llama", 0.5), rtol=0, atol=2e-5)
    own = evaluate(folder, lm_of(LineasLM, strength=0.5, logits_cache=False), ["choice"])
    assert answers(own) == answers(results)


@pytest.mark.parametrize("tokens", ["all", "last", "generated", "-2:"])
def test_strength_0_gives_the_bits_of_the_plain_model(folder, tokens):
    plain = evaluate(folder, lm_of(HFLM, logits_cache=False))
    off = evaluate(folder, lm_of(LineasLM, strength=0, map_tokens=tokens, logits_cache=False))
    assert answers(off) == answers(plain)
    assert off["results"] == plain["results"]


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_scores_and_texts_are_those_of_the_folded_model(folder, strength):
    model, maps = language_model()
    folded = HFLM(pretrained=maps.fold(model, strength), tokenizer=tokenizer(), batch_size=3)
    expected, found = evaluate(folder, folded), evaluate(folder, lm_of(LineasLM, strength=strength))
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=0, atol=1e-4)
    assert answers(found)["tiny_writing"] == answers(expected)["tiny_writing"]
    assert np.abs(numbers(found) - numbers(evaluate(folder, lm_of(HFLM)))).max() > 0.1


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_chat_templates(folder, tokens):
    lm = lm_of(LineasLM, map_tokens=tokens, logits_cache=False)
    results = evaluate(folder, lm, ["choice"], apply_chat_template=True)
    samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    pairs = [(f"we {context} you", answer) for context, answer in PAIRS]
    assert samples[0]["arguments"][0][0] == "we the film was very you "
    found = [float(sample["resps"][0][0][0]) for sample in samples]
    np.testing.assert_allclose(found, expected_scores("llama", 1.0, tokens, pairs), rtol=0, atol=2e-5)


def test_results_say_which_maps_were_on_and_how(folder):
    lm = lm_of(LineasLM, strength=0.5, map_tokens=slice(-2, None))
    config = json.loads(json.dumps(evaluate(folder, lm, ["choice"])["config"], default=str))
    assert config["maps"] == "SteeringMaps(modules=3, d=48, support=48)"
    assert config["strength"] == 0.5 and config["map_tokens"] == {"slice": [-2, None, None]}
    assert config["model_num_parameters"] == lm.model.num_parameters()
    _, maps = language_model()
    same = lineas.SteeringMaps(dict(maps), {"method": "other"})
    assert lm_of(LineasLM, maps=same).get_model_info()["maps_sha256"] == config["maps_sha256"]
    assert lm_of(LineasLM, maps=0.5 * maps).get_model_info()["maps_sha256"] != config["maps_sha256"]


def test_a_cache_of_answers_belongs_to_its_maps(folder, tmp_path):
    first = evaluate(folder, lm_of(LineasLM), ["choice"], use_cache=str(tmp_path / "answers"))
    again = evaluate(folder, lm_of(LineasLM), ["choice"], use_cache=str(tmp_path / "answers"))
    assert answers(again) == answers(first)
    for changed in ({"strength": 0.5}, {"map_tokens": "last"}, {"maps": 0.5 * language_model()[1]}):
        with pytest.raises(
            ValueError, match=r"use_cache: .*answers_rank0.db holds the answers of .*: give each its own"
        ):
            evaluate(folder, lm_of(LineasLM, **changed), ["choice"], use_cache=str(tmp_path / "answers"))
    evaluate(folder, lm_of(HFLM), ["choice"], use_cache=str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="holds the answers of a model without maps"):
        evaluate(folder, lm_of(LineasLM), ["choice"], use_cache=str(tmp_path / "plain"))


# --- by name ----------------------------------------------------------------------------------------------------------


def arguments(folder, **more):
    given = {"pretrained": folder / "model", "maps": folder / "maps.safetensors", **more}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


@pytest.mark.parametrize("as_text", [False, True])
def test_the_model_type_has_a_name(folder, as_text):
    given = arguments(folder, strength=0.5, map_tokens="-2:", batch_size=3, logits_cache=False)
    model_args = ",".join(f"{name}={value}" for name, value in given.items()) if as_text else given
    results = evaluate(folder, "lineas", ["choice", "writing"], model_args=model_args, device="cpu")
    own = lm_of(LineasLM, strength=0.5, map_tokens=slice(-2, None), logits_cache=False)
    assert answers(results) == answers(evaluate(folder, own, ["choice", "writing"]))
    assert results["config"]["model"] == "lineas" and results["config"]["maps"] == given["maps"]


def test_maps_may_be_a_folder_a_sum_or_the_result_of_a_fit(folder, tmp_path, monkeypatch):
    _, maps = language_model()
    others = lineas.load(folder / "others.safetensors")
    maps.save_pretrained(tmp_path / "saved")
    maps.save(tmp_path / "a+b")
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("saved", maps),
        (tmp_path / "a+b", maps),
        (f"saved+{folder / 'others.safetensors'}", maps + others),
        (others, others),
    ):
        assert lm_of(LineasLM, maps=given)._maps == expected
    model, targets = models_zoo.llama(), [f"{context} {answer}" for context, answer in PAIRS]
    result = lineas.fit_end_to_end(
        model, TEXTS, targets, tokenizer=models_zoo.tokenizer(), layers=models_zoo.NORMS["llama"], steps=1, lr=0.1
    )
    result.save(tmp_path / "result.safetensors")
    assert lm_of(LineasLM, maps="result.safetensors")._maps == result.maps == lm_of(LineasLM, maps=result)._maps


def test_maps_act_on_the_tokens_that_they_were_fitted_for():
    _, maps = language_model()
    fitted = lineas.SteeringMaps(dict(maps), {"tokens": "generated"})
    lm = lm_of(LineasLM, maps=fitted)
    assert lm.get_model_info()["map_tokens"] == "generated"
    np.testing.assert_allclose(scores(lm), expected_scores("llama", tokens="generated"), rtol=0, atol=2e-5)


def test_a_calibrated_strength_is_left_to_the_maps(monkeypatch):
    from lineas.hooks import attach

    seen, original = [], attach.attach

    def calibrated(maps, model, strength=1.0, **options):
        seen.append(strength)
        return original(maps, model, 0.25 if strength == "calibrated" else strength, **options)

    monkeypatch.setattr(attach, "attach", calibrated)
    lm = lm_of(LineasLM, strength="calibrated", logits_cache=False)
    np.testing.assert_allclose(scores(lm), expected_scores("llama", 0.25), rtol=0, atol=2e-5)
    assert "calibrated" in seen and lm.get_model_info()["strength"] == 0.25


def test_maps_and_an_adapter(folder, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(models_zoo.llama(), config).eval()
    adapted.save_pretrained(tmp_path)
    lm = LineasLM(**arguments(folder, peft=tmp_path, map_tokens="last"), device="cpu", batch_size=3)
    with language_model()[1].attach(adapted, tokens="last"):
        encode = tokenizer().encode
        expected = [score_of(adapted, encode(context), encode(answer)) for context, answer in PAIRS]
    np.testing.assert_allclose(scores(lm), expected, rtol=0, atol=2e-5)
    assert not np.allclose(expected, expected_scores("llama", tokens="last"), rtol=0, atol=1e-2)


def test_the_entry_point_is_the_class():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["lm_eval.models"]
    [(name, value)] = points.items()
    assert importlib.metadata.EntryPoint(name, value, "lm_eval.models").load() is LineasLM
    assert registry.get_model(name) is LineasLM
    harness.register()  # once more
    assert registry.get_model(name) is LineasLM
    assert registry.get_model("hf") is HFLM


# --- from the shell ---------------------------------------------------------------------------------------------------


def shell(folder, *options, program=("-m", "lineas.evaluation.harness", "run"), path=(), **more):
    """lm-eval's command line in a process of its own, without a network."""
    given = ",".join(f"{name}={value}" for name, value in arguments(folder, **more).items())
    command = [sys.executable, *program, "--model", "lineas", "--model_args", given, "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    paths = {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    tasks = ["--tasks", "tiny_choice", "tiny_writing", "--include_path", str(folder / "tasks")]
    return subprocess.run(
        [*command, *tasks, *options], env=os.environ | offline | paths, cwd=folder, capture_output=True, text=True
    )


def written_out(value):
    """Answers as lm-eval writes them to files."""
    return [written_out(one) for one in value] if isinstance(value, list | tuple) else str(value)


def check_written(folder, output, **more):
    """What lm-eval wrote is what it gives in Python."""
    [path] = output.rglob("results_*.json")
    written = json.loads(path.read_text())
    expected = evaluate(folder, lm_of(LineasLM, batch_size=1, **more), ["choice", "writing"], apply_chat_template=True)
    for task, rows in answers(expected).items():
        values = {name: value for name, value in expected["results"][task].items() if "stderr" not in name}
        assert {name: written["results"][task][name] for name in values} == values
        [path] = output.rglob(f"samples_{task}_*.jsonl")
        samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
        assert [sample["resps"] for sample in samples] == written_out(rows)
    config = written["config"]
    assert config["model"] == "lineas" and config["maps"] == str(folder / "maps.safetensors")
    assert config["maps_sha256"] == expected["config"]["maps_sha256"]
    assert config["strength"] == more["strength"] and config["map_tokens"] == more["map_tokens"]


OUTPUT = ("--apply_chat_template", "--log_samples", "--output_path")


@pytest.mark.slow
def test_the_command_line(folder, tmp_path):
    done = shell(folder, *OUTPUT, str(tmp_path), strength=0.5, map_tokens="last")
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    check_written(folder, tmp_path, strength=0.5, map_tokens="last")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(registry, "load_plugins"), reason="lm-eval up to 0.4.13 looks for no other packages")
def test_the_command_line_of_lm_eval_itself(folder, tmp_path):
    installed = tmp_path / "site" / "lineas_points-0.dist-info"  # as pip writes it
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lineas-points\nVersion: 0\n")
    (installed / "entry_points.txt").write_text("[lm_eval.models]\nlineas = lineas.evaluation.harness:LineasLM\n")
    options = *OUTPUT, str(tmp_path / "output")
    more = {"strength": 0.5, "map_tokens": "last"}
    done = shell(folder, *options, program=("-m", "lm_eval", "run"), path=[installed.parent], **more)
    assert done.returncode == 0, done.stderr
    check_written(folder, tmp_path / "output", **more)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", ["last", "generated"])
def test_a_language_model_that_was_trained(tokens):
    from lineas.demo.model import load_smollm2

    model, made = load_smollm2()
    maps = attached.random_maps({f"model.layers.{k}.post_attention_layernorm": 576 for k in (8, 16)})
    pairs = [("The capital of France is", "Paris"), ("Q: Is water wet? A:", "Yes, it is, as everybody knows.")]
    lm = LineasLM(model, maps, 0.3, tokens, tokenizer=made, batch_size=2)
    with maps.attach(model, 0.3, tokens=tokens):
        expected = [score_of(model, made.encode(context), made.encode(f" {answer}")) for context, answer in pairs]
    np.testing.assert_allclose(scores(lm, pairs), expected, rtol=0, atol=1e-3)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "lineas.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ImportError, match=r'needs lm-eval: pip install "lineas\[lm-eval\]"'):
        importlib.import_module("lineas.evaluation.harness")


@pytest.fixture
def no_weights(monkeypatch):
    """Loading a model's weights is an error."""
    import transformers

    def loaded(*args, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)


WRONG = {
    "no maps": ({"maps": None}, ValueError, r"maps: expected a file, folder or hub id of maps, got none"),
    "no name": ({"maps": "a.safetensors+"}, ValueError, r"maps: expected names with \+ between them, got 'a.safe"),
    "no file": ({"maps": "none.safetensors"}, FileNotFoundError, r"none.safetensors"),
    "no second file": ({"maps": "maps.safetensors+none.safetensors"}, FileNotFoundError, r"none.safetensors"),
    "no such maps": ({"maps": 3}, TypeError, r"maps must be SteeringMaps, the result of a fit or a name, got int"),
    "a path": ({"maps": "path.safetensors"}, ValueError, r"maps: path.safetensors holds a sparse path: save the maps"),
    "a Gaussian map": ({"maps": "gaussian.safetensors"}, ValueError, r"gaussian.safetensors holds GaussianMap"),
    "strength word": ({"strength": "strong"}, ValueError, r"strength must be a number or 'calibrated', got 'strong'"),
    "strength nan": ({"strength": "nan"}, ValueError, r"strength must be finite, got nan"),
    "strength array": ({"strength": [0.5]}, TypeError, r"strength must be a real number, got list"),
    "strength flag": ({"strength": True}, TypeError, r"strength must be a real number, got bool"),
    "token word": ({"map_tokens": "first"}, ValueError, r"map_tokens must be 'all', 'last'.* got 'first'"),
    "token slice": ({"map_tokens": "1:x"}, ValueError, r"map_tokens must be a word or start:stop:step, got '1:x'"),
    "token step": ({"map_tokens": "1:5:0"}, ValueError, r"map_tokens: the step of a slice must be above 0, got 0"),
    "token number": ({"map_tokens": 3}, TypeError, r"map_tokens must be .* a slice or a callable, got int"),
    "callable": (
        {"maps": lineas.SteeringMaps(attached.random_maps({"a": 2}), {"tokens": {"callable": "f"}})},
        ValueError,
        r"pass it, or another selection, as map_tokens=",
    ),
    "module": ({"maps": attached.random_maps({"model.layers.0.nothing": 16})}, ValueError, r"model.layers.0.nothing"),
    "width": ({"maps": attached.random_maps({"model.norm": 15})}, ValueError, r"model.norm: the map is for 15 neurons"),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["named", "loaded"])
@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_input_is_an_error_before_weights_are_read(
    folder, tmp_path, monkeypatch, no_weights, given, error, message, loaded
):
    monkeypatch.chdir(tmp_path)
    language_model()[1].save("maps.safetensors")
    rng = np.random.default_rng(0)
    sides = [{"a": rng.normal(k, 1, (9, 2))} for k in (0, 1)]
    lineas.sparse_path(*sides).save("path.safetensors")
    lineas.bures_map(*(side["a"] for side in sides)).save("gaussian.safetensors")
    model = language_model()[0]
    with pytest.raises(error, match=message):
        if loaded:
            lm_of(LineasLM, **given)
        else:
            LineasLM(**arguments(folder) | given)
    assert not lineas.attached(model) and attached.hooks_on(model) == 0


def test_tokens_cannot_be_selected_in_an_encoder_decoder_model():
    import transformers

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=models_zoo.VOCABULARY, **sizes))
    given = {"pretrained": model, "maps": attached.random_maps({"encoder.block.0.layer.1.DenseReluDense.wo": 16})}
    with pytest.raises(ValueError, match="tokens='last' needs a model with one text"):
        lm_of(LineasLM, map_tokens="last", **given)
    assert scores(lm_of(LineasLM, **given)) != scores(lm_of(HFLM, pretrained=model))
    assert not lineas.attached(model)
