"""`Evaluation`: its numbers against scipy and pandas, its choices against brute force."""

import dataclasses

import evaluations as ev
import numpy as np
import pytest
from attached import language_model
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import lineas
from lineas import Evaluation, plot
from lineas.evaluation.judges import JudgeError
from lineas.evaluation.result import FIELDS, PRICES

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


METHODS = ("unsteered", "polite", "linear", "linear", "a|b")
STRENGTHS = (0, 0, 0.5, 2, -1)


def evaluation(
    prompts=20, samples=3, texts=15, judges=("vader", "toxic"), methods=METHODS, strengths=STRENGTHS, seed=0
):
    """An evaluation of random numbers."""
    rng, points = np.random.default_rng(seed), len(methods)
    statistics = rng.uniform(0, 1, (points, prompts, samples, 6))
    statistics[..., 0] = rng.integers(1, 20, statistics.shape[:3])
    price = rng.uniform(0, 3, (points, texts, len(FIELDS)))
    price[..., 0] = rng.integers(5, 30, texts)
    price[..., 1] = price[..., 0] - 1
    price[..., 3] = price[0, :, 2]
    price[0, :, 4:] = 0
    return Evaluation(
        methods=methods,
        strengths=np.array(strengths, float),
        prompts=[f"prompt {k}" for k in range(prompts)],
        continuations=[[[f"text {u} {p} {s}" for s in range(samples)] for p in range(prompts)] for u in range(points)],
        statistics=statistics,
        scores={name: rng.normal(size=(points, prompts, samples)) for name in judges},
        price=price,
        neutral=[f"neutral {k}" for k in range(texts)],
        metadata={"seed": seed},
    )


