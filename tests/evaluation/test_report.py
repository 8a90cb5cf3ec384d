"""`Evaluation.report`: the page is parsed, and what it says is compared with the evaluation's own numbers."""

import numpy as np
import pytest
from report_pages import PROMPTS, STATISTICS, best_of, chosen_in, evaluation, heads_of, rows_of, write

from lineas.evaluation.report_page import BUDGETS

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


@pytest.fixture
def written(tmp_path):
    """Writes a report and parses it."""
    return lambda found=None, **options: write(tmp_path, found, **options)


# ---- content ---------------------------------------------------------------------------------------------------------


def test_the_page_begins_with_what_was_evaluated(written):
    root = written(evaluation(samples=2))
    assert root.one("title").text == root.one("h1").text == "Evaluation of tiny"
    lead, intervals = root.one("header").all("p")
    assert lead.text == (
        "The model tiny was evaluated as it is and at 4 points of 2 methods (map and random), on 4 prompts, with 2 "
        "continuations of each at every point, and on 3 neutral texts of 30 tokens together."
    )
    assert "95 % intervals by bootstrap over prompts" in intervals.text
    assert [one.text for one in root.one("nav").all("a")] == [
        "Effect and price",
        "All points",
        "Continuations",
        "Side by side",
        "Settings and maps",
    ]


def test_a_title_of_ones_own(written):
    root = written(title="Rain & <sun>")
    assert root.one("title").text == root.one("h1").text == "Rain & <sun>"


def test_an_evaluation_that_was_interrupted_says_so(written):
    assert "Not finished." in written(evaluation(stopped="interrupted")).one("header").text
    assert "Not finished." not in written().one("header").text


def test_tables_have_the_numbers_of_the_evaluation(written):
    found = evaluation()
    root, rows = written(found), found.rows()
    assert heads_of(root, "Effects and prices of all points") == [
        *("method", "strength", "joy", "joy, change", "KL", "KL at the end", "loss rise", "perplexity", "top-1"),
    ]
    for cells, row in zip(rows_of(root, "Effects and prices of all points"), rows, strict=True):
        names = ("joy", "joy_change", "kl", "last_kl", "loss_rise", "perplexity_ratio", "changed_top1")
        numbers = [float(cell.attributes["data-value"]) for cell in cells[2:]]
        assert numbers == pytest.approx([row[name] for name in names])
        assert cells[0].text.split()[0] == row["method"]
        assert cells[2].text == f"{row['joy']:.3f} [{row['joy_low']:.3f}, {row['joy_high']:.3f}]"
    last = [cell.text for cell in rows_of(root, "Effects and prices of all points")[3]]
    assert last[1] == "2" and last[4].startswith("0.3000 [0.") and last[6].startswith("+0.300 [")
    assert last[7].startswith("×1.350 [×1.3") and last[8].startswith("30.0 % [")
    unsteered = [cell.text for cell in rows_of(root, "Effects and prices of all points")[0]]
    assert unsteered[1] == "–" and unsteered[3:] == ["–"] * 6
    texts = rows_of(root, "Continuations at all points")
    assert [float(cell.attributes["data-value"]) for cell in texts[2][2:]] == pytest.approx(
        [rows[2][name] for name in (*STATISTICS[2:], *STATISTICS[:2])]
    )


def test_statistics_of_which_nothing_is_known_have_no_column(written):
    found = evaluation()
    found.statistics[..., 1] = np.nan
    assert "ends itself" not in heads_of(written(found), "Continuations at all points")


def test_numbers_that_are_unknown_or_infinite_are_written_as_such(written):
    found = evaluation()
    found.price[3, 0, 4], found.price[4, :, 4] = np.inf, np.nan
    cells = rows_of(written(found), "Effects and prices of all points")
    assert cells[3][4].text.startswith("∞") and cells[3][4].attributes["data-value"] == "inf"
    assert cells[4][4].text == "–" and cells[4][4].attributes["data-value"] == ""


# ---- the best points -------------------------------------------------------------------------------------------------


def test_the_best_points_within_budgets_are_those_of_the_evaluation(written):
    found = evaluation()
    root = written(found)
    assert [found.best(max_kl=budget)["strength"] for budget in BUDGETS] == [0.5, 0.5, 1.0, 1.0]
    low, high = best_of(root)
    assert low.startswith("KL of at most 0.02 or 0.05 nats: map at strength 0.5, mean score 0.300 [")
    assert "+0.200 [" in low and "at a KL of 0.0150 [" in low
    assert high.startswith("KL of at most 0.1 or 0.2 nats: map at strength 1, mean score 0.500 [")
    marks = {cells[1].text: cells[0].text for cells in rows_of(root, "Effects and prices of all points")[1:4]}
    assert marks == {"0.5": "map best for KL ≤ 0.02, 0.05", "1": "map best for KL ≤ 0.1, 0.2", "2": "map"}
    assert chosen_in(root) == "map at strength 1"


