"""Training data: builtin families, JSON Lines, or hub datasets -> rendered examples.

`data.encode` makes token ids of them. The `datasets` library is imported only for hub datasets.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.builtin.problem import Problem
from soka_serve.data.hub_rows import hub_rows, text_length
from soka_serve.data.rows import Row, builtin_rows, jsonl_rows, problem_row, resolve
from soka_serve.errors import DataError
from soka_serve.io.warn_once import warn
from soka_serve.manifest.schema import Data
from soka_serve.manifest.templates import DEFAULT_COMPLETION, DEFAULT_PROMPT, RowTemplate

logger = logging.getLogger(__name__)

_CHUNK = 512  # Rows rendered per call.
_CHUNK_TEXT = 8 << 20  # Characters of the rows rendered per call.
_NO_TOKENIZER = "train.data.messages: chat messages need the base's tokenizer, and it is not at hand"

Part = Literal["train", "eval"]


@dataclass(frozen=True)
class Example:
    """One training text: the model reads `prompt` and learns to write `completion`.

    `templated` is True for rendered chats, whose text carries its own special tokens: none are added to it.
    """

    prompt: str
    completion: str
    templated: bool = False


@dataclass(frozen=True)
class DataReader:
    """Reads the examples of a manifest's data.

    Args:
        data: the [train.data] table.
        manifest_dir: relative paths start here.
        seed: chooses which examples `eval_frac` holds out, and nothing else.
        tokenizer: needed for `data.messages`, whose chat template it holds.
    """

    data: Data
    manifest_dir: Path
    seed: int = 0
    tokenizer: TextTokenizer | None = None

    def examples(self, part: Part, *, limit: int | None = None, stream: bool = False) -> list[Example]:
        """Read and render examples.

        Args:
            part: 'train', or 'eval': the configured evaluation set, a share of the training examples, or a builtin
                family's held-out split; [] where nothing is configured.
            limit: the first so many examples only, on top of `data.limit`.
            stream: read a hub dataset without downloading all of it (for samples).

        Raises:
            DataError: a file that is missing, empty, malformed or not UTF-8 (with line numbers), an unreachable
                dataset, a column that a template names and a row lacks.
        """
        data = self.data
        if data.messages is not None and self.tokenizer is None:
            raise DataError(_NO_TOKENIZER)
        held_out = data.eval_frac > 0  # then there is no evaluation set of its own
        if part == "eval" and not data.has_evaluation:
            return []
        # A held-out share is chosen among all rows, so `limit` may not cut before it.
        rows: Iterable[tuple[str, Row]]
        rows = self._rows("train", None, stream) if held_out else self._rows(part, limit, stream)
        if held_out:
            everything = list(rows)
            chosen = _held_out(len(everything), data.eval_frac, self.seed)
            rows = [row for index, row in enumerate(everything) if (index in chosen) == (part == "eval")]
        rendered = [example for chunk in _chunks(islice(rows, limit)) for example in self._render(chunk)]
        if not rendered:
            raise DataError(f"train.data: no {part} examples in {_source(data)}")
        empty = sum(not e.completion.strip() for e in rendered)
        if empty:
            warn(logger, "%d of %d %s examples have an empty completion", empty, len(rendered), part)
        return rendered

    def _rows(self, part: Part, limit: int | None, stream: bool) -> Iterator[tuple[str, Row]]:
        data, jsonl, split = self.data, self.data.eval_jsonl, self.data.eval_split
        if part == "train":
            jsonl, split = data.jsonl, data.split
            limit = min((n for n in (limit, data.limit) if n is not None), default=None)
        if jsonl is not None:
            return islice(jsonl_rows(resolve(self.manifest_dir, jsonl), limit), limit)
        if data.builtin is not None:
            return builtin_rows(data.builtin, "train" if part == "train" else "test", limit)
        return islice(hub_rows(data, str(split), self.manifest_dir, stream, limit), limit)

    def _render(self, rows: Sequence[tuple[str, Row]]) -> Iterator[Example]:
        if self.data.messages is not None and self.tokenizer is not None:
            return _render_chat_rows(self.data.messages, rows, self.tokenizer)
        return _render_rows(self.data, rows)


def _held_out(total: int, frac: float, seed: int) -> frozenset[int]:
    """Row numbers held out for evaluation: at least one, and never all."""
    if total < 2:
        raise DataError(f"train.data.eval_frac: {total} example(s) cannot be split into training and evaluation")
    count = min(max(1, round(total * frac)), total - 1)
    return frozenset(random.Random(seed).sample(range(total), count))


def _source(data: Data) -> str:
    """The data's source in words, for messages."""
    if data.builtin is not None:
        return f"builtin '{data.builtin}'"
    return f"'{data.jsonl}'" if data.jsonl is not None else f"hub dataset '{data.hub}'"


