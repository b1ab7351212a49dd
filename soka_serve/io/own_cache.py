"""This user's cache folder: hashes of files, logs of servers, tokenizers as servers open them."""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from pathlib import Path

from soka_serve.io.files import is_own, is_own_file
from soka_serve.io.workspace import HashCache

logger = logging.getLogger(__name__)

HASHES_FILE = "hashes.json"


def cache_directory() -> Path:
    """Where hashes of bases and logs of servers are kept: $XDG_CACHE_HOME/soka-serve, or ~/.cache/soka-serve."""
    given = os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "soka-serve"


def own_folder() -> Path:
    """`cache_directory()`, made if need be (mode 0700), with nothing in it that another user may have written.

    Where it was open to others it is closed, and the hashes in it are dropped, which costs reading files again. Where
    it belongs to another user, a temporary folder takes its place in this process. Both are logged. A folder that
    cannot be made is returned all the same; whoever writes to it says so.
    """
    folder = cache_directory()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        if status.st_uid not in (os.geteuid(), 0):
            return _instead_of(folder)
        hashes = folder / HASHES_FILE
        if not is_own(status) or (os.path.lexists(hashes) and not is_own_file(hashes)):
            logger.warning("%s: other users may write there; its hashes are dropped, and it is closed to them", folder)
            hashes.unlink(missing_ok=True)
            folder.chmod(0o700)
    except OSError as error:
        logger.warning("%s: no cache: %s", folder, error.strerror)
    return folder


@functools.cache
def _instead_of(folder: Path) -> Path:
    other = Path(tempfile.mkdtemp(prefix="soka-serve-"))
    logger.warning("%s belongs to another user and is left alone; hashes and logs go to %s", folder, other)
    return other


def own_hashes() -> HashCache:
    """The cache of file hashes that servers and evaluations of this user share."""
    return HashCache(own_folder() / HASHES_FILE)
