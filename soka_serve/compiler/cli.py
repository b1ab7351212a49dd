"""The commands `plan`, `build`, `merge`, `extract` and `export`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from soka_serve.io.console import FILE, SOURCE, say

if TYPE_CHECKING:
    from soka_serve.compiler.build import BuildResult


_BASE = click.option(
    "--base", required=True, help="The base, not quantised: a directory, a hub id, or 'tiny' (the embedded model)."
)


@click.command(epilog="Example:  soka-serve plan manifests/math.toml")
@click.argument("manifest", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--all", "every", is_flag=True, help="A line per module instead of one per kind.")
@click.option("--out", type=FILE, help="Folder of builds (default: [output] dir).")
@click.option("--policies", type=click.IntRange(min=1), help="Also list rank policies near this many parameters.")
def plan(manifest: Path, as_json: bool, every: bool, out: Path | None, policies: int | None) -> None:
    """Show what a build would do: modules, ranks, parameters, memory, examples. Loads no weights."""
    from soka_serve.compiler.plan.text import render_plan
    from soka_serve.compiler.status import plan as run

    made = run(manifest, out=out, policies=policies)
    click.echo(json.dumps(made.to_json(), indent=2) if as_json else render_plan(made, every=every))


@click.command(
    epilog="Example:  soka-serve build manifests/math.toml.  On several devices:  "
    "accelerate launch -m soka_serve build manifests/math.toml"
)
@click.argument("manifest", type=FILE)
@click.option("--out", type=FILE, help="Folder of builds (default: [output] dir).")
@click.option("--force", is_flag=True, help="Run every stage again, whatever is cached.")
@click.option("--json", "as_json", is_flag=True, help="Print the result for machines.")
def build(manifest: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Compile MANIFEST: initialise, fine-tune, export, merge, check, report."""
    from soka_serve.compiler.build import build as run

    result = run(manifest, out=out, force=force)
    if not result.is_main_process:
        return
    say(json.dumps(asdict(result), indent=2, default=str) if as_json else _build_text(result))


def _build_text(result: BuildResult) -> str:
    lines = [""]
    if result.accuracy_before and result.accuracy_after:
        (c0, n0), (c1, n1) = result.accuracy_before, result.accuracy_after
        lines.append(f"accuracy    {c0 / n0:.1%} -> {c1 / n1:.1%} on {n1} held-out {result.question_family!r} problems")
    others = ", ".join(f"{name} {count:,}" for name, count in result.comparison.items())
    lines.append(f"parameters  {result.trainable_parameters:,} trained (same modules: {others})")
    for what, path in (("adapter", result.adapter), ("merged", result.merged), ("report", result.report)):
        if path is not None:
            lines.append(f"{what:<11} {path}")
    if result.ran:
        spent = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.timings_s.items())
        lines.append(f"seconds     {spent}")
    return "\n".join(lines)


@click.command(epilog="Example:  soka-serve merge build/math/adapter --base path/to/base --out merged")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@_BASE
@click.option("--revision", help="Revision of a hub base.")
@click.option("--out", type=FILE, required=True, help="Directory of the merged model; an earlier one is replaced.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Reload and compare with base + adapter.")
@click.option("--allow-other-base", is_flag=True, help="Merge into a base that the adapter was not trained on.")
def merge(adapters: tuple[str, ...], **options: Any) -> None:
    """Add adapters to a base model's weights; write a dense model that any engine loads.

    An ADAPTER is a folder, a hub id (owner/name@revision), or the URL of a folder (s3://, gs://, https://).
    """
    from soka_serve.adapter.weighted import parse_weighted
    from soka_serve.compiler.merge.merge import merge as run

    say(run([parse_weighted(a) for a in adapters], **options).to_text())


@click.command(epilog="Example:  soka-serve extract tuned/ --base base/ --rank 4 --out adapter")
@click.argument("finetuned")
@_BASE
@click.option("--out", type=FILE, required=True, help="Directory of the adapter; an earlier extraction is replaced.")
@click.option("--rank", type=click.IntRange(min=1), help="Terms per module.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of each delta's energy to keep.")
@click.option("--parameters", type=click.IntRange(min=1), help="Total of parameters, spread over the modules.")
@click.option("--max-rank", type=click.IntRange(min=1), default=64, show_default=True, help="Most terms per module.")
@click.option("--modules", multiple=True, help="Projection or pattern; may be given several times (default: all 7).")
@click.option("--shape", default="balanced", show_default=True, help="'balanced', 'auto', or m,n,p,q.")
def extract(finetuned: str, **options: Any) -> None:
    """Extract a Kronecker adapter from a fully fine-tuned checkpoint."""
    from soka_serve.compiler.extract import extract as run

    say(run(finetuned, **options).to_text())


@click.command(epilog="Example:  soka-serve export build/math/adapter --to lora --rank 8 --out lora")
@click.argument("source", type=SOURCE)
@click.option("--to", type=click.Choice(["soka", "lora"]), default="soka", show_default=True)
@click.option("--rank", type=click.IntRange(min=1), help="Terms (soka) or LoRA rank; needed for lora.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of each delta's energy to keep, by as few terms as hold it (soka).",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--out", type=FILE, required=True, help="Directory of the export; an earlier one is replaced.")
def export(source: str, out: Path, **options: Any) -> None:
    """Write an adapter or a training checkpoint in another form, and say what is lost.

    SOURCE is a folder, a hub id (owner/name@revision), or the URL of a folder (s3://, gs://, https://).
    """
    from soka_serve.adapter.export import export as run

    say(run(source, out, **options).to_text())