def test_the_smallest_score_may_be_the_best(written):
    root = written(minimize=True)
    assert best_of(root)[0].startswith(
        "KL of at most 0.02, 0.05, 0.1 or 0.2 nats: random at strength 1, mean score 0.050"
    )
    assert "The smallest mean score within a budget:" in root.text
    both = written(evaluation(judges=("joy", "rage")), minimize=["rage"])
    assert "map at strength 0.5" in best_of(both)[0] and "random at strength 1" in best_of(both, "rage")[0]


def test_judge_says_by_which_scores_points_are_marked(written):
    found = evaluation(judges=("joy", "rage"))
    found.scores["rage"] = found.scores["rage"][[0, 1, 2, 3, 1]] + np.array([0, 0, 0, 0, 1.0])[:, None, None]
    marked = [cells[0].text for cells in rows_of(written(found, judge="rage"), "Effects and prices of all points")]
    assert marked[4] == "random best for KL ≤ 0.02, 0.05, 0.1, 0.2"
    assert marked[2] == "map"


def test_where_no_point_is_better_the_unsteered_model_is_the_best(written):
    found = evaluation()
    found.scores["joy"][1:] -= 1
    root = written(found)
    assert best_of(root) == [
        "KL of at most 0.02, 0.05, 0.1 or 0.2 nats: no point is better than the unsteered model, which has "
        "0.100 [0.087, 0.113]."
    ]
    assert "best for" not in root.text


def test_a_change_that_may_be_chance_is_called_so(written):
    found = evaluation()
    found.scores["joy"][1] = found.scores["joy"][0] + np.array([-0.5, 0.5, 0.6, -0.5])[:, None]
    (sentence,) = [one for one in best_of(written(found)) if "0.02" in one]
    assert sentence.endswith("The interval of the change includes 0: it may be chance.")
    assert all("chance" not in one for one in best_of(written()))


def test_a_best_point_that_degenerates_is_called_so(written):
    found = evaluation()
    found.statistics[2, ..., 5] = 0.5
    low, high = best_of(written(found))
    assert high.endswith(" Its continuations degenerate, see below.") and "degenerate" not in low


# ---- the curve -------------------------------------------------------------------------------------------------------


def test_there_is_a_curve_for_every_judge_with_its_description(written):
    root = written(evaluation(judges=("joy", "rage")))
    pictures = root.all("svg", class_="chart")
    assert [one.attributes["role"] for one in pictures] == ["img", "img"]
    said = pictures[0].attributes["aria-label"]
    assert said.startswith("Mean score by joy against the KL divergence")
    assert "The unsteered model has 0.100." in said and "map at strength 2 has 0.900 at 0.3000 nats." in said
    keys = [one.text for one in root.all("ul", class_="keys")[0].all("li")]
    assert keys == ["map", "random", "unsteered"]


def test_the_picture_follows_the_colours_of_the_page_and_not_the_style_of_the_caller(tmp_path):
    import matplotlib

    first = evaluation().report(tmp_path / "first.html").read_text()
    with matplotlib.rc_context():
        matplotlib.style.use("dark_background")
        before = dict(matplotlib.rcParams)
        second = evaluation().report(tmp_path / "second.html").read_text()
        assert dict(matplotlib.rcParams) == before
    assert first == second
    picture = first[first.index("<svg") : first.index("</svg>")]
    assert "stroke: currentColor" in picture and "#000000" not in picture and "font-family" not in picture


def test_the_curve_runs_from_negative_to_positive_strengths():
    from lineas import plot

    found = evaluation(("unsteered", "a", "a", "a", "a"), (0, 2, -2, 1, -1))
    found.scores["joy"][:] = found.strengths[:, None, None]
    ax = plot.evaluation(found)
    assert ax.containers[0].lines[0].get_ydata().tolist() == [-2, -1, 0, 1, 2]


def test_names_with_dollars_are_no_mathematics():
    from lineas import plot

    ax = plot.evaluation(evaluation(("unsteered", "$x^$"), (0, 1), judges=("cost in $ a $",)))
    ax.figure.canvas.draw()
    label = ax.get_legend().get_texts()[1]
    assert label._preprocess_math(label.get_text()) == ("$x^$", False)


