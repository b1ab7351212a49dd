"""Several datasets in exact proportions.

Weights are shares of an epoch's examples. The epoch is the longest one in which no example comes twice: some dataset
gives all of its examples, the others a seeded choice of theirs, the same in every epoch. Without weights every dataset
gives all of its examples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TypeVar

from soka_serve.data.encode import EncodedExample, EncodedSet
from soka_serve.errors import DataError

T = TypeVar("T")


@contextmanager
def naming(index: int, count: int) -> Iterator[None]:
    """Errors in it say which of several datasets they are about."""
    try:
        yield
    except DataError as error:
        if count == 1:
            raise
        raise type(error)(f"train.data[{index}]: {error.message}", hint=error.hint) from error


def mixture_counts(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Examples that an epoch has of each dataset.

    Semantics: counts[i] = weights[i] / sum(weights) * N, with the largest N for which no count is above its size,
    rounded down and the rest given to the largest remainders that have room.

    >>> mixture_counts([100, 1000, 50], [0.5, 0.4, 0.1])
    [100, 80, 20]
    >>> mixture_counts([7, 5], None)
    [7, 5]

    Args:
        sizes: of the datasets, examples.
        weights: relative shares, above 0; None takes all examples.
    """
    if weights is None:
        return list(sizes)
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth
    total = sum(exact)
    shares = [weight / total for weight in exact]
    length = int(min(size / share for size, share in zip(sizes, shares, strict=True)))
    wanted = [share * length for share in shares]
    counts = [min(int(want), size) for want, size in zip(wanted, sizes, strict=True)]
    for i in sorted(range(len(counts)), key=lambda i: (counts[i] - wanted[i], i)):
        if sum(counts) < length and counts[i] < sizes[i]:
            counts[i] += 1
    return counts


def mix(parts: Sequence[Sequence[T]], weights: Sequence[float] | None, seed: int) -> list[T]:
    """One epoch's examples, those of each dataset in their order, spread evenly.

    Args:
        parts: the datasets; one alone is taken as it is.
        weights: see `mixture_counts`.
        seed: chooses the examples of a dataset that gives only some.
    """
    if len(parts) == 1:
        return list(parts[0])
    counts = mixture_counts([len(part) for part in parts], weights)
    placed: list[tuple[float, int, T]] = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        chosen = sorted(random.Random(f"{seed} {number}").sample(range(len(part)), count))
        placed += [((k + 0.5) / count, number, part[index]) for k, index in enumerate(chosen)]
    placed.sort(key=lambda item: item[:2])
    return [example for _, _, example in placed]


def mix_encoded(sets: Sequence[EncodedSet], weights: Sequence[float] | None, seed: int) -> EncodedSet:
    """Encoded datasets as one: proportions are those of the examples that were not dropped.

    Raises:
        DataError: a dataset whose share is less than one example.
    """
    if len(sets) == 1:
        return sets[0]
    sizes = [len(encoded.examples) for encoded in sets]
    for number, count in enumerate(mixture_counts(sizes, weights)):
        if count == 0:
            raise DataError(
                f"train.data[{number}]: its weight gives it none of the mixture's examples (the datasets have {sizes})",
                hint="raise its weight, or leave it out",
            )
    examples: list[EncodedExample] = mix([encoded.examples for encoded in sets], weights, seed)
    total, dropped, truncated, boundary = (
        sum(getattr(encoded, name) for encoded in sets) for name in ("total", "dropped", "truncated", "boundary")
    )
    return EncodedSet(examples, total, dropped, truncated, boundary, max(encoded.longest for encoded in sets))
