"""The commands `compare` and `schema`: a suite's, or that of the manifest below it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from soka_serve.io.console import FILE, say


@click.command(
    epilog="""Examples:

    \b
    soka-serve compare eval/suites/quick.toml --jobs 2 --out results.json
    soka-serve compare /shared/mine.toml --ray 10.0.0.1:6379 --out /shared/mine.json
    """
)
@click.argument("suite", type=FILE)
@click.option("--root", type=FILE, help="Folder that the suite's relative paths start from.  [default: its own]")
@click.option("--work", type=FILE, default="build/compare", show_default=True, help="Folder of the runs' records.")
@click.option("--out", type=FILE, help="JSON file of the results; Markdown and HTML lie beside it.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Runs at a time, a thread each (default: 1; with --ray as many as the cluster has CPUs, or GPUs).",
)
@click.option("--ray", metavar="ADDRESS", help="Do the runs on a Ray cluster: HOST:PORT of its head, or 'auto'.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Start no run after so many minutes.")
@click.option("--limit-runs", type=click.IntRange(min=0), help="Start at most so many runs.")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier call.")
@click.option("--dry-run", is_flag=True, help="List the runs, what they cost, and parameters; train nothing.")
def compare(suite: Path, root: Path | None, out: Path | None, dry_run: bool, **options: Any) -> None:
    """Compare methods over settings and seeds, as SUITE says; go on where an earlier call stopped."""
    if dry_run:
        from soka_serve.comparison.preview import preview

        say(preview(suite, root).to_text())
        return
    from soka_serve.comparison.compare import compare as run

    shown = {"jobs": options["jobs"], "ray": options["ray"], "root": root, "out": out}
    given = "".join(f" --{name} {value}" for name, value in shown.items() if value)
    say(run(suite, root=root, out=out, command=f"soka-serve compare {suite}{given}", **options).to_text())


@click.command(
    epilog="""Examples:

    \b
    soka-serve schema > soka.schema.json
    soka-serve schema --suite > suite.schema.json
    """
)
@click.option("--suite", is_flag=True, help="Print the schema of comparison suites instead.")
def schema(suite: bool) -> None:
    """Print the manifest's JSON Schema, for editors."""
    from soka_serve.manifest.read import json_schema

    if suite:
        from soka_serve.comparison.suite import Suite

        found = json_schema(Suite, "suite")
    else:
        found = json_schema()
    click.echo(json.dumps(found, indent=2))
