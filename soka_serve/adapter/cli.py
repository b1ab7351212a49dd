"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from soka_serve.io.console import FILE, say


@click.command(epilog="Example:  soka-serve inspect build/math")
@click.argument("path", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what an adapter, a build or a checkpoint holds: shapes, ranks, sigma, norms, provenance."""
    from soka_serve.adapter.inspect import inspect as run

    found = run(path)
    say(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())
