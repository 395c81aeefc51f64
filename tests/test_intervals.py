"""tools/intervals.py: its intervals against tables, scipy and 10,000 comparisons of noise."""

import math

import numpy as np
import pytest
from scipy import stats

from tools.intervals import (
    critical_value,
    half_widths,
    mean,
    pooled,
    seeds_for,
    smallest_difference,
    standard_error,
    student_interval,
)


def test_interval_is_students():
    for df, t in {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 1000: 1.9623}.items():
        values = np.random.default_rng(df).normal(size=df + 1).tolist()
        half = t * np.std(values, ddof=1) / math.sqrt(df + 1)
        assert student_interval(values) == pytest.approx([np.mean(values) - half, np.mean(values) + half], abs=5e-5)
    assert student_interval([0.0, 0.0]) == [0.0, 0.0]
    assert student_interval([1.5]) is None and student_interval([]) is None and mean([]) is None


def test_pooled():
    assert pooled([[1.0, 3.0], [10.0, 10.0, 13.0], [7.0]]) == (pytest.approx(math.sqrt((2 + 6) / 3)), 3)
    assert pooled([[1.0], [2.0]]) == (None, 0)


# (rows besides the first, degrees of freedom): two-sided, 5 % (Dunnett 1964)
TABLE = {(1, 10): 2.23, (2, 6): 2.86, (2, 12): 2.50, (3, 8): 2.88, (5, 12): 2.90, (5, 24): 2.70, (9, 20): 2.95}


@pytest.mark.parametrize("others, df", TABLE)
def test_critical_value_is_that_of_the_table(others, df):
    sizes = (df // (others + 1) + 1,) * (others + 1)
    assert sum(sizes) - len(sizes) == df and critical_value(sizes) == pytest.approx(TABLE[others, df], abs=0.006)


@pytest.mark.parametrize("sizes", [(3, 3), (3,) * 6, (2, 2, 2), (5, 3, 4), (3, 3, 1)])
def test_intervals_are_those_of_scipy(sizes):
    rng = np.random.default_rng(1)
    first, *others = [rng.normal(size=size).tolist() for size in sizes]
    low, high = stats.dunnett(*others, control=first, rng=rng).confidence_interval()
    assert half_widths(sizes, pooled([first, *others])[0]) == pytest.approx((high - low) / 2, rel=0.01)


def test_critical_value_where_scipys_interval_misses_its_level():
    """With the rows' correlations, as 200,000 draws of noise have them."""
    sizes = (2, 2, 1, 3)
    rng = np.random.default_rng(1)
    means = rng.normal(size=(200_000, 4)) / np.sqrt(sizes)
    std = np.sqrt(rng.chisquare(4, size=(200_000, 1)) / 4)
    errors = [standard_error(size, sizes[0]) for size in sizes[1:]]
    inside = np.abs(means[:, 1:] - means[:, :1]) <= critical_value(sizes) * std * errors
    assert inside.all(axis=1).mean() == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize("rows, seeds", [(6, 3), (2, 2), (3, 5)])
def test_ten_thousand_comparisons_of_noise(rows, seeds):
    """All intervals of a comparison hold the true differences in 95 % of them, so that where there is none, one or more
    is found in 5 %; and a difference that is said to be found four times in five is."""
    sizes, sd = (seeds,) * rows, 0.0082
    losses = np.random.default_rng(0).normal(1.2, sd, size=(10_000, rows, seeds))
    stds = np.sqrt(losses.var(axis=2, ddof=1).mean(axis=1))
    assert pooled(losses[0].tolist()) == (pytest.approx(stds[0]), rows * (seeds - 1))
    halves = np.stack(half_widths(sizes, stds), axis=1)
    differences = losses[:, 1:].mean(axis=2) - losses[:, :1].mean(axis=2)
    assert (np.abs(differences) <= halves).all(axis=1).mean() == pytest.approx(0.95, abs=0.01)
    planted = smallest_difference(sizes, sd)
    found = differences[:, 0] + planted > halves[:, 0]
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    if rows == 6:  # the committed comparison of six activations
        assert planted == pytest.approx(0.0255, abs=2e-4)


def test_seeds_for():
    seeds = seeds_for(0.01, 6, 0.0082)
    assert smallest_difference((seeds,) * 6, 0.0082) <= 0.01 < smallest_difference((seeds - 1,) * 6, 0.0082)
    assert seeds_for(0.01, 2, 0.0) == 2 and seeds_for(0.01, 2, 1.0) is None
    assert smallest_difference((3, 3, 2), 1.0) > smallest_difference((3, 3, 3), 1.0)
