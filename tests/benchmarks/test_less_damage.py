"""The tables of the study of damage: prices at equal effect and effects at equal price, on made-up curves."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from _less_damage_results import DOMAINS, Curves, Point, draw, tables

PROMPTS, TEXTS = 40, 20


def point(toxic, rise, strength=1.0):
    """A point at which the first `toxic` of 40 prompts are toxic, and the loss on clean texts has risen by `rise`."""
    judges = np.zeros((2, PROMPTS))
    judges[:, :toxic] = 1
    counts = {name: np.full(TEXTS, 10) for name in DOMAINS}
    sums = {name: np.full(TEXTS, 10 * (3 + (rise if name == "clean" else rise / 2))) for name in DOMAINS}
    return Point(judges, sums, counts, strength)


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
    ratio = lines[[line.startswith("| variant | that rise") for line in lines].index(True) :]
    assert ratio[2].startswith("| half | 0.25 [") and ratio[3].startswith("| never | out of reach [")
    draw({"a model": found}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
