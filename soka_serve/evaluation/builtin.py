"""The embedded families as lm-eval tasks: the problems and the judgement of `soka_serve.builtin`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from soka_serve.builtin.problem import Problem
from soka_serve.builtin.tasks import check_answer, generate
from soka_serve.evaluation.prompts import zero_shot_prompt
from soka_serve.evaluation.sources import as_dataset


def load(family: str, **_: Any) -> dict[str, Any]:
    """The family's test problems, as many as it gives by default."""
    return as_dataset([asdict(problem) for problem in generate(family, "test")])


def prompt(doc: Mapping[str, Any]) -> str:
    """The prompt, as training renders it."""
    columns = {name: doc[name] for name in ("prompt", "completion", "answer")}
    return zero_shot_prompt("builtin", doc["prompt"], columns)


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is right, as `soka_serve.compiler.answers.measure` counts it."""
    problem = Problem(doc["family"], doc["prompt"], doc["completion"], doc["answer"], tuple(doc["tests"]))
    return {"accuracy": float(check_answer(problem, results[0]))}
