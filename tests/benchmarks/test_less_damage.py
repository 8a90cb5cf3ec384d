"""The tables of the study of damage: prices at equal effect and effects at equal price, on made-up curves."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _less_damage_results as results
from _less_damage_results import DOMAINS, Curves, GateFacts, Point, draw, gate_table, tables

PROMPTS, TEXTS = 40, 20


def point(toxic, rise, strength=1.0):
    """A point at which the first `toxic` of 40 prompts are toxic, and the loss on clean texts has risen by `rise`."""
    judges = np.zeros((2, PROMPTS))
    judges[:, :toxic] = 1
    counts = {name: np.full(TEXTS, 10) for name in DOMAINS}
    sums = {name: np.full(TEXTS, 10 * (3 + (rise if name == "clean" else rise / 2))) for name in DOMAINS}
    return Point(judges, sums, counts, strength)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(results, "DRAWS", 100)


@pytest.fixture
def found():
    """Two seeds: "half" reaches half the toxic share at a rise of 0.05, "plain" at 0.2, "never" not at all."""
    off = [point(20, 0.0, 0.0)]
    return {
        "none": [off, off],
        "plain": [[point(15, 0.1), point(5, 0.3)]] * 2,
        "half": [[point(10, 0.05), point(4, 0.3)]] * 2,
        "never": [[point(20, 0.1), point(18, 0.3)]] * 2,
    }


def test_effects_are_read_between_the_points(found):
    curves = Curves(found)
    np.testing.assert_allclose(curves.share_at("plain", 0.1, 0), 15 / 40)
    np.testing.assert_allclose(curves.share_at("plain", 0.05, 0), 17.5 / 40)
    np.testing.assert_allclose(curves.share_at("plain", 0.2, 0), 10 / 40)
    assert np.isnan(curves.share_at("plain", 0.4, 0)).all()


def test_prices_are_read_where_the_share_is_halved(found):
    curves = Curves(found)
    np.testing.assert_allclose(curves.rise_at("plain", 0.5, 0), 0.2)
    np.testing.assert_allclose(curves.rise_at("half", 0.5, 0), 0.05)
    np.testing.assert_allclose(curves.rise_at("half", 0.5, 0, "code"), 0.025)
    assert np.isnan(curves.rise_at("never", 0.5, 0)).all()


def test_draws_differ_and_repeat(found):
    found["plain"] = [[point(15, 0.1), point(5, 0.3)], [point(13, 0.1), point(6, 0.25)]]
    first, again = Curves(found), Curves(found)
    shares = [first.share_at("plain", 0.1, draw)[0] for draw in range(50)]
    assert len(set(shares)) > 10
    assert shares == [again.share_at("plain", 0.1, draw)[0] for draw in range(50)]


def test_tables_name_what_is_out_of_reach(found, tmp_path):
    lines = tables({"a model": found})
    text = "\n".join(lines)
    assert "| plain | 1.00 | +0.100 | +0.050 | +0.050 | +0.050 | 37.5% [" in text
    clean = lines[[line.startswith("| variant | rise on clean comments at half") for line in lines].index(True) :]
    assert clean[2].startswith("| plain | +0.200 [") and clean[2].endswith("| 1 | 1 |")
    assert clean[3].startswith("| half | +0.050 [") and "| 0.25 [" in clean[3]
    assert clean[4].startswith("| never | out of reach [")
    others = lines[[line.startswith("| variant | mean rise on code") for line in lines].index(True) :]
    assert others[2].startswith("| plain | +0.100 [") and others[3].startswith("| half | +0.025 [")
    draw({"a model": found}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_gate_table_has_areas_and_shares_of_closed_tokens():
    closed, half, opened = np.zeros(8), np.repeat([0.0, 1.0], 4), np.ones(8)
    kept = {"auroc": np.array([0.8, 0.6])}
    texts = {"insults": opened, "comments": half, "prompts": half, "clean": half} | dict.fromkeys(DOMAINS[1:], closed)
    for name, values in texts.items():
        kept[f"values {name}"], kept[f"lengths {name}"] = values, np.array([3, 5])
    facts = GateFacts.of(kept)
    np.testing.assert_array_equal(facts.ends["comments"], [0, 1])
    # Half of the clean tokens tie with the insults' and half are below; the ends are [1, 1] against [0, 1].
    assert gate_table({"a model": [facts]})[-1] == "| a model | 0.70 | 0.75 | 0.75 | 0.50 | 50% | 100% | 100% | 100% |"
