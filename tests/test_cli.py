"""The command line, on a tiny random model saved to disk."""

import json
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import lineas
from lineas import cli

pytest.importorskip("transformers")
import models_zoo
from commands import fails

NORMS = models_zoo.NORMS["llama"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, and two files of prompts."""
    folder = tmp_path_factory.mktemp("cli")
    models_zoo.llama().save_pretrained(folder / "model")
    models_zoo.tokenizer().save_pretrained(folder / "model")
    (folder / "source.txt").write_text("\n\n".join(models_zoo.texts(8, seed=1)) + "\n", encoding="utf-8")
    (folder / "target.txt").write_text("\ufeff" + "\n".join(models_zoo.texts(6, seed=2)), encoding="utf-8")
    return folder


@pytest.fixture
def fit(folder, tmp_path):
    """Run ``lineas fit`` with these options; returns the exit code and the path of the maps."""

    def run(*options, model=None, source=None, target=None, output=None, layers=(NORMS,)):
        output = output or tmp_path / "maps.safetensors"
        files = ["--source", str(source or folder / "source.txt"), "--target", str(target or folder / "target.txt")]
        arguments = ["fit", str(model or folder / "model"), *files, "--layers", *layers, "-o", str(output), "--quiet"]
        return cli.main([*arguments, *options]), output

    return run


def read(path):
    return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line]


def test_fit_end_to_end_equals_the_library(fit, folder, capsys):
    code, path = fit("--steps", "3", "--lr", "0.1", "--l1", "0.001", "--group", "0.002", "--held-out-fraction", "0.5")
    assert code == 0
    source, target = read(folder / "source.txt"), read(folder / "target.txt")
    expected = lineas.fit_end_to_end(
        models_zoo.llama(),
        source[:4],
        target[:3],
        held_out=(source[4:], target[3:]),
        layers=NORMS,
        tokenizer=models_zoo.tokenizer(),
        steps=3,
        lr=0.1,
        l1=0.001,
        group=0.002,
        progress=False,
    )
    maps = lineas.load(path)
    assert maps == expected.maps
    assert maps.metadata["model"] == str(folder / "model")
    out = capsys.readouterr().out
    assert "held-out loss" in out and f"written to {path}" in out


def test_fit_keeps_texts_as_they_are_and_fits_shifts_alone(fit, folder, tmp_path):
    kept = tmp_path / "keep.txt"
    kept.write_text("\n".join(models_zoo.texts(5, seed=9)) + "\n", encoding="utf-8")
    code, path = fit("--steps", "2", "--slopes", "--keep", str(kept), "--keep-weight", "2", "--keep-loss", "kl")
    assert code == 0
    expected = lineas.fit_end_to_end(
        models_zoo.llama(),
        read(folder / "source.txt"),
        read(folder / "target.txt"),
        layers=NORMS,
        tokenizer=models_zoo.tokenizer(),
        steps=2,
        slopes=False,
        keep=read(kept),
        keep_weight=2.0,
        progress=False,
    )
    assert lineas.load(path) == expected.maps
    assert all((one.weight == 1).all() for one in expected.maps.values())


def test_fit_takes_prompts_in_parts(fit):
    code, path = fit("--steps", "2", "--batch-size", "2", "--mini-batch", "4")
    assert code == 0
    settings = lineas.load(path).metadata["settings"]
    assert (settings["batch_size"], settings["mini_batch"]) == (2, 4)


def test_held_out_prompts_choose_a_strength(fit, capsys):
    code, path = fit("--steps", "2", "--held-out-fraction", "0.5", "--strengths", "0.5", "0.25")
    assert code == 0
    metadata = lineas.load(path).metadata
    assert metadata["settings"]["strengths"] == [0.5, 0.25]
    if metadata["history"]["best_step"]:
        assert f"(at strength {metadata['history']['best_strength']:g} of the fit)" in capsys.readouterr().out


def test_sites_are_listed_from_the_configuration_alone(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "model" / "config.json").read_bytes())
    assert cli.main(["sites", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{lineas.sites(models_zoo.llama())}\n"


def test_a_folded_model_is_the_librarys(fit, folder, tmp_path, capsys):
    _, path = fit("--method", "linear")
    made = tmp_path / "folded"
    arguments = ["fold", str(folder / "model"), "--maps", str(path), "--strength", "0.5", "--quiet", "-o"]
    assert cli.main([*arguments, str(made)]) == 0
    assert capsys.readouterr().out.endswith(f"3 maps at strength 0.5\nwritten to {made}\n")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(made)(models_zoo.texts(2), return_tensors="pt", padding=True)
    expected = lineas.load(path).fold(models_zoo.llama(), 0.5)
    assert (AutoModelForCausalLM.from_pretrained(made)(**batch).logits == expected(**batch).logits).all()
    fails(capsys, cli.main([*arguments, str(made)]), f"--output: {made} exists")
    nowhere = tmp_path / "no" / "folded"
    fails(capsys, cli.main([*arguments, str(nowhere)]), f"--output: the folder of {nowhere} does not exist")
    wrong = tmp_path / "x.GGUF"
    fails(capsys, cli.main([*arguments, str(wrong)]), f"--output: {wrong} is the name of a GGUF file, and {folder}")
    lineas.SteeringMaps({"model.layers.9.mlp": lineas.AffineMap.identity(16)}).save(path)
    fails(capsys, cli.main([*arguments, str(tmp_path / "other")]), "has no module 'model.layers.9.mlp'")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folded", "maps.safetensors"]


def test_a_model_without_a_tokenizer_is_folded_without(folder, maps_path, tmp_path, capsys):
    model, made = tmp_path / "weights", tmp_path / "folded"
    models_zoo.llama().save_pretrained(model)
    arguments = ["fold", str(model), "--maps", str(maps_path), "--quiet", "-o", str(made)]
    assert cli.main(arguments) == 0
    assert f"lineas: {model} has no tokenizer files, and {made} gets none" in capsys.readouterr().err.splitlines()
    assert {path.name for path in made.iterdir()} == {path.name for path in model.iterdir()}
    (model / "tokenizer.json").write_text("damaged")
    fails(capsys, cli.main([*arguments[:-1], str(tmp_path / "other")]), f"cannot load '{model}'")


@pytest.mark.parametrize("method", ["mean", "gaussian", "linear"])
def test_fit_local_methods_equal_the_library(fit, folder, method):
    code, path = fit("--method", method, "--pooling", "max", "--tokens=-2:")
    assert code == 0
    tokens = slice(-2, None)
    settings = {"layers": NORMS, "tokenizer": models_zoo.tokenizer(), "pooling": "max", "tokens": tokens}
    source, target = (
        lineas.collect(models_zoo.llama(), read(folder / f"{name}.txt"), **settings) for name in ("source", "target")
    )
    maps = lineas.load(path)
    assert maps == lineas.fit(source, target, method=method)
    assert maps.metadata["method"] == method
    assert maps.metadata["layers"] == NORMS and maps.metadata["pooling"] == "max"
    with maps.attach(models_zoo.llama()) as handle:
        assert handle.tokens == tokens


@pytest.mark.parametrize("method", ["incremental", "end-to-end"])
def test_maps_for_some_tokens_say_so_in_their_file(fit, method):
    code, path = fit("--method", method, "--tokens", "last", *(["--steps", "1"] if method == "end-to-end" else []))
    assert code == 0
    assert lineas.load(path).metadata["tokens"] == "last"


def test_fit_incremental_equals_the_library(fit, folder):
    code, path = fit("--method", "incremental")
    assert code == 0
    expected = lineas.fit_incremental(
        models_zoo.llama(),
        read(folder / "source.txt"),
        read(folder / "target.txt"),
        layers=NORMS,
        tokenizer=models_zoo.tokenizer(),
        progress=False,
    )
    assert lineas.load(path) == expected


def test_fit_takes_several_globs_and_a_dtype(fit):
    code, path = fit("--method", "mean", "--dtype", "bfloat16", layers=("model.layers.0.input_layernorm", "model.norm"))
    assert code == 0
    assert list(lineas.load(path)) == ["model.layers.0.input_layernorm", "model.norm"]


def test_a_fit_is_kept_and_goes_on(fit, folder, tmp_path, capsys):
    kept = tmp_path / "kept.safetensors"
    assert fit("--steps", "2", "--checkpoint", str(kept))[0] == 0
    code, path = fit("--steps", "4", "--lr", "auto", "--patience", "3", "--checkpoint", str(kept))
    assert code == 0
    expected = lineas.fit_end_to_end(
        models_zoo.llama(),
        read(folder / "source.txt"),
        read(folder / "target.txt"),
        layers=NORMS,
        tokenizer=models_zoo.tokenizer(),
        steps=4,
        progress=False,
    )
    assert lineas.load(path) == expected.maps
    code, path = fit("--checkpoint", str(kept), "--l1", "0.1")
    assert code == 2 and "is that of another fit, of which the l1 differs" in capsys.readouterr().err


def test_an_interrupted_fit_saves_what_it_has_and_returns_130(fit, monkeypatch, capsys):
    fitted = lineas.fit_end_to_end

    def interrupted(*args, **kwargs):
        import dataclasses

        return dataclasses.replace(fitted(*args, **{**kwargs, "steps": 1}), stopped="interrupted")

    monkeypatch.setattr(lineas, "fit_end_to_end", interrupted)
    code, path = fit("--steps", "5")
    assert code == 130
    assert len(lineas.load(path)) == models_zoo.LAYERS
    assert "interrupted; maps of step 1 kept" in capsys.readouterr().err


def test_ctrl_c_outside_the_steps_returns_130_and_writes_nothing(fit, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lineas, "collect", interrupt)
    code, _ = fit("--method", "mean")
    assert code == 130
    assert capsys.readouterr().err == "lineas: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_an_exception_while_a_command_runs(fit, tmp_path, monkeypatch, capsys):
    seen = []

    def terminated(*args, **kwargs):
        warnings.warn("one\nor two", UserWarning, stacklevel=1)
        signal.raise_signal(signal.SIGTERM)

    def looked_at(*args, **kwargs):
        seen.append(signal.getsignal(signal.SIGTERM))
        raise ValueError("seen")

    def other(*args):
        raise AssertionError

    monkeypatch.setattr(lineas, "collect", terminated)
    shown = warnings.showwarning
    with pytest.raises(SystemExit) as caught:
        fit("--method", "mean")
    assert caught.value.code == 143
    assert capsys.readouterr().err == "lineas: warning: one or two\nlineas: terminated\n"
    assert list(tmp_path.iterdir()) == [] and warnings.showwarning is shown
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    monkeypatch.setattr(lineas, "collect", looked_at)
    with ThreadPoolExecutor(1) as pool:
        code, _ = pool.submit(fit, "--method", "mean").result()
    assert (code, seen) == (2, [signal.SIG_DFL])  # a thread cannot set one
    signal.signal(signal.SIGTERM, other)
    try:
        assert fit("--method", "mean")[0] == 2 and seen[1] is other
    finally:
        assert signal.signal(signal.SIGTERM, signal.SIG_DFL) is other


def test_fit_refuses_bad_input(fit, folder, tmp_path, capsys):
    one, binary = tmp_path / "one.txt", tmp_path / "binary.txt"
    one.write_text("good day\n \n", encoding="utf-8")
    binary.write_bytes(b"good \xff day\n")
    cases = [
        ({"source": tmp_path / "absent.txt"}, (), "absent.txt"),
        ({"source": one}, (), "one.txt: expected at least 2 prompts, got 1"),
        ({"target": binary}, (), "binary.txt: expected UTF-8 text, got byte 0xff at 5"),
        ({"output": tmp_path / "absent" / "maps.safetensors"}, (), "--output: expected a file in an existing folder"),
        ({"output": folder}, (), "--output: expected a file in an existing folder"),
        ({"model": tmp_path / "absent"}, (), "absent"),
        ({"layers": ("model.layer.*",)}, (), "--layers: no module matches 'model.layer.*'"),
        ({}, ("--method", "linear", "--lr", "0.1"), "--lr is for --method end-to-end only, got --method linear"),
        ({}, ("--held-out-fraction", "1.5"), "--held-out-fraction: expected 0 < x < 1, got 1.5"),
        ({}, ("--held-out-fraction", "0.9"), "at least 2 prompts on each side, got 1 fitted and 7 held out of"),
        ({}, ("--tokens", "generated"), "tokens='generated' selects nothing of source"),
        ({}, ("--checkpoint", str(tmp_path / "none" / "fit")), "--checkpoint: expected a file in an existing folder"),
        ({}, ("--device", "nowhere"), "--device: expected a device of this machine, got 'nowhere'"),
    ]
    for files, options, message in cases:
        code, output = fit(*options, **files)
        fails(capsys, code, message)
        assert not output.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"one.txt", "binary.txt"}


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test."""

    def load(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli, "_load_model", load)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--l1", "nan"), "--l1 must be finite, got nan"),
        (("--group", "-1"), "--group must not be negative, got -1"),
        (("--lr", "0"), "--lr must be above 0, got 0"),
        (("--lr", "-1e-3"), "--lr must be above 0, got -0.001"),
        (("--optimizer", "adm"), "--optimizer must be one of 'sgd', 'adam', got 'adm'"),
        (("--optimizer", "adam"), "--lr must be a number for optimizer 'adam'"),
        (("--scaling", "papr"), "--scaling must be one of"),
        (("--init", "means"), "--init must be one of 'mean', 'gaussian', 'linear', 'iti-c', 'linear-incremental', "),
        (("--init", "best"), "--init='best': there are no held_out sets to choose by"),
        (("--pooling", "median"), "--pooling must be one of"),
        (("--pooling", "median", "--method", "mean"), "--pooling must be one of"),
        (("--tokens", "lst"), "--tokens must be 'all', 'last', 'prompt', 'generated', a slice or a callable, got"),
        (("--tokens", "lst", "--method", "incremental"), "--tokens must be 'all'"),
        (("--tokens", "::-1"), "--tokens: the step of a slice must be above 0, got -1"),
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--mini-batch", "1"), "--mini-batch must be at least 2, got 1"),
        (("--batch-size", "0", "--method", "linear"), "--batch-size must be at least 1, got 0"),
        (("--max-length", "0"), "--max-length must be at least 1, got 0"),
        (("--patience", "0"), "--patience must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--strengths", "0.5", "1"), "--strengths: there are no prompts to choose among them by without --held-out"),
        (("--strengths", "nan", "--held-out-fraction", "0.5"), "--strengths must be finite, got nan"),
        (("--keep-weight", "-1"), "--keep-weight must not be negative, got -1"),
        (("--max-kl", "0"), "--max-kl must be above 0, got 0"),
        (("--max-kl", "0.1", "--keep-weight", "1"), "--max-kl is for keep_weight='auto', got keep_weight=1"),
        (("--keep-loss", "l2", "--max-kl", "0.1"), "--keep-loss must be one of 'kl', 'activations', got 'l2'"),
        (("--slopes", "--shifts"), "--slopes and shifts are both False: nothing is left to be fitted"),
        (("--max-kl", "0.1", "--method", "linear"), "--max-kl is for --method end-to-end only, got --method linear"),
    ],
)
def test_values_are_checked_before_the_model_is_loaded(fit, no_model, capsys, options, message):
    code, output = fit(*options)
    fails(capsys, code, message)
    assert not output.exists()


