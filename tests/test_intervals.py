"""tools/intervals.py: its intervals against tables, Student's, a fit by least squares, and simulated comparisons."""

import math

import numpy as np
import pytest
from scipy import stats

from tools.intervals import critical_value, differences, seeds_for, smallest_difference

# (rows besides the first, degrees of freedom): two-sided, 5 % (Dunnett 1964)
TABLE = {(1, 10): 2.23, (2, 6): 2.86, (2, 12): 2.50, (3, 8): 2.88, (5, 12): 2.90, (5, 24): 2.70, (9, 20): 2.95}


@pytest.mark.parametrize("others, df", TABLE)
def test_critical_value_is_that_of_the_table(others, df):
    assert critical_value(others, df) == pytest.approx(TABLE[others, df], abs=0.006)


@pytest.mark.parametrize("df", [1, 2, 4, 30, 1000])
def test_with_two_rows_it_is_students(df):
    assert critical_value(1, df) == pytest.approx(float(stats.t.isf(0.025, df)), rel=1e-7)
    losses = np.random.default_rng(df).normal(size=(2, df + 1))
    paired = stats.ttest_rel(losses[1], losses[0]).confidence_interval()
    difference, half, _ = differences(losses)
    assert [difference[0] - half, difference[0] + half] == pytest.approx([paired.low, paired.high])


def test_residuals_are_those_of_a_fit_of_rows_and_seeds():
    losses = np.random.default_rng(1).normal(size=(4, 5))
    row, seed = np.indices(losses.shape).reshape(2, -1)
    design = np.hstack([np.eye(4)[row], np.eye(5)[seed]])
    fitted = design @ np.linalg.lstsq(design, losses.ravel(), rcond=None)[0]
    difference, half, sd = differences(losses)
    assert sd == pytest.approx(math.sqrt(((losses.ravel() - fitted) ** 2).sum() / 12))
    assert half == pytest.approx(critical_value(3, 12) * sd * math.sqrt(2 / 5))
    assert np.allclose(difference, (losses - losses[0]).mean(axis=1)[1:])
    assert [differences(array)[1:] for array in (losses[:, :1], losses[:1])] == [(None, None)] * 2


@pytest.mark.parametrize("seed_effect", [0.0, 3.0])
@pytest.mark.parametrize("rows, seeds", [(2, 3), (3, 2), (3, 3), (3, 5), (6, 3), (5, 12)])
def test_simulated_comparisons(rows, seeds, seed_effect):
    """In 95 % of comparisons all intervals contain the true differences, one of which is not zero; that one is found as
    often as smallest_difference says. Effects of the seeds change nothing."""
    rng, planted = np.random.default_rng(0), smallest_difference(rows, seeds, 1.0)
    losses = rng.normal(size=(10_000, rows, seeds)) + seed_effect * rng.normal(size=(10_000, 1, seeds))
    losses[:, 1] += planted
    difference, half = (np.array(part) for part in list(zip(*map(differences, losses)))[:2])
    true = np.array([planted] + [0.0] * (rows - 2))
    assert (np.abs(difference - true) <= half[:, None]).all(axis=1).mean() == pytest.approx(0.95, abs=0.01)
    assert (difference[:, 0] > half).mean() == pytest.approx(0.8, abs=0.015)
    assert (np.abs(difference[:, 1:]) > half[:, None]).any(axis=1).mean() < 0.05


def test_seeds_for():
    seeds = seeds_for(0.01, 6, 0.0082)
    assert smallest_difference(6, seeds, 0.0082) <= 0.01 < smallest_difference(6, seeds - 1, 0.0082)
    assert seeds_for(0.01, 2, 0.0) == 2 and seeds_for(0.01, 2, 1.0) is None
