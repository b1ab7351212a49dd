"""GSM8K: `#### 18` read strictly, or the last number of the answer read flexibly; compared as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from soka_serve.builtin.tasks import extract_hashes
from soka_serve.evaluation.prompts import zero_shot_prompt
from soka_serve.evaluation.sources import as_dataset, read_rows

_COLUMNS = ("question", "answer")

_NUMBER = re.compile(r"[-−]?\$?\d[\d,]*(?:\.\d+)?|[-−]?\$?\.\d+")  # the second minus is U+2212


def load(**_: Any) -> dict[str, Any]:
    """The test problems."""
    return as_dataset(read_rows("gsm8k/test", _COLUMNS))


def load_fewshot(**_: Any) -> dict[str, Any]:
    """The test problems, and the training problems that the shots are drawn from."""
    train = as_dataset(read_rows("gsm8k/train", _COLUMNS))["test"]
    return {**as_dataset(read_rows("gsm8k/test", _COLUMNS)), "train": train}


def prompt(doc: Mapping[str, Any]) -> str:
    """The question, in the format that the adapter was trained on."""
    return zero_shot_prompt("gsm8k", doc["question"], {"question": doc["question"]})


def last_number(text: str) -> str | None:
    """The last number of a text, without dollar signs and thousands separators; None without one.

    >>> last_number("It costs $1,200.50. The answer is: 18.")
    '18'
    >>> last_number("It falls to \N{MINUS SIGN}3 degrees")
    '-3'
    """
    found = _NUMBER.findall(text)
    return found[-1].replace("$", "").replace(",", "").replace("−", "-") if found else None


def same_number(found: str | None, gold: str | None) -> bool:
    """Whether two numbers are equal: 18 equals 18.00; a missing number equals nothing."""
    if found is None or gold is None:
        return False
    try:
        return Decimal(found) == Decimal(gold)
    except InvalidOperation:
        return False


def read_strictly(resps: Sequence[Sequence[str]], docs: Sequence[Any]) -> list[list[str | None]]:
    """lm-eval filter: the number after the first `####` of each answer."""
    return [[extract_hashes(text) for text in texts] for texts in resps]


def read_flexibly(resps: Sequence[Sequence[str]], docs: Sequence[Any]) -> list[list[str | None]]:
    """lm-eval filter: the last number of each answer."""
    return [[last_number(text) for text in texts] for texts in resps]


def score(doc: Mapping[str, Any], results: Sequence[str | None]) -> dict[str, float]:
    """Whether the number that a filter read is the number after the gold answer's `####`."""
    return {"exact_match": float(same_number(results[0], extract_hashes(doc["answer"])))}