def test_values_of_other_commands_are_checked_before_a_model_is_loaded(folder, maps_path, no_model, tmp_path, capsys):
    for option, value, message in (
        ("--strength", "nan", "--strength must be finite, got nan"),
        ("--max-new-tokens", "0", "--max-new-tokens must be at least 1, got 0"),
        ("--temperature", "-1", "--temperature must not be negative, got -1"),
        ("--temperature", "inf", "--temperature must be finite, got inf"),
        ("--top-p", "2", "--top-p must be from 0 to 1, got 2"),
        ("--top-p", "-1e-3", "--top-p must be from 0 to 1, got -0.001"),
    ):
        fails(capsys, generate(folder, maps_path, option, value, "a day"), message)
    fails(capsys, generate(folder, maps_path, ""), "prompts[0] has no tokens")
    fold = ["fold", str(folder / "model"), "--maps", str(maps_path), "-o", str(tmp_path / "x"), "--strength", "nan"]
    fails(capsys, cli.main(fold), "--strength must be finite, got nan")
    fails(capsys, cli.main(["demo", "--steps", "0"]), "--steps must be at least 1, got 0")
    fails(capsys, cli.main(["demo", "--seed", "-1"]), "--seed must be at least 0, got -1")


def test_the_maps_replace_no_file_that_the_fit_needs(fit, folder, no_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _ = fit("--checkpoint", "./same.st", output=tmp_path / "same.st")
    fails(capsys, code, "--output: same.st is the file of --checkpoint, which the maps would replace")
    for name in ("source", "target"):
        before = (folder / f"{name}.txt").read_bytes()
        (tmp_path / name).symlink_to(folder / f"{name}.txt")
        code, _ = fit(output=tmp_path / name)
        fails(capsys, code, f"is the file of --{name}, which the maps would replace")
        assert (folder / f"{name}.txt").read_bytes() == before


def test_slices_and_numbers_may_begin_with_a_minus(fit, folder):
    code, path = fit("--method", "mean", "--tokens", "-3:")
    assert code == 0 and lineas.load(path).metadata["tokens"] == {"slice": [-3, None, None]}
    code, path = fit("--method", "mean", "--tokens", ":-1")
    assert code == 0 and lineas.load(path).metadata["tokens"] == {"slice": [None, -1, None]}


def test_a_model_that_is_not_there_is_named(folder, maps_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    made = str(tmp_path / "made")
    (tmp_path / "empty").mkdir()
    for name, here in (("modles/llama", ", which is no folder here"), (str(tmp_path / "empty"), "")):
        for command in (["sites", name], ["fold", name, "--maps", str(maps_path), "-o", made]):
            fails(capsys, cli.main(command), f"cannot load {name!r}{here}: ")


@pytest.fixture(scope="module")
def maps_path(folder):
    """Maps strong enough to change what the tiny model says."""
    width = models_zoo.WIDTH
    weight, bias = np.full(width, -2.0, np.float32), np.linspace(-5, 5, width, dtype=np.float32)
    names = [f"model.layers.{k}.post_attention_layernorm" for k in range(models_zoo.LAYERS)]
    maps = lineas.SteeringMaps(
        {name: lineas.AffineMap(weight, bias) for name in names},
        {"method": "end-to-end", "settings": {"lr": 0.1, "steps": 2}, "history": {"loss": [2.0, 1.0]}},
    )
    path = folder / "maps.safetensors"
    maps.save(path)
    return path


def generate(folder, maps_path, *options):
    return cli.main(["generate", str(folder / "model"), "--maps", str(maps_path), "--quiet", *options])


def test_generate_equals_the_model_with_maps_on(folder, maps_path, capsys):
    import torch

    options = ("--temperature", "0", "--max-new-tokens", "6")
    assert generate(folder, maps_path, *options, "--strength", "0", "--strength", "1", "the film", "my day") == 0
    out = capsys.readouterr().out.splitlines()
    model, tokenizer = models_zoo.llama(), models_zoo.tokenizer()
    expected = []
    for prompt in ("the film", "my day"):
        tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
        for strength in (0.0, 1.0):
            with lineas.load(maps_path).attach(model, strength=strength):
                found = model.generate(tokens, do_sample=False, max_new_tokens=6, pad_token_id=0)[0]
            expected.append(f"[{strength:g}] {tokenizer.decode(found, skip_special_tokens=True)}")
    assert out == expected
    assert out[0][4:] != out[1][4:]


def test_calibrated_strengths(folder, maps_path, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    settings = {"neutral": models_zoo.texts(8, seed=5), "tokenizer": models_zoo.tokenizer(), "progress": False}
    found = lineas.load(maps_path).calibrate(models_zoo.llama(), max_kl=0.01, **settings)
    found.maps.save(path := tmp_path / "calibrated.safetensors")
    outputs = []
    for value in ("calibrated", repr(found.strength), "1"):
        assert generate(folder, path, "--strength", "0", "--strength", value, "--temperature", "0", "the film") == 0
        outputs.append(capsys.readouterr().out.splitlines()[1].partition("] "))
    assert outputs[0] == outputs[1] and outputs[0][0] == f"[{found.strength:g}" and outputs[0][2] != outputs[2][2]
    fold = ["fold", str(folder / "model"), "--quiet", "--strength", "calibrated", "-o", str(tmp_path / "x"), "--maps"]
    assert cli.main([*fold, str(path)]) == 0
    assert f"3 maps at strength {found.strength:g}\n" in capsys.readouterr().out
    batch = models_zoo.tokenizer()(models_zoo.texts(2), return_tensors="pt", padding=True)
    expected = found.maps.fold(models_zoo.llama(), found.strength)(**batch).logits
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "x")(**batch).logits == expected).all()
    fold[6] = str(tmp_path / "y")
    assert generate(folder, maps_path, "--strength", "calibrated", "a") == cli.main([*fold, str(maps_path)]) == 2
    assert capsys.readouterr().err.count("--strength='calibrated' is for maps that were calibrated") == 2


def test_generate_reads_prompts_and_repeats_itself_with_the_same_seed(folder, maps_path, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("the film\n\nmy day\n", encoding="utf-8")
    outputs = []
    for seed in ("3", "3", "4"):
        assert generate(folder, maps_path, "--prompts", str(file), "--seed", seed) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert [line.split()[:2] for line in outputs[0].splitlines()] == [["the", "film"], ["my", "day"]]


def test_generate_answers_conversations(folder, maps_path, tmp_path, capsys):
    import torch
    from transformers import AutoTokenizer

    tokenizer = models_zoo.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'the ' + m['content'] + ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
    )
    chats = tmp_path / "model"
    models_zoo.llama().save_pretrained(chats)
    tokenizer.save_pretrained(chats)
    asked = {"role": "user", "content": "the film"}
    lines = [[asked], {"messages": [asked, {"role": "assistant", "content": "my day"}]}]
    file = tmp_path / "chats.JSONL"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    options = ["--temperature", "0", "--max-new-tokens", "6", "--prompts", str(file), "--strength", "0.5"]
    assert cli.main(["generate", str(chats), "--maps", str(maps_path), "--quiet", *options]) == 0
    model, tokens = models_zoo.llama(), torch.tensor([tokenizer("the the film <eos> a")["input_ids"]])
    with lineas.load(maps_path).attach(model, strength=0.5):
        found = model.generate(tokens, do_sample=False, max_new_tokens=6, pad_token_id=0)[0, tokens.shape[1] :]
    answer = AutoTokenizer.from_pretrained(chats).decode(found, skip_special_tokens=True)
    assert capsys.readouterr().out == f"{answer}\n{answer}\n"


def test_generate_refuses_conversations_before_it_loads_a_model(folder, maps_path, no_model, tmp_path, capsys):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps([{"role": "user", "content": "the film"}]), encoding="utf-8")
    code = generate(folder, maps_path, "--prompts", str(file))
    fails(capsys, code, "prompts[0] is a conversation, and ")
    code = generate(folder, maps_path, "--prompts", str(file), "the film")
    fails(capsys, code, "prompts[1] must be a text like the entries before it, got list")


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson"])
def test_json_lines_whatever_the_case_of_their_ending(tmp_path, name):
    file, chat = tmp_path / name, [{"role": "user", "content": "x"}]
    file.write_text(f'"one\\ntwo"\n\n{json.dumps(chat)}\n[1, 2]\n', encoding="utf-8")
    assert cli._read_prompts(file) == ["one\ntwo", chat, [1, 2]]
    for line in ("3", "[]", '["a"]', '{"text": "a"}', '[{"content": "a"}]', "null", "[true]"):
        file.write_text(f'"one"\n{line}\n', encoding="utf-8")
        with pytest.raises(ValueError, match="line 2: expected a text, messages or token ids, got"):
            cli._read_prompts(file)


