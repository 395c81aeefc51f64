"""One rule decides what a comparison shows. It was fixed before the runs, as a part of the program.

A loss is that of the last validation, in nats per token. Runs of one seed share their initial weights and their data,
so seeds are blocks: a loss is modelled as the sum of an effect of its row, an effect of its seed, and a residual. The
residuals of all rows that are compared with one reference are pooled into one standard deviation with (rows − 1) ·
(seeds − 1) degrees of freedom. A difference is that of two means over the same seeds. Its interval is Dunnett's: with
95 % probability, all intervals of one reference contain the true differences. If an interval contains zero, the
difference is not significant. A seed that a row lacks is left out of all rows. The effect is the difference divided by
the residual standard deviation.
"""

import bisect
import functools
import math

import numpy as np

LEVEL = 0.95  # of all intervals of one reference together
POWER = 0.8  # "four times in five"
MOST_SEEDS = 1000


def differences(losses):
    """(differences from the first row, half of the width of their intervals, residual standard deviation) of losses, an
    array (rows, seeds). Where there are no degrees of freedom, the last two are None."""
    losses = np.asarray(losses, float)
    rows, seeds = losses.shape
    means = losses.mean(axis=1)
    difference = means[1:] - means[0]
    df = (rows - 1) * (seeds - 1)
    if not df:
        return difference, None, None
    residual = losses - means[:, None] - losses.mean(axis=0) + losses.mean()
    sd = math.sqrt((residual**2).sum() / df)
    return difference, critical_value(rows - 1, df) * sd * math.sqrt(2 / seeds), sd


@functools.cache
def critical_value(others, df):
    """What |difference| / standard error exceeds in none of `others` rows with probability LEVEL, if all true means are
    equal: Dunnett's value for equal sizes (Dunnett 1955), where two differences have a correlation of ½."""
    from scipy import optimize, stats

    # In units of the standard error, a difference is (z − z₀) / (√2·s), with normal z and z₀ and s² a χ² over its
    # degrees of freedom. Given z₀ and s, the rows are independent; both are integrated by Gauss–Legendre.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    z, z_weights = 8 * nodes, 8 * weights * stats.norm.pdf(8 * nodes)
    most = math.sqrt(stats.chi2.isf(1e-13, df) / df)
    s = most * (nodes + 1) / 2
    s_weights = most / 2 * weights * stats.chi2.pdf(df * s**2, df) * 2 * df * s

    def excess(t):
        limit = math.sqrt(2) * t * s[:, None]
        inside = (stats.norm.cdf(z + limit) - stats.norm.cdf(z - limit)) ** others
        return float(s_weights @ inside @ z_weights) - LEVEL

    # between Student's value for one row and Bonferroni's for all
    one, most_t = stats.t.isf([(1 - LEVEL) / 2, (1 - LEVEL) / 2 / others], df)
    return optimize.brentq(excess, 0.99 * one, 1.01 * most_t)


def smallest_difference(rows, seeds, sd):
    """The true difference of one row to the first that is found, with the right sign, with probability POWER, if sd is
    the true residual standard deviation."""
    from scipy import optimize, stats

    df = (rows - 1) * (seeds - 1)
    critical = critical_value(rows - 1, df)
    shift = optimize.brentq(lambda shift: float(stats.nct.sf(critical, df, shift)) - POWER, 0, 3 * critical)
    return shift * sd * math.sqrt(2 / seeds)


def seeds_for(difference, rows, sd):
    """The number of seeds that makes this the smallest difference found; None if MOST_SEEDS are too few."""
    seeds = range(2, MOST_SEEDS + 1)
    enough = bisect.bisect_left(seeds, True, key=lambda n: smallest_difference(rows, n, sd) <= difference)
    return seeds[enough] if enough < len(seeds) else None
