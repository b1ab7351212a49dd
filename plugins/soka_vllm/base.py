"""Whether an adapter was made for the weights that are served: its soka.lock against the base's files."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from soka_serve.errors import SokaError, printable
from soka_serve.io.budget import ReadingBudget
from soka_vllm.folders import opened, renamed

_logger = logging.getLogger("vllm.soka")

ALLOW_VARIABLE = "SOKA_ALLOW_OTHER_BASE"

_MAX_LOCK_BYTES = 1 << 20  # the engine's loop reads it, too; one of ours has 60 bytes a module

_lock = threading.Lock()
_hashes: dict[Path, str | None] = {}  # of served bases, once per process


def check_base(adapter: Path, model: str, revision: str | None, roots: Sequence[Path] | None = None) -> None:
    """Compare the base that an adapter's soka.lock names with the one served.

    The base's files are read once, the first time an adapter has a soka.lock, and their hash is remembered by path,
    size and time of change, for the next servers of this user too. Whoever brings the adapter has no part in that.

    Args:
        adapter: its directory.
        model, revision: the served base as vLLM was given it: a directory, or a hub id whose snapshot is on this
            machine.
        roots: see `soka_vllm.folders`.

    Raises:
        ValueError: not in `roots`, or made for other weights; both hashes are in the message. For other weights only a
            warning where the served base is a quantised checkpoint, whose weights are others by nature, or where
            SOKA_ALLOW_OTHER_BASE=1.
    """
    from soka_serve.adapter.source import base_sha256_of, find_lock

    with opened(adapter, roots) as files:
        try:
            expected = base_sha256_of(find_lock(files, ReadingBudget(lock_bytes=_MAX_LOCK_BYTES), only="base"))
        except SokaError as error:
            raise ValueError(renamed(error.message, files, adapter)) from error
    if expected is None:
        _logger.info("%s: no soka.lock, so not compared with the served base", adapter)
        return
    expected = printable(expected, 2 * 64)  # whatever stands there
    directory = _local(model, revision)
    actual = None if directory is None else _hash_of(directory)
    if directory is None or actual is None:
        _logger.warning("%s: made for base weights %s; those of %s cannot be compared", adapter, expected, model)
    elif actual != expected:
        message = f"made for base weights with sha256 {expected}, the served base has {actual}"
        from soka_serve.adapter.served_base import is_quantised

        if is_quantised(directory):
            _logger.warning("%s: %s, which is quantised; served all the same", adapter, message)
        elif os.environ.get(ALLOW_VARIABLE) == "1":
            _logger.warning("%s: %s; served all the same, as %s says", adapter, message, ALLOW_VARIABLE)
        else:
            raise ValueError(
                f"{message}; serve the adapter's own base, or set {ALLOW_VARIABLE}=1 if the difference is intended"
            )


def _local(model: str, revision: str | None) -> Path | None:
    """Where the base's files are on this machine."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None  # from another hub, say, or from object storage


def _hash_of(directory: Path) -> str | None:
    """Hash of a base's weights, None where they are no safetensors files."""
    from soka_serve.adapter.served_base import served_sha256  # takes its time, and most processes check no base

    with _lock:
        if directory not in _hashes:
            try:
                _hashes[directory] = served_sha256(directory, _logger)
            except SokaError as error:
                _logger.warning("The served base's weights cannot be hashed: %s", error.message)
                _hashes[directory] = None
        return _hashes[directory]