@pytest.mark.parametrize("name", ["a.json", "a.JSON"])
def test_a_json_list_is_no_list_of_lines(fit, no_model, tmp_path, capsys, name):
    (tmp_path / name).write_text('[\n"one",\n"two"\n]', encoding="utf-8")
    code, _ = fit(source=tmp_path / name)
    fails(capsys, code, f"{name}: expected text or JSON lines: write one value a line, and name the file .jsonl")


def test_generate_refuses_bad_input(folder, maps_path, tmp_path, capsys):
    fails(capsys, generate(folder, maps_path), "expected a prompt or --prompts FILE with at least one, got none")
    fails(capsys, generate(folder, maps_path, "--strength", "nan", "a day"), "strength")
    fails(capsys, generate(folder, tmp_path / "absent.safetensors", "a day"), "absent.safetensors")
    fails(capsys, generate(folder, folder / "source.txt", "a day"), "source.txt")
    other = tmp_path / "other.safetensors"
    lineas.SteeringMaps({"model.layers.9.mlp": lineas.AffineMap.identity(4)}).save(other)
    fails(capsys, generate(folder, other, "a day"), "model.layers.9.mlp")


def test_info_describes_maps_without_torch(maps_path):
    # A process of its own: the tests around this one have imported torch.
    code = (
        "import sys; from lineas import cli; status = cli.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "info", str(maps_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert repr(lineas.load(maps_path)) in done.stdout
    assert "settings: lr=0.1, steps=2" in done.stdout
    assert "history" not in done.stdout
    assert lineas.load(maps_path).summary() in done.stdout


def test_info_refuses_other_files(folder, tmp_path, capsys):
    fails(capsys, cli.main(["info", str(folder / "source.txt")]), "source.txt")
    file = tmp_path / "other.safetensors"
    lineas.GaussianMap(np.eye(2), np.zeros(2)).save(file)
    fails(capsys, cli.main(["info", str(file)]), "other.safetensors holds a GaussianMap, not steering maps")
    lineas.sparse_path(np.arange(6.0).reshape(3, 2), np.ones((3, 2))).save(file)
    fails(capsys, cli.main(["info", str(file)]), "other.safetensors is a sparse path: save the maps of one of its")


def test_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    for unknown in (["info", "maps", "--unknown"], ["generate", "model", "--maps", "maps", "prompt", "--unknown"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(unknown)
        assert stop.value.code == 2
        assert "unrecognized arguments: " in (err := capsys.readouterr().err) and err.endswith("--unknown\n")
    with pytest.raises(SystemExit):
        cli.main(["fold", "model", "--strength", "much"])
    assert "argument --strength: expected a number or calibrated, got 'much'" in capsys.readouterr().err
    for text in ("1:x", "1:2:3:4"):
        with pytest.raises(SystemExit):
            cli.main(["fit", "model", "--tokens", text])
        assert f"argument --tokens: expected a word or start:stop:step, got '{text}'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lineas {lineas.__version__}\n"


def test_prompts_may_stand_before_and_after_the_options(folder, maps_path, capsys):
    assert generate(folder, maps_path, "the film", "--max-new-tokens", "1", "my day", "a dog", "--top-p", "0") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["the", "my", "a"]


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_missing_packages_name_the_extra(fit, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, _ = fit("--method", "mean")
    fails(capsys, code, 'this command needs torch and transformers: pip install "lineas[torch]"')
