"""An adapter together with the hashes and the provenance of exactly the files that were read."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.adapter.format import Adapter, read_adapter
from soka_serve.errors import CheckpointError, printable
from soka_serve.io.budget import ReadingBudget, read_limited
from soka_serve.io.file_names import CARD_FILE, CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.files import read_errors, sha256_file
from soka_serve.io.leftovers import final_name
from soka_serve.io.lockfile import read_lock
from soka_serve.io.stamps import WAIT, FileStamps

log = logging.getLogger(__name__)

_TRIES = 5
_MAX_CARD_BYTES = 16 << 20


@dataclass(frozen=True)
class AdapterSource:
    """An adapter, the hashes of its files and their texts, all read at one moment.

    Args:
        adapter: as read.
        sha256: of its weights file.
        config_sha256: of its adapter_config.json.
        lock: its own soka.lock, or that of the build it lies in; None where there is none.
        card: its README.md; None where there is none.
    """

    adapter: Adapter
    sha256: str
    config_sha256: str
    lock: dict[str, Any] | None
    card: str | None

    @property
    def name(self) -> str:
        """What to call it: a build's adapter after the build, another one after its directory."""
        real = Path(os.path.realpath(self.adapter.directory))
        return printable(final_name(real.parent) if real.name == "adapter" else final_name(real))

    @property
    def base_sha256(self) -> str | None:
        """Hash of the base weights that the lock names; None where it names none."""
        return base_sha256_of(self.lock)


def base_sha256_of(lock: Mapping[str, Any] | None) -> str | None:
    """Hash of the base weights in a soka.lock; None where there is none."""
    base = lock.get("base") if lock is not None else None
    digest = base.get("sha256") if isinstance(base, Mapping) else None
    return str(digest) if digest else None


def find_lock(directory: Path, budget: ReadingBudget | None = None, only: str | None = None) -> dict[str, Any] | None:
    """The soka.lock of an adapter, or of the build it lies in, or one table of it (`read_lock`); None without any.

    Raises:
        CheckpointError: it cannot be read, or not within the budget.
    """
    for file in _locks(directory):
        if file.exists():
            return read_lock(file, budget, only)
    return None


def read_source(directory: Path) -> AdapterSource:
    """Read and hash an adapter; read it again if it changes meanwhile, as when a build replaces it.

    Raises:
        CheckpointError: damaged, or changed again and again.
    """
    files = [*(directory / name for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE)), *_locks(directory)]
    for attempt in range(1, _TRIES + 1):
        unchanged = FileStamps(files)
        try:
            found = _read_once(directory)
        except CheckpointError:
            if attempt == _TRIES or not unchanged.changed():
                raise
        else:
            if not unchanged.changed():
                return found
        log.info("%s was changed while it was read; reading it again", directory)
    raise CheckpointError(f"{directory}: is changed again and again while it is read", hint=WAIT)


def _read_once(directory: Path) -> AdapterSource:
    adapter = read_adapter(directory)
    with read_errors(directory):
        weights, config = (sha256_file(directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE))
        card = directory / CARD_FILE
        text = read_limited(card, _MAX_CARD_BYTES, errors="replace") if card.is_file() else None
    return AdapterSource(adapter, weights, config, find_lock(directory), text)


def _locks(directory: Path) -> list[Path]:
    return [folder / LOCK_FILE for folder in (directory, Path(os.path.realpath(directory)).parent)]
