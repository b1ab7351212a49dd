"""The command line. A command reads its arguments, calls one function and prints what it returned.

Nothing heavy is imported before a command needs it: `--help` and `schema` answer at once.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from soka_serve.errors import SokaError, printable_lines
from soka_serve.io.warn_once import one_command

if TYPE_CHECKING:
    from soka_serve.compiler.build import BuildResult


class _PathType(click.Path):
    """A path; not an empty one, which an unset variable of a shell leaves, and which would be the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty; the current directory is '.'", param, ctx)
        return super().convert(value, param, ctx)


_FILE = _PathType(path_type=Path)


class _Group(click.Group):
    """One place where exceptions become messages and exit codes: 2 for what the user can mend, 1 for our bugs."""

    def invoke(self, ctx: click.Context) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except SokaError as error:
            if debug:
                raise
            _show(error.message, error.hint)
            ctx.exit(error.exit_code)
        except (KeyboardInterrupt, click.exceptions.Abort):
            if debug:
                raise
            _show("interrupted", "Nothing is half-written; run the same command again to go on.")
            ctx.exit(2)
        except Exception as error:
            if debug:
                raise
            from soka_serve.io.files import explain_disk_error

            known = explain_disk_error(error)
            if known is None:
                click.echo(
                    f"internal error: {type(error).__name__}: {printable_lines(str(error))}\n"
                    "This is a bug in soka-serve: please report it with the output of the same command after "
                    "`soka-serve --debug`.",
                    err=True,
                )
                ctx.exit(1)
            _show(known.message, known.hint)
            ctx.exit(known.exit_code)


def _show(message: str, hint: str | None) -> None:
    click.echo(click.style("error: ", fg="red", bold=True) + printable_lines(message), err=True)
    if hint:
        click.echo(click.style("hint: ", fg="cyan", bold=True) + printable_lines(hint), err=True)


