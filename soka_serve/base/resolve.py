"""A base as it is named on a command line or in a call: a directory, a hub id, or the embedded model."""

from __future__ import annotations

from pathlib import Path

from soka_serve.base.checkpoint import Checkpoint, check_directory
from soka_serve.base.hub import fetch_snapshot
from soka_serve.errors import CheckpointError
from soka_serve.io.json_files import read_json
from soka_serve.manifest.schema import Base


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


def resolve_base(base: Base, *, manifest_dir: Path, weights: bool = True) -> Path:
    """The directory of a manifest's base model, fetched first if it is on the hub.

    Args:
        base: the manifest's [base] table.
        manifest_dir: what a relative path is relative to.
        weights: False fetches and checks the config, index and tokenizer only; a hub that cannot be reached is then
            replaced by the config inside the package, if there is one, with a warning.

    Raises:
        CheckpointError: missing, malformed, gated, or not to be reached; the hint says what to do.
    """
    if base.builtin is not None:
        from soka_serve.builtin import base_directory

        directory = base_directory()
    elif base.path is not None:
        directory = manifest_dir / Path(base.path).expanduser()
        check_directory(directory)
    else:
        directory = fetch_snapshot(str(base.hub), base.revision, weights=weights)
    if weights:
        Checkpoint.open(directory)
    else:
        read_json(directory / "config.json")
    return directory
