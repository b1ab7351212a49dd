"""The commands `serve` and `doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from soka_serve.io.console import FILE, SOURCE, PassThroughCommand, say

if TYPE_CHECKING:
    from soka_serve.adapter.remote.address import Address


def _builds(given: str | None) -> Path | Address | None:
    """The value of --builds."""
    from soka_serve.serving.command import parse_builds

    return None if given is None else parse_builds(given)


@click.command(
    cls=PassThroughCommand,
    epilog="""Examples:

    \b
    soka-serve serve manifests/math.toml manifests/code.toml
    soka-serve serve sums=build/math/adapter --port 9000 -- --max-model-len 1024
    soka-serve serve build/math/merged
    soka-serve serve --builds build --base tiny
    soka-serve serve owner/math@v2 code=s3://bucket/adapters/code
    soka-serve serve --builds s3://bucket/adapters --base path/to/base
    """,
)
@click.argument("targets", nargs=-1, metavar="[NAME=]TARGET... [-- VLLM OPTIONS]")
@click.option("--host", help="Address to listen on (default: [serve] host, else 127.0.0.1).")
@click.option("--port", type=click.IntRange(1, 65535), help="TCP port (default: [serve] port, else 8000).")
@click.option(
    "--base",
    help="The base, in place of the one that the adapters name: a directory (quantised or not), a hub id, or 'tiny'.",
)
@click.option("--out", type=FILE, help="Folder of builds of the manifests (default: [output] dir).")
@click.option(
    "--builds",
    type=SOURCE,
    callback=lambda ctx, param, value: _builds(value),
    help="Also serve every adapter in this folder by its name, at the first request: a folder, its URL (s3://, gs://, "
    "https://), or hf://OWNER for a hub's.",
)
@click.option(
    "--runtime-loading/--no-runtime-loading",
    default=None,
    help="Let clients load and unload adapters over HTTP (default: as VLLM_ALLOW_RUNTIME_LORA_UPDATING says, so off). "
    "SOKA_ADAPTER_ROOTS limits the folders.",
)
@click.option("--verbose", is_flag=True, help="Show vLLM's log instead of writing it to a file.")
@click.option("--timeout", default=1800.0, show_default=True, help="Seconds that vLLM may take to start.")
@click.option("--dry-run", is_flag=True, help="Check everything and print vLLM's command instead of running it.")
def serve(
    targets: tuple[str, ...],
    base: str | None,
    out: Path | None,
    dry_run: bool,
    vllm_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve adapters on their base, or one merged model, through vLLM's OpenAI-compatible API.

    A TARGET is a manifest whose build is up to date, an adapter or build directory, the hub id (owner/name@revision)
    or URL (s3://, gs://, https://) of an adapter, or a merged model. Each is the model NAME in the API. What follows --
    goes to `vllm serve`, and wins over what is worked out here; options that would make untrue what was checked are
    refused.
    """
    from soka_serve.serving.command import ServeOptions
    from soka_serve.serving.serve import plan_launch
    from soka_serve.serving.serve import serve as run

    running = {"verbose": options.pop("verbose"), "timeout_s": options.pop("timeout")}
    settings = ServeOptions(vllm=vllm_options, **options)
    planned, launch = plan_launch(targets, settings, base=base, out=out)
    if dry_run:
        say(launch.to_text())
        return
    raise click.exceptions.Exit(run(planned, launch, say=say, **running))


@click.command(epilog="Example:  soka-serve doctor.  Exit code 0 when everything is there, else 2.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--quick", is_flag=True, help="Import nothing: only package metadata and the environment.")
def doctor(as_json: bool, quick: bool) -> None:
    """Check what serving needs: Python, torch, vLLM and its version, the plugin, PEFT, GPU or CPU."""
    from soka_serve.serving.doctor import all_checks, quick_checks

    found = []
    for check in quick_checks() if quick else all_checks():
        found.append(check)
        if not as_json:
            say(check.to_text())
    problems = sum(check.state == "problem" for check in found)
    if as_json:
        click.echo(json.dumps({"ok": not problems, "checks": [asdict(check) for check in found]}, indent=2))
    elif not problems:
        click.echo("everything that was checked is there")
    raise click.exceptions.Exit(2 if problems else 0)
