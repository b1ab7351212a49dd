"""`soka-serve eval`: run the same lm-eval tasks on a build and on its base. Resumable, see `parts`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from soka_serve.base.foreign_code import check_no_code
from soka_serve.errors import EvalError
from soka_serve.evaluation.backends import TransformersBackend, VllmBackend
from soka_serve.evaluation.harness import check_installed, quiet_harness, task_environment
from soka_serve.evaluation.parts import SEED, run_parts
from soka_serve.evaluation.record import document, make_record
from soka_serve.evaluation.results import EvalResult, Threshold, check_thresholds, collect, missed, table
from soka_serve.evaluation.subject import Backend, Evaluation, Subject
from soka_serve.evaluation.tasks import default_tasks, needs_code_execution
from soka_serve.io.files import write_text_atomic
from soka_serve.io.outputs import check_results
from soka_serve.io.places import given_path
from soka_serve.io.warn_once import one_command
from soka_serve.manifest.read import LoadedManifest, read_manifest
from soka_serve.serving.targets import read_targets


@one_command()
def evaluate(
    manifest: str | Path,
    *,
    tasks: Sequence[str] = (),
    backend: Literal["vllm", "transformers"] = "vllm",
    server: str | None = None,
    limit: int | None = None,
    parallel: int | None = None,
    out: str | Path | None = None,
    results: str | Path | None = None,
    fail_under: Sequence[Threshold] = (),
    allow_code_execution: bool = False,
    vllm_options: Sequence[str] = (),
) -> EvalResult:
    """Measure a build and its base on lm-eval tasks. Its many arguments are the options of `soka-serve eval`.

    Args:
        manifest: path of the TOML file whose build is measured.
        tasks: names of lm-eval tasks or groups, ours or the harness's own; default: `[eval] tasks`, else the task of
            the built-in data family.
        backend: where the models run.
        server: URL of a running vLLM server that serves the build's adapter; default: one is started, and ended.
        limit: problems per task; None is all of them.
        parallel: requests at once (vllm, default 64), or sequences per batch (transformers, default 16).
        out: folder of builds; default: `[output] dir`.
        results: folder for the results; default: OUT/NAME-eval.
        fail_under: thresholds of the build's scores; those missed are in the result.
        allow_code_execution: consent to running code that the models write, in a sandbox.
        vllm_options: for a vLLM that is started.

    Returns:
        Scores of base and build, also written as JSON and as a table.

    Raises:
        SokaError: anything that the user can mend: not built, no such task, no consent, an adapter without effect.
    """
    given = (tuple(tasks), backend, server, limit, parallel, out, tuple(fail_under), allow_code_execution)
    settings = EvalSettings(*given, tuple(vllm_options))
    return measure(prepare(read_manifest(Path(manifest)), settings, results), settings)


@dataclass(frozen=True)
class EvalSettings:
    """The options of `evaluate`, which says what they mean; they hold for every manifest."""

    tasks: tuple[str, ...] = ()
    backend: Literal["vllm", "transformers"] = "vllm"
    server: str | None = None
    limit: int | None = None
    parallel: int | None = None
    out: str | Path | None = None
    fail_under: tuple[Threshold, ...] = ()
    allow_code_execution: bool = False
    vllm_options: tuple[str, ...] = ()


def prepare(
    loaded: LoadedManifest, settings: EvalSettings, results: str | Path | None, parts: Path | None = None
) -> Evaluation:
    """Check all of an evaluation that can be checked before a model runs.

    Args:
        loaded: the manifest whose build is measured.
        settings: the options.
        results: folder for the results; None is OUT/NAME-eval.
        parts: see `Evaluation`.

    Raises:
        SokaError: anything that the user can mend.
    """
    check_installed()
    if settings.server is not None and (settings.backend != "vllm" or settings.vllm_options):
        raise EvalError("a running server was given: --backend transformers and options for vLLM have no place there")
    if settings.limit is not None and settings.limit < 1:
        raise EvalError(f"limit {settings.limit}: expected a number of problems from 1")
    chosen = _chosen(loaded, settings.tasks, settings.allow_code_execution)
    check_thresholds(settings.fail_under, chosen)
    subject = _subject(loaded, None if settings.out is None else Path(settings.out))
    root = given_path(settings.out, "out") if settings.out is not None else Path(loaded.manifest.output.dir)
    folder = given_path(results, "results") if results is not None else root / f"{loaded.manifest.name}-eval"
    models: Backend = TransformersBackend(subject, batch_size=settings.parallel or 16)
    if settings.backend == "vllm":
        models = VllmBackend(
            subject, server=settings.server, concurrency=settings.parallel or 64, options=settings.vllm_options
        )
    evaluation = Evaluation(
        loaded, subject, models, chosen, settings.limit, folder, settings.allow_code_execution, parts
    )
    json_file, table_file = evaluation.result_files
    check_results(json_file, [table_file], ("manifest", "scores", "parts"))
    return evaluation


def measure(evaluation: Evaluation, settings: EvalSettings) -> EvalResult:
    """Run an evaluation and write its results.

    Raises:
        SokaError: no such task, a server that does not answer, an adapter without effect.
    """
    with task_environment(evaluation), quiet_harness():
        parts = run_parts(evaluation)
    return _write(evaluation, parts, settings.fail_under)


def _chosen(loaded: LoadedManifest, tasks: Sequence[str], allow_code_execution: bool) -> tuple[str, ...]:
    """The tasks to run."""
    chosen = tuple(dict.fromkeys(tasks)) or default_tasks(loaded.manifest)
    if not chosen:
        raise EvalError(
            f"{loaded.path}: no task to run: [eval] tasks is empty",
            hint="Name some there, or with --tasks; `lm_eval ls tasks` lists the harness's own.",
        )
    if needs_code_execution(chosen) and not allow_code_execution:
        raise EvalError(
            f"{', '.join(t for t in chosen if needs_code_execution([t]))}: runs code that the models write",
            hint="Consent with --allow-code-execution; it runs in a sandbox, whose limits docs/evaluating.md names.",
        )
    return chosen


def _subject(loaded: LoadedManifest, out: Path | None) -> Subject:
    from soka_serve.base.folder import ModelFolder
    from soka_serve.base.modules import text_config
    from soka_serve.base.resolve import resolve_base

    target = read_targets([str(loaded.path)], out=out)[0]
    base = resolve_base(loaded.manifest.base, manifest_dir=loaded.directory, name_key=loaded.name_key)
    for folder in (base.folder, ModelFolder(target.path)):
        check_no_code(folder)
    context = text_config(base.config).get("max_position_embeddings")
    longest = loaded.manifest.serve.max_model_len
    context = longest if longest is not None else context
    if not isinstance(context, int):
        raise EvalError(
            f"{base.directory}: its config.json names no max_position_embeddings", hint="Set [serve] max_model_len."
        )
    return Subject(loaded.manifest, target, base.directory, base.tokenizer_folder.directory, context)


def _write(
    evaluation: Evaluation, parts: Mapping[tuple[str, str], Mapping[str, Any]], thresholds: Sequence[Threshold]
) -> EvalResult:
    """Write the results, and hold them against the thresholds."""
    tasks, (json_file, table_file) = evaluation.tasks, evaluation.result_files
    scores = collect(parts, tasks)
    record = make_record(evaluation, parts, scores, seed=SEED)
    write_text_atomic(json_file, json.dumps(record, indent=1) + "\n")
    write_text_atomic(table_file, document(record, table(scores, evaluation.subject.target.name)))
    name, under = str(evaluation.loaded.manifest.name), missed(scores, tasks, thresholds)
    return EvalResult(name, evaluation.backend.name, tasks, scores, record, json_file, table_file, under)
