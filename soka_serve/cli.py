"""The command line: the group of all commands, and what becomes of their exceptions and logs.

The commands are in the rooms whose functions they call, in files of this name. Each reads its arguments, calls one
function and prints what it returned. None imports anything heavy before it runs: `--help` and `schema` answer at once.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import click

from soka_serve.adapter.cli import combine, inspect
from soka_serve.comparison.cli import compare, schema
from soka_serve.compiler.cli import build, export, extract, merge, plan
from soka_serve.errors import SokaError, printable_lines
from soka_serve.evaluation.cli import evaluate
from soka_serve.io.warn_once import one_command
from soka_serve.manifest.cli import init
from soka_serve.serving.cli import doctor, serve


class _Group(click.Group):
    """The group whose commands' exceptions become messages and exit codes: 2 for what the user can mend, 1 for bugs."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params.get("debug"):
                raise
            ctx.exit(_tell(error))


def _tell(error: BaseException) -> int:
    """Print what an exception means to the user; the exit code."""
    from soka_serve.io.files import explain_disk_error

    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        error = SokaError("interrupted", hint="Nothing is half-written; run the same command again to go on.")
    known = error if isinstance(error, SokaError) else explain_disk_error(error)
    if known is None:
        click.echo(
            f"internal error: {type(error).__name__}: {printable_lines(str(error))}\n"
            "This is a bug in soka-serve: please report it with the output of the same command after "
            "`soka-serve --debug`.",
            err=True,
        )
        return 1
    click.echo(click.style("error: ", fg="red", bold=True) + printable_lines(known.message), err=True)
    if known.hint:
        click.echo(click.style("hint: ", fg="cyan", bold=True) + printable_lines(known.hint), err=True)
    return known.exit_code


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
        # These libraries warn of their own state, such as a kernel package that is not installed; --debug shows it.
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


for _command in (
    *(build, combine, compare, doctor, evaluate, export, extract, init, inspect, merge, plan, schema, serve),
):
    main.add_command(_command)
