"""Limits on the memory and time of reading an adapter, and reading within them.

An adapter comes from anywhere: a file of a few KB can claim to be GiBs (a hole on the disk), or ask for GiBs once it is
parsed or multiplied out. Every limit is held before the memory is taken.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from soka_serve.errors import CheckpointError
from soka_serve.io.files import irregular, require_regular

_MIB = 1 << 20
# A file with a hole is refused where it is larger than this and than so many times its size on the disk. What a
# compressing file system makes of an honest one stays far below.
_HOLE_BYTES = _MIB
_HOLE_RATIO = 16
_BYTES_PER_S = 10e6  # of the slowest disk that is waited for

LIMIT_HINT = "an adapter that was saved by a training is far smaller: fetch or save it again"


@dataclass
class ReadingBudget:
    """Limits for reading one adapter; the defaults are for callers that know no model to compare it with.

    Args:
        config_bytes, lock_bytes: of adapter_config.json and soka.lock.
        header_bytes: of the header of adapter_model.safetensors.
        tensors: how many the file may hold.
        values: how many all of them may hold, and what is made of them while reading.
        seconds: for everything, and a second more for each 10 MB that are read.
        pattern_seconds: processor time for matching the regular expressions of its config.
        source: where the limits come from, for messages.
    """

    config_bytes: int = 64 * _MIB
    lock_bytes: int = 8 * _MIB
    header_bytes: int = 100_000_000  # the limit of the safetensors library
    tensors: int = 1_000_000
    values: int = 1 << 33
    seconds: float = 300.0
    pattern_seconds: float = 60.0
    source: str = ""
    _started: float = field(default_factory=time.monotonic)
    _values: int = 0

    def take_tensors(self, file: Path, count: int) -> None:
        """Raises CheckpointError where a file holds more tensors than allowed."""
        if count > self.tensors:
            raise self._exceeded(f"{file}: {count} tensors", self.tensors)

    def take_values(self, what: object, count: int) -> None:
        """Take a part of the values; raises CheckpointError where there are not as many left."""
        self._values += count
        self.seconds += 4 * count / _BYTES_PER_S
        if self._values > self.values:
            raise self._exceeded(f"{what}: {self._values} values in float32", self.values)

    def take_pattern_seconds(self, taken: float) -> None:
        """Raises ValueError where the time for patterns is over."""
        self.pattern_seconds -= taken
        if self.pattern_seconds < 0:
            raise ValueError(f"its patterns take too long to match{self.source}")

    def check_time(self, what: object) -> None:
        """Raises CheckpointError where the time is over."""
        taken = time.monotonic() - self._started
        if taken > self.seconds:
            raise CheckpointError(
                f"{what}: reading has taken {taken:.0f} s, at most {self.seconds:.0f} s are allowed", hint=LIMIT_HINT
            )

    def _exceeded(self, what: str, limit: int) -> CheckpointError:
        return CheckpointError(f"{what}, too large: at most {limit} are read{self.source}", hint=LIMIT_HINT)


def open_regular(file: Path) -> BinaryIO:
    """Open a file for reading, without waiting for the writer of a pipe.

    Raises:
        OSError: it is missing, cannot be opened, or is a directory, a device, a pipe or a socket.
    """
    require_regular(file)  # to open some devices is to do something
    # What is opened is looked at again: it need not be what had this name before.
    number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        raise irregular(file, mode)
    return os.fdopen(number, "rb", buffering=0)


def read_limited(file: Path, limit: int, source: str = "", errors: str = "strict") -> str:
    """A text file of at most `limit` bytes, all of which are on the disk.

    Args:
        file: the file.
        limit: bytes.
        source: where the limit comes from, for messages.
        errors: what becomes of bytes that are not UTF-8, as in `bytes.decode`.

    Raises:
        CheckpointError: it is larger, or mostly a hole.
        OSError, UnicodeDecodeError: it cannot be read, or is not UTF-8.
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{file}: {size} bytes, too large: at most {limit} are read{source}", hint=LIMIT_HINT)
        refuse_hole(file, stream)
        data = bytearray()
        while part := stream.read(limit + 1 - len(data)):  # it may grow meanwhile
            data += part
        if len(data) > limit:
            raise CheckpointError(f"{file}: grows while it is read; at most {limit} bytes are{source}", hint=LIMIT_HINT)
    return data.decode("utf-8", errors)


def refuse_hole(file: Path, stream: BinaryIO) -> None:
    """Refuse a sparse file, of which little is on the disk; keeps the stream's position.

    Raises:
        CheckpointError: it is mostly a hole.
    """
    found = os.fstat(stream.fileno())
    on_disk = getattr(found, "st_blocks", found.st_size) * 512
    if found.st_size <= max(_HOLE_BYTES, _HOLE_RATIO * on_disk) or not hasattr(os, "SEEK_HOLE"):
        return
    place = stream.tell()
    hole = os.lseek(stream.fileno(), 0, os.SEEK_HOLE)  # the end, where the file system knows of none
    stream.seek(place)
    if hole < found.st_size:
        raise CheckpointError(
            f"{file}: a hole: {found.st_size} bytes long, of which {on_disk} are on the disk", hint=LIMIT_HINT
        )
