"""`soka-serve eval`: a build and its base, asked the same lm-eval tasks.

Resumable: each (model, task) is a part that is kept when it is done, and its answers are kept as they come.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partialmethod
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from soka_serve.base.foreign_code import check_no_code
from soka_serve.base.tokenizer_class import TOKENIZER_FILES
from soka_serve.errors import EvalError, SokaError
from soka_serve.evaluation.backends import Asked, Subject, TransformersBackend, VllmBackend, wait_counted
from soka_serve.evaluation.prompts import MANIFEST_VARIABLE
from soka_serve.evaluation.record import document, make_record
from soka_serve.evaluation.results import (
    ROLES,
    EvalResult,
    Threshold,
    check_thresholds,
    collect,
    missed,
    table,
)
from soka_serve.evaluation.sources import DATA_VARIABLE
from soka_serve.evaluation.tasks import default_tasks, needs_code_execution
from soka_serve.io.files import disk_errors, sha256_text, write_text_atomic
from soka_serve.io.outputs import check_results
from soka_serve.io.own_cache import own_hashes
from soka_serve.io.places import given_path
from soka_serve.io.warn_once import one_command
from soka_serve.manifest.read import LoadedManifest, read_manifest
from soka_serve.serving.targets import read_targets

logger = logging.getLogger(__name__)

_SEED = 1234  # lm-eval's own, of few-shot examples and of sampling
# A difference of log-probabilities that rounding alone makes is below so many times what two equal requests differ by.
_NOISE_FACTOR = 10.0
_PARTS = ".parts"


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
    """Measure a build and its base on lm-eval tasks.

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
    _check_installed()
    loaded = read_manifest(Path(manifest))
    chosen = tuple(dict.fromkeys(tasks)) or default_tasks(loaded.manifest)
    if not chosen:
        raise EvalError(
            f"{loaded.path}: no task to run: [eval] tasks is empty",
            hint="Name some there, or with --tasks; `lm_eval ls tasks` lists the harness's own.",
        )
    check_thresholds(fail_under, chosen)
    if server is not None and (backend != "vllm" or vllm_options):
        raise EvalError("a running server was given: --backend transformers and options for vLLM have no place there")
    if limit is not None and limit < 1:
        raise EvalError(f"limit {limit}: expected a number of problems from 1")
    if needs_code_execution(chosen) and not allow_code_execution:
        raise EvalError(
            f"{', '.join(t for t in chosen if needs_code_execution([t]))}: runs code that the models write",
            hint="Consent with --allow-code-execution; it runs in a sandbox, whose limits docs/evaluating.md names.",
        )
    subject = _subject(loaded, None if out is None else Path(out))
    root = given_path(out, "out") if out is not None else Path(loaded.manifest.output.dir)
    folder = given_path(results, "results") if results is not None else root / f"{loaded.manifest.name}-eval"
    json_file, table_file = _result_files(folder, backend)
    check_results(json_file, [table_file], ("manifest", "scores", "parts"))
    runner: VllmBackend | TransformersBackend
    if backend == "vllm":
        options = tuple(vllm_options)
        runner = VllmBackend(subject, server=server, concurrency=parallel or 64, options=options)
    else:
        runner = TransformersBackend(subject, batch_size=parallel or 16)
    weights = _weights(subject)
    with _environment(loaded, allow_code_execution), _quiet_harness():
        parts = _run(loaded, subject, runner, chosen, limit, folder, weights, allow_code_execution)
    return _finish(loaded, subject, runner, chosen, limit, folder, weights, parts, fail_under)


def _check_installed() -> None:
    missing = [name for name in ("lm_eval", "tenacity", "math_verify") if find_spec(name) is None]
    if missing:
        raise EvalError(
            f"lm-eval is not installed as it is needed here: no {', '.join(missing)}",
            hint="pip install 'soka-serve[eval]'",
        )


def _subject(loaded: LoadedManifest, out: Path | None) -> Subject:
    from soka_serve.base.folder import ModelFolder
    from soka_serve.base.modules import text_config
    from soka_serve.base.resolve import resolve_base

    target = read_targets([str(loaded.path)], out=out)[0]
    base = resolve_base(loaded.manifest.base, manifest_dir=loaded.directory)
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


