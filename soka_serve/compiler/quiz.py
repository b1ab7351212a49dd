"""Held-out problems that evaluations during training let the model answer, where `[train] answered` asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin.problem import Problem
from soka_serve.builtin.tasks import (
    DEFAULT_COUNTS,
    check_answer,
    extract_boxed,
    extract_hashes,
    generate_validation,
)
from soka_serve.compiler.processes import launched_sharding
from soka_serve.data.encode import check_answerable
from soka_serve.data.examples import DataReader, render_problems
from soka_serve.errors import DataError, PlanError
from soka_serve.manifest.schema import Manifest

logger = logging.getLogger(__name__)

_NO_EXAMPLES = "train.answered is set, but there are no evaluation examples"
_BY_LOSS = "leave train.answered out: the loss then says which evaluation is the best"
_EXTRACT: dict[str, Callable[[str], str | None]] = {"math": extract_hashes, "boxed": extract_boxed}
"""How an answer is found in a text, by the family whose marking is used."""


@dataclass(frozen=True)
class Quiz:
    """Problems, and how they are asked."""

    problems: Sequence[Problem]
    tokenizer: TextTokenizer
    max_new_tokens: int
    templated: bool = False

    def accuracy(self, model: Any) -> float:
        """Share of the problems that a model answers right, greedily."""
        from soka_serve.compiler.answers import generate_answers

        prompts = [problem.prompt for problem in self.problems]
        texts = generate_answers(model, self.tokenizer, prompts, self.max_new_tokens, templated=self.templated)
        right = sum(check_answer(problem, text) for problem, text in zip(self.problems, texts, strict=True))
        return right / len(texts)


def kept_apart(manifest: Manifest) -> int:
    """How many of a built-in family's test problems a quiz leaves alone: those of the quick check and of benchmarks."""
    return max(DEFAULT_COUNTS["test"], manifest.eval.limit)


def make_quiz(manifest: Manifest, manifest_dir: Path, tokenizer: TextTokenizer) -> Quiz | None:
    """The problems of `[train] answered`; None where it is not set.

    Of a built-in family they share nothing with the problems that results are measured on; of other data they are the
    first evaluation examples, marked by the number after `####` or by the content of `\\boxed{}`.

    Raises:
        DataError: no evaluation examples, or some have an answer of neither kind, or a prompt without any token.
        PlanError: launched with FSDP or DeepSpeed.
    """
    count, data = manifest.train.answered, manifest.train.judged
    if count is None:
        return None
    if data is None:
        raise DataError(_NO_EXAMPLES)
    if launched := launched_sharding():
        raise PlanError(
            f"train.answered does not go with {launched}: no process has the whole model to answer with",
            hint="leave train.answered out, or launch without --use_fsdp and --use_deepspeed (DDP)",
        )
    limit = manifest.eval.max_new_tokens
    if data.builtin is not None:
        problems = generate_validation(data.builtin, count, kept_apart(manifest))
        examples = render_problems(data, problems)
        check_answerable(examples, tokenizer, "train.answered", _BY_LOSS)
        return Quiz([replace(p, prompt=e.prompt) for p, e in zip(problems, examples, strict=True)], tokenizer, limit)
    examples = DataReader(data, manifest_dir, manifest.train.seed, tokenizer).examples("eval", limit=count)
    if not examples:
        raise DataError(_NO_EXAMPLES)
    if len(examples) < count:
        logger.warning("train.answered = %d: there are only %d evaluation examples to ask", count, len(examples))
    check_answerable(examples, tokenizer, "train.answered", _BY_LOSS)
    for family, extract in _EXTRACT.items():
        answers = [extract(example.completion) for example in examples]
        if None not in answers:
            problems = [
                Problem(family, example.prompt, example.completion, str(answer))
                for example, answer in zip(examples, answers, strict=True)
            ]
            return Quiz(problems, tokenizer, limit, templated=data.messages is not None)
    raise DataError(
        f"train.answered: of {len(examples)} evaluation examples not every one has its answer after #### or in "
        "\\boxed{}",
        hint=_BY_LOSS,
    )
