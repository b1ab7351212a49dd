"""Where adapters may come from: names in a folder of builds, and the folders of runtime loads. No vLLM, no torch.

Names and paths are what any client sends: nothing but an adapter inside the folders may be reached by them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

BUILDS_VARIABLE = "SOKA_BUILDS"
ROOTS_VARIABLE = "SOKA_ADAPTER_ROOTS"

_CONFIG = "adapter_config.json"
# One component of a path that is not hidden; the same as the names of builds.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


def find_build(folder: Path, name: str) -> Path | None:
    """The adapter of a name in a folder of builds; None where there is none, or where the name leads out of the folder.

    Args:
        folder: the folder.
        name: what a client asked for, so anything.
    """
    if not _NAME.fullmatch(name):
        return None
    for place in (folder / name / "adapter", folder / name):
        if (place / _CONFIG).is_file():
            return place if is_inside(place, [folder]) else None
    return None


def is_inside(directory: Path, roots: Sequence[Path]) -> bool:
    """Whether a directory and the files in it, links followed, lie in one of the folders."""
    resolved = [root.resolve() for root in roots]

    def allowed(path: Path) -> bool:
        real = path.resolve()
        return any(real.is_relative_to(root) for root in resolved)

    try:
        return directory.is_dir() and allowed(directory) and all(allowed(child) for child in directory.iterdir())
    except (OSError, ValueError, RuntimeError):  # a loop of links, no permission, a NUL in the path
        return False


def allowed_roots() -> list[Path] | None:
    """The folders of SOKA_ADAPTER_ROOTS; None where it is not set, that is where everything is allowed."""
    text = os.environ.get(ROOTS_VARIABLE)
    return None if text is None else [Path(part).expanduser() for part in text.split(os.pathsep) if part]
