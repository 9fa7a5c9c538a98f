"""Means, intervals, paired differences and ranks over seeds.

A value of a seed is the mean over its label draws. All methods have the same seeds and draws, so that differences are paired. With few
seeds, t intervals are used: a bootstrap of three numbers covers the truth in about 75 % of cases, not in 95 %.
"""

import itertools
from collections.abc import Sequence

import numpy
import pandas
from scipy import stats

LEVEL = 0.95
LEAST = 3  # with fewer seeds nothing is decided
ROUNDING = 2e-4  # values have four decimals; a spread below that says nothing: a few test images give equal differences by chance


def half_width(values: numpy.ndarray, level: float = LEVEL) -> float:
    """Half the width of the t interval of a mean; NaN for a single value."""
    count = len(values)
    return float("nan") if count < 2 else float(stats.t.ppf((1 + level) / 2, count - 1) * values.std(ddof=1) / count**0.5)


def p_value(differences: numpy.ndarray) -> float:
    """Of a two-sided paired t test; 1 where nothing can be said: for one difference, and for equal ones."""
    if len(differences) < 2 or (spread := differences.std(ddof=1)) < ROUNDING:
        return 1.0
    return float(2 * stats.t.sf(abs(differences.mean()) / (spread / len(differences) ** 0.5), len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: the chance of one wrong decision among all of them is at most the smallest that is decided on."""
    order, adjusted, largest = numpy.argsort(p_values), [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def per_seed(scores: pandas.DataFrame) -> pandas.DataFrame:
    """Scores with columns method, seed, evaluation, value (one row per draw) to a frame of one row per method, evaluation and seed."""
    return scores.groupby(["method", "evaluation", "seed"], sort=False)["value"].mean().reset_index()


def means(scores: pandas.DataFrame) -> pandas.DataFrame:
    """One row per method and evaluation: seeds, mean and half (of the interval), in the unit of the values."""
    groups = per_seed(scores).groupby(["method", "evaluation"], sort=False)["value"]
    return groups.agg(seeds="count", mean="mean", half=lambda values: half_width(values.to_numpy())).reset_index()


def paired(scores: pandas.DataFrame, pairs: Sequence[tuple[str, str]]) -> pandas.DataFrame:
    """One row per evaluation and pair (method, reference) of methods that both have it: the mean difference over the seeds that both have.

    Columns: method, reference, evaluation, seeds, difference, half (of the paired interval), p (adjusted by Holm over the pairs of an
    evaluation), decided, and least: the smallest difference that these seeds could have shown, with this spread and after the decisions
    that were made; NaN for fewer seeds than LEAST and for equal differences.
    """
    values, found = per_seed(scores).pivot(index=["evaluation", "seed"], columns="method", values="value"), []
    for evaluation in scores["evaluation"].unique():
        own = values.loc[evaluation]
        gaps = {(a, b): (own[a] - own[b]).dropna().to_numpy() for a, b in pairs if a in own and b in own}
        gaps = {pair: gap for pair, gap in gaps.items() if len(gap)}
        adjusted = holm([p_value(gap) for gap in gaps.values()])
        decided = [len(gap) >= LEAST and p < 1 - LEVEL for gap, p in zip(gaps.values(), adjusted, strict=True)]
        level = 1 - (1 - LEVEL) / max(1, len(gaps) - sum(decided))  # at which Holm's procedure has stopped
        for ((a, b), gap), p, sure in zip(gaps.items(), adjusted, decided, strict=True):
            numbers = {"seeds": len(gap), "difference": gap.mean(), "half": half_width(gap), "p": p, "decided": sure}
            found.append(
                {
                    "method": a,
                    "reference": b,
                    "evaluation": evaluation,
                    **numbers,
                    "least": half_width(gap, level) if len(gap) >= LEAST and gap.std(ddof=1) >= ROUNDING else float("nan"),
                }
            )
    columns = ["method", "reference", "evaluation", "seeds", "difference", "half", "p", "decided", "least"]
    return pandas.DataFrame(found, columns=columns)


def differences(scores: pandas.DataFrame, reference: str) -> pandas.DataFrame:
    """`paired` for the differences of all other methods from a reference."""
    return paired(scores, [(method, reference) for method in scores["method"].unique() if method != reference])


def ranks(scores: pandas.DataFrame) -> dict[tuple[str, str], tuple[int, int]]:
    """The first and last rank that a method, by (method, evaluation), can have: all pairs of methods are compared, and only decided
    differences count."""
    table = paired(scores, [*itertools.combinations(scores["method"].unique(), 2)])
    sure, found = table[table["decided"].astype(bool)], {}
    for method, evaluation in scores[["method", "evaluation"]].drop_duplicates().itertuples(index=False):
        own = sure[sure["evaluation"] == evaluation]
        better = ((own["method"] == method) & (own["difference"] < 0)) | ((own["reference"] == method) & (own["difference"] > 0))
        worse = ((own["method"] == method) & (own["difference"] > 0)) | ((own["reference"] == method) & (own["difference"] < 0))
        others = scores.loc[scores["evaluation"] == evaluation, "method"].nunique()
        found[method, evaluation] = (1 + int(better.sum()), others - int(worse.sum()))
    return found
