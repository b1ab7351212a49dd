"""The papers of a build: soka.lock, model card, report and the record of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.compiler.methods import FULL, LORA
from soka_serve.io.file_names import CARD_FILE, CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.versions import versions

if TYPE_CHECKING:
    from soka_serve.compiler.check import QuickCheck
    from soka_serve.compiler.context import Context
    from soka_serve.compiler.init.result import Initialisation
    from soka_serve.compiler.report.data import AnswerPair, ReportData
    from soka_serve.compiler.train.run import TrainResult
    from soka_serve.data.encode import EncodedSet

# What the report compares with, on the same modules.
_LORA_RANKS = (1, 2, 8, 16)


@dataclass(frozen=True)
class StageResults:
    """What the stages of a build made.

    Args:
        training: the encoded examples.
        start: the factors at step 0; None where the method has none.
        trained: the trained weights.
        check: answers before and after; None where none were asked for.
        measured: what `[output] measure` names; None where it names nothing.
    """

    training: EncodedSet
    start: Initialisation | None
    trained: TrainResult
    check: QuickCheck | None
    measured: Mapping[str, Any] | None = None


def write_papers(context: Context, new: Path, made: StageResults) -> None:
    """Write everything in `new` that is not weights: lock, card, report, history, spectra, manifest."""
    from soka_serve.compiler.report.card import render_card
    from soka_serve.compiler.report.page import write_report
    from soka_serve.io.files import write_text_atomic
    from soka_serve.io.lockfile import write_lock

    if made.trained.history.exists():
        shutil.copyfile(made.trained.history, new / "history.jsonl")
    if made.start is not None:
        shutil.copyfile(context.workspace.stage("init", context.keys["init"]) / "init.json", new / "init.json")
    write_text_atomic(new / "manifest.toml", context.loaded.text)
    lock = _lock(context, new, made)
    data = _report_data(context, new, made, lock)
    card = render_card(data)
    write_text_atomic(new / CARD_FILE, card)
    if (new / "adapter").exists():
        for name in (CARD_FILE, LOCK_FILE):  # may be second names of the last build's files
            (new / "adapter" / name).unlink(missing_ok=True)
        write_text_atomic(new / "adapter" / CARD_FILE, card)
        write_lock(new / "adapter" / LOCK_FILE, lock)
    if context.loaded.manifest.output.report:
        write_report(new / "report.html", data)
    # Last, with the size of everything else: it is how the next build knows that this one is whole.
    files = {p.relative_to(new).as_posix(): p.stat().st_size for p in sorted(new.rglob("*")) if p.is_file()}
    write_lock(new / LOCK_FILE, {**lock, "files": files})


def comparison(context: Context) -> dict[str, int]:
    """Trainable parameters of other methods on the same modules."""
    modules = [t.module for t in context.targets]
    found = {f"{LORA.label} r={r}": sum(LORA.parameters(m, r) for m in modules) for r in _LORA_RANKS}
    return {**found, FULL.name: sum(FULL.parameters(m, 0) for m in modules)}


def trained_ranks(trained: TrainResult) -> dict[str, int]:
    """Terms of every module after training, which may have pruned some. An exported adapter has up to twice as many:
    it holds theta and theta0."""
    config = json.loads((trained.directory / CONFIG_FILE).read_text())
    return {name: int(spec["rank"]) for name, spec in config["soka_modules"].items()}


def _lock(context: Context, new: Path, made: StageResults) -> dict[str, Any]:
    trained = made.trained
    loaded, manifest = context.loaded, context.loaded.manifest
    lock: dict[str, Any] = {
        "soka": 1,
        "name": str(manifest.name),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": manifest.train.seed,
        "manifest": {"file": loaded.path.name, "sha256": loaded.sha256},
        "base": {
            "name": f"builtin:{manifest.base.builtin}" if manifest.base.builtin else context.base.name,
            "revision": manifest.base.revision or "",
            "sha256": context.inputs.base,
        },
        "data": {"sha256": context.inputs.data},
        "finetuned": dict(context.inputs.finetuned),
        "versions": versions(),
        "stages": dict(context.keys),
        "result": {
            "method": manifest.train.method,
            "steps": trained.steps,
            "final_loss": trained.final_loss if trained.final_loss is not None else "none",
            "trainable_parameters": trained.trainable_parameters,
            "dropped_energy_frac": context.dropped_energy_frac,
        },
        "comparison": comparison(context),
    }
    if made.start is not None:
        lock["ranks"] = trained_ranks(trained)
    adapter = new / "adapter" / WEIGHTS_FILE
    if adapter.exists():
        from soka_serve.io.files import sha256_file

        lock["adapter"] = {"sha256": sha256_file(adapter)}
    return lock


def _report_data(context: Context, new: Path, made: StageResults, lock: dict[str, Any]) -> ReportData:
    from soka_serve.compiler.history import read_history
    from soka_serve.compiler.report.data import ReportData, history_points, rank_history

    manifest, trained, training, check = context.loaded.manifest, made.trained, made.training, made.check
    adapter = new / "adapter" / WEIGHTS_FILE
    log = read_history(trained.history)
    names = ("adapter", "merged", LOCK_FILE, "manifest.toml", "history.jsonl", "measured.json")
    artefacts = {name: name for name in names if (new / name).exists()}
    return ReportData(
        name=str(manifest.name),
        description=manifest.description,
        base_name=lock["base"]["name"],
        method=manifest.train.method,
        created=lock["created"],
        versions=lock["versions"],
        seed=manifest.train.seed,
        modules=[
            replace(m, rank=lock["ranks"].get(m.module, m.rank)) for m in (made.start.modules if made.start else ())
        ],
        history=history_points(log),
        samples=_samples(check) if check else [],
        accuracy_before=check.before.accuracy if check else None,
        accuracy_after=check.after.accuracy if check else None,
        trainable_parameters=trained.trainable_parameters,
        base_parameters=context.base.layout.size.parameters,
        comparison=lock["comparison"],
        adapter_bytes=adapter.stat().st_size if adapter.exists() else 0,
        dropped_energy_frac=context.dropped_energy_frac,
        data_summary={
            "training examples": len(training.examples),
            "dropped (too long)": training.dropped,
            "truncated": training.truncated,
            "training tokens": training.tokens,
        },
        manifest_text=context.loaded.text,
        lock=lock,
        artefacts=artefacts,
        rank_over_time=rank_history(log),
        timings_s=dict(context.timings_s),
        quantize=context.quantize,
        measured=made.measured or {},
    )


def _samples(check: QuickCheck) -> list[AnswerPair]:
    """The first problems with both answers."""
    from soka_serve.compiler.report.data import AnswerPair

    return [
        AnswerPair(
            prompt=prompt,
            expected=check.expected[i],
            before=check.before.texts[i],
            after=check.after.texts[i],
            before_ok=check.before.marks[i] if check.before.marks else None,
            after_ok=check.after.marks[i] if check.after.marks else None,
        )
        for i, prompt in enumerate(check.prompts)
    ]
