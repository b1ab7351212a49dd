"""The held-out problems of a comparison: validation problems choose learning rates, test problems measure results."""

from __future__ import annotations

from pathlib import Path

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin.problem import Problem
from soka_serve.builtin.tasks import check_answer, extract_boxed, extract_hashes, generate, generate_validation
from soka_serve.comparison.suite import DataSet, Protocol
from soka_serve.data.examples import DataReader
from soka_serve.errors import DataError

_KINDS = {"hashes": "math", "boxed": "boxed"}  # whose way of marking is used


def validation_problems(
    dataset: DataSet, protocol: Protocol, directory: Path, tokenizer: TextTokenizer
) -> list[Problem]:
    """The problems that choose learning rates; none of them is among `test_problems`."""
    if dataset.data.builtin is not None:
        return generate_validation(dataset.data.builtin, protocol.validation, protocol.test)
    return _own(dataset, protocol, directory, tokenizer)[protocol.test :]


def test_problems(dataset: DataSet, protocol: Protocol, directory: Path, tokenizer: TextTokenizer) -> list[Problem]:
    """The problems that measure results; for a builtin family, those that builds measure by."""
    if dataset.data.builtin is not None:
        return generate(dataset.data.builtin, "test", protocol.test)
    return _own(dataset, protocol, directory, tokenizer)[: protocol.test]


def _own(dataset: DataSet, protocol: Protocol, directory: Path, tokenizer: TextTokenizer) -> list[Problem]:
    """Evaluation examples of data of one's own, the test problems first.

    Raises:
        DataError: too few, or one without an answer.
    """
    wanted = protocol.test + protocol.validation
    examples = DataReader(dataset.data, directory, tokenizer=tokenizer).examples("eval", limit=wanted)
    if len(examples) < wanted:
        raise DataError(
            f"dataset {dataset.name!r} has {len(examples)} evaluation examples; protocol.test and protocol.validation "
            f"need {wanted}",
            hint="lower them, or give more evaluation data",
        )
    problems = []
    for index, example in enumerate(examples):
        answer = _answer(dataset, example.completion)
        if answer is None:
            raise DataError(
                f"dataset {dataset.name!r}: evaluation example {index} has no answer of the kind {dataset.answers!r}: "
                f"{example.completion[-60:]!r}",
                hint="see `answers` of [[dataset]]",
            )
        kind = _KINDS.get(dataset.answers, "exact")
        problems.append(Problem(kind, example.prompt, example.completion, answer))
    return problems


def _answer(dataset: DataSet, completion: str) -> str | None:
    if dataset.answers == "hashes":
        return extract_hashes(completion)
    if dataset.answers == "boxed":
        return extract_boxed(completion)
    return completion.strip()


def is_right(problem: Problem, text: str) -> bool:
    """Whether an answer is right, by the rule of the problem's family."""
    if problem.family == "exact":
        return text.strip() == problem.answer
    return check_answer(problem, text)
