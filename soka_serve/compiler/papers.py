"""The papers of a build: soka.lock, model card, report and the record of the run."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soka_serve.base.resolve import base_name
from soka_serve.io.versions import versions

if TYPE_CHECKING:
    from soka_serve.compiler.check import QuickCheck
    from soka_serve.compiler.context import Context
    from soka_serve.compiler.init.initialise import Initialisation
    from soka_serve.compiler.report.page import ReportData
    from soka_serve.compiler.train.run import TrainResult
    from soka_serve.data.examples import EncodedSet

# What the report compares with, on the same modules.
_LORA_RANKS = (1, 2, 8, 16)


def write_papers(
    context: Context,
    new: Path,
    start: Initialisation | None,
    trained: TrainResult,
    check: QuickCheck | None,
    training: EncodedSet,
) -> None:
    """Write everything in `new` that is not weights: lock, card, report, history, spectra, manifest."""
    from soka_serve.compiler.report.card import render_card
    from soka_serve.compiler.report.page import write_report
    from soka_serve.io.files import write_text_atomic
    from soka_serve.io.lockfile import write_lock

    if trained.history.exists():
        shutil.copyfile(trained.history, new / "history.jsonl")
    if start is not None:
        shutil.copyfile(context.workspace.stage("init", context.keys["init"]) / "init.json", new / "init.json")
    write_text_atomic(new / "manifest.toml", context.loaded.text)
    lock = _lock(context, new, start, trained)
    data = _report_data(context, new, start, trained, check, training, lock)
    card = render_card(data)
    write_text_atomic(new / "README.md", card)
    if (new / "adapter").exists():
        for name in ("README.md", "soka.lock"):  # may be second names of the last build's files
            (new / "adapter" / name).unlink(missing_ok=True)
        write_text_atomic(new / "adapter" / "README.md", card)
        write_lock(new / "adapter" / "soka.lock", lock)
    if context.loaded.manifest.output.report:
        write_report(new / "report.html", data)
    # Last, with the size of everything else: it is how the next build knows that this one is whole.
    files = {p.relative_to(new).as_posix(): p.stat().st_size for p in sorted(new.rglob("*")) if p.is_file()}
    write_lock(new / "soka.lock", {**lock, "files": files})


def comparison(context: Context) -> dict[str, int]:
    """Trainable parameters of other methods on the same modules."""
    sizes = [(t.module.out_features, t.module.in_features) for t in context.targets]
    found = {f"LoRA r={r}": r * sum(o + i for o, i in sizes) for r in _LORA_RANKS}
    return {**found, "full": sum(o * i for o, i in sizes)}


def trained_ranks(trained: TrainResult) -> dict[str, int]:
    """Terms of every module after training, which may have pruned some. An exported adapter has up to twice as many:
    it holds theta and theta0."""
    config = json.loads((trained.directory / "adapter_config.json").read_text())
    return {name: int(spec["rank"]) for name, spec in config["soka_modules"].items()}


def _lock(context: Context, new: Path, start: Initialisation | None, trained: TrainResult) -> dict[str, Any]:
    loaded, manifest = context.loaded, context.loaded.manifest
    name = base_name(manifest.base, loaded.directory)
    lock: dict[str, Any] = {
        "soka": 1,
        "name": str(manifest.name),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": manifest.train.seed,
        "manifest": {"file": loaded.path.name, "sha256": loaded.sha256},
        "base": {
            "name": f"builtin:{manifest.base.builtin}" if manifest.base.builtin else name,
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
    if start is not None:
        lock["ranks"] = trained_ranks(trained)
    adapter = new / "adapter" / "adapter_model.safetensors"
    if adapter.exists():
        from soka_serve.io.files import sha256_file

        lock["adapter"] = {"sha256": sha256_file(adapter)}
    return lock


def _report_data(
    context: Context,
    new: Path,
    start: Initialisation | None,
    trained: TrainResult,
    check: QuickCheck | None,
    training: EncodedSet,
    lock: dict[str, Any],
) -> ReportData:
    from soka_serve.compiler.report.page import ModuleSpectrum, ReportData, Sample, read_history, read_rank_history

    manifest = context.loaded.manifest
    ranks = lock.get("ranks", {})
    modules = [
        ModuleSpectrum(
            module=m.module,
            layer=m.layer,
            projection=m.module.rsplit(".", 1)[-1],
            shape=(m.out_features, m.in_features),
            factor_shape=m.factor_shape,
            sigma=m.sigma,
            total_energy=m.total_energy,
            rank=ranks.get(m.module, m.rank),
            parameters=m.factor_shape.parameters(ranks.get(m.module, m.rank)),
            init=m.init,
            policy=m.policy,
        )
        for m in (start.modules if start else ())
    ]
    samples = []
    if check is not None:
        for i, prompt in enumerate(check.prompts):
            samples.append(
                Sample(
                    prompt=prompt,
                    expected=check.expected[i],
                    before=check.before.texts[i],
                    after=check.after.texts[i],
                    before_ok=check.before.marks[i] if check.before.marks else None,
                    after_ok=check.after.marks[i] if check.after.marks else None,
                )
            )

    def accuracy(part: Any) -> tuple[int, int] | None:
        return None if part is None or part.total is None else (part.correct, part.total)

    adapter = new / "adapter" / "adapter_model.safetensors"
    tokens = sum(len(e.input_ids) for e in training.examples)
    artefacts = {
        n: n for n in ("adapter", "merged", "soka.lock", "manifest.toml", "history.jsonl") if (new / n).exists()
    }
    return ReportData(
        name=str(manifest.name),
        description=manifest.description,
        base_name=lock["base"]["name"],
        method=manifest.train.method,
        created=lock["created"],
        versions=lock["versions"],
        seed=manifest.train.seed,
        modules=modules,
        history=read_history(trained.history) if trained.history.exists() else [],
        samples=samples,
        accuracy_before=accuracy(check and check.before),
        accuracy_after=accuracy(check and check.after),
        trainable_parameters=trained.trainable_parameters,
        base_parameters=context.base.size.parameters,
        comparison=lock["comparison"],
        adapter_bytes=adapter.stat().st_size if adapter.exists() else 0,
        dropped_energy_frac=context.dropped_energy_frac,
        data_summary={
            "training examples": len(training.examples),
            "dropped (too long)": training.dropped,
            "truncated": training.truncated,
            "training tokens": tokens,
        },
        manifest_text=context.loaded.text,
        lock=lock,
        artefacts=artefacts,
        rank_over_time=read_rank_history(trained.history) if trained.history.exists() else None,
        timings_s=dict(context.timings_s),
    )
