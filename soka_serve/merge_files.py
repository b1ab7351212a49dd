"""The two files of a merge, each from its beginning to its end: the base's, hashed as it is read, and the new one."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from soka_serve.errors import CheckpointError

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

log = logging.getLogger(__name__)

COPY_BYTES = 1 << 20
_DIRECT_BYTES = 4 << 20


class Reader:
    """Reads a file of the base and hashes what it reads in a thread of its own.

    Two buffers take turns, so that one is hashed while the other is in work; the same memory all the time, as fresh
    pages would cost as much as the arithmetic.

    Args:
        file: of the base.
        digest: takes what is read; None if nobody wants to know.
    """

    def __init__(self, file: Path, digest: Hash | None) -> None:
        self._file = file
        self._digest = digest
        self._hasher = ThreadPoolExecutor(1)  # one: blocks are hashed in order
        self._buffers = [bytearray(), bytearray()]
        self._hashed: list[Future[None] | None] = [None, None]

    def __enter__(self) -> Self:
        self.descriptor = os.open(self._file, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        self._hasher.shutdown()
        os.close(self.descriptor)

    @property
    def is_hashed(self) -> bool:
        """Whether every byte has to pass through `read`."""
        return self._digest is not None

    def read(self, start: int, size: int) -> memoryview:
        """`size` bytes from `start`, which hold until the read after the next.

        Raises:
            CheckpointError: the file ends before that.
        """
        self._buffers.reverse()
        self._hashed.reverse()
        if (hashed := self._hashed[0]) is not None:
            hashed.result()
        if len(self._buffers[0]) < size:
            self._buffers[0] = bytearray(size)
        view = memoryview(self._buffers[0])[:size]
        done = 0
        while done < size:
            count = os.preadv(self.descriptor, [view[done:]], start + done)
            if count == 0:
                raise CheckpointError(
                    f"{self._file}: truncated: expected {size} bytes at {start}, found {done}",
                    hint="it was changed while it was being merged; merge again",
                )
            done += count
        if self._digest is not None:
            self._hashed[0] = self._hasher.submit(self._digest.update, view)
        return view


class Writer:
    """Writes a file from its beginning to its end.

    Args:
        file: the new file.
        size: of the finished file, bytes.
    """

    def __init__(self, file: Path, size: int) -> None:
        self._file = file
        self._size = size
        self._end = 0

    def __enter__(self) -> Self:
        self._descriptor = self._open()
        os.truncate(self._descriptor, self._size)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def append(self, data: memoryview) -> None:
        """Write what comes next."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], self._end + done)
        self._end += done

    def append_copy(self, base: Reader, start: int, size: int) -> None:
        """Write `size` bytes of the base's file from `start`; inside the kernel where nobody has to see them."""
        done = 0
        if not base.is_hashed and hasattr(os, "copy_file_range"):
            try:
                while done < size:
                    count = os.copy_file_range(
                        base.descriptor, self._descriptor, size - done, start + done, self._end + done
                    )
                    if count == 0:
                        break
                    done += count
            except OSError as error:
                # Across file systems, on old kernels and on some network mounts: copy by hand.
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
        self._end += done
        self._append_by_hand(base, start + done, size - done)

    def _append_by_hand(self, base: Reader, start: int, size: int) -> None:
        for first in range(0, size, COPY_BYTES):
            self.append(base.read(start + first, min(COPY_BYTES, size - first)))

    def _open(self, flags: int = 0) -> int:
        return os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o666)


class DirectWriter(Writer):
    """The same past the page cache (O_DIRECT), for files that would not fit into it.

    There, the kernel would look for a page to give up for every page written, which took a fifth of a merge's
    processor time, and give up the base's, which are wanted for the next merge.
    """

    def __enter__(self) -> Self:
        self._buffer = mmap.mmap(-1, _DIRECT_BYTES)  # at a page's boundary, as O_DIRECT wants it
        self._view = memoryview(self._buffer)
        self._values = torch.frombuffer(self._view, dtype=torch.uint8)
        self._filled = 0
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        try:
            if self._filled:  # the rest is no multiple of a page
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                super().append(self._view[: self._filled])
        finally:
            super().__exit__()

    def append(self, data: memoryview) -> None:
        """Write what comes next, once there is enough of it."""
        values = torch.frombuffer(data, dtype=torch.uint8)
        while len(values):
            part = values[: _DIRECT_BYTES - self._filled]
            self._values[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            values = values[len(part) :]
            if self._filled == _DIRECT_BYTES:
                self._filled = 0
                super().append(self._view)

    def append_copy(self, base: Reader, start: int, size: int) -> None:
        """Write `size` bytes of the base's file from `start`."""
        self._append_by_hand(base, start, size)

    def _open(self, flags: int = 0) -> int:
        return super()._open(flags | os.O_DIRECT)


def can_write_direct(folder: Path) -> bool:
    """Whether the file system of a folder takes files past the page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    probe = folder / ".direct"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        log.info("%s: the file system has no O_DIRECT; writing through the page cache", folder)
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
