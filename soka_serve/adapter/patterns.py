"""PEFT's rank_pattern and alpha_pattern: which module names each of their regular expressions matches.

PEFT and vLLM match them by engines that backtrack, where a pattern of 20 characters can take years. Here RE2 does it
(through pyarrow, which `datasets` needs anyway), in time linear in the name. What RE2 has no form for (lookarounds,
back references) is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from soka_serve.io.budget import ReadingBudget
from soka_serve.io.scoped import scoped

# What bounds the time of one call: RE2 unrolls repeats, and each pass over a name goes through what it unrolled.
_MAX_CHARACTERS = 500
_MAX_REPEATS = 2
_REPEAT = re.compile(r"\{(\d(?:,\d?)?\})?")
_CHARACTERS_AT_ONCE = 4000  # of names, between two looks at the clock

_current: ContextVar[Matcher | None] = ContextVar("soka_matcher", default=None)


@dataclass
class _PatternMatches:
    """Of one set of patterns: by module name the first that matches, and why they cannot be matched."""

    patterns: Mapping[str, Any]
    found: dict[str, str | None] = field(default_factory=dict)
    problem: str = ""


class Matcher:
    """Answers PEFT's question for the modules of one adapter.

    Args:
        names: of the modules, as in a checkpoint.
        budget: holds the time.
    """

    def __init__(self, names: Sequence[str], budget: ReadingBudget) -> None:
        self._names = list(dict.fromkeys(names))
        self._budget = budget
        # By the identity of the patterns, which are kept with it: to compare thousands of them takes its time, too.
        self._answers: dict[int, _PatternMatches] = {}

    def key_for(self, patterns: Mapping[str, Any], name: str) -> str | None:
        """The first of the patterns that matches a module's name as PEFT matches it; None where none does.

        Raises:
            ValueError: a pattern that cannot be matched, named, or patterns that take too long.
        """
        if not patterns:
            return None
        new = id(patterns) not in self._answers
        answers = self._answers.setdefault(id(patterns), _PatternMatches(patterns))
        try:
            if answers.problem:
                raise ValueError(answers.problem)
            if new:
                answers.found = self._match(tuple(patterns), self._names)
            if name not in answers.found:
                answers.found.update(self._match(tuple(patterns), [name]))
        except ValueError as error:
            answers.problem = str(error)
            raise
        return answers.found[name]

    def _match(self, keys: tuple[str, ...], names: list[str]) -> dict[str, str | None]:
        """The first key that matches each name, or None."""
        import pyarrow.compute  # before the clock starts

        if len(keys) > self._budget.tensors:
            raise ValueError(f"{len(keys)} patterns, at most {self._budget.tensors} are read{self._budget.source}")
        found: dict[str, str | None] = dict.fromkeys(names)
        for part in _portions(names):
            texts = pyarrow.array(part, pyarrow.string())
            for key in keys:
                started = time.thread_time()
                hits = _matches(key, texts)
                found.update({n: key for n, hit in zip(part, hits, strict=True) if hit and found[n] is None})
                self._budget.take_pattern_seconds(time.thread_time() - started)
        return found


def _portions(names: list[str]) -> Iterator[list[str]]:
    """The names in portions of few characters, or of one name."""
    part: list[str] = []
    for name in names:
        if part and sum(map(len, part)) + len(name) > _CHARACTERS_AT_ONCE:
            yield part
            part = []
        part.append(name)
    if part:
        yield part


def _matches(key: str, names: Any) -> list[bool]:
    """Whether PEFT's `re.match(rf"(.*\\.)?({key})$", name)` would match, for each name of a pyarrow array."""
    import pyarrow
    import pyarrow.compute

    problem = _why_not(key)
    if problem is None:
        try:
            hits = pyarrow.compute.match_substring_regex(names, pattern=rf"^(?:(.*\.)?({key})$)")
            return list(hits.to_pylist())
        except (pyarrow.ArrowInvalid, UnicodeEncodeError) as error:
            problem = str(error).partition(": ^(?:")[0]
    raise ValueError(f"the pattern {key!r:.120}: {problem:.200}; write plain module names, or a simpler expression")


def _why_not(key: str) -> str | None:
    """Why a pattern is not given to RE2, None where it is. What the two engines read differently is not."""
    if len(key) > _MAX_CHARACTERS:
        return f"{len(key)} characters, at most {_MAX_CHARACTERS} are read"
    repeats = [repeat[1] for repeat in _REPEAT.finditer(key)]
    if None in repeats or len(repeats) > _MAX_REPEATS:
        return f"at most {_MAX_REPEATS} repeats such as {{2}} or {{1,9}} are read"
    if found := [mark for mark in ("[:", r"\p", r"\P", r"\Q", r"\C") if mark in key]:
        return f"{found[0]!r} is not read"
    return None


def matching(matcher: Matcher) -> AbstractContextManager[Matcher | None]:
    """vLLM's own reader, called inside, has an adapter's patterns matched by this (`match_for_vllm`)."""
    return scoped(_current, matcher)


def match_for_vllm(stock: Any, pattern: dict[str, Any], name: str) -> Any:
    """PEFTHelper._match_pattern: the value of the first pattern that matches, or None."""
    matcher = _current.get() or Matcher([name], ReadingBudget())
    key = matcher.key_for(pattern, name)
    return None if key is None else pattern[key]
