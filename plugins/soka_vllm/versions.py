"""The versions of vLLM that the plugin is made for; readable without importing vLLM."""

from __future__ import annotations

import re

SUPPORTED = ((0, 29), (0, 35))  # from, and up to but not including


def is_supported(version: str) -> bool:
    """Whether a version of vLLM is one that the plugin is made for; docs/serving.md says how each was tested.

    >>> is_supported("0.34.0+cpu"), is_supported("0.28.3"), is_supported("0.35.0"), is_supported("dev")
    (True, False, False, False)
    """
    number = _number(version)
    return number is not None and SUPPORTED[0] <= number < SUPPORTED[1]


def is_unknown(version: str) -> bool:
    """Whether a version is later than those, or none that can be placed: its sources have to be compared.

    >>> is_unknown("0.35.0"), is_unknown("dev"), is_unknown("0.34.0"), is_unknown("0.28.3")
    (True, True, False, False)
    """
    number = _number(version)
    return number is None or number >= SUPPORTED[1]


def is_before(version: str, release: tuple[int, int]) -> bool:
    """Whether a version comes before a release; one that cannot be placed comes after all.

    >>> is_before("0.33.1", (0, 34)), is_before("0.34.0+cpu", (0, 34)), is_before("dev", (0, 34))
    (True, False, False)
    """
    number = _number(version)
    return number is not None and number < release


def supported_text() -> str:
    """The range in words.

    >>> supported_text()
    '0.29 up to below 0.35'
    """
    return " up to below ".join(".".join(map(str, version)) for version in SUPPORTED)


def _number(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match and (int(match[1]), int(match[2]))
