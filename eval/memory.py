"""Resident memory of this process, from Linux's /proc: psutil gives neither its peak nor its anonymous part."""

from __future__ import annotations

import threading
from pathlib import Path

_POLL_S = 0.005


def resident_bytes(field: str) -> int:
    """A field of this process's status in bytes: VmRSS (now), VmHWM (the most so far) or RssAnon (not of files)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status: this benchmark needs Linux")


def reset_peak() -> int:
    """Let VmHWM begin anew; returns VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


class AnonymousPeak:
    """The most anonymous memory while it is open, beyond what there was: pages of mapped files do not count."""

    def __enter__(self) -> AnonymousPeak:
        self._before = self._most = resident_bytes("RssAnon")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._most = max(self._most, resident_bytes("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def added_bytes(self) -> int:
        """Bytes above the start."""
        return self._most - self._before
