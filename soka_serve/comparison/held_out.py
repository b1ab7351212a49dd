"""What a comparison never trains on: validation problems choose settings, test problems give results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin.problem import Problem
from soka_serve.builtin.tasks import (
    DEFAULT_COUNTS,
    check_answer,
    extract_boxed,
    extract_hashes,
    generate,
    generate_validation,
)
from soka_serve.comparison.suite import DataSet, Other, Protocol
from soka_serve.data.encode import MASKED, EncodedExample, EncodedSet, check_answerable
from soka_serve.data.examples import DataReader, Example, render_problems
from soka_serve.errors import DataError

SPLIT_SEED = 0
"""Of what `eval_frac` holds out: the same problems in every run, whatever its seed."""

_KINDS = {"hashes": "math", "boxed": "boxed"}  # whose way of marking is used


@dataclass(frozen=True)
class HeldOut:
    """Problems, and the tokens of each with its answer; the labels of the prompt are masked."""

    problems: Sequence[Problem]
    encoded: Sequence[EncodedExample]


@dataclass(frozen=True)
class HeldOutReader:
    """Reads what is held out of a suite's data.

    Args:
        protocol: how many problems there are.
        directory: relative paths start here.
        tokenizer: the base's.
        max_length: longest problem with its answer, tokens; longer ones of data of one's own are left out.
    """

    protocol: Protocol
    directory: Path
    tokenizer: TextTokenizer
    max_length: int

    def problems(self, dataset: DataSet) -> tuple[HeldOut, HeldOut]:
        """Test and validation problems.

        Raises:
            DataError: there are too few, one has no answer, or no token to be asked by, or the two share a prompt.
        """
        protocol, family = self.protocol, dataset.data.builtin
        if family is not None:
            return self._builtin(family, dataset)
        reader = DataReader(dataset.data, self.directory, SPLIT_SEED, self.tokenizer)
        found = self._fitting(reader.examples("eval"))
        if dataset.validation == "train":
            chosen = self._fitting(reader.examples("train"))[-protocol.validation :]
        else:
            chosen = found[protocol.test :][: protocol.validation]
        test = self._held_out(dataset, found[: protocol.test], protocol.test, "test")
        validation = self._held_out(dataset, chosen, protocol.validation, "validation")
        prompts = {problem.prompt for problem in test.problems}
        if both := sum(problem.prompt in prompts for problem in validation.problems):
            raise DataError(
                f"dataset {dataset.name!r}: {both} validation problems have the prompt of a test problem",
                hint="what chooses a setting may not be in the results: give other data, or remove what stands twice",
            )
        return test, validation

    def _builtin(self, family: str, dataset: DataSet) -> tuple[HeldOut, HeldOut]:
        """Test and validation problems that share neither arithmetic nor function."""
        protocol, test_seed = self.protocol, dataset.test_seed
        if test_seed is None:
            test = generate(family, "test", protocol.test)
            validation = generate_validation(family, protocol.validation, protocol.test)
        else:
            besides = max(DEFAULT_COUNTS["test"], protocol.validation)
            test = generate_validation(family, protocol.test, besides, test_seed)
            validation = generate(family, "test", protocol.validation)
        return self._encode_all(dataset, test), self._encode_all(dataset, validation)

    def other(self, text: Other) -> list[EncodedExample]:
        """The examples of a text that nothing is trained on.

        Raises:
            DataError: none fits.
        """
        found = self._fitting(DataReader(text.data, self.directory, tokenizer=self.tokenizer).examples("train"))
        if not found:
            raise DataError(f"other {text.name!r}: no example has at most train.max_length = {self.max_length} tokens")
        return [encoded for _, encoded in found[: text.examples]]

    def _fitting(self, examples: Sequence[Example]) -> list[tuple[Example, EncodedExample]]:
        """The examples that fit, with their tokens; an example of no answer token does not."""
        pairs = self.tokenizer.encode_pairs(
            [(e.prompt, e.completion) for e in examples], add_special_tokens=not any(e.templated for e in examples)
        )
        encoded = [
            EncodedExample(p.input_ids, [MASKED] * p.prompt_length + p.input_ids[p.prompt_length :]) for p in pairs
        ]
        return [
            (example, tokens)
            for example, tokens in zip(examples, encoded, strict=True)
            if len(tokens.input_ids) <= self.max_length
        ]

    def _encode_all(self, dataset: DataSet, problems: Sequence[Problem]) -> HeldOut:
        found = self._fitting(render_problems(dataset.data, problems))
        if len(found) < len(problems):
            raise DataError(
                f"{len(problems) - len(found)} held-out problems are longer than train.max_length = {self.max_length} "
                "tokens",
                hint="raise train.max_length",
            )
        self._check_answerable(dataset, [example for example, _ in found])
        asked = [replace(problem, prompt=e.prompt) for problem, (e, _) in zip(problems, found, strict=True)]
        return HeldOut(asked, [encoded for _, encoded in found])

    def _check_answerable(self, dataset: DataSet, examples: Sequence[Example]) -> None:
        if self.protocol.answered != 0 or self.protocol.choose_by != "loss":
            hint = "write a prompt, or set protocol.answered = 0 and choose by the loss"
            check_answerable(examples, self.tokenizer, f"dataset {dataset.name!r}", hint)

    def _held_out(
        self, dataset: DataSet, found: Sequence[tuple[Example, EncodedExample]], wanted: int, what: str
    ) -> HeldOut:
        if len(found) < wanted:
            raise DataError(
                f"dataset {dataset.name!r}: {len(found)} {what} problems have at most train.max_length = "
                f"{self.max_length} tokens; protocol.{what} asks for {wanted}",
                hint="lower it, raise train.max_length, or give more data",
            )
        self._check_answerable(dataset, [example for example, _ in found])
        problems = [_problem(dataset, example, index) for index, (example, _) in enumerate(found)]
        return HeldOut(problems, [encoded for _, encoded in found])


def _problem(dataset: DataSet, example: Example, index: int) -> Problem:
    """An example as a problem with the answer that is looked for."""
    extract = {"hashes": extract_hashes, "boxed": extract_boxed}.get(dataset.answers, str.strip)
    answer = extract(example.completion)
    if answer is None:
        raise DataError(
            f"dataset {dataset.name!r}: evaluation example {index} has no answer of the kind {dataset.answers!r}: "
            f"{example.completion[-60:]!r}",
            hint="see `answers` of [[dataset]]",
        )
    return Problem(_KINDS.get(dataset.answers, "exact"), example.prompt, example.completion, answer)


def is_right(problem: Problem, text: str) -> bool:
    """Whether an answer is right, by the rule of the problem's family."""
    if problem.family == "exact":
        return text.strip() == problem.answer
    return check_answer(problem, text)


def without(training: EncodedSet, dataset: DataSet, test: HeldOut, validation: HeldOut) -> EncodedSet:
    """Training examples that are not held out.

    Raises:
        DataError: a test problem is among them, or a validation problem that is not taken from them.
    """
    refused = {tuple(e.input_ids) for e in test.encoded}
    taken = {tuple(e.input_ids) for e in validation.encoded}
    if dataset.validation == "eval":
        refused |= taken
    kept = [e for e in training.examples if tuple(e.input_ids) not in taken]
    if leaked := sum(tuple(e.input_ids) in refused for e in training.examples):
        raise DataError(
            f"dataset {dataset.name!r}: {leaked} training examples are held-out problems too",
            hint="results would measure what was trained on: take them out of the training data",
        )
    return replace(training, examples=kept)
