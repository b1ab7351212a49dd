"""Rows of a dataset: builtin families, JSON Lines files, hub datasets. No torch.

Each row comes with where it stands ('train.jsonl:12'), so that every later error can name it. The `datasets` library is
imported only for hub datasets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from soka_serve.errors import DataError
from soka_serve.files import require_regular
from soka_serve.schema import Data

_MAX_REPORTED = 5  # Malformed lines named in one error.

Row = Mapping[str, Any]


class UnreachableDataError(DataError):
    """The data is not there: no such file, or a hub that cannot be reached. A plan goes on without it."""


def resolve(manifest_dir: Path, text: str) -> Path:
    """A path of the manifest, relative to its directory."""
    return manifest_dir / Path(text).expanduser()


def builtin_rows(family: str, split: Literal["train", "test"], limit: int | None) -> Iterator[tuple[str, Row]]:
    """The first `limit` problems of a builtin family's split (None: as many as the family gives by default)."""
    from soka_serve.builtin import generate

    # Always the same problems: the run's seed orders them, it does not choose others (data_sha256 relies on it).
    for index, problem in enumerate(generate(family, split, count=limit, seed=0)):
        row = {"prompt": problem.prompt, "completion": problem.completion, "answer": problem.answer}
        yield f"builtin {family}/{split}[{index}]", row


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
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})",
                hint="Convert the file first: iconv -f LATIN1 -t UTF-8.",
            ) from None
        except json.JSONDecodeError as error:
            bad += 1
            problems.append(f"{file}:{number}:{error.colno}: malformed JSON: {error.msg}")
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


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Bytes: only a line feed ends a line, unlike in str."""
    try:
        with require_regular(file).open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.startswith((b"\xff\xfe", b"\xfe\xff")) and number == 1:
                    raise DataError(f"{file}:1: UTF-16; expected UTF-8", hint="iconv -f UTF-16 -t UTF-8")
                if text.strip():
                    yield number, text
    except FileNotFoundError:
        raise UnreachableDataError(
            f"{file}: not found", hint="Paths in a manifest start from the manifest's directory."
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def hub_rows(data: Data, split: str, manifest_dir: Path, stream: bool) -> Iterator[tuple[str, Row]]:
    """Rows of a hub dataset, or of a local directory of that name; `stream` reads it without downloading it whole."""
    name = str(data.hub)
    local = resolve(manifest_dir, name)
    import datasets

    # Offline there is only the local cache, which holds datasets whole.
    stream = stream and not datasets.config.HF_HUB_OFFLINE
    try:
        loaded = datasets.load_dataset(
            str(local) if local.is_dir() else name,
            name=data.config,
            split=split,
            revision=None if local.is_dir() else data.revision,
            streaming=stream,
        )
        iterator = iter(loaded)
        first = next(iterator, None)
    except Exception as error:
        raise UnreachableDataError(
            f"hub dataset '{name}' (config {data.config or 'default'}, split '{split}', revision "
            f"{data.revision or 'newest'}): {type(error).__name__}: {error}",
            hint=_hub_hint(error),
        ) from error
    if first is not None:
        yield f"{name}[{split}][0]", first
    for index, row in enumerate(iterator, start=1):
        yield f"{name}[{split}][{index}]", row


def _hub_hint(error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "gated" in text or "401" in text or "403" in text:
        return "Ask for access on the dataset's page, then log in: hf auth login."
    if "split" in text or "config" in text:
        return "Check train.data.split and train.data.config against the dataset's page."
    return (
        "Check the id and the network (HF_HUB_OFFLINE must be unset to download), or give a local directory or a "
        "JSON Lines file (train.data.jsonl)."
    )
