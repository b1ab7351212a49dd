"""The two files of a merge: one of the base, hashed as it is read, and the new one, written from beginning to end."""

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
from soka_serve.io.files import read_errors

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

log = logging.getLogger(__name__)

_DIRECT_BYTES = 4 << 20
_BY_HAND = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EIO)


class Reader:
    """Reads a file of the base and hashes what it reads in a thread of its own.

    Two buffers take turns, so that one is hashed while the other is in work; the same memory all the time, as fresh
    pages would cost as much as the arithmetic.

    Args:
        file: of the base.
        digest: takes what is read; None to skip hashing.
    """

    def __init__(self, file: Path, digest: Hash | None) -> None:
        self._file = file
        self._digest = digest
        self._hasher = ThreadPoolExecutor(1)  # one: blocks are hashed in order
        self._buffers = [bytearray(), bytearray()]
        self._hashed: list[Future[None] | None] = [None, None]

    def __enter__(self) -> Self:
        with read_errors(self._file):
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
            CheckpointError: the file ends before that, or the disk does not give it.
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
            with read_errors(self._file):
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

    _FLAGS = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

    def __init__(self, file: Path, size: int) -> None:
        self._file = file
        self._size = size
        self._end = 0

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._file, self._FLAGS, 0o666)
        try:
            os.truncate(self._descriptor, self._size)  # the disk may have no room
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._descriptor)

    def append(self, data: memoryview) -> None:
        """Write what comes next."""
        done = 0
        while done < len(data):
            done += self._pwrite(data[done:], self._end + done)
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
                # Across file systems, on old kernels and on some network mounts: copy by hand. So too after an
                # error of a disk, which by hand shows whether it is the one that is read.
                if error.errno not in _BY_HAND:
                    raise
        self._end += done
        self.append(base.read(start + done, size - done))

    def _pwrite(self, data: memoryview, offset: int) -> int:
        return os.pwrite(self._descriptor, data, offset)

    def _finish(self) -> None:
        if self._end != self._size:
            raise AssertionError(f"{self._file}: {self._end} bytes were written of {self._size}")


class DirectWriter(Writer):
    """The same past the page cache (O_DIRECT), for files that would not fit into it.

    There, the kernel would look for a page to give up for every page written, and give up the base's, which the next
    merge wants.
    """

    _FLAGS = Writer._FLAGS | getattr(os, "O_DIRECT", 0)

    def __enter__(self) -> Self:
        self._view = memoryview(mmap.mmap(-1, _DIRECT_BYTES))  # at a page's boundary, as O_DIRECT wants it
        self._values = torch.frombuffer(self._view, dtype=torch.uint8)
        self._filled = 0
        return super().__enter__()

    def append(self, data: memoryview) -> None:
        """Write what comes next, once there is enough of it."""
        # torch copies outside the interpreter's lock; it wants memory that can be written to, and some.
        values = torch.frombuffer(data, dtype=torch.uint8) if data else self._values[:0]
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
        self.append(base.read(start, size))

    def _pwrite(self, data: memoryview, offset: int) -> int:
        try:
            return super()._pwrite(data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._through_the_cache():
                raise
            log.info("%s: the file system refuses O_DIRECT; going on through the page cache", self._file)
            return super()._pwrite(data, offset)

    def _finish(self) -> None:
        self._through_the_cache()  # the rest is no multiple of a page
        super().append(self._view[: self._filled])
        super()._finish()

    def _through_the_cache(self) -> bool:
        """Go on without O_DIRECT; whether it was in force."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return bool(flags & os.O_DIRECT)


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
