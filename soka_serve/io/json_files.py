"""JSON objects read from files, within limits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from soka_serve.errors import CheckpointError, name_some
from soka_serve.io.budget import ReadingBudget, read_limited

FETCH_AGAIN = "fetch or save the checkpoint again"


CHECK_RIGHTS = "check the path and its rights"


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"names that occur twice: {name_some(twice)}")
    return found


def read_json(file: Path, budget: ReadingBudget | None = None) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        file: the file.
        budget: of an adapter, whose keys may occur once only; None for other files.

    Raises:
        CheckpointError: missing, not UTF-8, not JSON (with line and column), not an object, or too large.
    """
    return parse_json(file, read_json_text(file, budget), unique=budget is not None)


def read_json_text(file: Path, budget: ReadingBudget | None = None) -> str:
    """The text of a JSON file, not parsed yet.

    Raises:
        CheckpointError: missing, not UTF-8, or too large.
    """
    limits = budget or ReadingBudget()
    try:
        return read_limited(file, limits.config_bytes, limits.source)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file", hint=FETCH_AGAIN) from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint=CHECK_RIGHTS) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text: {error.reason}", hint=FETCH_AGAIN) from error


def parse_json(file: Path, content: str | bytes, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        file: where it was read, for messages.
        content: the text, or its bytes in UTF-8.
        unique: refuse keys that occur twice.

    Raises:
        CheckpointError: not UTF-8, not JSON (with line and column), or not an object.
    """
    try:
        text = content if isinstance(content, str) else content.decode()
        value = json.loads(text, object_pairs_hook=no_duplicates if unique else None)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file}:{error.lineno}:{error.colno}: not JSON: {error.msg}", hint=FETCH_AGAIN
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 text: {error.reason}", hint=FETCH_AGAIN) from error
    except (ValueError, RecursionError) as error:  # an endless number, nested without end
        raise CheckpointError(f"{file}: not JSON that can be read: {error}", hint=FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(value).__name__}", hint=FETCH_AGAIN)
    return value
