"""The study of diagnostics without its model: which fits it makes, and that its tables say what the numbers do."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
stats = pytest.importorskip("scipy.stats")
pytest.importorskip("sklearn")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import diagnostics as study  # noqa: E402
from _diagnostics_results import Row, Rows, spearman  # noqa: E402

from lineas.evaluation import diagnose  # noqa: E402

CHECKS = (diagnose.W2, diagnose.SEPARABILITY, diagnose.STABILITY, diagnose.DAMAGE, diagnose.CHANGE)


def row(concept, share, effect, price, rng, stable=None):
    """A row whose price is the change to the power of 0.9 at every strength."""
    change = price ** (1 / 0.9) / 4
    values = dict(zip(CHECKS, (share, 0.8, stable, change, change), strict=True))
    verdicts = dict.fromkeys(CHECKS, "good") | {diagnose.STABILITY: "stable" if stable else "not applicable"}
    modules = {name: [change, None] for name in ("own_damage", "own_change")}
    modules |= {"auc": [0.7, 0.9], "unsteered": [1.0, 1.0], "steered": [1.0 - share, 1.0]}
    powers = np.array(study.STRENGTHS)
    changes = change * powers**2
    return Row(
        concept=concept,
        label="8, all, dense",
        support=1.0,
        fit_closing=0.5,
        diagnosis={
            "checks": [
                {"name": name, "value": values[name], "verdict": verdicts[name], "interval": None, "why": ""}
                for name in CHECKS
            ],
            "modules": modules,
            "seconds": {"collect": 2.0},
        },
        gains=effect + 0.01 * rng.normal(size=40),
        strengths=study.STRENGTHS,
        price={
            "kl": (4 * changes) ** 0.9,
            **dict.fromkeys(("damage", "change", "own_damage", "own_change"), changes),
        },
    )


@pytest.fixture
def rows(rng):
    """Two concepts: in both the share ranks the effect, on scales that have nothing in common, and not the price."""
    shares, prices = np.linspace(0, 1, 8), rng.permutation(np.geomspace(0.01, 1, 8))
    return Rows(
        [row("a", share, 0.3 * share, price, rng) for share, price in zip(shares, prices, strict=True)]
        + [
            row("b", 0.1 * share, 5 + share, price, rng, stable=0.5)
            for share, price in zip(shares, prices, strict=True)
        ]
    )


def test_fits_are_of_all_kinds_and_draw_prompts_of_their_own():
    fits = study.all_fits()
    assert len(fits) == len({fit.slug for fit in fits}) == 24
    assert {(fit.concept, fit.size, fit.kind) for fit in fits} == {
        (concept, size, kind) for concept in study.CONCEPTS for size in study.SIZES for kind in study.KINDS
    }
    for concept in study.CONCEPTS:
        assert len({fit.seed for fit in fits if fit.concept == concept}) == 12


def test_sentences_that_are_held_out_are_not_fitted():
    for fit in study.all_fits():
        if fit.concept == "sentiment":
            fitted, held = study.Study.sets(None, fit)
            for mine, theirs in zip(fitted, held, strict=True):
                assert len(mine) == fit.size and len(theirs) == study.HELD_OUT and not set(mine) & set(theirs)


def test_intervals_of_spearman_hold_the_true_correlation(rng):
    held = []
    for _ in range(200):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=12).T
        rho, low, high = spearman(x, y)
        assert rho == pytest.approx(stats.spearmanr(x, y).statistic) and low < rho < high
        held.append(low <= 6 / np.pi * np.arcsin(0.3) <= high)
    assert 0.9 <= np.mean(held) <= 0.99
    assert np.isnan(spearman(np.ones(9), np.arange(9.0))).all()


def test_pooled_correlations_rank_within_each_concept(rows):
    for concept in ("a", "b", None):
        rho, low, _ = rows.correlation("share of the gap closed", "effect", concept)
        assert rho > 0.95 and low > 0.5
        assert rows.correlation("change", "price", concept)[0] == pytest.approx(1)
    assert np.isnan(rows.correlation("stability of the support", "effect", "a")[0])  # which has none


def test_tables_hold_every_fit_number_and_verdict(rows):
    fits, correlations, verdicts, thresholds, reading = rows.report()
    assert len(fits) == 2 + 16 and len(correlations) == 2 + 10
    for lines in (fits, correlations, verdicts, thresholds):
        assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| stability of the support | not applicable | 8 |") for line in verdicts)
    effect = next(line for line in reading if "rank the effect" in line).split("These do not: ")
    assert "share of the gap closed (+" in effect[0] and "damage" in effect[1]
    assert any("reliability of" in line and "nan" not in line for line in reading)


def test_thresholds_are_where_the_price_reaches_its_amounts(rows):
    line = next(line for line in rows.thresholds() if line.startswith("| change |"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    for cell, kl in zip(cells[1:3], (diagnose.KL_SHOWS, diagnose.KL_BREAKS), strict=True):
        assert float(cell) == pytest.approx(kl ** (1 / 0.9) / 4, rel=0.01)
    assert cells[4:] == ["0.90", "1.0", "1.0"]
