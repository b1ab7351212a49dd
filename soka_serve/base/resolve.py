"""A base as it is named on a command line, in a call or in a manifest: a directory, a hub id, or the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from soka_serve.base.base import Base
from soka_serve.base.checkpoint import check_directory
from soka_serve.base.hub import fetch_snapshot
from soka_serve.errors import CheckpointError
from soka_serve.manifest import schema
from soka_serve.manifest.nodes import TomlPath


def open_base(name: str, revision: str | None = None) -> Base:
    """Open a base: 'tiny', a directory or a hub id.

    Raises:
        CheckpointError: no such directory, or the hub does not give it.
    """
    here = Path.cwd()
    if name == "tiny" and not Path(name).is_dir():
        return resolve_base(schema.Base(builtin="tiny"), manifest_dir=here)
    path = Path(name).expanduser()
    if not name.startswith((".", "~")) and "/" not in name and not path.exists():
        raise CheckpointError(
            f"base {name}: neither a directory here nor 'tiny', the embedded model",
            hint="give the directory of a Hugging Face checkpoint, a hub id (ORGANISATION/NAME), or tiny",
        )
    # A hub id is ORGANISATION/NAME at most; anything else that looks like a path is one, there or not.
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return resolve_base(schema.Base(path=str(path)), manifest_dir=here)
    return resolve_base(schema.Base(hub=name, revision=revision), manifest_dir=here)


def resolve_base(
    table: schema.Base, *, manifest_dir: Path, weights: bool = True, name_key: Callable[[TomlPath], str] | None = None
) -> Base:
    """A manifest's base model, fetched first if it is on the hub.

    Args:
        table: the manifest's [base] table.
        manifest_dir: what a relative path is relative to.
        weights: False fetches and checks the config, index and tokenizer only; a hub that cannot be reached is then
            replaced by the config inside the package, if there is one, with a warning.
        name_key: what errors call a key of the file that the table is from, such as `LoadedManifest.name_key`.

    Raises:
        CheckpointError: missing, malformed, gated, or not to be reached; the hint says what to do.
    """
    try:
        directory = _directory(table, manifest_dir, weights)
    except CheckpointError as error:
        if name_key is None:
            raise
        key = "hub" if table.path is None else "path"
        raise CheckpointError(f"{name_key(('base', key))}: {error.message}", hint=error.hint) from error
    base = Base(directory, table.hub)
    _ = base.checkpoint if weights else base.config
    return base


def _directory(table: schema.Base, manifest_dir: Path, weights: bool) -> Path:
    if table.builtin is not None:
        from soka_serve.builtin import base_directory

        return base_directory()
    if table.path is None:
        return fetch_snapshot(str(table.hub), table.revision, weights=weights)
    directory = manifest_dir / Path(table.path).expanduser()
    check_directory(directory)
    return directory
