"""The versions of vLLM that the plugin is tested with; readable without importing vLLM."""

from __future__ import annotations

import re

SUPPORTED = ((0, 29), (0, 33))  # from, and up to but not including


def is_supported(version: str) -> bool:
    """Whether a version of vLLM is one that the plugin is tested with.

    >>> is_supported("0.32.1+cpu"), is_supported("0.33.0"), is_supported("dev")
    (True, False, False)
    """
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and SUPPORTED[0] <= (int(match[1]), int(match[2])) < SUPPORTED[1]


def supported_text() -> str:
    """The range in words.

    >>> supported_text()
    '0.29 up to below 0.33'
    """
    return " up to below ".join(".".join(map(str, version)) for version in SUPPORTED)
