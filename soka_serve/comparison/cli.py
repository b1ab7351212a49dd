"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from soka_serve.io.console import FILE, say


@click.command(epilog="Example:  soka-serve compare eval/suites/quick.toml --jobs 2 --out results.json")
@click.argument("suite", type=FILE)
@click.option("--root", type=FILE, help="Folder that the suite's relative paths start from.  [default: its own]")
@click.option("--work", type=FILE, default="build/compare", show_default=True, help="Folder of the runs' records.")
@click.option("--out", type=FILE, help="JSON file of the results; Markdown and HTML lie beside it.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time, a thread each.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Start no run after so many minutes.")
@click.option("--limit-runs", type=click.IntRange(min=0), help="Start at most so many runs.")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier call.")
@click.option("--dry-run", is_flag=True, help="List the runs, what they cost, and parameters; train nothing.")
def compare(suite: Path, root: Path | None, out: Path | None, jobs: int, dry_run: bool, **options: Any) -> None:
    """Compare methods over settings and seeds, as SUITE says; go on where an earlier call stopped."""
    if dry_run:
        from soka_serve.comparison.preview import preview

        say(preview(suite, root).to_text())
        return
    from soka_serve.comparison.compare import compare as run

    given = "".join(f" --{name} {path}" for name, path in (("root", root), ("out", out)) if path)
    command = f"soka-serve compare {suite} --jobs {jobs}{given}"
    say(run(suite, root=root, out=out, jobs=jobs, command=command, **options).to_text())
