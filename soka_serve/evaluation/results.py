"""The scores of an evaluation, one per task, metric and model: as JSON, as a table, checked against thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.errors import EvalError

ROLES = ("base", "result")


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Args:
        task: name of an lm-eval task or group.
        metric: metric and filter as lm-eval writes them, 'exact_match,strict-match'.
        problems: how many were asked.
        base, result: values of the base and of what was built, fractions for accuracies.
        base_stderr, result_stderr: standard errors; None where the metric has none.
    """

    task: str
    metric: str
    problems: int
    base: float
    result: float
    base_stderr: float | None
    result_stderr: float | None


@dataclass(frozen=True)
class Threshold:
    """`--fail-under`: the least value of a task's first metric; `task` None is every task asked for."""

    task: str | None
    value: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """'VALUE' or 'TASK=VALUE'.

        >>> Threshold.parse("soka_gsm8k=0.4"), Threshold.parse("0.9")
        (Threshold(task='soka_gsm8k', value=0.4), Threshold(task=None, value=0.9))

        Raises:
            EvalError: no number.
        """
        task, separator, number = text.rpartition("=")
        try:
            if separator and not task:
                raise ValueError(text)
            return cls(task or None, float(number))
        except ValueError:
            raise EvalError(
                f"--fail-under {text}: expected a number or TASK=NUMBER; got {number!r}",
                hint="Accuracies are fractions: --fail-under soka_gsm8k=0.4",
            ) from None


@dataclass(frozen=True)
class EvalResult:
    """The result of `evaluate`.

    Args:
        name: of the build.
        backend: 'vllm' or 'transformers'.
        tasks: that were asked for, in order.
        scores: of these and of their subtasks.
        record: everything, as the JSON file holds it.
        json_file, table_file: what was written.
        missed: thresholds that were not reached, a line each.
    """

    name: str
    backend: str
    tasks: tuple[str, ...]
    scores: tuple[Score, ...]
    record: Mapping[str, Any]
    json_file: Path
    table_file: Path
    missed: tuple[str, ...] = ()

    def first(self, task: str) -> Score:
        """The task's first metric, which is the one that thresholds are held against."""
        return next(score for score in self.scores if score.task == task)

    def to_text(self) -> str:
        """For the terminal."""
        lines = [table(self.scores, self.name), "", f"results {self.json_file}", f"table   {self.table_file}"]
        return "\n".join([*lines, *self.missed])


def collect(parts: Mapping[tuple[str, str], Mapping[str, Any]], tasks: Sequence[str]) -> tuple[Score, ...]:
    """Scores out of lm-eval's results.

    Args:
        parts: (role, task) -> a part's record, with `results` and `problems` by task or subtask.
        tasks: the tasks asked for, in order.
    """
    found: list[Score] = []
    for task in tasks:
        base, result = (parts[role, task] for role in ROLES)
        # The task (or group) itself first, then what it consists of.
        for name in sorted(result["results"], key=lambda name: name != task):
            ours, theirs = result["results"][name], base["results"][name]
            asked = int(result["problems"].get(name, sum(result["problems"].values())))
            for metric, value in ours.items():
                kind, _, filtered = metric.partition(",")
                told = kind in ("alias", "name", "sample_len", "sample_count") or kind.endswith("_stderr")
                if not told and isinstance(value, int | float):
                    errors = (_number(each.get(f"{kind}_stderr,{filtered}")) for each in (theirs, ours))
                    found.append(Score(name, metric, asked, float(theirs[metric]), float(value), *errors))
    return tuple(dict.fromkeys(found))


def table(scores: Sequence[Score], name: str) -> str:
    """A Markdown table."""
    lines = [f"| task | metric | problems | base | {name} | difference |", "|---|---|---:|---:|---:|---:|"]
    return "\n".join([*lines, *score_rows(scores)])


def score_rows(scores: Sequence[Score]) -> list[str]:
    """The rows of a Markdown table with task, metric, problems, base, result and difference."""
    lines = []
    for s in scores:
        shown = [f"{s.problems}", _shown(s.base, s.base_stderr), _shown(s.result, s.result_stderr)]
        lines.append(f"| {s.task} | {s.metric} | {' | '.join(shown)} | {s.result - s.base:+.4f} |")
    return lines


def missed(scores: Sequence[Score], tasks: Sequence[str], thresholds: Sequence[Threshold]) -> tuple[str, ...]:
    """A line per task whose first metric stays under a threshold."""
    lines = []
    for threshold in thresholds:
        for task in tasks if threshold.task is None else (threshold.task,):
            score = next(s for s in scores if s.task == task)
            # `not >=`: a NaN has not reached anything.
            if not score.result >= threshold.value:
                lines.append(f"{task}: {score.metric} is {score.result:.4f}, under {threshold.value:g}")
    return tuple(lines)


def check_thresholds(thresholds: Sequence[Threshold], tasks: Sequence[str]) -> None:
    """Raise EvalError for a threshold on a task that is not run."""
    unknown = [t.task for t in thresholds if t.task is not None and t.task not in tasks]
    if unknown:
        raise EvalError(f"--fail-under {unknown[0]}=...: this task is not run", hint=f"Run are: {', '.join(tasks)}")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # lm-eval writes "N/A"


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
