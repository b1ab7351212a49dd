r"""MATH: the answer in the last `\boxed{}`, compared with the gold one by math-verify.

Answers that math-verify cannot read (words, mostly) are right when they are the same text after cleaning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from soka_serve.errors import EvalError, install_extra
from soka_serve.evaluation.prompts import zero_shot_prompt
from soka_serve.evaluation.sources import as_dataset, read_rows

LEVELS = (1, 2, 3, 4, 5)

_COLUMNS = ("problem", "level", "type", "subject")
"""Columns of MATH and MATH-500 that a prompt may use, as they are in the data."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=[^\s{])")
_SAID = re.compile(r"(?:final answer is|[Aa]nswer is)\s*:?\s*(.+?)\s*(?:\. I hope it is correct|\.?\s*(?:\n|\Z))")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"(?<!\\)\\[!,; ]")  # not the end of a matrix's row and a space
_LEVEL = re.compile(r"(\d)")


def load(subject: str, **_: Any) -> dict[str, Any]:
    """The test problems of one of the seven subjects."""
    return as_dataset(_rows(f"math_{subject}/test"))


def load_500(**_: Any) -> dict[str, Any]:
    """The 500 problems of MATH-500."""
    return as_dataset(_rows("math_500/test"))


def _rows(name: str) -> list[dict[str, Any]]:
    rows = []
    for index, row in enumerate(read_rows(name, ("problem", "level", "solution"))):
        answer = last_boxed(row["solution"])
        if answer is None:
            raise EvalError(
                f"{name}, row {index + 1}: no \\boxed{{}} in the solution",
                hint="Rows have the columns problem, level, type, solution; the answer is in the last \\boxed{}.",
            )
        level = _LEVEL.search(str(row["level"]))
        rows.append(
            {
                **{name: row[name] for name in _COLUMNS if name in row},
                "solution": row["solution"],
                "answer": answer,
                "level_number": int(level.group(1)) if level else None,  # a few rows of MATH say "Level ?"
            }
        )
    return rows


def prompt(doc: Mapping[str, Any]) -> str:
    """The problem, in the format that the adapter was trained on."""
    return zero_shot_prompt("math", doc["problem"], {name: doc[name] for name in _COLUMNS if name in doc})


def fewshot_samples() -> list[dict[str, Any]]:
    """The four problems of Lewkowycz et al. (2022), as the harness's minerva_math shows them."""
    from lm_eval.tasks.minerva_math.utils import list_fewshot_samples

    return [{"problem": s["problem"], "solution": s["solution"]} for s in list_fewshot_samples()]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}`, braces matched; None without one.

    >>> last_boxed(r"first $\boxed{1}$, then $\boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    for match in reversed(list(_BOX.finditer(text))):
        start = match.end()
        if text[start : start + 1] != "{":
            return re.split(r"[$\s]", text[start:], maxsplit=1)[0]
        depth = 0
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[start + 1 : at].strip()
    return None


def read_answer(text: str) -> str | None:
    r"""The final answer in a text: its last `\boxed{}`, else what follows the last "the answer is".

    >>> read_answer("So $x = 3$. The answer is: 3")
    '3'
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    said = _SAID.findall(text)
    return said[-1].strip().strip("$").strip() if said else None


def clean(answer: str) -> str:
    r"""An answer without what does not matter: spacing, `\left`, the kind of fraction, degrees, dollars, final stops.

    >>> clean(r"\left( \dfrac{1}{2},\, 3 \right).")
    '(\\frac{1}{2},3)'
    """
    answer = answer.strip().rstrip(".").strip("$")
    answer = _TEXT.sub(r"\1", answer)
    for spelling in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        answer = answer.replace(spelling, "")
    for spelling in ("\\dfrac", "\\tfrac"):
        answer = answer.replace(spelling, "\\frac")
    answer = _SPACING.sub("", answer)
    return re.sub(r"\s+", "", answer).rstrip(".")


def is_same(answer: str | None, gold: str) -> bool:
    """Whether an answer is the gold one: the same cleaned text, or the same mathematics to math-verify."""
    if answer is None or not gold.strip():
        return False
    return clean(answer) == clean(gold) or _verified(answer, gold)


def _verified(answer: str, gold: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise EvalError("MATH is scored by math-verify, which is not installed", hint=install_extra("eval")) from None
    parsed = [parse(f"${text}$", parsing_timeout=5) for text in (gold, answer)]
    return bool(all(parsed) and verify(*parsed, timeout_seconds=5))


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float | None]:
    """Exact match, equivalence, and equivalence at each level (None for problems of other levels)."""
    answer = read_answer(results[0])
    same = float(is_same(answer, doc["answer"]))
    exact = float(answer is not None and bool(doc["answer"].strip()) and clean(answer) == clean(doc["answer"]))
    levels = {f"math_verify_level_{n}": same if doc["level_number"] == n else None for n in LEVELS}
    return {"exact_match": exact, "math_verify": same, **levels}


def mean_of_level(values: Sequence[float | None]) -> float:
    """lm-eval aggregation: the mean over the problems of a level; NaN where there is none."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else float("nan")
