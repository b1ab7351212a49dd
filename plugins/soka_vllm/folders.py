"""An adapter's files, each opened once: what was checked is what is read.

A path can lead elsewhere a moment after it was looked at. Here the directory and its files are opened first, and the
kernel is asked where the things lie that are open. Readers get a private directory of links to the open descriptors
(/proc/self/fd), so vLLM's and PEFT's own, which open by path, cannot leave them either, and nothing is copied.

A file with several hard links lies where the name lies that was opened: one made inside an allowed folder is inside.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from soka_serve.errors import printable
from soka_serve.io.file_names import CONFIG_FILE, LOCK_FILE
from soka_serve.io.files import is_own
from soka_serve.io.safetensors import PICKLE_SUFFIXES
from soka_vllm.settings import BUILDS_VARIABLE, ROOTS_VARIABLE

_logger = logging.getLogger("vllm.soka")

_DESCRIPTORS = Path("/proc/self/fd")
_PREFIX = "soka-adapter-"
# To remove a directory takes some microseconds there, and on a disk some milliseconds: as long as the rest of a load.
_IN_MEMORY = Path("/dev/shm")
# What readers open or ask for; whatever else is in the folder of an adapter nobody looks at.
_NAMES = frozenset({CONFIG_FILE, LOCK_FILE, "trainer_state.json"})
_SUFFIXES = frozenset({".safetensors", *PICKLE_SUFFIXES})
_MOST_FILES = 200  # of these, in one folder

# The thing itself, for looking at: neither its content is read nor the writer of a pipe waited for.
_LOOK = getattr(os, "O_PATH", os.O_RDONLY | os.O_NONBLOCK) | os.O_CLOEXEC


class OutsideError(ValueError):
    """A directory, or a file in it, that does not lie in the allowed folders, or of which that cannot be told.

    The message says nothing on what is there: that is not for whoever asks to know.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(
            f"'{printable(directory)}' is not an adapter directory inside the folders that {ROOTS_VARIABLE} and "
            f"{BUILDS_VARIABLE} allow"
        )


@contextmanager
def opened(directory: Path, roots: Sequence[Path] | None = None) -> Iterator[Path]:
    """Open an adapter's files and give them as a directory that nobody else can change.

    The soka.lock beside the directory, of the build it lies in, is beside the given one if the adapter has none of its
    own and this process's user wrote it and nobody else can.

    Args:
        directory: the adapter. A missing one is given as an empty directory.
        roots: folders, links in their own paths followed, in which the directory and all that is read must lie, links
            followed; None: anywhere.

    Yields:
        The directory, valid within the context. Where the system cannot name open files (no /proc) it is `directory`
        itself, which is told from a private one by its path.

    Raises:
        OutsideError: not in `roots`; nothing is said about what is there.
        OSError, ValueError: without `roots`, a path that leads nowhere, such as a loop of links or one with a NUL.
    """
    if not _DESCRIPTORS.is_dir():
        if roots is not None:
            _logger.error("No /proc here, which says where open files lie: no adapter is inside an allowed folder")
            raise OutsideError(directory)
        yield directory
        return
    with ExitStack() as stack:
        try:
            found = _open_files(stack, directory, roots)
        except (OSError, ValueError) as error:
            if roots is None:
                raise
            raise OutsideError(directory) from error
        yield Path(stack.enter_context(_linked(found))) / "adapter"


def renamed(text: str, files: Path, directory: str | Path) -> str:
    """A message on files of an `opened` directory, as one on those of the directory that was opened."""
    if files == Path(directory):
        return text
    return text.replace(str(files), str(directory)).replace(str(files.parent), str(Path(directory).parent))


def lies_in(directory: Path, roots: Sequence[Path]) -> bool:
    """Whether `opened` would take a directory; a moment later it may have another answer."""
    with ExitStack() as stack:
        try:
            _open_files(stack, directory, roots)
        except (OSError, ValueError):
            return False
    return True


def location(descriptor: int) -> Path:
    """Current path of an open file or directory, from /proc; OSError where the kernel does not tell."""
    return (_DESCRIPTORS / str(descriptor)).readlink()


def _open_files(stack: ExitStack, directory: Path, roots: Sequence[Path] | None) -> dict[str, int]:
    """Descriptors of what readers may ask for, by the path in the private directory."""
    allowed = None if roots is None else _locations(roots)

    def open_one(name: str | Path, at: int | None, extra: int = 0) -> int:
        descriptor = os.open(name, _LOOK | extra, dir_fd=at)
        stack.callback(os.close, descriptor)
        if allowed is not None and not _is_in(location(descriptor), allowed):
            raise OutsideError(directory)
        return descriptor

    try:
        folder = open_one(directory, None, os.O_DIRECTORY)
    except FileNotFoundError:
        if roots is None:
            return {}
        raise
    found: dict[str, int] = {}
    for name in _names(folder):
        try:
            found[f"adapter/{name}"] = open_one(name, folder)
        except FileNotFoundError:  # gone by now, or a link to nothing, which may tell what is not there
            if roots is not None and _is_there(name, folder):
                raise
        except OSError as error:
            raise OSError(error.errno, f"{name}: {error.strerror}") from error
    if f"adapter/{LOCK_FILE}" not in found:
        try:
            beside = open_one("..", folder, os.O_DIRECTORY)
            lock = open_one(LOCK_FILE, beside, os.O_NOFOLLOW)
            if is_own(os.fstat(beside)) and is_own(os.fstat(lock)) and stat.S_ISREG(os.fstat(lock).st_mode):
                found[LOCK_FILE] = lock
        except (OSError, OutsideError):
            pass  # none, or one that is not this adapter's
    return found


def _is_there(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _linked(found: Mapping[str, int]) -> tempfile.TemporaryDirectory[str]:
    """A directory of mode 0700 with links to open files, by their paths in it: in memory, or else where others are."""
    with suppress(OSError):  # none there, or no room in it
        return _link_in(tempfile.TemporaryDirectory(prefix=_PREFIX, dir=_IN_MEMORY), found)
    return _link_in(tempfile.TemporaryDirectory(prefix=_PREFIX), found)


def _link_in(made: tempfile.TemporaryDirectory[str], found: Mapping[str, int]) -> tempfile.TemporaryDirectory[str]:
    try:
        (Path(made.name) / "adapter").mkdir()
        for name, descriptor in found.items():
            (Path(made.name) / name).symlink_to(_DESCRIPTORS / str(descriptor))
    except OSError:
        made.cleanup()
        raise
    return made


def _names(folder: int) -> list[str]:
    """Names in an open directory that readers may ask for."""
    # O_PATH opens nothing that can be listed.
    listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        with os.scandir(listed) as entries:
            names = [e.name for e in entries if e.name in _NAMES or Path(e.name).suffix in _SUFFIXES]
    finally:
        os.close(listed)
    if len(names) > _MOST_FILES:
        raise ValueError(f"{len(names)} files of weights in one folder; an adapter has at most {_MOST_FILES}")
    return sorted(names)


def _locations(roots: Sequence[Path]) -> list[Path]:
    """Where folders lie, those that are there."""
    found = []
    for root in roots:
        try:
            descriptor = os.open(root, _LOOK | os.O_DIRECTORY)
        except (OSError, ValueError):
            continue
        try:
            found.append(location(descriptor))
        finally:
            os.close(descriptor)
    return found


def _is_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)
