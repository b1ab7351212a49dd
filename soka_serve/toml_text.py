"""TOML of bounded depth. tomllib takes memory with the square of a dotted key's parts, and recurses into brackets."""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_PARTS = 32
MAX_DEPTH = 64

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
        ValueError: it is not TOML, has a key of more than MAX_PARTS parts, or brackets more than MAX_DEPTH deep.
    """
    dots = depth = 0
    for token in _TOKEN.finditer(text):
        mark = token["mark"]
        if mark in ("'", '"'):
            break  # tomllib says where
        if mark == ".":
            dots += 1
        elif mark is not None:
            dots = 0
            depth += (mark in "[{") - (mark in "]}")
        if dots >= MAX_PARTS or depth > MAX_DEPTH:
            line = text.count("\n", 0, token.start()) + 1
            what = f"a key of more than {MAX_PARTS} parts" if dots else f"brackets more than {MAX_DEPTH} deep"
            raise ValueError(f"{what} (at line {line})")
    return tomllib.loads(text)
