"""The commands `combine` and `inspect`."""

from __future__ import annotations

import json
from typing import Any

import click

from soka_serve.io.console import FILE, SOURCE, say


@click.command(epilog="Example:  soka-serve combine clients/one=0.5 clients/two=0.5 --rank 4 --out combined")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("--out", type=FILE, required=True, help="Directory of the new adapter; an earlier one is replaced.")
@click.option("--rank", type=click.IntRange(min=1), help="Most terms per module (default: all, which is exact).")
@click.option("--allow-other-base", is_flag=True, help="Combine adapters that were made for different bases.")
def combine(adapters: tuple[str, ...], **options: Any) -> None:
    """Write the weighted sum of several adapters of one base as one adapter, and say what is lost.

    An ADAPTER is a folder, a hub id (owner/name@revision), or the URL of a folder (s3://, gs://, https://).
    """
    from soka_serve.adapter.combine import combine as run
    from soka_serve.adapter.weighted import parse_weighted

    say(run([parse_weighted(a) for a in adapters], **options).to_text())


@click.command(
    epilog="""Examples:

    \b
    soka-serve inspect build/math
    soka-serve inspect s3://bucket/adapters/math
    soka-serve inspect owner/math@v2
    """,
)
@click.argument("path", type=SOURCE)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option(
    "--base",
    help="Also count intruder dimensions beside this base, with SVDs of its weights: a directory, a hub id, or 'tiny'.",
)
def inspect(path: str, as_json: bool, base: str | None) -> None:
    """Show what an adapter, a build or a checkpoint holds: shapes, ranks, sigma, norms, provenance.

    An adapter may be a hub id (owner/name@revision) or the URL of its folder (s3://, gs://, https://), too.
    """
    from soka_serve.adapter.inspect import inspect as run

    found = run(path, base=base)
    say(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())
