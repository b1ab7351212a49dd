"""The quick accuracy check of a build: a few held-out problems before and after training.

For the built-in task families every answer is marked; for other data a few answers are generated to look at, and
nothing is scored (that is `soka-serve eval`'s job).
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.data.encode import answerable, check_answerable
from soka_serve.data.examples import DataReader, render_problems
from soka_serve.manifest.schema import Manifest

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

# Answers shown when nothing is scored, and kept as samples for the report.
SAMPLES = 6


@dataclass(frozen=True)
class Answers:
    """What one model answered.

    `correct` and `total` are None when the data has no marker; `texts` and `marks` hold the first few answers.
    """

    correct: int | None
    total: int | None
    texts: list[str]
    marks: list[bool] | None

    @property
    def accuracy(self) -> tuple[int, int] | None:
        """(correct, total); None when the data has no marker."""
        return None if self.correct is None or self.total is None else (self.correct, self.total)


@dataclass(frozen=True)
class QuickCheck:
    """The same prompts answered by the base and by the result."""

    prompts: list[str]
    expected: list[str]
    before: Answers
    after: Answers

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, path: Path) -> QuickCheck:
        """Read what `write` wrote."""
        value = json.loads(path.read_text())
        return cls(**value | {key: Answers(**value[key]) for key in ("before", "after")})


@dataclass(frozen=True)
class Questions:
    """Held-out prompts as training reads them, and how answers are marked (`family` None: they are not). `templated`:
    they are rendered chats, which bring their own special tokens."""

    family: str | None
    limit: int
    prompts: list[str]
    expected: list[str]
    templated: bool = False


def choose_questions(manifest: Manifest, manifest_dir: Path, tokenizer: TextTokenizer) -> Questions | None:
    """Held-out problems of the manifest's data; None when `[eval] limit` is 0 or there are none.

    Raises:
        DataError: they cannot be read or rendered, or a builtin family's prompts have no token.
    """
    limit = manifest.eval.limit
    if limit == 0:
        return None
    data = manifest.train.judged
    if data is None:
        return None
    if data.builtin is not None:
        from soka_serve.builtin.tasks import generate

        asked = render_problems(data, generate(data.builtin, "test", limit))
        check_answerable(asked, tokenizer, "train.data.prompt", "write a prompt, or set eval.limit = 0")
        return Questions(data.builtin, limit, [e.prompt for e in asked], [e.completion for e in asked])
    reader = DataReader(data, manifest_dir, manifest.train.seed, tokenizer)
    read = reader.examples("eval", limit=min(limit, SAMPLES))
    examples = list(compress(read, answerable(read, tokenizer)))
    if len(examples) < len(read):
        logger.info(
            "check: %d of %d held-out prompts have no token, and are not asked", len(read) - len(examples), len(read)
        )
    if not examples:
        return None
    prompts, expected = [e.prompt for e in examples], [e.completion for e in examples]
    return Questions(None, len(examples), prompts, expected, templated=data.messages is not None)


def answer(model: nn.Module, tokenizer: TextTokenizer, questions: Questions, max_new_tokens: int) -> Answers:
    """Let a model answer greedily, and mark the answers where the data has a marker."""
    from soka_serve.compiler.answers import generate_answers, measure

    if questions.family is None:
        prompts, chats = questions.prompts, questions.templated
        texts = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size=8, templated=chats)
        return Answers(None, None, texts, None)
    marked = measure(
        model, questions.family, questions.limit, max_new_tokens, tokenizer=tokenizer, prompts=questions.prompts
    )
    first = marked.samples[:SAMPLES]
    return Answers(marked.correct, marked.total, [s.text for s in first], [s.correct for s in first])
