"""What is known of training data without rendering it: how many examples, and a hash of what they are made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from soka_serve.data.mixture import naming
from soka_serve.data.rows import open_data, read_lines, resolve
from soka_serve.manifest.schema import Data, Train


def count_examples(data: Data, *, manifest_dir: Path) -> int | None:
    """How many training rows there are, before `eval_frac`; None where only loading a hub dataset would tell.

    Raises:
        DataError: the file cannot be read.
    """
    if data.jsonl is not None:
        total = sum(1 for _ in read_lines(resolve(manifest_dir, data.jsonl)))
    elif data.builtin is not None:
        from soka_serve.builtin.tasks import DEFAULT_COUNTS

        # A builtin family has no end: the limit is how many are generated.
        return data.limit or DEFAULT_COUNTS["train"]
    else:
        return None
    return total if data.limit is None else min(total, data.limit)


def file_digest(file: Path) -> bytes:
    """The sha256 of a data file.

    Raises:
        DataError: it cannot be read.
    """
    with open_data(file) as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def mixture_sha256(
    train: Train, *, manifest_dir: Path, evaluation: bool = True, digest_of: Callable[[Path], bytes] = file_digest
) -> str:
    """`data_sha256` of the one dataset, or a hash of those of all that are mixed, with their weights.

    Raises:
        DataError: a file cannot be read; of several datasets it is named.
    """
    hashes = []
    for number, data in enumerate(train.datasets):
        with naming(number, len(train.datasets)):
            hashes.append(data_sha256(data, manifest_dir=manifest_dir, evaluation=evaluation, digest_of=digest_of))
    if isinstance(train.data, Data):
        return hashes[0]
    return hashlib.sha256(json.dumps([hashes, train.weights]).encode()).hexdigest()


def data_sha256(
    data: Data, *, manifest_dir: Path, evaluation: bool = True, digest_of: Callable[[Path], bytes] = file_digest
) -> str:
    """Hash of what the examples are made from: sources, templates, limits.

    Without `evaluation` as if there were no evaluation set of its own (`eval_jsonl`, `eval_split`). `digest_of` is
    `file_digest`, or one that remembers.

    Builtin: the family and the generators' source. JSON Lines and local dataset directories: the files' bytes, wherever
    they lie, and names inside a directory. Hub: id and revision only; an unpinned id hashes the same when its authors
    change it.

    Raises:
        DataError: a file cannot be read.
    """
    if not evaluation:
        data = data.model_copy(update={"eval_jsonl": None, "eval_split": None})
    digest = hashlib.sha256()
    local = data.hub is not None and resolve(manifest_dir, data.hub).is_dir()
    places = ("jsonl", "eval_jsonl", *(["hub"] if local else []))
    digest.update(json.dumps(data.model_dump(mode="json") | {n: "" for n in places if getattr(data, n)}).encode())
    files: list[Path] = []
    if data.builtin is not None:
        package = Path(__file__).parents[1] / "builtin"
        files += sorted(f for f in package.glob("*.py") if f.name.startswith(("tasks", "problem", "family_")))
    if data.jsonl is not None:
        files.append(resolve(manifest_dir, data.jsonl))
    if data.eval_jsonl is not None:
        files.append(resolve(manifest_dir, data.eval_jsonl))
    if local:
        folder = resolve(manifest_dir, str(data.hub))
        files += sorted(f for f in folder.rglob("*") if f.is_file())
        digest.update(json.dumps([str(f.relative_to(folder)) for f in files]).encode())
    for file in files:
        digest.update(digest_of(file))
    return digest.hexdigest()
