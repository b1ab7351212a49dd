"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from soka_serve.io.console import FILE, say


@click.command(epilog="Example:  soka-serve compare eval/suites/quick.toml --jobs 2 --out results.json")
@click.argument("suite", type=FILE)
@click.option("--work", type=FILE, default="build/compare", show_default=True, help="Folder of the runs' records.")
@click.option("--out", type=FILE, help="JSON file of the results; Markdown and HTML lie beside it.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time, a thread each.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Start no run after so many minutes.")
@click.option("--limit-runs", type=click.IntRange(min=0), help="Start at most so many runs.")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier call.")
@click.option("--dry-run", is_flag=True, help="List the runs and estimate parameters; train nothing.")
def compare(suite: Path, out: Path | None, jobs: int, dry_run: bool, **options: Any) -> None:
    """Compare methods over learning rates and seeds, as SUITE says; go on where an earlier call stopped."""
    if dry_run:
        from soka_serve.comparison.preview import preview

        say(preview(suite).to_text())
        return
    from soka_serve.comparison.compare import compare as run

    command = f"soka-serve compare {suite} --jobs {jobs}" + (f" --out {out}" if out else "")
    say(run(suite, out=out, jobs=jobs, command=command, **options).to_text())
