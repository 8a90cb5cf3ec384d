"""`Evaluation.report`: hostile text, parts that are missing, files, errors, and the page in a browser."""

import importlib.util
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import browser
import models_zoo as zoo
import numpy as np
import pytest
from report_pages import (
    HOSTILE,
    MEANS,
    METHODS,
    PROMPTS,
    STRENGTHS,
    Node,
    best_of,
    calibrated,
    calibrations_of,
    chosen_in,
    evaluation,
    facts_of,
    heads_of,
    rows_of,
    sections,
    write,
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

import lineas
from lineas.evaluation.report import report


@pytest.fixture
def written(tmp_path):
    """Writes a report and parses it."""
    return lambda found=None, **options: write(tmp_path, found, **options)


# ---- hostile text ----------------------------------------------------------------------------------------------------


def test_nothing_of_an_evaluation_becomes_markup(written):
    names = (f"map {HOSTILE}", f"random {HOSTILE}")
    calibration = {"strength": 1.5, "range": [1, 2], "budget": {HOSTILE: 1.0}, "measured": {HOSTILE: 0.5}}
    found = evaluation(
        methods=("unsteered", *names[:1] * 3, names[1]),
        prompts=[HOSTILE, [{"role": HOSTILE, "content": HOSTILE}], [HOSTILE], "plain"],
        judges=(HOSTILE,),
        continuations=[[[HOSTILE + str(k)] for _ in range(4)] for k in range(5)],
        metadata={
            "model": HOSTILE,
            "methods": {names[0]: {"method": HOSTILE, HOSTILE: HOSTILE, "calibration": calibration}},
            "instructions": {names[1]: HOSTILE},
            "sampling": {HOSTILE: HOSTILE},
        },
        stopped=HOSTILE,
    )
    plain = written()
    check = SimpleNamespace(name=HOSTILE, value=1, verdict=HOSTILE, why=HOSTILE)
    root = written(
        found,
        title=HOSTILE,
        diagnosis={HOSTILE: SimpleNamespace(checks=[check])},
        calibration={HOSTILE: SimpleNamespace(**calibration | {"strength": 2.0})},
    )
    assert {one.tag for one in root.all()} - {one.tag for one in plain.all()} <= {
        "dl",
        "dt",
        "dd",
        "b",
        "mark",
        "strong",
    }
    assert root.one("script").children == plain.one("script").children
    assert root.one("title").text == " ".join(HOSTILE.split())
    for place in ("h1", "summary", "optgroup", "article"):
        assert root.all(place)
    texts = [one.text for one in root.all("p", class_="text")]
    assert texts == [f"{HOSTILE}{k}" for _ in range(4) for k in range(5)]
    assert root.all("optgroup")[0].attributes["label"] == names[0]
    assert "49" not in root.one("h1").text


def test_characters_that_no_page_can_hold_are_replaced(written):
    found = evaluation(("unsteered", "a\x00\ud800\x1b"), (0, 1), prompts=PROMPTS[:1])
    found.continuations[1][0][0] = "a\x00b\ud83dc\x85d\tnul"
    root = written(found)
    assert root.one("div", data_point="1").one("p", class_="text").text == "a\ufffdb\ufffdc\ufffdd nul"
    assert root.one("optgroup").attributes["label"] == "a\ufffd\ufffd\ufffd"


def test_metadata_of_any_kind_make_a_page(written):
    for metadata in (
        None,
        [],
        {"methods": [], "support": 3, "instructions": "x", "sampling": 4, "model": ["m"], "seed": 10**400},
        {"methods": {"map": None, "random": {"calibration": {"strength": "1"}, "parts": [3, {}], "settings": "s"}}},
        {"methods": {"map": {"x": {(1, 2): object()}}}, "support": {"map": [1, 0], "random": [10**400, 3]}},
    ):
        assert written(evaluation(metadata=metadata)).one("h1").text.startswith("Evaluation of ")


# ---- parts that are missing ------------------------------------------------------------------------------------------


def test_without_prompts_there_are_prices_only(written):
    root = written(evaluation(prompts=[], judges=()))
    assert sections(root) == ["points", "settings"]
    assert heads_of(root, "Prices of all points")[2] == "KL"
    assert root.one("header").all("p")[0].text.endswith("(map and random), on 3 neutral texts of 30 tokens together.")
    assert "none, so no effect was measured" in root.text


def test_without_neutral_texts_there_are_effects_only(written):
    root = written(evaluation(neutral=0))
    assert sections(root) == ["effect", "points", "continuations", "texts", "settings"]
    assert not root.all("svg", class_="chart") and "no price was measured" in root.text
    assert best_of(root)[0].startswith("At any price, which was not measured: map at strength 2, mean score 0.900")
    assert heads_of(root, "Effects of all points") == ["method", "strength", "joy", "joy, change"]
    assert [cells[0].text for cells in rows_of(root, "Effects of all points")][3] == "map best"


def test_without_judges_there_are_texts_and_prices(written):
    root = written(evaluation(judges=()))
    assert sections(root) == ["points", "continuations", "texts", "settings"]
    assert heads_of(root, "Prices of all points")[2] == "KL"
    assert not root.all("p", class_="scores")
    assert chosen_in(root) == "map at strength 2"


def test_the_unsteered_model_alone(written):
    root = written(evaluation(("unsteered",), (0,)))
    assert "Only the unsteered model was measured." in root.text
    assert not root.all("select") and not root.all("svg", class_="chart") and not root.all("mark")
    assert len(rows_of(root, "Effects and prices of all points")) == 1
    assert "was evaluated as it is, on 4 prompts, with 1 continuation of each" in root.text


def test_one_prompt_and_one_text(written):
    root = written(evaluation(prompts=PROMPTS[:1], neutral=1))
    assert "on 1 prompt, with 1 continuation of each at every point, and on 1 neutral text of 10 tokens" in root.text


def test_many_methods_and_marks(written):
    names = [f"path, support {k}" for k in range(30)]
    root = written(evaluation(("unsteered", *names), (0, *[1] * 30)))
    assert "30 methods (path, support 0, path, support 1" in root.text and "and others)" in root.text
    assert len(root.one("ul", class_="keys").all("li")) == 31
    assert "The table has 22 methods more." in root.one("svg", class_="chart").attributes["aria-label"]


# ---- where maps come from, calibration, diagnosis --------------------------------------------------------------------


def test_settings_and_origins(written):
    found = evaluation()
    found.metadata["methods"]["map"] |= {
        "layers": [f"layer.{k}" for k in range(30)],
        "loss_layers": [f"layer.{k}" for k in range(30)],
        "settings": {"l1": 0.5, "lr": None, "betas": [0.9, 0.99]},
        "tokens": "last",
        "version": "0.1.0",
    }
    found.metadata["methods"]["random"] = {"method": "random", "parts": [{"method": "linear"}]}
    found.metadata["instructions"] = {"told": "Be glad."}
    root = written(evaluation((*METHODS, "told"), (*STRENGTHS, 0), metadata=found.metadata))
    settings = next(one for one in root.all("section") if one.attributes["aria-labelledby"] == "settings")
    own = facts_of(settings)
    assert own["Prompts"] == "4, 1 continuation of each of at most 20 tokens"
    assert own["Sampling"] == "top_p = 0.9" and own["Seed"] == "7" and own["Judges"] == "joy"
    assert own["Neutral texts"] == "3, 30 tokens; the unsteered model's loss on them is 4.000 nats a token"
    origins = {one.one("summary").text: facts_of(one) for one in settings.all("details")}
    assert origins["map"] == {
        "Method": "linear",
        "Neurons changed": "3 of 12 (25.0 %)",
        "Modules": "layer.0, layer.1, …, layer.29 (30)",
        "Settings": "l1 = 0.5, betas = [0.9, 0.99]",
        "Tokens": "last",
        "Version of lineas": "0.1.0",
    }
    assert origins["random"] == {"Method": "random", "Made of": "linear"}
    assert origins["told"] == {"Text before every prompt": "Be glad."}
    assert "history" not in root.source and "1.0, 1.0" not in root.source


def test_calibrations_are_told_in_sentences(written):
    within = (
        "For a KL divergence of at most 0.1 nats, the strength is 1.25; with other texts of the same kind it would "
        "have been 1.1 to 1.5 (95 % interval). On held-out neutral texts, which the strength was not chosen by, the KL "
        "divergence is 0.0800 [0.0600, 0.1200]: within the budget."
    )
    assert calibrations_of(written(calibration=calibrated())) == [within]
    over = calibrated(measured={"kl": 0.13, "kl_low": 0.06, "kl_high": 0.2})
    assert calibrations_of(written(calibration={"map": over}))[0].endswith("0.1300 [0.0600, 0.2000]: over the budget.")
    effect = calibrated(
        budget={"max_kl": 0.1, "effect": 0.6},
        measured={"kl": 0.05, "joy": 0.62, "joy_low": 0.5, "joy_high": 0.7, "joy_unsteered": 0.1},
    )
    (said,) = calibrations_of(written(calibration=effect))
    assert said.startswith("For a KL divergence of at most 0.1 nats and a mean score of 0.6, the strength is 1.25;")
    assert "the KL divergence is 0.0500: within the budget." in said
    assert said.endswith(
        "On the prompts that it was chosen by, the mean score by joy is 0.620 [0.500, 0.700], against 0.100 of the "
        "unsteered model."
    )


def test_calibrations_of_metadata_are_told_once(written):
    found = evaluation()
    record = {**vars(calibrated()), "range": [1.1, 1.5]}
    found.metadata["methods"]["map"]["calibration"] = record
    found.metadata["methods"]["random"] = {"calibration": record | {"strength": 3.0}}
    said = calibrations_of(written(found))
    assert [one.partition(":")[0] for one in said] == ["map", "random"]
    said = calibrations_of(written(found, calibration=calibrated()))
    assert len(said) == 2 and said[0].startswith("For a KL") and said[1].startswith("random: For a KL")


def test_the_diagnosis_is_a_list_of_number_verdict_and_why(written):
    checks = [
        SimpleNamespace(
            name="separability", value=np.float64(0.91234), verdict="good", why="Because.", interval=(0.8, 1.0)
        ),
        SimpleNamespace(name="damage", value=None, verdict="left out", why="No neutral text."),
        SimpleNamespace(name="change", value=math.nan, verdict="none", why="Not known.", interval=None),
    ]
    root = written(diagnosis=SimpleNamespace(checks=tuple(checks)))
    found = [
        [one.text for one in entry.children if isinstance(one, Node)]
        for entry in root.one("dl", class_="checks").children
        if isinstance(entry, Node)
    ]
    assert found == [
        ["separability", "0.912 [0.8, 1] good", "Because."],
        ["damage", "left out", "No neutral text."],
        ["change", "none", "Not known."],
    ]


# ---- files and errors ------------------------------------------------------------------------------------------------


def test_the_same_evaluation_gives_the_same_bytes(tmp_path):
    first, second = (evaluation().report(tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()


def test_300_prompts_and_10_points_stay_below_a_megabyte(tmp_path):
    words = (
        "The quick brown fox jumps over the lazy dog, and then it goes back to its den for a good long winter sleep. "
    )
    found = evaluation(
        ("unsteered", *["map"] * 5, *["random"] * 5),
        (0, *range(1, 6), *range(1, 6)),
        prompts=[f"{k}: what will the animals of the forest do when winter comes?" for k in range(300)],
        neutral=50,
        continuations=[[[f"{words[k:]}{words[:k]}"] for _ in range(300)] for k in range(11)],
    )
    page = found.report(tmp_path / "page.html", samples=300)
    assert page.read_text().count("</article>") == 300
    assert page.stat().st_size < 2**20
    assert found.report(tmp_path / "few.html").stat().st_size < 150_000


def test_a_page_replaces_the_one_before_as_a_whole(tmp_path, monkeypatch):
    path = evaluation().report(str(tmp_path / "page.html"), title="first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        evaluation().report(path, title="second")
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"] and "first" in path.read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": 3}, TypeError, "path must be a str or a path, got int"),
        ({"path": b"page.html"}, TypeError, "path must be a str or a path, got bytes"),
        ({"path": "missing/page.html"}, FileNotFoundError, "path: there is no folder '.*missing'"),
        ({"path": "."}, IsADirectoryError, "path must be that of a file, got the folder"),
        ({"title": 3}, TypeError, "title must be a str, got int"),
        ({"samples": 1.5}, TypeError, "samples must be an int, got float"),
        ({"samples": -1}, ValueError, "samples must be at least 0, got -1"),
        ({"judge": "jay"}, ValueError, "judge: there is no 'jay'"),
        ({"minimize": "jay"}, ValueError, "judge: there is no 'jay'"),
        ({"minimize": 1}, TypeError, "minimize must be True, False or names of judges, got 1"),
        ({"minimize": [1]}, TypeError, r"minimize must be True, False or names of judges, got \[1\]"),
        ({"calibration": 1.5}, TypeError, "calibration must be a Calibration or a mapping .* got float"),
        ({"calibration": {1: calibrated()}}, TypeError, "calibration must be a Calibration or a mapping"),
        (
            {"calibration": calibrated(range=None)},
            TypeError,
            "calibration must be a Calibration .* got SimpleNamespace",
        ),
        ({"diagnosis": "good"}, TypeError, "diagnosis must be a Diagnosis or a mapping .* got str"),
        ({"diagnosis": SimpleNamespace(checks=["good"])}, TypeError, "diagnosis must be a Diagnosis"),
    ],
)
def test_bad_arguments_leave_no_file(tmp_path, options, error, message):
    options = {"path": "page.html", **options}
    if isinstance(options["path"], str):
        options["path"] = tmp_path / options["path"]
    with pytest.raises(error, match=message):
        evaluation().report(**options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_evaluation_is_refused(tmp_path):
    with pytest.raises(TypeError, match="evaluation must be an Evaluation, got dict"):
        report({}, tmp_path / "page.html")
    with pytest.raises(ValueError, match="continuations must be 5 lists of 4 lists of 1 texts"):
        evaluation(continuations=[[["a"]] * 3] * 5)


@pytest.mark.parametrize(
    ("module", "message"), [("jinja2", "report needs Jinja2"), ("matplotlib.figure", "drawing needs")]
)
def test_missing_packages_are_named(tmp_path, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{message}.*pip install"):
        evaluation().report(tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_page_without_curves_needs_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluation(neutral=0).report(tmp_path / "page.html").is_file()


def test_what_evaluate_measures_of_a_model(written):
    model, tokenizer = zoo.llama(), zoo.tokenizer()
    names = [f"model.layers.{k}.post_attention_layernorm" for k in range(zoo.LAYERS)]
    rng = np.random.default_rng(0)
    maps = lineas.SteeringMaps(
        {name: lineas.AffineMap(rng.uniform(0.8, 1.2, zoo.WIDTH), rng.normal(0, 0.2, zoo.WIDTH)) for name in names}
    )
    found = lineas.evaluate(
        model,
        {"shift": maps},
        tokenizer=tokenizer,
        prompts=zoo.texts(5),
        neutral=zoo.texts(6, seed=1),
        judges={"words": lambda texts: [float(len(text.split())) for text in texts]},
        strengths=[0.5, 1],
        controls=["random"],
        max_new_tokens=6,
        progress=False,
    )
    root = written(found, samples=3)
    assert len(rows_of(root, "Effects and prices of all points")) == len(found) == 5
    shown = [one.text for one in root.all("p", class_="text")]
    wanted = [" ".join(found.continuations[k][p][0].split()) or "no text" for p in (0, 2, 4) for k in range(5)]
    assert shown == wanted


# ---- in a browser ----------------------------------------------------------------------------------------------------

CLIPPED = """() => [...document.querySelectorAll("body *")].filter((one) =>
  !one.closest(".wide, svg, [hidden], details:not([open])") && one.getBoundingClientRect().right > innerWidth + 0.5
).map((one) => one.outerHTML.slice(0, 80))"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or browser.chromium() is None,
    reason="needs playwright, chromium: make browser",
)
def test_the_page_in_a_browser(tmp_path):
    found = evaluation(("unsteered", "map", "map", f"map {HOSTILE}", "random"))
    found.continuations[3][0][0] = HOSTILE
    path = found.report(tmp_path / "page.html")
    with browser.browser() as page:
        messages, asked = [], []
        page.on("console", lambda message: messages.append(message.text))
        page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())

        def shown(point):
            return page.locator(f"[data-point='{point}']:visible").count()

        # The picker, by the keyboard.
        picker = page.get_by_label("Beside the unsteered model")
        assert [shown(k) for k in range(1, 5)] == [0, 4, 0, 0]
        picker.focus()
        page.keyboard.press("ArrowDown")
        assert [shown(k) for k in range(1, 5)] == [0, 0, 4, 0]
        assert page.locator("[data-point='3'] .text").first.inner_text() == HOSTILE
        picker.select_option("all")
        assert [shown(k) for k in range(1, 5)] == [4, 4, 4, 4]

        # The tables: up, down, what is not known at the end, and back to the order of the evaluation.
        table = page.get_by_role("region", name="Effects and prices of all points")

        def column(k):
            return table.locator(f"tbody tr > :nth-child({k})").evaluate_all(
                "all => all.map((one) => one.dataset.value)"
            )

        joy = table.get_by_role("columnheader", name="joy", exact=True)
        button = joy.get_by_role("button")
        button.focus()
        page.keyboard.press("Enter")
        assert joy.get_attribute("aria-sort") == "ascending" and sorted(MEANS) == pytest.approx(
            list(map(float, column(3)))
        )
        button.click()
        assert joy.get_attribute("aria-sort") == "descending"
        assert sorted(MEANS, reverse=True) == pytest.approx(list(map(float, column(3))))
        table.get_by_role("button", name="strength").click()
        assert column(2) == ["0.5", "1.0", "1.0", "2.0", ""] and joy.get_attribute("aria-sort") == "none"
        table.get_by_role("button", name="method").click()
        assert column(1) == ["0", "1", "2", "3", "4"]

        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width in (400, 1100):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate(CLIPPED) == []
                if os.environ.get("LINEAS_SCREENSHOTS"):
                    name = f"report-{scheme}-{width}.png"
                    page.screenshot(path=Path(os.environ["LINEAS_SCREENSHOTS"], name), full_page=True)
        page.emulate_media(media="print")
        assert page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        assert messages == [] and asked == [path.as_uri()]
