"""This analysis was fixed before the runs, as a part of the program.

A loss is that of the last validation, in nats per token: mean ± standard deviation over the seeds. Perplexity and bits
per byte are those of the mean. A difference is that of two means. Its interval is Dunnett's, from the standard
deviation pooled over the rows that are compared with one reference: with 95 % probability, all of these intervals
contain the true differences. The verdicts follow it. Paired is the mean difference between runs of one seed, which saw
the same batches, with Student's 95 % interval of this row alone. A true difference of one row counts as found if its
interval is beyond zero on the right side; "four times in five" supposes that the pooled standard deviation is the true
one.
"""

import bisect
import functools
import math
import statistics

LEVEL = 0.95  # of all intervals
POWER = 0.8  # four times in five
MOST_SEEDS = 1000


def mean(values):
    """The mean of a list; None if it is empty, or lacks a value (None)."""
    return statistics.fmean(values) if values and None not in values else None


def student_interval(values):
    """[low, high]: Student's interval of the mean of some numbers; None for fewer than two."""
    from scipy import stats

    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return [mean(values) + float(t) * error for t in stats.t.interval(LEVEL, df=len(values) - 1)]


def pooled(rows):
    """(standard deviation within the rows, its degrees of freedom); (None, 0) if no row has two values."""
    df = sum(map(len, rows)) - len(rows)
    return math.sqrt(sum(statistics.pvariance(row) * len(row) for row in rows) / df) if df else None, df


def standard_error(size, first):
    """Of the difference between the means of two rows with these many values, in standard deviations of a value."""
    return math.sqrt(1 / size + 1 / first)


@functools.cache
def critical_value(sizes):
    """What |difference to the first row| / standard error exceeds in none of the other rows with probability LEVEL, if
    all true means are equal (Dunnett 1955). sizes: a tuple of how many values each row has.

    scipy.stats.dunnett, which minimizes a function that it samples anew at each call, misses the level for some sizes:
    90 % for (2, 2, 1, 3). Here the samples are always the same, so that the function has a root; it is exact to 0.02 %.
    """
    from scipy import optimize, stats

    df, others = sum(sizes) - len(sizes), len(sizes) - 1
    shares = [1 / math.sqrt(1 + sizes[0] / size) for size in sizes[1:]]  # of the first row in each difference
    correlations = [[1 if i == j else shares[i] * shares[j] for j in range(others)] for i in range(others)]
    distribution = stats.multivariate_t(shape=correlations, df=df)

    def excess(t):
        inside = distribution.cdf([t] * others, lower_limit=[-t] * others, maxpts=10000, random_state=0)
        return float(inside) - LEVEL

    # between the values for one row and, by Bonferroni, for rows without correlation
    one, most = stats.t.isf([(1 - LEVEL) / 2, (1 - LEVEL) / 2 / others], df)
    return optimize.brentq(excess, 0.99 * one, 1.01 * most)


def half_widths(sizes, sd):
    """Those of Dunnett's intervals, around the difference of each row but the first to the first."""
    return [critical_value(sizes) * sd * standard_error(size, sizes[0]) for size in sizes[1:]]


def smallest_difference(sizes, sd):
    """The true difference between the first row and the shortest other one that is found with probability POWER, if sd
    is the true standard deviation."""
    from scipy import optimize, stats

    critical, df = critical_value(sizes), sum(sizes) - len(sizes)
    shift = optimize.brentq(lambda shift: float(stats.nct.sf(critical, df, shift)) - POWER, 0, 3 * critical)
    return shift * sd * standard_error(min(sizes[1:]), sizes[0])


def seeds_for(difference, rows, sd):
    """The number of seeds per row that makes this the smallest difference found; None if MOST_SEEDS are too few."""
    seeds = range(2, MOST_SEEDS + 1)
    enough = bisect.bisect_left(seeds, True, key=lambda n: smallest_difference((n,) * rows, sd) <= difference)
    return seeds[enough] if enough < len(seeds) else None