@contextmanager
def _environment(loaded: LoadedManifest, allow_code_execution: bool) -> Iterator[None]:
    """What the tasks read: the manifest whose prompt template they render, and the consent."""
    values = {MANIFEST_VARIABLE: str(loaded.path.resolve())}
    if allow_code_execution:
        values["SOKA_ALLOW_CODE_EXECUTION"] = "1"
        values["HF_ALLOW_CODE_EVAL"] = "1"  # the harness's own tasks ask for this one
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(
    loaded: LoadedManifest,
    subject: Subject,
    runner: VllmBackend | TransformersBackend,
    tasks: Sequence[str],
    limit: int | None,
    folder: Path,
    weights: Mapping[str, str],
    allow_code_execution: bool,
) -> dict[tuple[str, str], dict[str, Any]]:
    """Every part's record: those of earlier runs as they are, the others made now."""
    common = {**_identity(loaded, runner, limit), "tokenizer": _tokenizer_sha256(subject.tokenizer)}
    places = {
        (role, task): folder / _PARTS / f"{role}-{sha256_text(json.dumps([common, weights[role], task]))[:16]}"
        for role in ROLES
        for task in tasks
    }
    with disk_errors(folder):
        (folder / _PARTS).mkdir(parents=True, exist_ok=True)
    done = {part: _read(place) for part, place in places.items()}
    missing = [part for part, record in done.items() if record is None]
    if not missing:
        logger.info("every task has been run: nothing to ask")
    else:
        kept = len(places) - len(missing)
        if kept:
            logger.info("%d of %d parts are there from an earlier run", kept, len(places))
        manager = _task_manager()
        _check_names(manager, tasks)
        with runner.roles() as open_role:
            for role in ROLES:
                wanted = [task for task in tasks if (role, task) in missing]
                if not wanted:
                    continue
                with open_role(role) as asked:
                    for task in wanted:
                        record = _ask(
                            asked,
                            runner.name,
                            role,
                            task,
                            manager,
                            places[role, task],
                            loaded,
                            limit,
                            allow_code_execution,
                        )
                        write_text_atomic(places[role, task].with_suffix(".json"), json.dumps(record, indent=1))
                        done[role, task] = record
    return {part: record for part, record in done.items() if record is not None}


def _identity(loaded: LoadedManifest, runner: VllmBackend | TransformersBackend, limit: int | None) -> dict[str, Any]:
    """What scores depend on, beside the weights."""
    data = os.environ.get(DATA_VARIABLE)
    files = sorted(Path(data).glob("*.jsonl")) if data else []
    return {
        **runner.identity(),
        "limit": limit,
        "harness": metadata.version("lm_eval"),
        "soka_serve": metadata.version("soka-serve"),
        "data": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "template": loaded.manifest.train.data.model_dump(mode="json"),
        "generation": _generation(loaded),
    }


def _tokenizer_sha256(directory: Path) -> str:
    hashes = own_hashes()
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return sha256_text("".join(f"{file.name} {hashes.file(file)}\n" for file in files))


def _generation(loaded: LoadedManifest) -> dict[str, int]:
    """What the manifest says of answers, where it says it; else each task's own."""
    table = loaded.manifest.eval
    return {"max_gen_toks": table.max_new_tokens} if "max_new_tokens" in table.model_fields_set else {}


def _weights(subject: Subject) -> dict[str, str]:
    """By role, a hash of the weights that answer; large files are hashed once and remembered, as for serving."""
    hashes = own_hashes()
    found = {}
    for role, place in zip(ROLES, (subject.base, subject.target.path), strict=True):
        files = sorted([*place.glob("*.safetensors"), *place.glob("adapter_config.json")])
        found[role] = sha256_text(subject.target.base_sha256 + "".join(hashes.file(file) for file in files))
    with suppress(SokaError, OSError):  # a cache that cannot be written costs time only
        hashes.save()
    return found


