"""Tests of counter-based randomness."""

import itertools
import random

import numpy
import torch

from common.randomness import generator, mix, reseed, reseed_cpu


def test_keys_of_any_length_give_distinct_numbers():
    keys = [key for length in (1, 2, 3, 4) for key in itertools.product(range(4), repeat=length)]
    numbers = [mix(*key) for key in keys]
    assert len(set(numbers)) == len(keys) and all(0 <= number < 2**63 for number in numbers)


def test_a_key_seeds_the_global_generators_and_a_new_one():
    draws = []
    for key in ((3, 1), (3, 1, 0), (3, 1)):
        reseed(*key)
        draws.append((numpy.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator(*key)).item()))
    assert draws[0] == draws[2] and all(one != other for one, other in zip(draws[0], draws[1], strict=True))


def test_reseeding_without_gpus_gives_the_same_numbers_on_the_cpu():
    drawn = []
    for seed in (reseed, reseed_cpu):
        seed(1, 2, 3)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
