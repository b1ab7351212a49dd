"""PEFT's rank_pattern and alpha_pattern: which module names each of their regular expressions matches. No vLLM.

PEFT and vLLM match them by engines that backtrack, where a pattern of 20 characters can take years. Here RE2 does it
(through pyarrow, which `datasets` needs anyway), in time linear in the name. What RE2 has no form for (lookarounds,
back references) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from soka_serve.budget import ReadingBudget

_MAX_CHARACTERS = 1000
_MAX_REPEATS = 4
_REPEAT = re.compile(r"\{(\d{1,2}(?:,\d{0,2})?\})?")
_NAMES_AT_ONCE = 64  # between two looks at the clock

_current: ContextVar[Matcher | None] = ContextVar("soka_matcher", default=None)


class Matcher:
    """Answers PEFT's question for the modules of one adapter.

    Args:
        names: of the modules, as in a checkpoint.
        budget: holds the time.
    """

    def __init__(self, names: Sequence[str], budget: ReadingBudget) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._budget = budget
        self._found: dict[tuple[str, ...], dict[str, str]] = {}

    def key_for(self, patterns: Mapping[str, Any], name: str) -> str | None:
        """The first of the patterns that matches a module's name as PEFT matches it; None where none does.

        Raises:
            ValueError: a pattern that cannot be matched, named.
            CheckpointError: it takes too long.
        """
        if not patterns:
            return None
        keys = tuple(patterns)
        if keys not in self._found:
            self._found[keys] = self._match(keys, self._names)
        if name not in self._names:
            return self._match(keys, (name,)).get(name)
        return self._found[keys].get(name)

    def _match(self, keys: tuple[str, ...], names: tuple[str, ...]) -> dict[str, str]:
        import pyarrow

        if len(keys) > self._budget.tensors:
            raise ValueError(f"{len(keys)} patterns, at most {self._budget.tensors} are read{self._budget.source}")
        found: dict[str, str] = {}
        for start in range(0, len(names), _NAMES_AT_ONCE):
            part = list(names[start : start + _NAMES_AT_ONCE])
            texts = pyarrow.array(part, pyarrow.string())
            for key in keys:
                self._budget.check_time("the patterns of its config")
                hits = _matches(key, texts)
                found.update({name: key for name, hit in zip(part, hits, strict=True) if hit and name not in found})
        return found


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
        return f"at most {_MAX_REPEATS} repeats such as {{2}} or {{1,99}} are read"
    if "[:" in key:
        return "'[:' is not read"
    return None


@contextmanager
def matching(names: Sequence[str], budget: ReadingBudget) -> Iterator[None]:
    """vLLM's own reader, called inside, matches the patterns of an adapter with these modules by `match_for_vllm`."""
    token = _current.set(Matcher(names, budget))
    try:
        yield
    finally:
        _current.reset(token)


def match_for_vllm(pattern: dict[str, Any], name: str) -> Any:
    """In place of vLLM's PEFTHelper._match_pattern: the value of the first pattern that matches, or None."""
    matcher = _current.get() or Matcher((name,), ReadingBudget())
    key = matcher.key_for(pattern, name)
    return None if key is None else pattern[key]
