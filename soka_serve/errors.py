"""The errors a user can cause, and how they are shown.

Every failure that a user can mend is a `SokaError`: one message that names the file, key or tensor, what was
expected and what came, and a hint that says what to do. The command line prints both and exits with `exit_code`;
anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 10
_LINE_CHARACTERS = 500


def first_ten(lines: Sequence[str]) -> list[str]:
    """The first ten of many lines or names, and a line that says how many more there are.

    >>> first_ten([str(number) for number in range(12)])[-2:]
    ['9', 'and 2 more']
    >>> first_ten(["x" * 600])[0][-17:]
    'xx... (600 chars)'
    """
    shown = [
        line if len(line) <= _LINE_CHARACTERS else f"{line[:_LINE_CHARACTERS]}... ({len(line)} chars)"
        for line in lines[:_SHOWN]
    ]
    return shown + [f"and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)


def name_some(names: Sequence[str]) -> str:
    """Names in one line, made printable: the first ten, and how many more there are.

    >>> name_some(["a", "b"])
    'a, b'
    """
    return ", ".join(map(printable, first_ten(names)))


def install_extra(name: str) -> str:
    """How to install what an extra of this package needs.

    >>> install_extra("eval")
    "In the checkout of soka-serve: pip install -e '.[eval]'"
    """
    return f"In the checkout of soka-serve: pip install -e '.[{name}]'"


def is_shown(problems: Sequence[str]) -> bool:
    """Whether `first_ten` will show one more problem; costly hints are made for those only."""
    return len(problems) < _SHOWN


# Marks that reorder the text around them; with control characters, surrogates and line ends, what no message shows.
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})


def printable(text: object, limit: int = 300, *, keep: str = "") -> str:
    """Text from outside (a name, a path, a value of a file), escaped for messages, logs and terminals.

    Args:
        text: anything; its `str` counts.
        limit: characters after which it is cut.
        keep: control characters that stay, such as line ends.

    Returns:
        The text, what is not printable written as Python does in strings.

    >>> printable("a\\x1b[31m\\nb"), printable("é" * 9, 5)
    ('a\\\\x1b[31m\\\\nb', 'ééééé... (9 characters)')
    """
    whole = str(text)
    shown = whole[:limit]
    if not shown.isprintable():
        hidden = {c for c in shown if c not in keep and (c in _REORDERING or unicodedata.category(c) in _HIDDEN)}
        shown = "".join(c.encode("unicode_escape").decode() if c in hidden else c for c in shown)
    return shown if len(whole) <= limit else f"{shown}... ({len(whole)} characters)"


def printable_lines(text: str) -> str:
    """A text of any length, escaped as by `printable`, with its line ends and tabs."""
    return printable(text, len(text), keep="\n\t")


def is_printable(text: str) -> bool:
    """Whether `printable` leaves a text as it is."""
    return text.isprintable() or printable(text, len(text)) == text


class SokaError(Exception):
    """A failure that the user can mend.

    Args:
        message: what is wrong, naming the file, key or tensor, what was expected and what came.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def joined(problems: Sequence[SokaError]) -> tuple[str, str | None]:
    """Message and hint of several errors in one, without repeated lines.

    >>> joined([SokaError("a: gone", hint="look"), SokaError("a: gone\\nb: gone", hint="look")])
    ('a: gone\\nb: gone', 'look')
    """
    lines = dict.fromkeys(line for problem in problems for line in problem.message.split("\n"))
    hints = dict.fromkeys(problem.hint for problem in problems if problem.hint)
    return "\n".join(lines), "\n".join(hints) or None


@dataclass(frozen=True)
class ManifestProblem:
    """One thing wrong in a manifest.

    `line` and `column` count from 1; both are 0 when the text has no place for it (a key that is missing in the whole
    file, say). `key` is the dotted key, with list indices: `adapt[1].rank.policy`.
    """

    key: str
    message: str
    line: int = 0
    column: int = 0
    hint: str | None = None


class ManifestError(SokaError):
    """Everything that is wrong in one manifest, in one exception."""

    def __init__(self, file: str, problems: Sequence[ManifestProblem]) -> None:
        self.file = file
        self.problems = tuple(problems)
        super().__init__("\n".join(self._line(p) for p in self.problems))

    def _line(self, problem: ManifestProblem) -> str:
        place = f"{self.file}:{problem.line}:{problem.column}" if problem.line else self.file
        text = f"{place}: {problem.key}: {problem.message}" if problem.key else f"{place}: {problem.message}"
        return f"{text} ({problem.hint})" if problem.hint else text


class PlanError(SokaError):
    """The manifest is well formed, but does not fit the base model (no module matched, a shape that cannot be)."""


class CheckpointError(SokaError):
    """A base checkpoint or adapter file that is missing, truncated, of the wrong shape, or not finite."""


class DataError(SokaError):
    """A dataset that is missing, malformed (with its line number), or lacks a column that a template names."""


class BuildError(SokaError):
    """A stage of a build that could not finish for a reason outside the program (disk full, no permission)."""


class DivergedError(BuildError):
    """Training whose loss is not finite any more."""


class ServeError(SokaError):
    """A server that did not start or died, or an adapter that has no effect in it."""


class EvalError(SokaError):
    """A measurement that cannot be made: missing data, a prompt that does not fit, a task that does not exist."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        if hint:
            self.add_note(hint)  # lm-eval's own command line shows a traceback, and this at its end


class SandboxError(EvalError):
    """Model-written code that may not run: no consent, or a protection that this machine does not have."""
