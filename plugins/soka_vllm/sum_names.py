"""Names of sums of adapters, as requests write them: `math+0.5*code`. Names of adapters may contain a `+` themselves.

A sum is terms joined by `+`; a term is an adapter's name, or a scale, `*` and the name. Spaces around `+` and `*` do
not count. Where a text can be read in two ways, the longest name of an adapter that is loaded counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable
from typing import NamedTuple

from soka_serve.errors import printable

LONGEST_SUM = 2000  # characters
_MOST_TERMS = 16
_LONGEST_NAME = 300  # characters, with spaces behind it; names themselves have 200 at most
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d+)?|[-+]?(?:inf(?:inity)?|nan)"
_SCALE = re.compile(rf"\s*({_NUMBER})\s*\*", re.IGNORECASE | re.ASCII)
_ONLY_NUMBER = re.compile(rf"\s*(?:{_NUMBER})\s*", re.IGNORECASE | re.ASCII)


class Term(NamedTuple):
    """An adapter of a sum, and what its delta is multiplied by."""

    scale: float
    name: str


class SumError(ValueError):
    """A text that says no sum, though its names may be right; the message says what to write."""


def may_be_sum(text: object) -> bool:
    """Whether a model's name may be a sum.

    >>> may_be_sum("math+0.5*code"), may_be_sum("2*math"), may_be_sum("math")
    (True, True, False)
    """
    return isinstance(text, str) and len(text) <= LONGEST_SUM and ("+" in text or "*" in text)


def parse_sum(text: str, known: Container[str]) -> list[Term]:
    """The terms of a sum as they are written; the names need not exist, and are empty where one is missing.

    Args:
        text: what a client asked for.
        known: names of the adapters that are loaded.

    Raises:
        SumError: a scale that is no finite number, or too many terms.

    >>> parse_sum(" math + -0.5 * code", {"math", "code"})
    [Term(scale=1.0, name='math'), Term(scale=-0.5, name='code')]
    >>> parse_sum("c+++2*d", {"c++"})
    [Term(scale=1.0, name='c++'), Term(scale=2.0, name='d')]
    """
    terms: list[Term] = []
    at = 0
    while at <= len(text):
        scale = 1.0
        found = _SCALE.match(text, at)
        if found is not None:
            scale, at = float(found[1]), found.end()
        name, at = _name(text, at, known)
        if found is not None and not math.isfinite(scale):
            raise SumError(f"`{printable(text)}`: the scale {found[1]:.40} of `{printable(name)}` is no finite number")
        if "*" in name:
            raise SumError(f"`{printable(text)}`: {_no_number(*name.split('*', 1))}")
        terms.append(Term(scale, name))
        if len(terms) > _MOST_TERMS:
            raise SumError(f"`{printable(text)}`: a sum has at most {_MOST_TERMS} terms")
    return terms


def sum_terms(terms: Iterable[Term]) -> list[Term]:
    """The terms of a sum in the order of their names, one an adapter, without those of scale 0.

    Raises:
        SumError: nothing is left, or scales that add up to no finite number.

    >>> sum_terms([Term(1, "math"), Term(0.5, "code"), Term(1, "math"), Term(0, "boxed")])
    [Term(scale=0.5, name='code'), Term(scale=2.0, name='math')]
    """
    scales: dict[str, float] = {}
    for term in terms:
        scales[term.name] = scales.get(term.name, 0.0) + term.scale
    for name, scale in scales.items():
        if not math.isfinite(scale):
            raise SumError(f"the scales of `{printable(name)}` add up to {scale}")
    left = [Term(float(scale), name) for name, scale in sorted(scales.items()) if scale]
    if not left:
        raise SumError(
            "every adapter of the sum has the scale 0, so nothing is left of it; ask for the base by its name"
        )
    return left


def sum_name(terms: Iterable[Term]) -> str:
    """The one name of a sum, however it was written.

    >>> sum_name([Term(0.5, "code"), Term(2.0, "math"), Term(1.0, "z")])
    '0.5*code+2*math+z'
    """
    return "+".join(name if scale == 1 else f"{repr(scale).removesuffix('.0')}*{name}" for scale, name in terms)


def _name(text: str, at: int, known: Container[str]) -> tuple[str, int]:
    """The name that begins at a place, and where the next term begins, beyond the text where there is none."""
    while text[at : at + 1].isspace():
        at += 1
    ends = [at + found.start() for found in re.finditer(r"\+", text[at : at + _LONGEST_NAME])]
    if len(text) <= at + _LONGEST_NAME or not ends:
        ends.append(len(text))
    end = next((end for end in reversed(ends) if text[at:end].strip() in known), ends[0])
    return text[at:end].strip(), end + 1


def _no_number(scale: str, name: str) -> str:
    """What is wrong with a term in which something stands before a `*` that is no number."""
    scale, name = scale.strip(), name.strip()
    if _ONLY_NUMBER.fullmatch(name):
        return f"the scale comes first: `{printable(name)}*{printable(scale)}`"
    before, minus, number = scale.rpartition("-")
    if minus and before and _ONLY_NUMBER.fullmatch(number):
        return f"a negative scale is written `{printable(before.strip())}+-{number.strip()}*{printable(name)}`"
    return f"the scale `{printable(scale, 40)}` of `{printable(name)}` is not a number"
