r"""Task families generated from code: seeded, endless, with splits that cannot overlap. No torch.

Three families mirror benchmarks: `math` (GSM8K: worked steps, `#### n`), `boxed` (MATH: `\boxed{}`), `code` (MBPP: a
function, checked by asserts). Each is a two-step problem made of parts that its easy variety (`math-easy`, ...) asks
for singly. The embedded base is trained on the easy ones and has never seen a target one.

Each drawn problem has a key; the key's hash, not the seed, says whether it is for training or for testing, so no seed
and no count can put one key on both sides. For a target family the key is the arithmetic, or what the function does,
without names and wording. For an easy family it is the prompt, since one-digit products and one-action functions are
too few to hold any back from the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from hashlib import blake2b
from random import Random
from typing import Literal

from soka_serve.builtin import family_boxed, family_code, family_math
from soka_serve.builtin.interpreter import passes
from soka_serve.builtin.problem import Draft, Problem

Split = Literal["train", "test"]

TARGET_FAMILIES = ("math", "boxed", "code")
EASY_FAMILIES = ("math-easy", "boxed-easy", "code-easy")
FAMILIES = (*TARGET_FAMILIES, *EASY_FAMILIES)
DEFAULT_COUNTS: Mapping[str, int] = {"train": 4000, "test": 500}

MAX_REPEATS = 10_000
"""Draws in a row without a new problem after which a family counts as exhausted."""

_TEST_BYTES = 32
"""Keys whose first hash byte is below this are for testing: one in eight."""

_DRAW: Mapping[str, Callable[[Random], Draft | None]] = {
    "math": family_math.draw_target,
    "boxed": family_boxed.draw_target,
    "code": family_code.draw_target,
    "math-easy": family_math.draw_easy,
    "boxed-easy": family_boxed.draw_easy,
    "code-easy": family_code.draw_easy,
}

_AFTER_HASHES = re.compile(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)")


def split_of(key: str) -> Split:
    """The split that a key belongs to."""
    return "test" if blake2b(key.encode(), digest_size=1).digest()[0] < _TEST_BYTES else "train"


def draw_problems(family: str, split: Split, seed: int = 0) -> Iterator[Problem]:
    """Problems without end, the same ones for the same arguments; a problem may come again.

    Raises:
        ValueError: unknown family or split.
    """
    if family not in _DRAW:
        raise ValueError(f"unknown task family {family!r}; expected one of {', '.join(FAMILIES)}")
    if split not in DEFAULT_COUNTS:
        raise ValueError(f"unknown split {split!r}; expected 'train' or 'test'")
    return (draft.problem for draft in _drafts(_DRAW[family], split, Random(f"{family}/{split}/{seed}")))


def draw_drafts(draw: Callable[[Random], Draft | None], split: Split, rng: Random) -> Iterator[Problem]:
    """The problems that `draw` gives, without end, as far as they are of the split."""
    return (draft.problem for draft in _drafts(draw, split, rng))


def _drafts(draw: Callable[[Random], Draft | None], split: Split, rng: Random) -> Iterator[Draft]:
    while True:
        draft = draw(rng)
        if draft is not None and split_of(draft.key) == split:
            yield draft


def generate(family: str, split: Split, count: int | None = None, seed: int = 0) -> list[Problem]:
    """The first `count` different problems of a family's split (default: 4000 for train, 500 for test).

    Deterministic: a smaller count gives a prefix of a larger one.

    Raises:
        ValueError: unknown family or split, a negative count, or more problems than the family has.

    >>> problem = generate("math", "test", 1)[0]
    >>> problem.prompt.startswith("Question: "), check_answer(problem, problem.completion)
    (True, True)
    """
    problems = draw_problems(family, split, seed)
    count = DEFAULT_COUNTS[split] if count is None else count
    if count < 0:
        raise ValueError(f"expected a count from 0; got {count}")
    return _take(problems, count, f"{family} has too few different {split} problems for a count of {count}")


def generate_validation(family: str, count: int, besides: int, seed: int = 1) -> list[Problem]:
    """Problems of the test split to choose settings by: none has the key of one of the first `besides` test problems.

    Raises:
        ValueError: as `generate`.
    """
    measured = {problem.prompt for problem in generate(family, "test", besides)}
    keys: set[str] = set()
    seen: set[str] = set()
    for draft in _drafts(_DRAW[family], "test", Random(f"{family}/test/0")):
        if draft.problem.prompt in measured:
            keys.add(draft.key)
            seen.add(draft.problem.prompt)
        if len(seen) == len(measured):
            break
    others = (
        None if draft.key in keys or draft.problem.prompt in measured else draft.problem
        for draft in _drafts(_DRAW[family], "test", Random(f"{family}/test/{seed}"))
    )
    return _take(others, count, f"{family} has too few test problems for {besides} to measure and {count} to choose by")


def _take(problems: Iterator[Problem | None], count: int, problem_text: str) -> list[Problem]:
    """The first `count` problems with different prompts; None counts as one that came before."""
    found: dict[str, Problem] = {}
    repeats = 0
    while len(found) < count:
        problem = next(problems)
        if problem is None or problem.prompt in found:
            repeats += 1
            if repeats > MAX_REPEATS:
                raise ValueError(problem_text)
        else:
            found[problem.prompt] = problem
            repeats = 0
    return list(found.values())


def extract_hashes(text: str) -> str | None:
    """The number after the first `####`, without thousands separators; None when the first one has no number."""
    at = text.find("####")
    match = _AFTER_HASHES.match(text, at) if at >= 0 else None
    return match.group(1).replace(",", "") if match else None


def extract_boxed(text: str) -> str | None:
    r"""What stands in the first `\boxed{...}`, braces matched; None when there is none or it is not closed."""
    start = text.find(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at].strip()
    return None


def check_answer(problem: Problem, text: str) -> bool:
    r"""Whether what a model wrote after `problem.prompt` is right.

    math: the number after the first `####`. boxed: the content of the first `\boxed{}`. code: the first function in
    the text passes every assert, worked out by a small interpreter of whitelisted syntax, never by exec or eval.
    """
    kind = problem.family.removesuffix("-easy")
    if kind == "code":
        return passes(text, problem.tests)
    if kind == "boxed":
        return extract_boxed(text) == problem.answer
    number = extract_hashes(text)
    return number is not None and Decimal(number) == Decimal(problem.answer)