# ---- continuations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before", "after", "said"),
    [
        ("repetition_4", 0.01, 0.2, "repeats itself (share of repeated 4-grams): 20.0 % against 1.0 %"),
        ("distinct_2", 0.95, 0.8, "varies less (distinct-2): 0.800 against 0.950"),
        ("length", 20.0, 8.0, "breaks off (tokens): 8.0 against 20.0"),
        ("stopped", 0.75, 0.25, "finds no end (share that ends by itself): 25.0 % against 75.0 %"),
    ],
)
def test_degenerate_text_is_warned_of(written, name, before, after, said):
    found = evaluation()
    values = found.statistics[..., STATISTICS.index(name)]
    values[:], values[3] = before, after
    warning = written(found).one("div", class_="warning")
    assert warning.text.startswith("Against the unsteered model, the text degenerates at 1 of 4 points:")
    (item,) = warning.all("li")
    assert item.text.startswith(f"map at strength 2 {said}, a difference of ")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("repetition_4", 0.2, 0.01),
        ("repetition_4", 0.01, 0.05),
        ("distinct_2", 0.95, 0.91),
        ("length", 20.0, 11.0),
        ("stopped", 0.25, 0.75),
    ],
)
def test_text_that_is_no_worse_is_not_warned_of(written, name, before, after):
    found = evaluation()
    values = found.statistics[..., STATISTICS.index(name)]
    values[:], values[3] = before, after
    root = written(found)
    assert not root.all("div", class_="warning")
    assert "By these numbers, the text degenerates at no point." in root.text


def test_a_difference_within_chance_is_not_warned_of(written):
    found = evaluation()
    found.statistics[3, :, 0, 5] = [0.0, 0.0, 0.0, 0.9]
    assert not written(found).all("div", class_="warning")


# ---- texts side by side ----------------------------------------------------------------------------------------------


def test_texts_stand_side_by_side_with_scores_and_marks(written):
    found = evaluation(samples=2)
    found.continuations[2][1][0] = found.continuations[0][1][0]
    root = written(found)
    articles = root.all("article")
    assert [one.one("p", class_="prompt").text for one in articles] == PROMPTS
    said = articles[1].all("div", class_="said")
    assert [one.one("p", class_="who").text for one in said] == [
        *("unsteered", "map at strength 0.5", "map at strength 1 the same text", "map at strength 2"),
        "random at strength 1",
    ]
    assert [one.attributes.get("data-point") for one in said] == [None, "1", "2", "3", "4"]
    assert [one.one("p", class_="text").text for one in said] == [
        *("so good, text 0 1 0", "so good, text 1 1 0", "so good, text 0 1 0", "so good, text 3 1 0"),
        "so good, text 4 1 0",
    ]
    assert [[mark.text for mark in one.all("mark")] for one in said] == [[], ["1 1 0"], [], ["3 1 0"], ["4 1 0"]]
    assert said[3].one("p", class_="scores").text == f"joy {found.scores['joy'][3, 1, 0]:.3f}"
    # Once each, and of several continuations of a prompt the first alone.
    assert root.source.count("1 1 0") == 1 and "1 1 1" not in root.source
    options = root.one("select").all("option")
    assert [one.attributes["value"] for one in options] == ["1", "2", "3", "4", "all"]
    assert [one.attributes["label"] for one in root.all("optgroup")] == ["map", "random"]


@pytest.mark.parametrize(
    ("other", "mark"),
    [
        ("a good dog", None),
        ("a good day", "day"),
        ("a goodness", "goodness"),
        ("a good", None),
        ("a good, long", ", long"),
        ("", None),
        ("又好", "又好"),
    ],
)
def test_the_mark_begins_with_the_first_word_that_differs(written, other, mark):
    found = evaluation(("unsteered", "a"), (0, 1), prompts=PROMPTS[:1])
    found.continuations[0][0][0], found.continuations[1][0][0] = "a good dog", other
    text = written(found).one("div", data_point="1").one("p", class_="text")
    assert text.text == (other or "no text")
    assert [one.text for one in text.all("mark")] == ([] if mark is None else [mark])


@pytest.mark.parametrize(
    ("samples", "numbers"), [(1, [1]), (3, [1, 4, 7]), (7, list(range(1, 8))), (99, list(range(1, 8)))]
)
def test_as_many_prompts_as_are_asked_for_evenly_spaced(written, samples, numbers):
    root = written(evaluation(prompts=[f"prompt {k}" for k in range(7)]), samples=samples)
    assert [int(one.one("h3").text.split()[1]) for one in root.all("article")] == numbers


def test_continuations_can_be_left_out(written):
    root = written(samples=0)
    assert "so good" not in root.source and not root.all("article") and not root.all("select")
    assert rows_of(root, "Continuations at all points")


def test_conversations_and_token_ids_are_shown_as_what_they_are(written):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    first, second, third = written(evaluation(prompts=[chat, [1, 2, 3], "x" * 5000])).all("article")
    assert [one.text for one in first.all("p", class_="prompt")] == [
        "system Be brief.",
        'user [{"type": "text", "text": "Hi"}]',
    ]
    assert second.one("p", class_="prompt").text == "token ids 1 2 3"
    assert third.one("p", class_="prompt").text == "x" * 1499 + "…"
