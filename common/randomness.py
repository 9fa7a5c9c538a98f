"""Counter-based randomness: every draw is a function of a key, never of earlier draws.

A key is a tuple of integers such as (seed, step, rank) or (seed, epoch, sample). The training loop reseeds from
its key before every micro-batch, the data loaders before every sample. So there is no generator state to save:
a run that was killed, or is resumed with another number of workers, has the same draws as an uninterrupted run.
"""

import random

import numpy
import torch


def mix(*key: int) -> int:
    """A well-mixed 63-bit number for a key of non-negative integers; (1, 2) and (1, 2, 0) are different keys."""
    return int(numpy.random.SeedSequence((len(key), *key)).generate_state(1, numpy.uint64)[0] >> numpy.uint64(1))


def reseed(*key: int) -> None:
    """Set Python's, NumPy's and torch's global generators (all devices) from a key."""
    reseed_cpu(*key)
    torch.manual_seed(mix(*key))


def reseed_cpu(*key: int) -> None:
    """`reseed` without the generators of GPUs, for the images of data loaders: asking for GPUs takes longer than to flip an image."""
    number = mix(*key)
    random.seed(number)
    numpy.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number)


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Create a new torch generator, seeded from a key."""
    return torch.Generator(device).manual_seed(mix(*key))
