"""Rows of a dataset: builtin families and JSON Lines files; `hub_rows` has those of hub datasets.

Each row comes with where it stands ('train.jsonl:12'), so that every later error can name it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from soka_serve.errors import CheckpointError, DataError
from soka_serve.io.budget import open_regular, refuse_hole

if TYPE_CHECKING:
    from soka_serve.builtin.problem import Problem

_MAX_REPORTED = 5  # Malformed lines named in one error.
_MAX_LINE = 64 << 20  # bytes of one line
_BUFFER = 1 << 20

# An escape that may be half of a character beyond U+FFFF; two that belong together are a whole one.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

Row = Mapping[str, Any]


class UnreachableDataError(DataError):
    """The data is not there: no such file, or a hub that cannot be reached. A plan goes on without it."""


def resolve(manifest_dir: Path, text: str) -> Path:
    """A path of the manifest, relative to its directory."""
    return manifest_dir / Path(text).expanduser()


def builtin_rows(family: str, split: Literal["train", "test"], limit: int | None) -> Iterator[tuple[str, Row]]:
    """The first `limit` problems of a builtin family's split (None: as many as the family gives by default)."""
    from soka_serve.builtin.tasks import generate

    # Always the same problems: the run's seed orders them, it does not choose others (data_sha256 relies on it).
    for index, problem in enumerate(generate(family, split, count=limit, seed=0)):
        yield f"builtin {family}/{split}[{index}]", problem_row(problem)


def problem_row(problem: Problem) -> Row:
    """The columns that a problem of a builtin family has for templates."""
    return {"prompt": problem.prompt, "completion": problem.completion, "answer": problem.answer}


def jsonl_rows(file: Path, limit: int | None) -> Iterator[tuple[str, Row]]:
    """Rows of a JSON Lines file with where they stand ('train.jsonl:12'); blank lines are skipped."""
    problems: list[str] = []
    bad = 0
    rows = 0
    for number, line in read_lines(file):
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise DataError(f"expected a JSON object, got {type(row).__name__}")
            if _SURROGATE.search(line) and (half := _half_character(row)):
                raise DataError(f"{half} is half of a character, which no text has (a pair was cut, or written singly)")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
                hint="Convert the file first: iconv -f LATIN1 -t UTF-8.",
            ) from None
        except json.JSONDecodeError as error:
            bad += 1
            problems.append(f"{file}:{number}:{error.colno}: malformed JSON: {error.msg}")
        except (RecursionError, ValueError) as error:
            bad += 1
            what = "it is nested too deeply" if isinstance(error, RecursionError) else error
            problems.append(f"{file}:{number}: malformed JSON: {what}")
        except DataError as error:
            bad += 1
            problems.append(f"{file}:{number}: {error.message}")
        else:
            rows += 1
            if not bad:
                yield f"{file.name}:{number}", row
                if limit is not None and rows >= limit:
                    return
    if bad:
        more = [f"… and {bad - _MAX_REPORTED} more lines"] if bad > _MAX_REPORTED else []
        raise DataError(
            "\n".join(problems[:_MAX_REPORTED] + more), hint="JSON Lines holds one JSON object in each line."
        )
    if not rows:
        raise DataError(f"{file}: empty; expected one JSON object per line")


def _half_character(value: object) -> str | None:
    """An escape in keys or values of a row that stands for no character alone; None where all texts are whole."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


@contextmanager
def open_data(file: Path) -> Iterator[io.BufferedIOBase]:
    """Open a data file: a regular one, all of which is on the disk.

    Raises:
        UnreachableDataError: there is none.
        DataError: it is mostly a hole, a directory, a device or a pipe, or it cannot be read, also inside the context.
    """
    try:
        with cast("io.FileIO", open_regular(file)) as raw, io.BufferedReader(raw, _BUFFER) as stream:
            refuse_hole(file, raw)
            yield stream
    except CheckpointError as error:
        raise DataError(error.message, hint="Copy or download the file again.") from None
    except FileNotFoundError:
        raise UnreachableDataError(
            f"{file}: not found", hint="Paths in a manifest start from the manifest's directory."
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Bytes: only a line feed ends a line, unlike in str."""
    with open_data(file) as stream:
        for number in count(1):
            line = stream.readline(_MAX_LINE + 1)
            if not line:
                return
            if len(line) > _MAX_LINE:
                raise DataError(f"{file}:{number}: a line of more than {_MAX_LINE >> 20} MiB")
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.startswith((b"\xff\xfe", b"\xfe\xff")) and number == 1:
                raise DataError(f"{file}:1: UTF-16; expected UTF-8", hint="iconv -f UTF-16 -t UTF-8")
            if text.strip():
                yield number, text
