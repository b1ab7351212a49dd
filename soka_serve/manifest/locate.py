"""Line and column of each key and value of a TOML text.

tomllib says where a syntax error is and nothing about valid keys, so this reads the text once more. It only ever sees
text that tomllib has accepted, and therefore follows the grammar without checking it.

A path is a tuple of keys and list indices: `adapt[1].rank.policy` is ("adapt", 1, "rank", "policy").
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import NamedTuple

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\r\n]*")
_STRINGS = {
    '"""': re.compile(r'"""(?:\\.|[^\\])*?"""{1,3}', re.DOTALL),
    "'''": re.compile(r"'''.*?'''{1,3}", re.DOTALL),
    '"': re.compile(r'"(?:\\.|[^"\\])*"'),
    "'": re.compile(r"'[^']*'"),
}


class Position(NamedTuple):
    """A position in the text; both count from 1, columns in characters."""

    line: int
    column: int


@dataclass
class Positions:
    """Positions of keys and of their values. A table's value stands where its header or its brace does."""

    keys: dict[Path, Position] = field(default_factory=dict)
    values: dict[Path, Position] = field(default_factory=dict)

    def key(self, path: Path) -> Position | None:
        """Where the key is written, or the nearest table around it; None for the whole file."""
        return self._nearest(self.keys, path)

    def value(self, path: Path) -> Position | None:
        """Where the value begins, or the nearest table around it; None for the whole file."""
        return self._nearest(self.values, path)

    def _nearest(self, positions: dict[Path, Position], path: Path) -> Position | None:
        while path:
            if path in positions:
                return positions[path]
            path = path[:-1]
        return None


def locate(text: str) -> Positions:
    """Find every key and value of a text that `tomllib.loads` accepts.

    >>> positions = locate("[base]\\nhub = 'x'\\n\\n[[adapt]]\\n[[adapt]]\\nrank.policy = 'fixed'\\n")
    >>> positions.key(("adapt", 1, "rank", "policy"))
    Position(line=6, column=6)
    >>> positions.value(("base", "hub"))
    Position(line=2, column=7)
    """
    reader = _Reader(text)
    reader.read()
    return reader.positions


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.positions = Positions()
        self._starts = [0, *(m.end() for m in re.finditer("\n", text))]
        self._lengths: dict[Path, int] = {}  # arrays of tables: how many so far

    def read(self) -> None:
        table: Path = ()
        while True:
            self._skip(_BLANK)
            if self.at >= len(self.text):
                return
            if self.text[self.at] == "[":
                table = self._read_header()
            else:
                self._read_pair(table)

    def _read_header(self) -> Path:
        start = self.at
        many = self.text.startswith("[[", start)
        self.at += 2 if many else 1
        keys = self._read_key()
        self.at += 2 if many else 1  # the closing brackets, which _read_key stops at
        path: Path = ()
        for name, position in keys:
            path = self._enter(path)
            path = (*path, name)
            self._note(path, position, position)
        header = self._position(start)
        if many:
            index = self._lengths[path] = self._lengths.get(path, -1) + 1
            path = (*path, index)
        # A header names its table for good; an earlier [table.below] only implied it.
        self.positions.keys[path] = self.positions.values[path] = header
        return path

    def _enter(self, path: Path) -> Path:
        """A header that goes through an array of tables means its last table."""
        return (*path, self._lengths[path]) if path in self._lengths else path

    def _read_pair(self, table: Path) -> None:
        keys = self._read_key()
        self.at += 1  # "="
        self._skip(_SPACE)
        value = self._position(self.at)
        path = table
        for name, position in keys:
            path = (*path, name)
            self._note(path, position, value)
        self._read_value(path)

    def _read_value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self._read_array(path)
        elif opening == "{":
            self._read_inline_table(path)
        elif opening in "\"'":
            self._read_string()
        else:
            self._skip(_SCALAR)

    def _read_array(self, path: Path) -> None:
        self.at += 1
        index = 0
        while True:
            self._skip(_BLANK)
            if self.text[self.at] == "]":
                self.at += 1
                return
            position = self._position(self.at)
            self._note((*path, index), position, position)
            self._read_value((*path, index))
            index += 1
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1

    def _read_inline_table(self, path: Path) -> None:
        self.at += 1
        while True:
            self._skip(_BLANK)
            if self.text[self.at] == "}":
                self.at += 1
                return
            self._read_pair(path)
            self._skip(_BLANK)
            if self.text[self.at] == ",":
                self.at += 1

    def _read_key(self) -> list[tuple[str, Position]]:
        """Read a dotted key, up to the `=` or `]` after it."""
        parts: list[tuple[str, Position]] = []
        while True:
            self._skip(_SPACE)
            start = self.at
            if self.text[start] in "\"'":
                token = self._read_string()
                name = next(iter(tomllib.loads(f"{token} = 0")))
            else:
                self._skip(_BARE_KEY)
                name = self.text[start : self.at]
            parts.append((name, self._position(start)))
            self._skip(_SPACE)
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def _read_string(self) -> str:
        start = self.at
        for quotes, pattern in _STRINGS.items():
            if self.text.startswith(quotes, start):
                self._skip(pattern)
                break
        return self.text[start : self.at]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def _position(self, offset: int) -> Position:
        line = bisect_right(self._starts, offset)
        return Position(line, offset - self._starts[line - 1] + 1)

    def _note(self, path: Path, key: Position, value: Position) -> None:
        self.positions.keys.setdefault(path, key)
        self.positions.values.setdefault(path, value)
