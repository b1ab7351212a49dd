"""TOML: values as text, and texts of bounded depth parsed.

tomllib takes memory with the square of a dotted key's parts, and recurses into brackets.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from datetime import date, time
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
        if dots >= MAX_PARTS or depth > MAX_DEPTH or brackets > MAX_BRACKETS:
            key = f"a key of more than {MAX_PARTS} parts" if dots >= MAX_PARTS else None
            deep = f"brackets more than {MAX_DEPTH} deep" if depth > MAX_DEPTH else None
            line = text.count("\n", 0, token.start()) + 1
            raise ValueError(f"{key or deep or f'more than {MAX_BRACKETS} tables and lists'} (at line {line})")
    return tomllib.loads(text)


def toml_key(name: str) -> str:
    """A key, in quotes where it needs them."""
    bare = name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    return name if bare else toml_value(name)


def toml_value(value: object) -> str:
    """A value on one line; a mapping is a table in braces.

    >>> toml_value({"policy": "fixed", "rank": 1}), toml_value([True, 0.5, "a"])
    ('{ policy = "fixed", rank = 1 }', '[true, 0.5, "a"]')

    Raises:
        TypeError: TOML has no form for it (None, say).
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):  # a datetime is a date; of somebody else's file
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    raise TypeError(f"TOML has no form for {type(value).__name__}")