def _say(text: str) -> None:
    """Print a result: names and texts in it may come from anyone's files, and a terminal obeys what it is shown."""
    click.echo(printable_lines(text))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable_lines(record.getMessage())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _set_up_logging(*, quiet: bool, debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("soka_serve")
    logger.handlers[:] = [handler]
    # Under `accelerate launch` only the first process tells what goes on.
    quiet = quiet or os.environ.get("RANK", "0") != "0"
    logger.setLevel(logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    if not debug:
        # Their warnings are about their own insides (a kernel package that is not installed, say); --debug shows them.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:  soka-serve init mine.toml  &&  soka-serve plan mine.toml  &&  soka-serve build mine.toml",
)
@click.version_option(package_name="soka-serve", prog_name="soka-serve")
@click.option("--debug", is_flag=True, help="Show tracebacks and debug logs.")
@click.option("--quiet", is_flag=True, help="Only warnings, errors and results.")
@click.pass_context
def main(ctx: click.Context, debug: bool, quiet: bool) -> None:
    """Kronecker-SVD adapters for LLMs, from a TOML manifest to a production endpoint."""
    ctx.with_resource(one_command())
    _set_up_logging(quiet=quiet, debug=debug)


@main.command(epilog="Example:  soka-serve init math  writes math.toml")
@click.argument("name")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def init(name: str, force: bool) -> None:
    """Write a commented starter manifest to NAME.toml."""
    from soka_serve.io.files import write_text_atomic
    from soka_serve.manifest.read import starter_manifest

    path = Path(name if name.endswith(".toml") else f"{name}.toml")
    if path.exists() and not force:
        raise SokaError(f"{path} is there already", hint="Choose another name, or give --force to overwrite it.")
    write_text_atomic(path, starter_manifest(path.stem))
    click.echo(f"wrote {path}; next: soka-serve plan {path}")


@main.command(epilog="Example:  soka-serve schema > soka.schema.json")
def schema() -> None:
    """Print the manifest's JSON Schema, for editors."""
    from soka_serve.manifest.read import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command(epilog="Example:  soka-serve plan manifests/math.toml")
@click.argument("manifest", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--all", "every", is_flag=True, help="A line per module instead of one per kind.")
@click.option("--out", type=_FILE, help="Folder of builds (default: [output] dir).")
@click.option("--policies", type=click.IntRange(min=1), help="Also list rank policies near this many parameters.")
def plan(manifest: Path, as_json: bool, every: bool, out: Path | None, policies: int | None) -> None:
    """Show what a build would do: modules, ranks, parameters, memory, examples. Loads no weights."""
    from soka_serve.compiler.api import plan as make
    from soka_serve.compiler.plan.text import render_plan

    made = make(manifest, out=out, policies=policies)
    click.echo(json.dumps(made.to_json(), indent=2) if as_json else render_plan(made, every=every))


@main.command(
    epilog="Example:  soka-serve build manifests/math.toml.  On several devices:  "
    "accelerate launch -m soka_serve build manifests/math.toml"
)
@click.argument("manifest", type=_FILE)
@click.option("--out", type=_FILE, help="Folder of builds (default: [output] dir).")
@click.option("--force", is_flag=True, help="Run every stage again, whatever is cached.")
@click.option("--json", "as_json", is_flag=True, help="Print the result for machines.")
def build(manifest: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Compile MANIFEST: initialise, fine-tune, export, merge, check, report."""
    from soka_serve.compiler.build import build as run

    result = run(manifest, out=out, force=force)
    if not result.is_main_process:
        return
    _say(json.dumps(_build_json(result), indent=2) if as_json else _build_text(result))


def _build_json(result: BuildResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(result).items()}


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


@main.command(epilog="Example:  soka-serve merge build/math/adapter --base path/to/base --out merged")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option(
    "--base", required=True, help="The base, not quantised: a directory, a hub id, or 'tiny' (the embedded model)."
)
@click.option("--revision", help="Revision of a hub base.")
@click.option("--out", type=_FILE, required=True, help="Directory of the merged model; an earlier one is replaced.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Reload and compare with base + adapter.")
@click.option("--allow-other-base", is_flag=True, help="Merge into a base that the adapter was not trained on.")
def merge(
    adapters: tuple[str, ...],
    base: str,
    revision: str | None,
    out: Path,
    dtype: str,
    verify: bool,
    allow_other_base: bool,
) -> None:
    """Add adapters to a base model's weights; write a dense model that any engine loads."""
    from soka_serve.compiler.api import merge as run
    from soka_serve.compiler.api import parse_weighted

    result = run(
        [parse_weighted(a) for a in adapters],
        base=base,
        revision=revision,
        out=out,
        dtype=dtype,
        verify=verify,
        allow_other_base=allow_other_base,
    )
    _say(result.to_text())


@main.command(epilog="Example:  soka-serve extract tuned/ --base base/ --rank 4 --out adapter")
@click.argument("finetuned")
@click.option(
    "--base", required=True, help="The base, not quantised: a directory, a hub id, or 'tiny' (the embedded model)."
)
@click.option("--out", type=_FILE, required=True, help="Directory of the adapter; an earlier extraction is replaced.")
@click.option("--rank", type=click.IntRange(min=1), help="Terms per module.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of each delta's energy to keep.")
@click.option("--parameters", type=click.IntRange(min=1), help="Total of parameters, spread over the modules.")
@click.option("--max-rank", type=click.IntRange(min=1), default=64, show_default=True, help="Most terms per module.")
@click.option("--modules", multiple=True, help="Projection or pattern; may be given several times (default: all 7).")
@click.option("--shape", default="balanced", show_default=True, help="'balanced', 'auto', or m,n,p,q.")
def extract(
    finetuned: str,
    base: str,
    out: Path,
    rank: int | None,
    energy: float | None,
    parameters: int | None,
    max_rank: int,
    modules: tuple[str, ...],
    shape: str,
) -> None:
    """Extract a Kronecker adapter from a fully fine-tuned checkpoint."""
    from soka_serve.compiler.extract import extract as run

    result = run(
        finetuned,
        base=base,
        out=out,
        rank=rank,
        energy=energy,
        parameters=parameters,
        max_rank=max_rank,
        modules=modules,
        shape=shape,
    )
    _say(result.to_text())


@main.command(epilog="Example:  soka-serve export build/math/adapter --to lora --rank 8 --out lora")
@click.argument("source", type=_FILE)
@click.option("--to", type=click.Choice(["soka", "lora"]), default="soka", show_default=True)
@click.option("--rank", type=click.IntRange(min=1), help="Terms (soka) or LoRA rank; needed for lora.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--out", type=_FILE, required=True, help="Directory of the export; an earlier one is replaced.")
def export(source: Path, to: str, rank: int | None, dtype: str, out: Path) -> None:
    """Write an adapter or a training checkpoint in another form, and say what is lost."""
    from soka_serve.compiler.api import export as run

    _say(run(source, out, to=to, rank=rank, dtype=dtype).to_text())


@main.command(epilog="Example:  soka-serve inspect build/math")
@click.argument("path", type=_FILE)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what an adapter, a build or a checkpoint holds: shapes, ranks, sigma, norms, provenance."""
    from soka_serve.adapter.inspect import inspect as run

    found = run(path)
    _say(json.dumps(found.to_json(), indent=2) if as_json else found.to_text())


@main.command(epilog="Example:  soka-serve compare eval/suites/quick.toml --jobs 2 --out results.json")
@click.argument("suite", type=_FILE)
@click.option("--work", type=_FILE, default="build/compare", show_default=True, help="Folder of the runs' records.")
@click.option("--out", type=_FILE, help="JSON file of the results; Markdown and HTML lie beside it.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time, a thread each.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Start no run after so many minutes.")
@click.option("--limit-runs", type=click.IntRange(min=0), help="Start at most so many runs.")
@click.option("--retry-failed", is_flag=True, help="Run again what failed in an earlier call.")
@click.option("--dry-run", is_flag=True, help="List the runs and estimate parameters; train nothing.")
def compare(
    suite: Path,
    work: Path,
    out: Path | None,
    jobs: int,
    minutes: float | None,
    limit_runs: int | None,
    retry_failed: bool,
    dry_run: bool,
) -> None:
    """Compare methods over learning rates and seeds, as SUITE says; go on where an earlier call stopped."""
    if dry_run:
        from soka_serve.comparison.preview import preview

        _say(preview(suite).to_text())
        return
    from soka_serve.comparison.compare import compare as run

    command = f"soka-serve compare {suite} --jobs {jobs}" + (f" --out {out}" if out else "")
    result = run(
        suite,
        work=work,
        out=out,
        jobs=jobs,
        minutes=minutes,
        limit_runs=limit_runs,
        retry_failed=retry_failed,
        command=command,
    )
    _say(result.to_text())


@main.command(epilog="Example:  soka-serve doctor.  Exit code 0 when everything is there, else 2.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.option("--quick", is_flag=True, help="Import nothing: only package metadata and the environment.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, quick: bool) -> None:
    """Check what serving needs: Python, torch, vLLM and its version, the plugin, PEFT, GPU or CPU."""
    from dataclasses import asdict

    from soka_serve.serving.doctor import all_checks, quick_checks

    found = []
    for check in quick_checks() if quick else all_checks():
        found.append(check)
        if not as_json:
            _say(check.to_text())
    problems = sum(check.state == "problem" for check in found)
    if as_json:
        click.echo(json.dumps({"ok": not problems, "checks": [asdict(check) for check in found]}, indent=2))
    elif not problems:
        click.echo("everything that was checked is there")
    ctx.exit(2 if problems else 0)


class _PassingOn(click.Command):
    """A command whose arguments after `--` are another program's: they go to `ctx.meta` as they are."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta["soka_serve.passed_on"] = tuple(args[cut + 1 :])
        return super().parse_args(ctx, args[:cut])


@main.command(
    cls=_PassingOn,
    epilog="""Examples:

    \b
    soka-serve serve manifests/math.toml manifests/code.toml
    soka-serve serve sums=build/math/adapter --port 9000 -- --max-model-len 2048
    soka-serve serve build/math/merged
    soka-serve serve --builds build --base tiny
    """,
)
@click.argument("targets", nargs=-1, metavar="[NAME=]TARGET... [-- VLLM OPTIONS]")
@click.option("--host", help="Address to listen on (default: [serve] host, else 127.0.0.1).")
@click.option("--port", type=click.IntRange(1, 65535), help="TCP port (default: [serve] port, else 8000).")
@click.option(
    "--base",
    help="The base, in place of the one that the adapters name: a directory (quantised or not), a hub id, or 'tiny'.",
)
@click.option("--out", type=_FILE, help="Folder of builds of the manifests (default: [output] dir).")
@click.option("--builds", type=_FILE, help="Also serve every adapter in this folder by its name, at the first request.")
@click.option(
    "--runtime-loading/--no-runtime-loading",
    default=None,
    help="Let clients load and unload adapters over HTTP (default: as VLLM_ALLOW_RUNTIME_LORA_UPDATING says, so off). "
    "SOKA_ADAPTER_ROOTS limits the folders.",
)
@click.option("--verbose", is_flag=True, help="Show vLLM's log instead of writing it to a file.")
@click.option("--timeout", default=1800.0, show_default=True, help="Seconds that vLLM may take to start.")
@click.option("--dry-run", is_flag=True, help="Check everything and print vLLM's command instead of running it.")
@click.pass_context
def serve(
    ctx: click.Context,
    targets: tuple[str, ...],
    host: str | None,
    port: int | None,
    base: str | None,
    out: Path | None,
    builds: Path | None,
    runtime_loading: bool | None,
    verbose: bool,
    timeout: float,
    dry_run: bool,
) -> None:
    """Serve adapters on their base, or one merged model, through vLLM's OpenAI-compatible API.

    A TARGET is a manifest whose build is up to date, an adapter or build directory, or a merged model. Each is the
    model NAME in the API. What follows -- goes to `vllm serve`, and wins over what is worked out here; options that
    would make untrue what was checked are refused.
    """
    from soka_serve.serving.command import Settings
    from soka_serve.serving.serve import plan_launch
    from soka_serve.serving.serve import serve as run

    passed_on = ctx.meta["soka_serve.passed_on"]
    settings = Settings(host=host, port=port, runtime_loading=runtime_loading, builds=builds, vllm=passed_on)
    planned, launch = plan_launch(targets, settings, base=base, out=out)
    if dry_run:
        _say(launch.to_text())
        return
    ctx.exit(run(planned, launch, verbose=verbose, timeout_s=timeout, say=_say))


@main.command(
    name="eval",
    cls=_PassingOn,
    epilog="""Examples:

    \b
    soka-serve eval manifests/math.toml --limit 100
    soka-serve eval manifests/math.toml --backend transformers --fail-under 0.9
    soka-serve eval mine.toml --tasks soka_gsm8k --tasks soka_math_500 -- --tensor-parallel-size 2
    soka-serve eval mine.toml --server http://127.0.0.1:8000

    Exit code 3 when a --fail-under is not reached.
    """,
)
@click.argument("manifest", type=_FILE)
@click.option(
    "--tasks", multiple=True, help="lm-eval task or group; may be given several times (default: [eval] tasks)."
)
@click.option("--limit", type=click.IntRange(min=1), help="Problems per task (default: all).")
@click.option(
    "--backend",
    type=click.Choice(["vllm", "transformers"]),
    default="vllm",
    show_default=True,
    help="A vLLM server, or transformers in this process.",
)
@click.option("--server", help="Address of a running server of this build, instead of starting one.")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    help="Requests at once (vllm; default 64), or sequences per batch (transformers; default 16).",
)
@click.option(
    "--fail-under",
    multiple=True,
    metavar="[TASK=]VALUE",
    help="Least value of the build's first metric, of one task or of each; may be given several times.",
)
@click.option(
    "--allow-code-execution",
    is_flag=True,
    envvar="SOKA_ALLOW_CODE_EXECUTION",
    help="Run code that the models write, in a sandbox; code tasks need it.",
)
@click.option("--out", type=_FILE, help="Folder of builds (default: [output] dir).")
@click.option("--results", type=_FILE, help="Folder for the results (default: OUT/NAME-eval).")
@click.pass_context
def evaluate(
    ctx: click.Context,
    manifest: Path,
    tasks: tuple[str, ...],
    limit: int | None,
    backend: Literal["vllm", "transformers"],
    server: str | None,
    parallel: int | None,
    fail_under: tuple[str, ...],
    allow_code_execution: bool,
    out: Path | None,
    results: Path | None,
) -> None:
    """Measure the build of MANIFEST and its base with lm-eval.

    Resumable: run it again after an interruption, and answers that have come are not asked for again.
    """
    from soka_serve.evaluation.results import Threshold
    from soka_serve.evaluation.run import evaluate as run

    found = run(
        manifest,
        tasks=tasks,
        backend=backend,
        server=server,
        limit=limit,
        parallel=parallel,
        out=out,
        results=results,
        fail_under=[Threshold.parse(text) for text in fail_under],
        allow_code_execution=allow_code_execution,
        vllm_options=ctx.meta["soka_serve.passed_on"],
    )
    _say(found.to_text())
    ctx.exit(3 if found.missed else 0)
