"""soka.lock: provenance as TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soka_serve.errors import CheckpointError
from soka_serve.io.budget import ReadingBudget, read_limited
from soka_serve.io.file_names import LOCK_FILE
from soka_serve.io.files import write_text_atomic
from soka_serve.io.toml_text import parse_toml, toml_key, toml_value


def write_lock(path: str | Path, lock: Mapping[str, Any]) -> None:
    """Write provenance as TOML: strings, numbers, booleans, dates and lists of them, in tables of any depth.

    Raises:
        TypeError: a value that TOML has no form for (None, say); names its key.
    """
    write_text_atomic(Path(path), "\n".join(_table(lock, ())).lstrip("\n") + "\n")


def read_lock(path: str | Path, budget: ReadingBudget | None = None, only: str | None = None) -> dict[str, Any]:
    """Read a soka.lock.

    Args:
        path: the file.
        budget: of the adapter it belongs to.
        only: the one table that is wanted: where it begins with a line of its own, as `write_lock` writes it, the
            others, of which there is a line for each module, are not parsed.

    Raises:
        CheckpointError: missing, unreadable, too large, or not TOML that `write_lock` could have written (with the
            place).
    """
    file, limits = Path(path), budget or ReadingBudget()
    try:
        text = read_limited(file, limits.lock_bytes, limits.source)
        found = only and re.search(rf"^\[{re.escape(only)}\]\n(?:(?!\[).*\n?)*", text, re.MULTILINE)
        return parse_toml(found[0] if found else text)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file", hint="it is written with every adapter and build") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}", hint="check its rights") from error
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{file}: not TOML: {error}", hint="it was edited or damaged; build again") from error


def lock_of(directory: Path) -> dict[str, Any]:
    """The soka.lock in a directory; empty where there is none. Raises what `read_lock` does."""
    return read_lock(directory / LOCK_FILE) if (directory / LOCK_FILE).exists() else {}


def _table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """The lines of one TOML table: its values first, then its sub-tables."""
    lines = [f"\n[{'.'.join(map(toml_key, path))}]"] if path else []
    for name, value in table.items():
        if not isinstance(value, Mapping):
            try:
                lines.append(f"{toml_key(name)} = {toml_value(value)}")
            except TypeError as error:
                raise TypeError(f"soka.lock: {'.'.join((*path, name))}: {error}") from None
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, name))
    return lines
