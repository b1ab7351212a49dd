"""What a generated problem is, and the draws that the families share. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

LARGEST = 99
"""Numbers stay in 1..LARGEST, intermediate results too: a model of 0.8M parameters can learn all of it."""


@dataclass(frozen=True)
class Problem:
    """One generated problem.

    A model is trained on `prompt + completion`, exactly these characters, and is given `prompt` alone to answer.

    Attributes:
        family: name of the family it comes from, such as "math-easy".
        prompt: the question, up to the place where the answer begins.
        completion: the worked answer.
        answer: what `check_answer` compares with; for the code families, the function itself.
        tests: for the code families, the asserts that a right function passes; the first one stands in the prompt.
    """

    family: str
    prompt: str
    completion: str
    answer: str
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A problem as a family draws it, with the key whose hash decides between train and test."""

    key: str
    problem: Problem


@dataclass(frozen=True)
class Step:
    """One worked operation on two numbers."""

    first: int
    operator: str
    second: int

    @property
    def result(self) -> int:
        if self.operator == "+":
            return self.first + self.second
        return self.first - self.second if self.operator == "-" else self.first * self.second

    def render(self, times: str = "*") -> str:
        """`23 + 14 = 37`, with `times` as the sign of multiplication."""
        operator = times if self.operator == "*" else self.operator
        return f"{self.first} {operator} {self.second} = {self.result}"


def draw_sum(rng: Random) -> Step:
    """A sum of two numbers, at most LARGEST."""
    total = rng.randint(4, LARGEST)
    first = rng.randint(2, total - 2)
    return Step(first, "+", total - first)


def draw_difference(rng: Random) -> Step:
    """A difference of two numbers, at least 2."""
    first = rng.randint(4, LARGEST)
    return Step(first, "-", rng.randint(2, first - 2))


def draw_product(rng: Random) -> Step:
    """A product of two numbers from 2 to 9."""
    return Step(rng.randint(2, 9), "*", rng.randint(2, 9))


def draw_change(rng: Random, value: int) -> Step | None:
    """Something added to `value` or taken from it; None where the result would leave 2..LARGEST."""
    if rng.random() < 0.5:
        return Step(value, "+", rng.randint(2, LARGEST - value)) if value <= LARGEST - 2 else None
    return Step(value, "-", rng.randint(2, value - 2)) if value >= 4 else None


def one_step_reaches(numbers: Sequence[int], answer: int) -> bool:
    """Whether one operation on two of the numbers, or one number alone, gives the answer.

    Two-step problems for which it does are not used: a model that can do a single step only would get them right.
    """
    if answer in numbers:
        return True
    pairs = ((a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :])
    return any(answer in (a + b, abs(a - b), a * b) for a, b in pairs)