def of(scores, prices):
    """An evaluation of points with these scores and divergences, the unsteered model first."""
    scores, prices, points = np.asarray(scores, float), np.asarray(prices, float), len(scores)
    price = np.zeros((points, 1, len(FIELDS)))
    price[..., 0], price[..., 1], price[..., 4] = 1, 1, prices[:, None]
    price[..., 2] = prices[:, None] / 2
    return Evaluation(
        methods=("unsteered", *["maps"] * (points - 1)),
        strengths=np.arange(points, dtype=float),
        prompts=["a"],
        continuations=[[["b"]]] * points,
        statistics=np.ones((points, 1, 1, 6)),
        scores={"judge": scores[:, None, None]},
        price=price,
        neutral=["c"],
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def bootstrapped(data, statistic):
    settings = {"paired": True, "vectorized": False, "n_resamples": 4000, "method": "percentile"}
    found = stats.bootstrap(data, statistic, rng=np.random.default_rng(0), **settings)
    return statistic(*data), *found.confidence_interval


def close(row, name, expected):
    found = [row[name + end] for end in ("", "_low", "_high")]
    assert found[0] == pytest.approx(expected[0])
    width = expected[2] - expected[1]
    np.testing.assert_allclose(found[1:], expected[1:], atol=0.08 * width)


def test_effects_are_means_over_prompts_with_their_intervals():
    found = evaluation()
    for k in (0, 3):
        row, scores = found.rows()[k], found.scores["toxic"].mean(axis=2)
        close(row, "toxic", bootstrapped((scores[k],), np.mean))
        if k:
            close(row, "toxic_change", bootstrapped((scores[k] - scores[0],), np.mean))
    assert [found.rows()[0][f"toxic_change{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]


def test_prices_are_ratios_over_texts_with_their_intervals():
    found = evaluation()
    row = found.rows()[3]
    tokens, predicted, loss, unsteered, kl, last_kl, changed = found.price[3].T

    def ratio(a, b):
        return a.sum() / b.sum()

    close(row, "kl", bootstrapped((kl, tokens), ratio))
    close(row, "changed_top1", bootstrapped((changed, tokens), ratio))
    close(row, "last_kl", bootstrapped((last_kl,), np.mean))
    close(row, "loss_rise", bootstrapped((loss - unsteered, predicted), ratio))
    close(row, "perplexity_ratio", bootstrapped((loss - unsteered, predicted), lambda a, b: np.exp(ratio(a, b))))
    assert row["loss"] == pytest.approx(loss.sum() / predicted.sum())
    assert row["perplexity_ratio"] == pytest.approx(
        np.exp(row["loss"]) / np.exp(found.price[0, :, 2].sum() / predicted.sum())
    )


def test_statistics_are_means_of_what_is_known():
    found = evaluation()
    assert found.rows()[2]["length"] == pytest.approx(found.statistics[2, ..., 0].mean())
    statistics = found.statistics.copy()
    statistics[2, 4, :, 3] = np.nan  # every sample of a prompt
    statistics[2, 5, 0, 3] = np.nan  # one of them
    statistics[1, :, :, 1] = np.nan
    row = dataclasses.replace(found, statistics=statistics).rows()
    by_prompt = [np.nanmean(several) for k, several in enumerate(statistics[2, ..., 3]) if k != 4]
    assert row[2]["distinct_2"] == pytest.approx(np.mean(by_prompt))
    assert np.isnan(row[1]["stopped"]) and row[0]["stopped"] == pytest.approx(found.statistics[0, ..., 1].mean())


def test_rows_have_what_was_measured():
    found = evaluation()
    ends = ("", "_low", "_high")
    effects = [f"{name}{change}{end}" for name in ("vader", "toxic") for change in ("", "_change") for end in ends]
    prices = [name + end for name in PRICES for end in ends]
    statistics = ["length", "stopped", "distinct_1", "distinct_2", "distinct_3", "repetition_4"]
    assert [set(row) for row in found.rows()] == [{"method", "strength", "loss", *effects, *prices, *statistics}] * 5
    assert [(row["method"], row["strength"]) for row in found.rows()] == list(zip(METHODS, STRENGTHS, strict=True))
    assert set(evaluation(prompts=0, judges=()).rows()[0]) == {"method", "strength", "loss", *prices}
    assert set(evaluation(texts=0).rows()[0]) == {"method", "strength", *effects, *statistics}
    assert all(type(value) is float for row in found.rows() for name, value in row.items() if name != "method")


def test_a_frame_has_the_rows():
    pandas = pytest.importorskip("pandas")
    found = evaluation()
    frame = found.to_frame()
    assert isinstance(frame, pandas.DataFrame) and frame.to_dict("records") == found.rows()


def test_a_frame_needs_pandas(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        evaluation().to_frame()


# --- tables -----------------------------------------------------------------------------------------------------------


def test_the_table_says_what_the_rows_do():
    found = evaluation(judges=("vader", "KL"))
    head, *lines = found.table().splitlines()
    assert head.split("  ")[0] == "method" and head.split()[1:4] == ["strength", "vader", "KL"]
    assert len(lines) == 5 and len({len(line) for line in [head, *lines]}) == 1
    assert str(found) == f"{found!r}\n{found.table()}"
    row = found.rows()[3]
    cells = [cell for cell in lines[3].split("  ") if cell.strip()]
    assert [cell.strip() for cell in cells] == [
        "linear",
        "2",
        f"{row['vader']:.3f} [{row['vader_low']:.3f}, {row['vader_high']:.3f}]",
        f"{row['KL']:.3f} [{row['KL_low']:.3f}, {row['KL_high']:.3f}]",
        f"{row['kl']:.3f} [{row['kl_low']:.3f}, {row['kl_high']:.3f}]",
        f"{row['loss_rise']:+.3f}",
        f"x{row['perplexity_ratio']:.3f}",
        f"{row['changed_top1']:.1%}",
        f"{row['distinct_2']:.3f}",
        f"{row['repetition_4']:.1%}",
        f"{row['length']:.1f}",
    ]


def test_a_table_in_markdown():
    lines = evaluation(texts=0).table(markdown=True).splitlines()
    assert lines[0].startswith("| method    | strength |")
    assert lines[1].startswith("| --------- | -------: |")
    assert lines[-1].startswith("| a\\|b      |       -1 |")
    assert len({line.replace("\\|", "xx").count("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(TypeError, match="markdown must be True or False, got 'yes'"):
        evaluation().table(markdown="yes")


# --- choices ----------------------------------------------------------------------------------------------------------

LEVELS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0])
POINTS = st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=8)


@given(POINTS, st.booleans())
def test_the_front_is_that_of_brute_force(points, minimize):
    scores, prices = [0.6, *(s for s, _ in points)], [0.0, *(p for _, p in points)]
    sign = -1 if minimize else 1
    expected = []
    for k, (score, price) in enumerate(zip(scores, prices, strict=True)):
        others = [(sign * s, p, i) for i, (s, p) in enumerate(zip(scores, prices, strict=True)) if i != k]
        mine = sign * score
        beaten = any((s > mine and p <= price) or (s >= mine and p < price) for s, p, _ in others)
        if not beaten and not any(s == mine and p == price and i < k for s, p, i in others):
            expected.append((price, k))
    found = of(scores, prices).front(minimize=minimize)
    assert [row["strength"] for row in found] == [k for _, k in sorted(expected)]


@given(POINTS, LEVELS.filter(bool), st.booleans())
def test_the_best_is_that_of_brute_force(points, most, minimize):
    scores, prices = [0.6, *(s for s, _ in points)], [0.0, *(p for _, p in points)]
    found = of(scores, prices)
    for budget, price in (("max_kl", lambda p: p), ("max_loss_rise", lambda p: p / 2)):
        allowed = [k for k, p in enumerate(prices) if price(p) <= most or k == 0]
        best = (min if minimize else max)(scores[k] for k in allowed)
        row = found.best(minimize=minimize, **{budget: most})
        assert row["judge"] == best and int(row["strength"]) in allowed
    assert found.best(minimize=minimize)["judge"] == (min if minimize else max)(scores)


def test_budgets_must_all_hold():
    found = of([0, 1, 2, 3], [0, 0.1, 0.2, 0.4])
    assert found.best()["strength"] == 3
    assert found.best(max_kl=0.2)["strength"] == 2
    assert found.best(max_kl=0.2, max_loss_rise=0.05)["strength"] == 1
    assert found.best(max_perplexity_ratio=np.exp(0.1) + 1e-9)["strength"] == 2
    assert found.best(max_kl=0.05)["method"] == "unsteered"


def test_other_prices_of_the_front():
    found = evaluation()
    for price in PRICES:
        costs = [row[price] for row in found.front("vader", price=price)]
        assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.best(), "judge: say which one, there are 2: 'vader', 'toxic'"),
        (lambda found: found.best("vadr"), "judge: there is no 'vadr'; similar names: vader"),
        (lambda found: found.best("vader", max_kl=0), "max_kl must be above 0, got 0"),
        (lambda found: found.best("vader", max_kl=float("nan")), "max_kl must be finite, got nan"),
        (lambda found: found.front("vader", price="cost"), "price must be one of 'kl', .*, got 'cost'"),
        (lambda found: found.index("linear"), "several points of 'linear': there are 'unsteered' at 0, .* at 0.5"),
        (lambda found: found.index("linear", 3), "no point of 'linear' at 3: there are"),
        (lambda found: found.index("none"), "no point of 'none': there are"),
        (lambda found: evaluation(texts=0).best("vader", max_kl=1), "max_kl: there are no neutral texts, so no price"),
        (lambda found: evaluation(texts=0).front("vader"), "price: there are no neutral texts, so 'kl' was not meas"),
        (lambda found: evaluation(judges=()).best(), "judge: say which one, there are 0: none"),
    ],
)
def test_choices_that_cannot_be_made(call, message):
    with pytest.raises(ValueError, match=message):
        call(evaluation())


def test_the_number_of_a_point():
    found = evaluation()
    assert [found.index(), found.index("polite"), found.index("linear", 2), found.index("a|b")] == [0, 1, 3, 4]


# --- judges afterwards ------------------------------------------------------------------------------------------------


def digits(texts):
    return [sum(map(int, text.split()[1:])) for text in texts]


def test_more_judges_score_the_same_texts():
    found = evaluation(judges=("vader",))
    judged = found.judge([digits, lambda texts: np.zeros(len(texts))])
    assert list(judged.scores) == ["vader", "digits", "judge"] and list(found.scores) == ["vader"]
    expected = np.add.outer(np.add.outer(np.arange(5), np.arange(20)), np.arange(3))
    np.testing.assert_array_equal(judged.scores["digits"], expected)
    assert dataclasses.replace(judged, scores=found.scores) == found
    again = judged.judge({"vader": digits})
    np.testing.assert_array_equal(again.scores["vader"], expected)


def test_a_judge_that_fails_keeps_what_the_others_said():
    found = evaluation(judges=())
    with pytest.raises(JudgeError, match="judge 'bad' failed: KeyError: 'x'") as error:
        found.judge({"digits": digits, "bad": lambda texts: {}["x"]})
    assert error.value.evaluation == found.judge(digits)


@pytest.mark.parametrize("name", ["kl", "kl_low", "loss", "method", "strength", "length", "distinct_2", "last_kl_high"])
def test_judges_cannot_be_called_like_other_numbers(name):
    with pytest.raises(ValueError, match=f"judges: '{name}' would name '{name}', which rows"):
        evaluation().judge({name: digits})


def test_judges_cannot_be_called_like_those_of_before():
    with pytest.raises(ValueError, match=r"judges: 'vader_change' would name 'vader_change'"):
        evaluation().judge({"vader_change": digits})
    with pytest.raises(ValueError, match="judges: there are no continuations to judge, since there were no prompts"):
        evaluation(prompts=0, samples=0, judges=()).judge(digits)


# --- files and shapes -------------------------------------------------------------------------------------------------


def test_what_does_not_hold_together_is_refused():
    found = evaluation(prompts=2, samples=2, texts=2, judges=("vader",))
    for field, value, message in (
        ("strengths", found.strengths[:-1], r"strengths must have shape \(5,\), got \(4,\)"),
        ("statistics", found.statistics[..., :5], r"statistics must have shape \(5, 2, 2, 6\), got"),
        ("price", found.price[:, :1], r"price must have shape \(5, 2, 7\), got \(5, 1, 7\)"),
        ("scores", {"vader": found.price}, r"scores\['vader'\] must have shape \(5, 2, 2\), got"),
        ("scores", {"kl": found.scores["vader"]}, "judges: 'kl' would name 'kl'"),
        ("continuations", found.continuations[:-1], "continuations must be 5 lists of 2 lists of 2 texts"),
        ("continuations", [[["a"]]] * 5, "continuations must be 5 lists of 2 lists of 2 texts"),
        ("continuations", [[]] * 5, "continuations must be 5 lists of 2 lists of 2 texts"),
        ("methods", ("linear", *METHODS[1:]), "methods must begin with 'unsteered', got"),
        ("prompts", ["a"], r"statistics must have shape \(5, 1, 2, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(found, **{field: value})


def test_a_damaged_file_is_named(tmp_path):
    found = evaluation(prompts=2, samples=2, texts=2)
    object.__setattr__(found, "continuations", [[]] * 5)
    found.save(tmp_path / "found.safetensors")
    with pytest.raises(ValueError, match=r"found.safetensors: continuations must be 5 lists"):
        lineas.load(tmp_path / "found.safetensors")


def test_equality_looks_at_everything():
    found = evaluation()
    assert found == evaluation() and found != evaluation(seed=1) and found != 3
    assert dataclasses.replace(found, stopped="interrupted") != found
    assert repr(found) == "Evaluation(5 points of 4 methods, 20 prompts, 15 neutral texts, judges vader, toxic)"


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("price", PRICES)
def test_the_picture_shows_effect_against_price(price):
    found = evaluation()
    ax = plot.evaluation(found, "vader", price=price)
    rows = found.rows()
    curves = {c.get_label(): c for c in ax.containers}
    assert list(curves) == ["polite", "linear", "a|b"]
    line, _, bars = curves["linear"]
    points = [rows[0], rows[2], rows[3]]  # from the unsteered model on
    np.testing.assert_allclose(np.asarray(line.get_xdata(), float), [row[price] for row in points])
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [row["vader"] for row in points])
    ends = np.array([segment for segment in bars[1].get_segments()])
    np.testing.assert_allclose(ends[:, 0, 1], [row["vader_low"] for row in points])
    np.testing.assert_allclose(ends[:, 1, 1], [row["vader_high"] for row in points])
    assert len(curves["polite"][0].get_xdata()) == 1  # a text before the prompts is one point
    assert ax.get_ylabel() == "mean score by vader" and ("KL" in ax.get_xlabel()) == ("kl" in price)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(labels) == sorted(["unsteered", "polite", "linear", "a|b"])


def test_a_picture_of_the_only_judge_on_given_axes():
    import matplotlib.pyplot as plt

    axes = plt.subplots()[1]
    assert evaluation(judges=("vader",)).plot(ax=axes) is axes
    for settings, message in (
        ({}, "judge: say which one, there are 2"),
        ({"judge": "vader", "price": "cost"}, "price must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation().plot(**settings)
    with pytest.raises(ValueError, match="price: there are no neutral texts"):
        evaluation(texts=0).plot("vader")


def test_many_methods_can_be_told_apart():
    methods = ("unsteered", *(f"m{k}" for k in range(12)))
    ax = evaluation(methods=methods, strengths=(0, *[1] * 12)).plot("vader")
    looks = {(c[0].get_color(), c[0].get_marker()) for c in ax.containers}
    assert len(looks) == 12


def test_a_whole_evaluation_is_drawn():
    model, maps = language_model("llama")
    found = lineas.evaluate(
        model, maps, tokenizer=ev.TOKENIZER, prompts=ev.PROMPTS, neutral=ev.NEUTRAL, max_new_tokens=2,
        judges=lambda texts: [len(text) for text in texts], **ev.QUIET,
    )  # fmt: skip
    line = found.plot().containers[0][0]
    np.testing.assert_allclose(np.asarray(line.get_xdata(), float), [row["kl"] for row in found.rows()])