def _chunks(rows: Iterable[tuple[str, Row]]) -> Iterator[list[tuple[str, Row]]]:
    """So many rows at a time, fewer where they are long."""
    chunk: list[tuple[str, Row]] = []
    length = 0
    for where, row in rows:
        chunk.append((where, row))
        length += text_length(row)
        if len(chunk) == _CHUNK or length > _CHUNK_TEXT:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _render_rows(data: Data, rows: Sequence[tuple[str, Row]]) -> Iterator[Example]:
    completion = DEFAULT_COMPLETION if data.completion is None else data.completion
    templates = (_prompt_template(data), _row_template(completion, "train.data.completion"))
    for texts in zip(*(template.render_many(rows) for template in templates), strict=False):
        errors = [text for text in texts if isinstance(text, DataError)]
        if errors:
            hints = [e.hint for e in errors if e.hint]
            raise DataError("\n".join(e.message for e in errors), hint=" ".join(hints) or None)
        prompt, answer = map(str, texts)
        yield Example(prompt, answer)


def _render_chat_rows(column: str, rows: Sequence[tuple[str, Row]], tokenizer: TextTokenizer) -> Iterator[Example]:
    chats: list[tuple[Sequence[Mapping[str, Any]], bool]] = []
    malformed: DataError | None = None
    for where, row in rows:
        try:
            messages, last = _find_answer(column, row, where)
        except DataError as error:  # rows before it may have another
            malformed = error
            break
        chats += [(messages[:last], True), (messages[: last + 1], False)]
    texts = iter(tokenizer.render_many(chats))
    for where, _ in rows[: len(chats) // 2]:
        parts = [text for text in islice(texts, 2) if _is_text(text, f"{where}: {column}")]
        prompt, whole = map(str, parts)
        if not whole.startswith(prompt):
            raise DataError(
                f"{where}: {column}: the chat template renders the conversation differently once the answer is there, "
                "so prompt and completion cannot be told apart",
                hint="Use prompt and completion templates for this tokenizer.",
            )
        yield Example(prompt, whole[len(prompt) :], templated=True)
    if malformed is not None:
        raise malformed


def _is_text(text: str | DataError, place: str) -> bool:
    if isinstance(text, DataError):
        raise DataError(f"{place}: {text.message}", hint=text.hint)
    return True


def _find_answer(column: str, row: Row, where: str) -> tuple[Sequence[Mapping[str, Any]], int]:
    """The messages of a row, and which of them is the last of the assistant's."""
    if column not in row:
        raise DataError(
            f"{where}: train.data.messages names column '{column}', which the row does not have; it has "
            f"{', '.join(sorted(row))}"
        )
    messages = row[column]
    valid = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not valid:
        raise DataError(f"{where}: {column}: expected a list of objects with the texts 'role' and 'content'")
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    if last == 0:
        raise DataError(f"{where}: {column}: no assistant message after another one; there is nothing to learn")
    return messages, last


def render_prompt(data: Data, row: Row, where: str, tokenizer: TextTokenizer | None = None) -> str:
    """The prompt of one row, exactly as `DataReader` renders it; the row needs no column of the completion.

    Args:
        where: which row, for errors: 'gsm8k'.
        tokenizer: needed for `data.messages`; the row's last message must be the assistant's, its text is not used.

    Raises:
        DataError: as `DataReader.examples`.
    """
    if data.messages is None:
        return _prompt_template(data).render(row, where)
    if tokenizer is None:
        raise DataError(_NO_TOKENIZER)
    return next(_render_chat_rows(data.messages, [(where, row)], tokenizer)).prompt


def render_problems(data: Data, problems: Sequence[Problem]) -> list[Example]:
    """Problems of the data's builtin family, as `DataReader` renders its rows.

    Raises:
        DataError: a template names a column that they have not.
    """
    return list(_render_rows(data, [(f"builtin {p.family}[{i}]", problem_row(p)) for i, p in enumerate(problems)]))


def _prompt_template(data: Data) -> RowTemplate:
    return _row_template(DEFAULT_PROMPT if data.prompt is None else data.prompt, "train.data.prompt")


@lru_cache(maxsize=16)
def _row_template(text: str, key: str) -> RowTemplate:
    return RowTemplate(text, key)
