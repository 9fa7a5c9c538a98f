"""Claims about counter-based randomness."""

import itertools

import numpy
import torch

from common.randomness import generator, mix, reseed


def test_every_key_is_a_number_of_its_own_whatever_its_length():
    keys = [key for length in (1, 2, 3, 4) for key in itertools.product(range(4), repeat=length)]
    numbers = [mix(*key) for key in keys]
    assert len(set(numbers)) == len(keys) and all(0 <= number < 2**63 for number in numbers)


def test_a_key_sets_all_generators_and_one_of_its_own():
    draws = []
    for key in ((3, 1), (3, 1, 0), (3, 1)):
        reseed(*key)
        draws.append((numpy.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator(*key)).item()))
    assert draws[0] == draws[2] and all(one != other for one, other in zip(draws[0], draws[1], strict=True))
