"""`soka-serve eval A B C`: several builds, each measured as one alone is, on one server or one loaded base.

A build that cannot be measured is named, and the others go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from soka_serve.errors import EvalError, SokaError, printable
from soka_serve.evaluation.backends import TransformersBackend, VllmBackend
from soka_serve.evaluation.results import EvalResult, score_rows
from soka_serve.evaluation.run import EvalSettings, measure, prepare
from soka_serve.evaluation.shared import SharedModel, SharedServer, own_dtype
from soka_serve.evaluation.subject import Evaluation
from soka_serve.io.files import disk_errors, write_text_atomic
from soka_serve.io.outputs import check_results
from soka_serve.io.places import given_path
from soka_serve.io.versions import versions
from soka_serve.io.warn_once import one_command
from soka_serve.manifest.read import LoadedManifest, read_manifest

logger = logging.getLogger(__name__)

_FOLDER = "eval"  # in the folder of builds


@dataclass(frozen=True)
class Row:
    """What came of one build: its result, or why there is none.

    Args:
        name: of the build; of a manifest that cannot be read, its path.
        manifest: path as it was given.
        result: scores and files.
        error: why there are none.
    """

    name: str
    manifest: Path
    result: EvalResult | None = None
    error: SokaError | None = None


@dataclass(frozen=True)
class EvalManyResult:
    """The result of `evaluate_many`: a row for each manifest, in their order, and the files with all of them."""

    rows: tuple[Row, ...]
    json_file: Path
    table_file: Path

    @property
    def failed(self) -> tuple[Row, ...]:
        """Builds that could not be measured."""
        return tuple(row for row in self.rows if row.error is not None)

    @property
    def missed(self) -> tuple[str, ...]:
        """Thresholds that were not reached, a line each."""
        return tuple(f"{row.name}: {line}" for row in self.rows if row.result for line in row.result.missed)

    def to_text(self) -> str:
        """For the terminal."""
        lines = [many_table(self.rows), "", f"results {self.json_file}", f"table   {self.table_file}", *self.missed]
        for row in self.failed:
            assert row.error is not None
            lines += ["", f"{row.name} failed: {row.error.message}", *([row.error.hint] if row.error.hint else [])]
        return "\n".join(lines)


@one_command()
def evaluate_many(
    manifests: Sequence[str | Path], settings: EvalSettings, *, results: str | Path | None = None
) -> EvalManyResult:
    """Measure several builds, each against its base, on lm-eval tasks; see `soka_serve.evaluate` for one.

    Adapters of one base share a vLLM server, or with transformers the loaded base, and the base's own answers.

    Args:
        manifests: paths of the TOML files whose builds are measured.
        settings: the options, which hold for all of them.
        results: folder for the results, with one in it for each build; default: OUT/eval.

    Returns:
        A row for each manifest, of those that failed with the error; also written as JSON and as a table.

    Raises:
        SokaError: nothing to measure, or files in the way.
    """
    if not manifests:
        raise EvalError("nothing to measure", hint="Give one manifest or more.")
    paths = list(dict.fromkeys(Path(manifest) for manifest in manifests))
    read, failed = _read(paths)
    folder = _folder(list(read.values()), settings, results)
    json_file, table_file = (folder / f"results-{settings.backend}.{kind}" for kind in ("json", "md"))
    check_results(json_file, [table_file], ("rows", "command"))
    evaluations: dict[Path, Evaluation] = {}
    for path, loaded in read.items():
        try:
            evaluations[path] = _prepare(loaded, settings, folder, evaluations)
        except SokaError as error:
            failed[path] = _failed(str(loaded.manifest.name), path, error)
    rows = {**failed, **_measure_all(evaluations, settings)}
    done = EvalManyResult(tuple(rows[path] for path in paths), json_file, table_file)
    _write(done, settings)
    return done


def _read(paths: Sequence[Path]) -> tuple[dict[Path, LoadedManifest], dict[Path, Row]]:
    """The manifests, and a row for each that cannot be read."""
    read: dict[Path, LoadedManifest] = {}
    failed: dict[Path, Row] = {}
    for path in paths:
        try:
            read[path] = read_manifest(path)
        except SokaError as error:
            failed[path] = _failed(str(path), path, error)
    return read, failed


def _measure_all(evaluations: Mapping[Path, Evaluation], settings: EvalSettings) -> dict[Path, Row]:
    rows: dict[Path, Row] = {}
    for group in _groups(evaluations, settings):
        with _sharing(list(group.values()), settings):
            for path, evaluation in group.items():
                name = str(evaluation.loaded.manifest.name)
                try:
                    rows[path] = Row(name, path, measure(evaluation, settings))
                except SokaError as error:
                    rows[path] = _failed(name, path, error)
    return rows


def _failed(name: str, path: Path, error: SokaError) -> Row:
    logger.error("%s failed: %s", printable(name), printable(error.message, 2000, keep="\n"))
    return Row(name, path, error=error)


def _folder(read: Sequence[LoadedManifest], settings: EvalSettings, results: str | Path | None) -> Path:
    if results is not None:
        return given_path(results, "results")
    if settings.out is not None:
        return given_path(settings.out, "out") / _FOLDER
    return Path(read[0].manifest.output.dir if read else "build") / _FOLDER


def _prepare(
    loaded: LoadedManifest, settings: EvalSettings, folder: Path, others: Mapping[Path, Evaluation]
) -> Evaluation:
    """An evaluation whose results lie in the common folder, under a name that no other one has."""
    name = str(loaded.manifest.name)
    for path, other in others.items():
        if name == str(other.loaded.manifest.name):
            raise EvalError(f"{loaded.path}: its name, {name!r}, is that of {path}", hint="Give one of them another.")
    made = prepare(loaded, settings, folder / name, folder / ".parts")
    taken = {other.subject.target.name: path for path, other in others.items()}
    if made.subject.target.name in taken:
        raise EvalError(
            f"{loaded.path}: is served as {made.subject.target.name!r}, as is {taken[made.subject.target.name]}",
            hint="Change [serve] name in one of them.",
        )
    return made


def _groups(evaluations: Mapping[Path, Evaluation], settings: EvalSettings) -> list[dict[Path, Evaluation]]:
    """Evaluations that can share a server, or a base in memory, together; in the order of the first of each."""
    groups: dict[Any, dict[Path, Evaluation]] = {}
    for path, evaluation in evaluations.items():
        subject = evaluation.subject
        serve, base = subject.manifest.serve, subject.manifest.base
        # Servers refuse adapters of a base in bits: one of those would keep the others from sharing a server.
        bits = subject.target.quantize
        key: Any = (subject.base, own_dtype(serve.dtype, subject.base), serve.max_model_len, subject.tokenizer, bits)
        if settings.backend == "transformers":
            key = (subject.base, serve.dtype, base.quantize)
        groups.setdefault((subject.target.kind, key), {})[path] = evaluation
    return list(groups.values())


@contextmanager
def _sharing(evaluations: Sequence[Evaluation], settings: EvalSettings) -> Iterator[None]:
    """Let evaluations of one group share what runs their models."""
    backends = [evaluation.backend for evaluation in evaluations]
    if isinstance(backends[0], TransformersBackend):
        model = SharedModel()
        for backend in backends:
            assert isinstance(backend, TransformersBackend)
            backend.shared = model
        try:
            yield
        finally:
            model.drop()  # backends outlive the block, and the next group has another base
        return
    if settings.server is None and len(evaluations) > 1 and evaluations[0].subject.target.kind == "adapter":
        with SharedServer([evaluation.subject for evaluation in evaluations], settings.vllm_options) as server:
            for backend in backends:
                assert isinstance(backend, VllmBackend)
                backend.shared = server
            yield
        return
    yield


def many_table(rows: Sequence[Row]) -> str:
    """A Markdown table with all scores of all builds."""
    lines = ["| build | task | metric | problems | base | build's | difference |", "|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        name = printable(row.name).replace("|", "/")
        if row.result is None:
            lines.append(f"| {name} | failed | | | | | |")
        else:
            lines += [f"| {name} {line}" for line in score_rows(row.result.scores)]
    return "\n".join(lines)


def _write(done: EvalManyResult, settings: EvalSettings) -> None:
    shown = " ".join(row.manifest.name if row.manifest.is_absolute() else str(row.manifest) for row in done.rows)
    command = f"soka-serve eval {shown} --backend {settings.backend}"
    command += "" if settings.limit is None else f" --limit {settings.limit}"
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "limit": settings.limit,
        "versions": versions(),
        "rows": [_row(row, done.json_file.parent) for row in done.rows],
    }
    with disk_errors(done.json_file):
        done.json_file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(done.json_file, json.dumps(record, indent=1) + "\n")
    reasons = "".join(f"\n- {printable(row.name)} failed: {row.error.message}" for row in done.failed if row.error)
    text = f"# {len(done.rows)} builds\n\n{many_table(done.rows)}\n\n- `{command}`, {record['created']}{reasons}\n"
    write_text_atomic(done.table_file, text)


def _row(row: Row, folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {"name": row.name, "manifest": row.manifest.name}
    if row.result is None:
        assert row.error is not None
        return {**told, "error": row.error.message, "hint": row.error.hint}
    scores = [asdict(score) for score in row.result.scores]
    kind = {key: row.result.record["result"][key] for key in ("kind", "peft_type", "weights")}
    files = {"results": str(row.result.json_file.relative_to(folder)), "missed": list(row.result.missed)}
    return {**told, **kind, "scores": scores, **files}
