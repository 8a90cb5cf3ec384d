"""The commands ``lineas evaluate`` and ``lineas calibrate``, on a tiny random model saved to disk."""

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
    """A tiny Llama with its tokenizer, maps, prompts and neutral texts."""
    folder = tmp_path_factory.mktemp("cli")
    model, tokenizer = models_zoo.llama(), models_zoo.tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = {"source": (8, 1), "target": (8, 2), "prompts": (4, 3), "neutral": (12, 4)}
    for name, (count, seed) in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(models_zoo.texts(count, seed=seed)), encoding="utf-8")
    sets = [models_zoo.texts(8, seed=seed) for seed in (1, 2)]
    source, target = (lineas.collect(model, texts, layers=NORMS, tokenizer=tokenizer) for texts in sets)
    lineas.fit(source, target, method="linear").save(folder / "linear.safetensors")
    lineas.fit(source, target, method="mean").save(folder / "mean.safetensors")
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Run a command on the tiny model; names of files stand for those in the folder."""
    monkeypatch.chdir(folder)

    def command(name, *arguments):
        return cli.main([name, "model", "--quiet", *map(str, arguments)])

    return command


def test_an_evaluation_is_the_librarys(run, folder, tmp_path, capsys):
    output, page = tmp_path / "found.safetensors", tmp_path / "page.html"
    maps = "--maps", "linear.safetensors", "mean.safetensors"
    data = "--prompts", "prompts.txt", "--neutral", "neutral.txt", "--judge", "vader"
    pytest.importorskip("vaderSentiment")
    options = "--strengths", "0.5", "1", "--controls", "random", "--max-new-tokens", "4", "--seed", "3"
    assert run("evaluate", *maps, *data, *options, "--max-kl", "100", "-o", output, "--report", page) == 0
    methods = {name: lineas.load(folder / f"{name}.safetensors") for name in ("linear", "mean")}
    expected = lineas.evaluate(
        models_zoo.llama(),
        methods,
        tokenizer=models_zoo.tokenizer(),
        prompts=models_zoo.texts(4, seed=3),
        neutral=models_zoo.texts(12, seed=4),
        judges="vader",
        strengths=[0.5, 1],
        controls=["random"],
        max_new_tokens=4,
        seed=3,
        progress=False,
    )
    found = lineas.load(output)
    assert found.methods == expected.methods == ("unsteered", *(
        name for name in ("linear", "mean", "random (linear)", "random (mean)") for _ in range(2)
    ))  # fmt: skip
    assert found.continuations == expected.continuations
    np.testing.assert_array_equal(found.price, expected.price)
    np.testing.assert_array_equal(found.scores["vader"], expected.scores["vader"])
    out = capsys.readouterr().out
    assert out.startswith(expected.table()) and f"written to {output}" in out and f"report in {page}" in out
    best = expected.best("vader", max_kl=100)
    assert f"best by vader: {best['method']} at strength {best['strength']:g}, {best['vader']:.3f}" in out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_prices_alone_with_a_checkpoint(run, tmp_path, capsys):
    kept = tmp_path / "kept.jsonl"
    arguments = "--maps", "mean.safetensors", "--neutral", "neutral.txt", "--checkpoint", kept
    assert run("evaluate", *arguments, "--strengths", "1") == 0
    first, size = capsys.readouterr().out, kept.stat().st_size
    assert run("evaluate", *arguments, "--strengths", "1") == 0
    assert capsys.readouterr().out == first and kept.stat().st_size == size


def test_a_calibration_is_written_into_the_maps(run, folder, tmp_path, capsys):
    path = tmp_path / "calibrated.safetensors"
    arguments = "--maps", "linear.safetensors", "--neutral", "neutral.txt", "--max-kl", "0.01"
    assert run("calibrate", *arguments, "-o", path) == 0
    maps = lineas.load(folder / "linear.safetensors")
    neutral, tokenizer = models_zoo.texts(12, seed=4), models_zoo.tokenizer()
    expected = maps.calibrate(models_zoo.llama(), neutral=neutral, max_kl=0.01, tokenizer=tokenizer, progress=False)
    found = lineas.load(path)
    assert found == maps and found.metadata["calibration"]["strength"] == expected.strength
    out = capsys.readouterr().out
    assert out == f"{expected!r}\nwritten to {path}\n"
    assert run("evaluate", "--maps", path, "--neutral", "neutral.txt") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--maps", "mean.safetensors"), "give prompts=, for the effect, or neutral=, for the price, or both"),
        (("--maps", "none.safetensors", "--neutral", "neutral.txt"), "none.safetensors"),
        (("--maps", "mean.safetensors", "--neutral", "none.txt"), "none.txt"),
        (
            ("--maps", "mean.safetensors", "--neutral", "neutral.txt", "--judge", "vader"),
            "--judge: there are no continuations",
        ),
        (("--maps", "mean.safetensors", "--neutral", "neutral.txt", "--controls", "best"), "--controls must be one of"),
        (("--maps", "mean.safetensors", "--neutral", "neutral.txt", "--controls", "mean"), "--controls"),
        (("--maps", "mean.safetensors", "--neutral", "neutral.txt", "--strengths", "nan"), "--strengths"),
        (("--maps", "mean.safetensors", "--neutral", "neutral.txt", "-o", "none/x"), "--output: expected a file in an"),
        (("--maps", "mean.safetensors", "--neutral", "neutral.txt", "--report", "model"), "--report: expected a file"),
    ],
)
def test_what_evaluate_refuses(run, folder, capsys, arguments, message):
    before = sorted(folder.iterdir())
    fails(capsys, run("evaluate", *arguments), message)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--neutral", "neutral.txt"), "give one of max_kl=, max_loss_rise= and max_perplexity_ratio=, or effect="),
        (("--max-kl", "0.1"), "--neutral: a budget is for neutral texts"),
        (("--neutral", "neutral.txt", "--max-kl", "0"), "--max-kl must be above 0, got 0"),
        (("--effect", "0.5"), "--effect, prompts and judge belong together"),
    ],
)
def test_what_calibrate_refuses(run, folder, tmp_path, capsys, arguments, message):
    fails(capsys, run("calibrate", "--maps", "linear.safetensors", *arguments, "-o", tmp_path / "x"), message)
    assert not list(tmp_path.iterdir())
