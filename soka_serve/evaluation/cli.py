"""The command `eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from soka_serve.io.console import FILE, PassThroughCommand, say


@click.command(
    name="eval",
    cls=PassThroughCommand,
    epilog="""Examples:

    \b
    soka-serve eval manifests/math.toml --limit 100
    soka-serve eval manifests/math.toml --backend transformers --fail-under 0.9
    soka-serve eval mine.toml --tasks soka_gsm8k --tasks soka_math_500 -- --tensor-parallel-size 2
    soka-serve eval mine.toml --server http://127.0.0.1:8000
    soka-serve eval one.toml two.toml three.toml --limit 200

    Exit code 3 when a --fail-under is not reached; of several manifests 2 when one of them failed.
    """,
)
@click.argument("manifests", type=FILE, nargs=-1, required=True, metavar="MANIFEST...")
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
@click.option("--out", type=FILE, help="Folder of builds (default: [output] dir).")
@click.option(
    "--results", type=FILE, help="Folder for the results (default: OUT/NAME-eval, of several manifests OUT/eval)."
)
def evaluate(manifests: tuple[Path, ...], fail_under: tuple[str, ...], results: Path | None, **options: Any) -> None:
    """Measure the build of each MANIFEST and its base with lm-eval.

    Several builds share a server, or a loaded base, and its answers; one that fails is named, and the others go on.
    Resumable: run it again after an interruption, and answers that have come are not asked for again.
    """
    from soka_serve.evaluation.results import Threshold
    from soka_serve.evaluation.run import EvalSettings
    from soka_serve.evaluation.run import evaluate as run

    least = tuple(Threshold.parse(text) for text in fail_under)
    if len(manifests) == 1:
        found = run(manifests[0], fail_under=least, results=results, **options)
        say(found.to_text())
        raise click.exceptions.Exit(3 if found.missed else 0)
    from soka_serve.evaluation.many import evaluate_many

    all_of_them = evaluate_many(manifests, EvalSettings(fail_under=least, **options), results=results)
    say(all_of_them.to_text())
    raise click.exceptions.Exit(2 if all_of_them.failed else 3 if all_of_them.missed else 0)