def _read(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None  # not run yet; parts are written whole
    return found if isinstance(found, dict) else None


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without what lm-eval says of its own insides, and without its asking git for the commit of the user's folder,
    which it would take for its own. What it says of requests that fail is shown; its bars are on a terminal only, where
    there are none of ours."""
    from lm_eval import evaluator
    from tqdm import tqdm

    talkative = [logging.getLogger(f"lm_eval.{part}") for part in ("evaluator", "models.huggingface", "tasks", "api")]
    levels = [each.level for each in talkative]
    ask_git, make_bar = evaluator.get_git_commit_hash, tqdm.__init__
    for each in talkative:
        each.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None
    if not sys.stderr.isatty():
        # Not by TQDM_DISABLE: vLLM divides by what a bar of that kind has not measured.
        tqdm.__init__ = partialmethod(make_bar, disable=True)
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, tqdm.__init__ = ask_git, make_bar
        for each, level in zip(talkative, levels, strict=True):
            each.setLevel(level)


def _task_manager() -> Any:
    from lm_eval.tasks import TaskManager

    from soka_serve.evaluation.tasks import tasks_directory

    logger.info("reading lm-eval's tasks")
    return TaskManager(include_path=str(tasks_directory()))


def _check_names(manager: Any, tasks: Sequence[str]) -> None:
    from difflib import get_close_matches

    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise EvalError(
            f"{', '.join(unknown)}: no such lm-eval task",
            hint=f"Did you mean {' or '.join(near)}?" if near else "`lm_eval ls tasks` lists them.",
        )


def _ask(
    asked: Asked,
    backend: str,
    role: str,
    task: str,
    manager: Any,
    place: Path,
    loaded: LoadedManifest,
    limit: int | None,
    allow_code_execution: bool,
) -> dict[str, Any]:
    """Run one task on one model."""
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    asked.lm.what = f"{role}: {task}"
    asked.lm.sent = asked.lm.cut = 0
    logger.info("asking %s: %s", role, task)
    effects = [asked.effect()] if asked.effect else []
    counted = asked.counted()
    started = time.monotonic()
    found = simple_evaluate(
        model=asked.lm,
        tasks=[task],
        task_manager=manager,
        limit=limit,
        use_cache=str(place),
        gen_kwargs=_generation(loaded) or None,
        random_seed=_SEED,
        numpy_random_seed=_SEED,
        torch_random_seed=_SEED,
        fewshot_random_seed=_SEED,
        confirm_run_unsafe_code=allow_code_execution,
        log_samples=True,
    )
    if found is None:  # only in processes that helped
        raise EvalError(f"{task}: lm-eval gave no result")
    seconds = time.monotonic() - started
    active = None
    if asked.effect:
        after = None if counted is None else wait_counted(asked.counted, counted + asked.lm.sent)
        effects.append(asked.effect())
        active = _active(effects, task)
        if counted is not None and after is not None:
            active |= {"requests_sent": asked.lm.sent, "requests_counted": after - counted}
    for name, samples in found["samples"].items():
        lines = [json.dumps(s, default=handle_non_serializable, ensure_ascii=False) for s in samples]
        write_text_atomic(place.parent.parent / f"samples-{backend}-{role}-{name}.jsonl", "\n".join(lines) + "\n")
    for file in place.parent.glob(f"{place.name}_rank*.db"):
        file.unlink()  # the answers were needed for a resume only
    scores = {**found["results"], **found.get("groups", {})}
    return {
        "role": role,
        "task": task,
        "results": json.loads(json.dumps(scores, default=handle_non_serializable)),
        "problems": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "task_versions": dict(found["versions"]),
        "few_shot": dict(found["n-shot"]),
        "asked": asked.lm.sent,
        "prompts_cut": asked.lm.cut,
        "active": active,
        "seconds": round(seconds, 1),
        **asked.facts,
    }


def _active(effects: Sequence[tuple[float, float]], task: str) -> dict[str, Any]:
    """The proof that the adapter was at work before and after a task.

    Raises:
        EvalError: it was not.
    """
    noise, least = max(n for n, _ in effects), min(e for _, e in effects)
    if not least > _NOISE_FACTOR * noise:
        raise EvalError(
            f"{task}: the adapter has no effect: its log-probabilities differ from the base's by {least:.3g} nats, two "
            f"answers of one model by {noise:.3g}",
            hint="Is it an untrained adapter, one of zeros? `soka-serve inspect` shows its norms.",
        )
    return {"effect_before_nats": effects[0][1], "effect_after_nats": effects[-1][1], "noise_nats": noise}


def _result_files(folder: Path, backend: str) -> tuple[Path, Path]:
    return folder / f"results-{backend}.json", folder / f"results-{backend}.md"


def _finish(
    loaded: LoadedManifest,
    subject: Subject,
    runner: VllmBackend | TransformersBackend,
    tasks: tuple[str, ...],
    limit: int | None,
    folder: Path,
    weights: Mapping[str, str],
    parts: Mapping[tuple[str, str], Mapping[str, Any]],
    thresholds: Sequence[Threshold],
) -> EvalResult:
    scores = collect(parts, tasks)
    record = make_record(loaded, subject, runner, tasks, limit, weights, parts, scores, seed=_SEED)
    json_file, table_file = _result_files(folder, runner.name)
    write_text_atomic(json_file, json.dumps(record, indent=1) + "\n")
    write_text_atomic(table_file, document(record, table(scores, subject.target.name)))
    return EvalResult(
        str(loaded.manifest.name),
        runner.name,
        tasks,
        scores,
        record,
        json_file,
        table_file,
        missed(scores, tasks, thresholds),
    )
