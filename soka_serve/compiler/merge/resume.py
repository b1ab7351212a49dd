"""Which files of a merge are finished, so that a merge that was killed goes on with the next one."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from soka_serve.adapter.source import AdapterSource
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.io.files import write_text_atomic
from soka_serve.io.stamps import stamp_of

log = logging.getLogger(__name__)

_JOURNAL = ".merge.json"


class MergeJournal:
    """Finished files of one merge, by name, with the sha256 of the base's file ("" where it was not hashed).

    Args:
        key: of everything that the files depend on (`merge_key`).
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.files: dict[str, str] = {}
        self._lock = threading.Lock()

    def adopt(self, left: Path, new: Path) -> None:
        """Take over what a killed run of the same merge has finished in `left`."""
        try:
            found = json.loads((left / _JOURNAL).read_text())
            files = dict(found["files"]) if found["key"] == self.key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return  # killed before its first file was finished, or no merge at all
        for name, digest in files.items():
            if name not in self.files:
                try:
                    (left / name).rename(new / name)
                except FileNotFoundError:  # another run was faster
                    continue
                self.add(new, name, digest)
        if files:
            log.info("going on with an interrupted merge: %d files are finished", len(self.files))

    def add(self, new: Path, name: str, digest: str) -> None:
        """Note that a file is finished and on the disk."""
        with self._lock:
            self.files[name] = digest
            write_text_atomic(new / _JOURNAL, json.dumps({"key": self.key, "files": self.files}))

    def close(self, new: Path) -> None:
        """The merge is done: its result holds no journal."""
        (new / _JOURNAL).unlink(missing_ok=True)


def merge_key(
    checkpoint: Checkpoint, sources: Sequence[tuple[AdapterSource, float]], dtype: str, *, hashed: bool
) -> str:
    """A hash of what a merge depends on: the base's files by path, size and time of change, adapters by content."""
    stamps = [(str(file.resolve()), *stamp_of(file)) for file in checkpoint.files]
    added = [[source.sha256, source.config_sha256, weight] for source, weight in sources]
    return hashlib.sha256(json.dumps([1, stamps, added, dtype, hashed]).encode()).hexdigest()
