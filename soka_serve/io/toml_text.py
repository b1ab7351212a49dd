"""TOML of bounded depth. tomllib takes memory with the square of a dotted key's parts, and recurses into brackets."""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_PARTS = 32
MAX_DEPTH = 64
MAX_BRACKETS = 2000  # a table of seven parts costs tomllib a tenth of a millisecond

# What a text that tomllib accepts is made of, up to the first place that it refuses: the two agree on where strings and
# comments end. A quote that begins no token begins a string without an end.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|(?!"""|\'\'\')(?:"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*')"
    r"|\#[^\n]*"
    r"|[A-Za-z0-9_-]+"
    r"|[ \t]+"
    r"|(?P<mark>.)",
    re.DOTALL,
)


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads`, for text from anywhere.

    Raises:
        ValueError: it is not TOML, has a key of more than MAX_PARTS parts, brackets more than MAX_DEPTH deep, or
            more than MAX_BRACKETS tables and lists.
    """
    dots = depth = brackets = 0
    for token in _TOKEN.finditer(text):
        mark = token["mark"]
        if mark in ("'", '"'):
            break  # tomllib says where
        if mark == ".":
            dots += 1
        elif mark is not None:
            dots = 0
            depth += (mark in "[{") - (mark in "]}")
            brackets += mark in "[{"
        what = (
            f"a key of more than {MAX_PARTS} parts"
            if dots >= MAX_PARTS
            else f"brackets more than {MAX_DEPTH} deep"
            if depth > MAX_DEPTH
            else f"more than {MAX_BRACKETS} tables and lists"
            if brackets > MAX_BRACKETS
            else None
        )
        if what:
            line = text.count("\n", 0, token.start()) + 1
            raise ValueError(f"{what} (at line {line})")
    return tomllib.loads(text)
