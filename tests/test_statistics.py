"""Tests of the comparison's statistics."""

import numpy
import pandas
import pytest
from scipy import stats

from benchmarks.statistics import differences, half_width, holm, means, p_value, ranks


def scores(values: dict[str, list[float]], evaluation: str = "knn") -> pandas.DataFrame:
    rows = [(method, seed, 0, evaluation, value) for method, own in values.items() for seed, value in enumerate(own)]
    return pandas.DataFrame(rows, columns=["method", "seed", "draw", "evaluation", "value"])


def test_the_interval_covers_the_true_mean_of_three_seeds_in_95_percent():
    draw = numpy.random.default_rng(0)
    samples = draw.normal(size=(4000, 3))
    covered = numpy.mean([abs(sample.mean()) <= half_width(sample) for sample in samples])
    assert 0.94 < covered < 0.96


def test_p_values_and_holm_agree_with_scipy_and_a_worked_example():
    one, other = numpy.array([3.0, 4.1, 5.2, 3.9]), numpy.array([2.0, 3.9, 4.1, 3.0])
    assert p_value(one - other) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert p_value(numpy.array([0.2778, 0.2777, 0.2778])) == 1.0  # one test image of 360 in each seed: nothing is known of the spread
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_difference_is_paired_over_seeds_and_decided_only_below_the_level():
    base = [10.0, 20.0, 30.0, 40.0]
    table = scores({"from scratch": base, "better": [11.0, 21.1, 31.0, 41.1], "same": [10.5, 19.0, 31.0, 39.0]})
    found = differences(table, "from scratch").set_index("method")
    assert found.loc["better", "difference"] == pytest.approx(1.05) and found.loc["better", "decided"]
    assert not found.loc["same", "decided"] and found.loc["same", "half"] > 1
    assert means(table).set_index("method").loc["better", "half"] > 10  # the unpaired interval is far wider


def test_the_mean_of_a_seed_is_over_its_label_draws():
    table = pandas.concat([scores({"a": [10.0, 20.0]}), scores({"a": [30.0, 40.0]}).assign(draw=1)])
    assert means(table)[["seeds", "mean"]].values.tolist() == [[2, 25.0]]


def test_fewer_than_three_seeds_decide_nothing():
    found = differences(scores({"from scratch": [1.0, 1.0], "better": [90.0, 90.0]}), "from scratch")
    assert found["difference"].item() == 89.0 and not found["decided"].item()


def test_the_smallest_difference_that_could_be_shown_is_decided_if_it_is_exceeded():
    noise = numpy.array([-1.0, 0.5, 0.0, 0.5, 0.0])
    base = {"from scratch": [0.0] * 5, "clear": [50.0, 50.1, 49.9, 50.0, 50.0], "other": [*(noise[::-1] * 3)]}
    least = differences(scores(base | {"near": [*noise]}), "from scratch").set_index("method").loc["near", "least"]
    for factor, decided in ((0.99, False), (1.01, True)):
        table = differences(scores(base | {"near": [*(noise + factor * least)]}), "from scratch").set_index("method")
        assert table.loc["near", "decided"] == decided and table.loc["clear", "decided"] and not table.loc["other", "decided"]


def test_ranks_are_only_as_narrow_as_the_decided_pairs_of_methods_allow():
    noise = numpy.array([0.1, -0.1, 0.0, 0.05, -0.05])
    table = scores({"worst": [*(10 + noise)], "one": [*(50 + 2 * noise)], "other": [*(50 - noise)], "best": [*(90 + noise * noise)]})
    found = {method: place for (method, _), place in ranks(table).items()}
    assert found == {"worst": (4, 4), "one": (2, 3), "other": (2, 3), "best": (1, 1)}
    assert {*ranks(table[table["seed"] < 2]).values()} == {(1, 4)}
