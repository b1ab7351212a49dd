"""Where outputs may be written: not over what belongs to the system, and not over where the user is."""

from __future__ import annotations

import os
from pathlib import Path

from soka_serve.errors import BuildError, SokaError

# Their content is made up by the kernel. /dev/shm, a file system in memory, is for everybody.
_KERNEL_PLACES = ("/proc", "/sys", "/dev")


def given_path(value: str | Path, option: str) -> Path:
    """A path that a user gave; refuses an empty one, which an unset variable of a shell leaves.

    Raises:
        SokaError: it is empty.
    """
    if value == "":
        raise SokaError(f"{option} is empty", hint="Give a folder; the current one is '.'")
    return Path(value)


def check_place(target: Path, *, replaced: bool = False) -> Path:
    """The real path of an output; refuses places where none may be written.

    Args:
        target: the file or directory to be written; need not exist.
        replaced: it is a directory that is replaced as a whole. Never replaced are the current directory, the home
            directory, whatever holds one of them, and mount points.

    Raises:
        BuildError: names the path and says why.
    """
    real = Path(os.path.realpath(target))
    for system in _KERNEL_PLACES:
        if real.is_relative_to(system) and not real.is_relative_to("/dev/shm"):
            raise BuildError(
                f"cannot write {target}: {real} lies in {system}, which is the kernel's and holds no files",
                hint="write somewhere else",
            )
    if replaced:
        for what, place in (("the current directory", _current_directory()), ("your home directory", _home())):
            if place is not None and place.is_relative_to(real):
                which = f"is {what}" if place == real else f"holds {what}"
                raise BuildError(
                    f"cannot write {target}: it {which}, and is not replaced",
                    hint="give a folder of its own, or run this from elsewhere",
                )
        if os.path.ismount(real):
            raise BuildError(
                f"cannot write {target}: it is a mount point, which cannot be replaced",
                hint=f"give a folder below it, such as {target / 'out'}",
            )
    return real


def _current_directory() -> Path | None:
    try:
        return Path(os.path.realpath(Path.cwd()))
    except FileNotFoundError:  # it was deleted
        return None


def _home() -> Path | None:
    try:
        return Path(os.path.realpath(Path.home()))
    except RuntimeError:  # nobody knows
        return None
