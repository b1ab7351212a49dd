"""The command `init`."""

from __future__ import annotations

from pathlib import Path

import click

from soka_serve.errors import SokaError


@click.command(epilog="Example:  soka-serve init math  writes math.toml")
@click.argument("name")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def init(name: str, force: bool) -> None:
    """Write a commented starter manifest to NAME.toml."""
    from soka_serve.io.files import write_text_atomic
    from soka_serve.manifest.starter import starter_manifest

    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    if path.exists() and not force:
        raise SokaError(f"{path} is there already", hint="Choose another name, or give --force to overwrite it.")
    write_text_atomic(path, starter_manifest(path.stem))
    click.echo(f"wrote {path}; next: soka-serve plan {path}")
