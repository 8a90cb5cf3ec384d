"""The table of the paper: a rehearsal of the whole protocol, held against transformers alone, and the parts of it."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _paper  # noqa: E402
import _paper_data  # noqa: E402
import _paper_published  # noqa: E402
import _paper_text  # noqa: E402
import models_zoo as zoo  # noqa: E402
import paper_table  # noqa: E402

import lineas  # noqa: E402
from lineas.hooks.modules import block_names, resolve  # noqa: E402

# ---- the whole protocol ----


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A rehearsal that is cut off in the midst of it, and goes on: its folder, and what was there before."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("paper")
    command = ["--rehearse", "--results", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        # lm-eval asks pip, the compiler and more for their versions, which takes seconds.
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        whole = _paper_text.Study.mmlu

        def cut_off(self, method, seed):
            if (method, seed) == ("Lin-AcT", 0):
                raise KeyboardInterrupt
            return whole(self, method, seed)

        with patch.context() as first:
            first.setattr(_paper_text.Study, "mmlu", cut_off)
            with pytest.raises(KeyboardInterrupt):
                paper_table.main(command)
        found = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.suffix in (".json", ".safetensors")}
        paper_table.main(command)
    return folder, found


@pytest.fixture(scope="module")
def everything(rehearsed):
    return json.loads((rehearsed[0] / "rehearsal.json").read_text())


@pytest.fixture(scope="module")
def parts(rehearsed):
    """Model, tokenizer and a function that gives the maps of a method and a seed, loaded without the script."""
    folder = rehearsed[0]
    where = folder / "stand-ins" / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(where).eval()

    def maps(method, seed):
        (file,) = folder.glob(f"maps-{_paper.slug(method)}-{seed}-*.safetensors")
        return lineas.load(file)

    return model, transformers.AutoTokenizer.from_pretrained(where), maps


@pytest.mark.slow
def test_a_rehearsal_measures_everything_and_says_what_it_is(rehearsed, everything):
    lines = (rehearsed[0] / "rehearsal.md").read_text().splitlines()
    assert lines[0] == "# Rehearsal of paper_table.py" and lines[2] == _paper.REHEARSAL
    assert [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("|")][2:] == [*_paper_text.METHODS]
    assert not (rehearsed[0] / "table.md").exists()
    assert everything["rehearsal"] and everything["seeds"] == [0, 1]
    for method, by in everything["values"].items():
        alone = method in ("none", "prompt")  # of which sentences and questions are the same for all seeds
        assert {name: len(by[name]) for name in by} == {"rtp": 2, "tet": 2, "ppl": 2 - alone, "mmlu": 2 - alone}
    assert np.isfinite([value for by in everything["values"].values() for one in by.values() for value in one]).all()
    assert everything["values"]["none"]["ppl"] == everything["values"]["prompt"]["ppl"]
    perplexities = [tuple(by["ppl"]) for method, by in everything["values"].items() if method != "prompt"]
    assert len(set(perplexities)) == len(perplexities), "all methods do something else"


@pytest.mark.slow
def test_a_run_that_was_cut_off_went_on(rehearsed):
    folder, before = rehearsed
    assert any(file.name.startswith("mmlu-iti-c-0") for file in before)
    assert not any(file.name.startswith(("mmlu-lin-act", "rtp-none-1")) for file in before)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert not [*folder.glob("fit-*")], "fits that are done leave no checkpoint"


@pytest.mark.slow
def test_a_third_run_loads_no_model(rehearsed, everything, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("everything is known")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    paper_table.main(["--rehearse", "--results", str(rehearsed[0])])
    assert json.loads((rehearsed[0] / "rehearsal.json").read_text())["values"] == everything["values"]
    assert (rehearsed[0] / "rehearsal.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method, strength", [("none", 0.0), ("ITI-C", 0.5), ("LinEAS", 1.0)])
def test_perplexities_are_those_of_transformers(parts, everything, method, strength):
    model, tokenizer, maps = parts
    settings = everything["settings"]
    sentences = _paper_data.texts(settings["wikipedia"])[1:][: settings["ppl_sentences"]]  # of one token there is none
    handle = maps(method, 0).attach(model, strength) if strength else None
    losses = []
    for text in sentences:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : settings["ppl_length"]]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    if handle is not None:
        handle.remove()
    assert everything["values"][method]["ppl"][0] == pytest.approx(np.exp(losses).mean(), rel=1e-4)


@pytest.mark.slow
def test_accuracies_are_those_of_few_shots_by_hand(rehearsed, parts, everything):
    model, tokenizer, maps = parts
    folder = rehearsed[0] / "stand-ins" / "tasks"
    shots, questions = (
        [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()] for split in ("dev", "test")
    )

    def asked(entry):
        return f"{entry['question']}\nA. {entry['choices'][0]}\nB. {entry['choices'][1]}\nAnswer:"

    context = "\n\n".join(f"{asked(entry)} {'AB'[entry['answer']]}" for entry in shots)
    right = []
    with maps("CAA (middle)", 1).attach(model):
        for entry in questions[: everything["settings"]["mmlu_limit"]]:
            before = len(tokenizer(f"{context}\n\n{asked(entry)}")["input_ids"])
            scores = []
            for letter in "AB":
                ids = tokenizer(f"{context}\n\n{asked(entry)} {letter}", return_tensors="pt")["input_ids"]
                with torch.no_grad():
                    likely = model(input_ids=ids).logits.log_softmax(dim=-1)
                scores.append(likely[0, before - 1 : -1].gather(1, ids[0, before:, None]).sum().item())
            right.append(int(np.argmax(scores)) == entry["answer"])
    assert everything["values"]["CAA (middle)"]["mmlu"][1] == 100 * np.mean(right)


@pytest.mark.slow
def test_shares_are_of_what_the_judge_says_of_the_continuations(rehearsed, everything):
    folder, settings = rehearsed[0], everything["settings"]
    judge = transformers.pipeline("text-classification", settings["judge"], device="cpu")
    for which, seed in (("rtp", 0), ("tet", 1)):
        (log,) = folder.glob(f"texts-{which}-{seed}-*.jsonl")
        entries = [json.loads(line) for line in log.read_text().splitlines()[1:]]
        texts = [text for text, _ in entries[0]["value"]]  # the unsteered model's come first, in one batch
        share = 100 * np.mean([one["label"] == "toxic" for one in judge(texts)])
        assert everything["values"]["none"][which][seed] == pytest.approx(share)
    assert 0 < np.mean(everything["values"]["CAA"]["rtp"]) < 100, "the stand-in of the judge tells texts apart"


# ---- what the paper counts ----

SIZES = {
    "Qwen/Qwen2.5-1.5B": (
        transformers.Qwen2Config,
        dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2),
        {"CAA": 0.043, "CAA (middle)": 0.0015, "ITI-C": 0.043, "Lin-AcT": 0.086, "LinEAS": 0.086},
    ),
    "google/gemma-2-2b": (
        transformers.Gemma2Config,
        dict(hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4),
        {"CAA": 0.06, "CAA (middle)": 0.0023, "ITI-C": 0.06, "Lin-AcT": 0.12, "LinEAS": 0.24},
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_maps_sit_where_the_paper_counts_parameters(name):
    """Table 7 has the number of parameters of each method, in millions: one or two for each neuron."""
    kind, size, counted = SIZES[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(kind(**size, intermediate_size=64, vocab_size=64))
    study = _paper_text.Study.__new__(_paper_text.Study)
    vars(study).update(model=model, layers=_paper_text.LAYERS)
    for method, millions in counted.items():
        modules = resolve(model, study._modules(method))
        shifts_alone = method in ("CAA", "CAA (middle)", "ITI-C")
        count = len(modules) * size["hidden_size"] * (1 if shifts_alone else 2)
        assert count / 1e6 == pytest.approx(millions, abs=0.6 * 10 ** -len(str(millions).partition(".")[2]))
    middle = study._modules("CAA (middle)")
    assert middle == [block_names(model)[size["num_hidden_layers"] // 2]]


def test_the_papers_numbers_are_found_by_model_and_method():
    assert _paper_published.published("Qwen/Qwen2.5-7B", "LinEAS")["tet"] == 14.95
    assert _paper_published.published("google/gemma-2-2b", "AurA") == {}
    assert _paper_published.published("another", "LinEAS") == {}


# ---- sampling ----


def test_prompts_of_a_batch_go_on_as_alone():
    """A penalty on tokens that were said knows nothing of padding, also where that is the token that ends a text."""
    model, tokenizer = zoo.llama(), zoo.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4  # ends are likely, or very unlikely
    options = _paper_text.sampling(paper_table._parser().parse_args(["--repetition-penalty", "8.0"]))
    assert [*options] == ["do_sample", "temperature", "top_p", "top_k", "repetition_penalty"]
    greedy = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, "max_new_tokens": 8}
    prompts = zoo.texts(12, shortest=2, longest=7)

    def write(texts, **settings):
        prompt = tokenizer(texts, return_tensors="pt", padding=True)
        prompt.pop("token_type_ids", None)
        new = model.generate(**prompt, **greedy, **settings)
        return tokenizer.batch_decode(new[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    plain = {"repetition_penalty": options["repetition_penalty"]}
    alone = [write([prompt], **plain)[0] for prompt in prompts]
    assert write(prompts, **plain) == alone
    blind = transformers.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
    assert write(prompts, logits_processor=[blind]) != alone


# ---- data ----


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_texts_come_out_of_files_of_each_kind(tmp_path):
    plain = write(tmp_path / "a.txt", "one\n\n two \n")
    lines = write(tmp_path / "a.jsonl", '"one"\n{"prompt": {"text": "two", "toxicity": 0.1}}\n{"query": "three"}\n')
    sheet = write(tmp_path / "a.csv", 'id,sentence\n1,"one,\ntwo"\n')
    assert _paper_data.texts(plain) == ["one", "two"]
    assert _paper_data.texts(lines) == ["one", "two", "three"] and _paper_data.texts(lines, 2) == ["one", "two"]
    assert _paper_data.texts(sheet) == ["one,\ntwo"]
    assert _paper_data.texts(plain, 1, lambda text: text == "two") == ["two"]


def test_comments_are_toxic_or_without_labels(tmp_path):
    rows = ["id,comment_text,toxic,severe_toxic,obscene,threat,insult,identity_hate"]
    rows += ["1,a,1,0,0,0,1,0", "2,b,0,0,0,0,0,0", "3,c,0,0,1,0,0,0", "4,d,-1,-1,-1,-1,-1,-1"]
    assert _paper_data.toxic_and_clean(write(tmp_path / "a.csv", "\n".join(rows))) == (["a"], ["b"])


def test_prompts_without_a_known_toxicity_are_left_out(tmp_path):
    prompts = [{"prompt": {"text": "a", "toxicity": None}}, {"prompt": {"text": "b", "toxicity": 0.0}}, "c"]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, prompts)))
    assert _paper_data.toxicity_prompts(file) == ["b", "c"]


def test_files_may_lie_on_the_hub(tmp_path, monkeypatch):
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def download(repository, file, *, repo_type):
        asked.append((repository, file, repo_type))
        return write(tmp_path / "a.txt", "one\n")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert _paper_data.texts("hf://datasets/some/set/data/a.txt") == ["one"]
    assert _paper.local("hf://some/model/a.bin").name == "a.txt"
    assert asked == [("some/set", "data/a.txt", "dataset"), ("some/model", "a.bin", "model")]
    with pytest.raises(SystemExit, match=r"expected hf://OWNER/NAME/FILE .* got hf://datasets/a\.txt"):
        _paper_data.texts("hf://datasets/a.txt")


def test_draws_depend_on_the_seed_alone():
    pool = [str(k) for k in range(50)]
    drawn = _paper_data.draw(pool, 7, 3, "pool")
    assert drawn == _paper_data.draw(pool, 7, 3, "pool") != _paper_data.draw(pool, 7, 4, "pool")
    assert len({*drawn} & {*pool}) == 7


@pytest.mark.parametrize(
    "read, name, content, message",
    [
        (_paper_data.texts, "none.txt", None, "there is no file .*none.txt"),
        (_paper_data.texts, "a.jsonl", '{"body": "x"}', "expected one of the columns text, prompt, .* got body"),
        (_paper_data.toxic_and_clean, "a.csv", "comment_text,toxic\na,1\n", "severe_toxic is missing"),
        (
            lambda path: _paper_data.draw(_paper_data.texts(path), 3, 0, "x"),
            "a.txt",
            "a\n",
            "x: 3 texts .* there are 1",
        ),
    ],
)
def test_bad_data_is_named(tmp_path, read, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(SystemExit, match=message):
        read(str(tmp_path / name))


# ---- tables and settings ----


def test_intervals_are_those_of_students_t():
    stats = pytest.importorskip("scipy.stats")
    values = [1.0, 2.5, 2.0, 4.0]
    found = _paper.spread(values)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high))
    assert found["sd"] == pytest.approx(np.std(values, ddof=1)) and found["n"] == 4
    assert _paper.spread(values, 0.5, 4.0) | found == found and _paper.spread(values, 0.5, 4.0)["high"] == 4.0
    assert _paper.spell(found) == f"2.38 ± {found['sd']:.2f} [{theirs.low:.2f}, {theirs.high:.2f}]"
    assert _paper.spread([3.0])["low"] is None and _paper.spell(_paper.spread([3.0])) == "3.00"
    assert _paper.spell(None) == ""


def test_findings_of_other_settings_stand_beside_one_another(tmp_path):
    results, calls = _paper.Results(tmp_path / "new"), []

    def compute():
        calls.append(1)
        return {"x": 1.5}

    assert [results.value("a b", {"n": n}, compute) for n in (1, 2, 1)] == [{"x": 1.5}] * 3
    assert len(calls) == 2 and len([*results.folder.glob("a-b-*.json")]) == 2
    kept = json.loads(results.path("a b", {"n": 2}, ".json").read_text())
    assert kept["settings"] == {"n": 2} and kept["value"] == {"x": 1.5}
    with pytest.raises(ZeroDivisionError):
        results.value("broken", 0, lambda: 1 / 0)
    assert not [*results.folder.glob("broken*")]


def test_nothing_is_written_into_the_documentation():
    with pytest.raises(SystemExit, match="--results must not be in the documentation"):
        _paper.Results(_paper.ROOT / "docs" / "paper")
    assert not (_paper.ROOT / "docs" / "paper").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "give --model, or --rehearse"),
        (["--rehearse", "--methods", "none", "prompt"], "at least one must be fitted: CAA"),
        (["--model", "m", "--toxic", "a.txt"], "--toxic and --clean belong together"),
        (["--model", "m", "--strength", "LinEAS=much"], "expected NAME=NUMBER, not 0, with NAME of CAA"),
        (["--model", "m", "--strength", "LinEAS=0"], "expected NAME=NUMBER, not 0, with NAME of CAA"),
        (["--model", "m", "--layers", "CAA=.*"], "expected NAME=REGEX with NAME of ITI-C"),
        (
            ["--model", "m", "--dtype", "float31"],
            "expected a dtype of torch such as float32 or bfloat16, got 'float31'",
        ),
    ],
)
def test_bad_options_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        paper_table.main(given)
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_options_say_what_a_rehearsal_is():
    parser = paper_table._parser()
    small = _paper.parse(parser, ["--rehearse", "--steps", "7"], paper_table.SMALL)
    assert small.steps == 7 and small.sentences == 6
    usual = _paper.parse(paper_table._parser(), ["--model", "m"], paper_table.SMALL)
    assert (usual.steps, usual.sentences, usual.rtp_prompts, usual.ppl_sentences) == (1000, 32, 1000, 20_000)
    assert usual.tet_prompts is None and usual.seeds == [0, 1, 2, 3] and usual.shots == 5
