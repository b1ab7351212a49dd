"""`soka-serve build`: manifest -> plan -> init -> tune -> export -> merge -> check -> measure -> report.

Each stage is a function elsewhere; this module decides which ones run, and puts the artefact in place as a whole. A
build that is interrupted goes on where it stopped; one with nothing changed does nothing.
"""

from __future__ import annotations

import logging
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from soka_serve.compiler.check import QuickCheck, choose_questions
from soka_serve.compiler.context import BUILD, Context, check_output, is_whole, prepare, previous_keys, tell_left_out
from soka_serve.compiler.plan.decay import check_decay
from soka_serve.compiler.processes import Processes
from soka_serve.compiler.quiz import make_quiz
from soka_serve.compiler.train.installed import check_installed
from soka_serve.io.file_names import LOCK_FILE
from soka_serve.io.files import replace_directory
from soka_serve.io.lockfile import read_lock
from soka_serve.io.places import given_path
from soka_serve.io.warn_once import one_command
from soka_serve.io.workspace import Workspace
from soka_serve.manifest.read import LoadedManifest, read_manifest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildResult:
    """What a build made.

    `ran` lists the stages that ran, in order; it is empty when nothing had changed. Paths are None for artefacts that
    the manifest does not ask for. `accuracy_before` and `accuracy_after` are (correct, total) on held-out problems,
    None where the data has no marker. `timings_s` has the seconds of each stage that ran. `is_main_process` is False
    in the processes of an `accelerate launch` that only helped.
    """

    name: str
    directory: Path
    adapter: Path | None
    merged: Path | None
    report: Path | None
    ran: tuple[str, ...]
    trainable_parameters: int
    comparison: dict[str, int]
    accuracy_before: tuple[int, int] | None
    accuracy_after: tuple[int, int] | None
    question_family: str | None
    timings_s: dict[str, float] = field(default_factory=dict)
    is_main_process: bool = True


@one_command()
def build(
    manifest: Path | str | LoadedManifest, *, out: Path | str | None = None, force: bool = False, progress: bool = True
) -> BuildResult:
    """Compile a manifest into an adapter and, when asked, a merged model.

    Args:
        manifest: path of the TOML file, or what `read_manifest` returned.
        out: folder of builds; default: `[output] dir`.
        force: run every stage, whatever is cached.
        progress: show progress bars (plain lines when the output is not a terminal).

    Returns:
        Where everything is and what it measured.

    Raises:
        SokaError: anything that the user can mend; the artefact of an earlier build is left as it was.

    Runs in every process of an `accelerate launch`; only the main one writes the artefact.
    """
    given = None if out is None else given_path(out, "out")
    processes = Processes()
    with ExitStack() as stack:

        def begin() -> Context:
            loaded = manifest if isinstance(manifest, LoadedManifest) else read_manifest(Path(manifest))
            workspace = Workspace(given or Path(loaded.manifest.output.dir), str(loaded.manifest.name))
            if processes.is_main:
                stack.enter_context(workspace.locked())
            return prepare(loaded, workspace, processes=processes, progress=progress)

        context = processes.together(begin)
        loaded, workspace = context.loaded, context.workspace
        processes.check_shared(workspace.cache)
        processes.check_same("other files or packages", repr(sorted(context.keys.items())))
        _check_dtypes(context)
        if force and processes.is_main:
            shutil.rmtree(workspace.cache / f"init-{context.keys.get('init')}", ignore_errors=True)
            shutil.rmtree(workspace.cache / f"tune-{context.keys['tune']}", ignore_errors=True)
        processes.wait()
        previous = {} if force or not is_whole(workspace.directory) else previous_keys(workspace.directory)
        processes.wait()  # everyone has looked, before anyone writes
        if previous == context.keys:
            logger.info("%s is up to date: nothing to do", workspace.directory)
            return _result(context)
        check_output(context)
        check_installed(loaded.manifest.train)
        check_decay(loaded.manifest, context.targets, loaded.name_key)
        if processes.is_main:
            tell_left_out(context)
            # Some seconds in which nothing else would be said.
            logger.info("%s: loading torch, transformers and PEFT", workspace.directory)
        from soka_serve.base.model import quiet_bars

        with quiet_bars():
            return _run(context, previous)


def _check_dtypes(context: Context) -> None:
    """Check that "auto" is the same dtype in every process: it depends on the device.

    Raises:
        BuildError: it is not, in every process.
    """
    if context.processes.count > 1:
        from soka_serve.compiler.train.precision import dtypes_here

        here = dtypes_here(context.loaded.manifest, context.base.layout.size.dtype)
        hint = "Machines hold and compute in other dtypes (AMX, GPUs): set base.dtype and train.precision."
        context.processes.check_same('"auto" is another dtype', here, hint)


def _run(context: Context, previous: dict[str, str]) -> BuildResult:
    from soka_serve.compiler.stages import (
        check_stage,
        encode,
        export_stage,
        init_stage,
        measure_stage,
        merge_stage,
        tune_stage,
    )

    manifest = context.loaded.manifest
    main = context.processes.is_main
    encoded = encode(context)
    quiz = make_quiz(manifest, context.loaded.directory, context.base.tokenizer)  # before hours of work: it may refuse
    questions = choose_questions(manifest, context.loaded.directory, context.base.tokenizer)  # likewise
    start = init_stage(context, encoded[0]) if context.method.kronecker else None
    trained = tune_stage(context, encoded, start, quiz)
    if main:
        with replace_directory(context.workspace.directory, foreign=BUILD.foreign) as new:
            export_stage(context, new, previous, trained)
            merge_stage(context, new, previous, trained)
            check = check_stage(context, new, previous, questions)
            measured = measure_stage(context, new, previous, encoded[0])
            if "adapter" not in manifest.output.write and (new / "adapter").exists():
                shutil.rmtree(new / "adapter")  # it was needed for the merge, and is not asked for
            with context.stage("report", "writing the report and the model card"):
                from soka_serve.compiler.papers import StageResults, write_papers

                context.hashes.check_unchanged()  # soka.lock names what was read
                write_papers(context, new, StageResults(encoded[0], start, trained, check, measured))
        context.workspace.forget_others({k: v for k, v in context.keys.items() if k in ("init", "tune")})
    context.processes.wait()
    return _result(context)


def _result(context: Context) -> BuildResult:
    """Read the result back from the artefact, so that a fresh build and one with nothing to do say the same."""
    directory = context.workspace.directory
    lock = read_lock(directory / LOCK_FILE)
    check = QuickCheck.read(directory / "check.json") if (directory / "check.json").exists() else None

    def there(name: str) -> Path | None:
        return directory / name if (directory / name).exists() else None

    return BuildResult(
        name=str(context.loaded.manifest.name),
        directory=directory,
        adapter=there("adapter"),
        merged=there("merged"),
        report=there("report.html"),
        ran=tuple(context.ran),
        trainable_parameters=int(lock["result"]["trainable_parameters"]),
        comparison={k: int(v) for k, v in lock["comparison"].items()},
        accuracy_before=check.before.accuracy if check else None,
        accuracy_after=check.after.accuracy if check else None,
        question_family=judged.builtin if (judged := context.loaded.manifest.train.judged) else None,
        timings_s={stage: context.timings_s[stage] for stage in context.ran},
        is_main_process=context.processes.is_main,
    )
