"""A base as it is named on a command line or in a call: a directory, a hub id, or the embedded model. No torch."""

from __future__ import annotations

from pathlib import Path

from soka_serve.checkpoint import resolve_base
from soka_serve.errors import CheckpointError
from soka_serve.schema import Base


def open_base(name: str, revision: str | None = None) -> tuple[Path, str]:
    """Find a base: ('tiny' | directory | hub id) -> its directory here, and the name to record for it.

    Raises:
        CheckpointError: no such directory, or the hub does not give it.
    """
    here = Path.cwd()
    if name == "tiny" and not Path(name).is_dir():
        return resolve_base(Base(builtin="tiny"), manifest_dir=here), base_name(Base(builtin="tiny"), here)
    path = Path(name).expanduser()
    if not name.startswith((".", "~")) and "/" not in name and not path.exists():
        raise CheckpointError(
            f"base {name}: neither a directory here nor 'tiny', the embedded model",
            hint="give the directory of a Hugging Face checkpoint, a hub id (ORGANISATION/NAME), or tiny",
        )
    # A hub id is ORGANISATION/NAME at most; anything else that looks like a path is one, there or not.
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        base = Base(path=str(path))
        return resolve_base(base, manifest_dir=here), base_name(base, here)
    base = Base(hub=name, revision=revision)
    return resolve_base(base, manifest_dir=here), name


def base_name(base: Base, manifest_dir: Path) -> str:
    """What `base_model_name_or_path` says of a base: a hub id, or an absolute directory that PEFT can load."""
    if base.hub is not None:
        return base.hub
    return str(resolve_base(base, manifest_dir=manifest_dir).resolve())
