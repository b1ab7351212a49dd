"""The parts of an evaluation, a model and a task each: those of earlier runs are kept, the others are asked.

A part's answers are kept as they come, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from soka_serve.base.tokenizer_class import TOKENIZER_FILES
from soka_serve.errors import EvalError
from soka_serve.evaluation.backends import RoleModel, wait_counted
from soka_serve.evaluation.harness import task_manager
from soka_serve.evaluation.results import ROLES
from soka_serve.evaluation.sources import DATA_VARIABLE
from soka_serve.evaluation.subject import Evaluation
from soka_serve.io.files import disk_errors, sha256_text, write_text_atomic
from soka_serve.io.own_cache import own_hashes

logger = logging.getLogger(__name__)

SEED = 1234  # lm-eval's own, of few-shot examples and of sampling
# A difference of log-probabilities that rounding alone makes is below so many times what two equal requests differ by.
_NOISE_FACTOR = 10.0
# Raised when a model is asked otherwise, so that parts of before are asked again: 2 is rendered chats as they are.
_VERSION = 2


def run_parts(evaluation: Evaluation) -> dict[tuple[str, str], dict[str, Any]]:
    """Every part's record, by role and task.

    Raises:
        SokaError: no such task, a server that does not answer, an adapter without effect.
    """
    common, parts = _identity(evaluation), evaluation.parts_folder
    places = {
        (role, task): parts / f"{role}-{sha256_text(json.dumps([common, evaluation.weights[role], task]))[:16]}"
        for role in ROLES
        for task in evaluation.tasks
    }
    with disk_errors(evaluation.folder):
        for folder in (evaluation.folder, parts):
            folder.mkdir(parents=True, exist_ok=True)
    done = {part: record for part, place in places.items() if (record := _read(place)) is not None}
    missing = {part: place for part, place in places.items() if part not in done}
    if not missing:
        logger.info("every task has been run: nothing to ask")
        return done
    if done:
        logger.info("%d of %d parts are there from an earlier run", len(done), len(places))
    manager = task_manager(evaluation.tasks)
    with evaluation.backend.roles() as open_role:
        for role in ROLES:
            wanted = {task: place for (owner, task), place in missing.items() if owner == role}
            if wanted:
                with open_role(role) as model:
                    for task, place in wanted.items():
                        record = {"role": role, "task": task, **_ask(evaluation, model, role, task, manager, place)}
                        write_text_atomic(place.with_suffix(".json"), json.dumps(record, indent=1))
                        done[role, task] = record
    return {part: done[part] for part in places}


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that scores depend on, other than the weights."""
    data = os.environ.get(DATA_VARIABLE)
    files = sorted(Path(data).glob("*.jsonl")) if data else []
    return {
        **evaluation.backend.identity(),
        "version": _VERSION,
        "limit": evaluation.limit,
        "harness": metadata.version("lm_eval"),
        "soka_serve": metadata.version("soka-serve"),
        "data": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        "template": evaluation.loaded.manifest.train.model_dump(mode="json", include={"data"})["data"],
        "generation": evaluation.generation,
        "tokenizer": _tokenizer_sha256(evaluation.subject.tokenizer),
    }


def _tokenizer_sha256(directory: Path) -> str:
    hashes = own_hashes()
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return sha256_text("".join(f"{file.name} {hashes.file(file)}\n" for file in files))


def _read(place: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None  # not run yet; parts are written whole
    return found if isinstance(found, dict) else None


def _ask(evaluation: Evaluation, model: RoleModel, role: str, task: str, manager: Any, place: Path) -> dict[str, Any]:
    """Run one task on one model: what lm-eval found, and the proof that the adapter was at work."""
    from lm_eval.utils import handle_non_serializable

    model.lm.what = f"{role}: {task}"
    model.lm.sent = model.lm.cut = 0
    logger.info("asking %s: %s", role, task)
    effects = [model.effect()] if model.effect else []
    counted = model.counted()
    started = time.monotonic()
    found = _simple_evaluate(evaluation, model, task, manager, place)
    seconds = time.monotonic() - started
    active = None
    if model.effect:
        after = None if counted is None else wait_counted(model.counted, counted + model.lm.sent)
        effects.append(model.effect())
        active = _active(effects, task)
        if counted is not None and after is not None:
            active |= {"requests_sent": model.lm.sent, "requests_counted": after - counted}
    for name, samples in found["samples"].items():
        lines = [json.dumps(s, default=handle_non_serializable, ensure_ascii=False) for s in samples]
        file = evaluation.folder / f"samples-{evaluation.backend.name}-{role}-{name}.jsonl"
        write_text_atomic(file, "\n".join(lines) + "\n")
    for file in place.parent.glob(f"{place.name}_rank*.db"):
        file.unlink()  # the answers were needed for a resume only
    scores = {**found["results"], **found.get("groups", {})}
    return {
        "results": json.loads(json.dumps(scores, default=handle_non_serializable)),
        "problems": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "task_versions": dict(found["versions"]),
        "few_shot": dict(found["n-shot"]),
        "asked": model.lm.sent,
        "prompts_cut": model.lm.cut,
        "active": active,
        "seconds": round(seconds, 1),
        **model.facts,
    }


def _simple_evaluate(
    evaluation: Evaluation, model: RoleModel, task: str, manager: Any, place: Path
) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    found: Mapping[str, Any] | None = simple_evaluate(
        model=model.lm,
        tasks=[task],
        task_manager=manager,
        limit=evaluation.limit,
        use_cache=str(place),
        gen_kwargs=evaluation.generation or None,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
        confirm_run_unsafe_code=evaluation.allow_code_execution,
        log_samples=True,
    )
    if found is None:  # only in processes that helped
        raise EvalError(f"{task}: lm-eval gave no result")
    return found


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
