"""Means, intervals and paired differences over seeds.

A value of a seed is the mean over its label draws. All methods have the same seeds and draws, so that differences are paired. With few
seeds, t intervals are used: a bootstrap of three numbers covers the truth in about 75 % of cases, not in 95 %.
"""

import numpy
import pandas
from scipy import stats

LEVEL = 0.95
LEAST = 3  # with fewer seeds nothing is decided


def half_width(values: numpy.ndarray) -> float:
    """Half the width of the t interval of a mean; NaN for a single value."""
    count = len(values)
    return float("nan") if count < 2 else float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * values.std(ddof=1) / count**0.5)


def p_value(differences: numpy.ndarray) -> float:
    """Of a two-sided paired t test; 1 where nothing can be said."""
    if len(differences) < 2:
        return 1.0
    spread = differences.std(ddof=1)
    if spread == 0:
        return 1.0 if differences.mean() == 0 else 0.0
    return float(2 * stats.t.sf(abs(differences.mean()) / (spread / len(differences) ** 0.5), len(differences) - 1))


def holm(p_values: list[float]) -> list[float]:
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


def differences(scores: pandas.DataFrame, reference: str) -> pandas.DataFrame:
    """One row per other method and evaluation: its mean difference from the reference, over the seeds that both have.

    Columns: seeds, difference, half (of the paired interval), p (adjusted by Holm over the methods of an evaluation), decided. `half` is
    also the smallest difference that these seeds could have shown, before Holm's correction.
    """
    values, found = per_seed(scores).set_index(["method", "evaluation", "seed"])["value"].sort_index(), []
    for evaluation in scores["evaluation"].unique():
        lines = []
        for method in scores["method"].unique():
            if method == reference:
                continue
            try:
                pairs = (values.loc[method, evaluation] - values.loc[reference, evaluation]).dropna().to_numpy()
            except KeyError:
                continue
            if len(pairs):
                lines.append(
                    {
                        "method": method,
                        "evaluation": evaluation,
                        "seeds": len(pairs),
                        "difference": pairs.mean(),
                        "half": half_width(pairs),
                        "p": p_value(pairs),
                    }
                )
        for line, p in zip(lines, holm([line["p"] for line in lines]), strict=True):
            found.append({**line, "p": p, "decided": line["seeds"] >= LEAST and p < 1 - LEVEL})
    columns = ["method", "evaluation", "seeds", "difference", "half", "p", "decided"]
    return pandas.DataFrame(found, columns=columns)
