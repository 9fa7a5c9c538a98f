"""Tests of masking: number of kept tokens, random permutations and their ranks."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.masking import gather_tokens, kept_tokens, permutation_ranks, random_order

QUICK = settings(deadline=None, max_examples=50, derandomize=True)
ORDERS = st.integers(1, 12).flatmap(lambda n: st.lists(st.permutations(range(n)), min_size=1, max_size=3)).map(torch.tensor)


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 196), (0.25, 147), (0.5, 98), (0.75, 49), (0.9, 19)])
def test_kept_counts_of_196_are_the_official_ones(ratio, kept):
    assert kept_tokens(196, ratio, "mask_ratio") == kept


@QUICK
@given(st.integers(1, 400), st.floats(0, 1))
def test_the_number_of_kept_tokens_is_the_kept_fraction_rounded_down(tokens, ratio):
    expected = int(tokens * (1 - ratio))
    if expected:
        assert kept_tokens(tokens, ratio, "mask_ratio") == expected
    else:
        with pytest.raises(ValueError, match="mask_ratio"):
            kept_tokens(tokens, ratio, "mask_ratio")


@pytest.mark.parametrize("ratio", [-0.1, 1.01, math.nan, math.inf])
def test_a_ratio_outside_0_to_1_is_refused_by_name(ratio):
    with pytest.raises(ValueError, match=f"context_ratio={ratio}.*between 0 and 1"):
        kept_tokens(196, ratio, "context_ratio")


@pytest.mark.parametrize(("tokens", "ratio"), [(196, 1.0), (196, 0.999), (1, 0.5), (10, 0.9)])
def test_a_ratio_that_leaves_nothing_is_refused_by_name(tokens, ratio):
    with pytest.raises(ValueError, match=f"mask_ratio={ratio} leaves none of the {tokens} tokens"):
        kept_tokens(tokens, ratio, "mask_ratio")


@pytest.mark.parametrize("tokens", [2, 3, 10, 16, 49, 64, 196, 256])
def test_a_ratio_just_below_the_limit_in_the_error_message_keeps_one_token(tokens):
    with pytest.raises(ValueError) as refusal:
        kept_tokens(tokens, 1.0, "mask_ratio")
    named = float(re.search(r"use a ratio below (\S+)$", str(refusal.value)).group(1))
    assert kept_tokens(tokens, named - 1e-4, "mask_ratio") == 1


@QUICK
@given(ORDERS)
def test_ranks_are_the_inverse_permutation(order_BN: Tensor):
    rank_BN = permutation_ranks(order_BN)
    place_BN = torch.arange(order_BN.shape[1]).expand_as(order_BN)
    assert torch.equal(rank_BN.gather(1, order_BN), place_BN) and torch.equal(order_BN.gather(1, rank_BN), place_BN)
    assert torch.equal(permutation_ranks(rank_BN), order_BN)


def test_a_random_order_sorts_the_noise_of_each_image_in_ascending_order():
    noise_BN = torch.rand(5, 196, generator=torch.Generator().manual_seed(0))
    order_BN = random_order(noise_BN)
    assert torch.equal(noise_BN.gather(1, order_BN), noise_BN.sort(1).values)
    assert torch.equal(order_BN.sort(1).values, torch.arange(196).expand(5, -1))
    assert random_order(torch.tensor([[0.3, 0.1, 0.2], [0.5, 0.6, 0.4]])).tolist() == [[1, 2, 0], [2, 0, 1]]


def test_tokens_are_gathered_per_image_and_one_table_serves_all_images():
    x_BND, index_BM = torch.randn(2, 4, 3), torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(gather_tokens(x_BND, index_BM), torch.stack([x_BND[0, [3, 0]], x_BND[1, [1, 1]]]))
    assert torch.equal(gather_tokens(x_BND[:1], index_BM), torch.stack([x_BND[0, [3, 0]], x_BND[0, [1, 1]]]))
