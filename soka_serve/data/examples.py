"""Training data: builtin families, JSON Lines, or hub datasets -> examples -> token ids with a loss mask.

`load_examples` renders text, `encode_examples` tokenises and masks it, `pack_examples` puts several examples in a row.
The `datasets` library is imported only for hub datasets.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.data.hub_rows import hub_rows, text_length
from soka_serve.data.rows import Row, UnreachableDataError, builtin_rows, jsonl_rows, open_data, read_lines, resolve
from soka_serve.errors import DataError
from soka_serve.io.warn_once import warn
from soka_serve.manifest.schema import Data
from soka_serve.manifest.templates import DEFAULT_COMPLETION, DEFAULT_PROMPT, RowTemplate

__all__ = [
    "MASKED",
    "Encoded",
    "EncodedSet",
    "Example",
    "Packed",
    "TextTokenizer",
    "UnreachableDataError",
    "count_examples",
    "data_sha256",
    "encode_examples",
    "load_examples",
    "pack_examples",
    "render_prompt",
]

logger = logging.getLogger(__name__)

MASKED = -100  # The label that cross-entropy ignores, in torch and transformers.

_CHUNK = 512  # Examples rendered and tokenised per call, so that progress shows.
_CHUNK_TEXT = 8 << 20  # Characters of the rows rendered per call.

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
class Encoded:
    """Token ids, and labels of the same length; a label of -100 is not trained on."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodedSet:
    """Encoded examples and what became of the rest.

    `total` examples came in; `dropped` were too long (or had no trained token left), `truncated` were cut, and
    `boundary` had a token that would have merged prompt and completion and were split there instead.
    """

    examples: list[Encoded]
    total: int
    dropped: int
    truncated: int
    boundary: int = 0
    longest: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the kept examples."""
        return sum(len(e.input_ids) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        """Tokens of the kept examples that the loss is taken over."""
        return sum(sum(label != MASKED for label in e.labels) for e in self.examples)


@dataclass(frozen=True)
class Packed:
    """Several examples in one row; `position_ids` start again at 0 with each, which keeps their attention apart."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


# --------------------------------------------------------------------------------------------------------- loading


def load_examples(
    data: Data,
    *,
    manifest_dir: Path,
    part: Part,
    seed: int = 0,
    limit: int | None = None,
    tokenizer: TextTokenizer | None = None,
    stream: bool = False,
) -> list[Example]:
    """Read and render the examples of `data`.

    Args:
        manifest_dir: relative paths start here.
        part: 'train', or 'eval': the configured evaluation set, a share of the training examples, or a builtin
            family's held-out split; [] where nothing is configured.
        seed: chooses which examples `eval_frac` holds out, and nothing else.
        limit: the first so many examples only, on top of `data.limit`.
        tokenizer: needed for `data.messages`, whose chat template it holds.
        stream: read a hub dataset without downloading all of it (for samples).

    Raises:
        DataError: a file that is missing, empty, malformed or not UTF-8 (with line numbers), an unreachable dataset, a
            column that a template names and a row lacks.
    """
    if data.messages is not None and tokenizer is None:
        raise DataError("train.data.messages: chat messages need the base's tokenizer, and it is not at hand")
    separate = data.eval_jsonl is not None or data.eval_split is not None or data.builtin is not None
    held_out = data.eval_frac > 0 and not separate
    if data.eval_frac > 0 and separate and part == "eval":
        warn(logger, "train.data.eval_frac has no effect: there is an evaluation set")
    if part == "eval" and not separate and not held_out:
        return []
    rows: Iterable[tuple[str, Row]]
    if part == "eval" and not held_out:
        rows = _eval_rows(data, manifest_dir, limit, stream)
    else:
        # A held-out share is chosen among all rows, so `limit` may not cut before it.
        rows = _train_rows(data, manifest_dir, None if held_out else limit, stream)
    if held_out:
        everything = list(rows)
        chosen = _held_out(len(everything), data.eval_frac, seed)
        rows = [row for index, row in enumerate(everything) if (index in chosen) == (part == "eval")]
    rendered = _render(data, islice(rows, limit), tokenizer)
    if not rendered:
        raise DataError(f"train.data: no {part} examples in {_source(data)}")
    empty = sum(not e.completion.strip() for e in rendered)
    if empty:
        warn(logger, "%d of %d %s examples have an empty completion", empty, len(rendered), part)
    return rendered


def _train_rows(data: Data, manifest_dir: Path, limit: int | None, stream: bool) -> Iterator[tuple[str, Row]]:
    limit = min((n for n in (limit, data.limit) if n is not None), default=None)
    if data.builtin is not None:
        return builtin_rows(data.builtin, "train", limit)
    if data.jsonl is not None:
        return islice(jsonl_rows(resolve(manifest_dir, data.jsonl), limit), limit)
    return islice(hub_rows(data, data.split, manifest_dir, stream, limit), limit)


def _eval_rows(data: Data, manifest_dir: Path, limit: int | None, stream: bool) -> Iterator[tuple[str, Row]]:
    if data.eval_jsonl is not None:
        return islice(jsonl_rows(resolve(manifest_dir, data.eval_jsonl), limit), limit)
    if data.eval_split is not None:
        return islice(hub_rows(data, data.eval_split, manifest_dir, stream, limit), limit)
    return builtin_rows(str(data.builtin), "test", limit)


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


def _render(data: Data, rows: Iterable[tuple[str, Row]], tokenizer: TextTokenizer | None) -> list[Example]:
    examples: list[Example] = []
    for chunk in _chunks(rows):
        if data.messages is not None and tokenizer is not None:
            examples += _render_chat_rows(data.messages, chunk, tokenizer)
        else:
            examples += _render_rows(data, chunk)
    return examples


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
    """The prompt of one row, exactly as `load_examples` renders it; the row needs no column of the completion.

    Args:
        where: which row, for errors: 'gsm8k'.
        tokenizer: needed for `data.messages`; the row's last message must be the assistant's, its text is not used.

    Raises:
        DataError: as `load_examples`.
    """
    if data.messages is None:
        return _prompt_template(data).render(row, where)
    if tokenizer is None:
        raise DataError("train.data.messages: chat messages need the base's tokenizer, and it is not at hand")
    return next(_render_chat_rows(data.messages, [(where, row)], tokenizer)).prompt


def _prompt_template(data: Data) -> RowTemplate:
    return _row_template(DEFAULT_PROMPT if data.prompt is None else data.prompt, "train.data.prompt")


@lru_cache(maxsize=16)
def _row_template(text: str, key: str) -> RowTemplate:
    return RowTemplate(text, key)


def count_examples(data: Data, *, manifest_dir: Path) -> int | None:
    """How many training rows there are, before `eval_frac`; None where only loading a hub dataset would tell.

    Raises:
        DataError: the file cannot be read.
    """
    if data.jsonl is not None:
        total = sum(1 for _ in read_lines(resolve(manifest_dir, data.jsonl)))
    elif data.builtin is not None:
        from soka_serve.builtin.tasks import DEFAULT_COUNTS

        # A builtin family has no end: the limit is how many are generated.
        return data.limit or DEFAULT_COUNTS["train"]
    else:
        return None
    return total if data.limit is None else min(total, data.limit)


def data_sha256(data: Data, *, manifest_dir: Path) -> str:
    """Hash of what the examples are made from: sources, templates, limits.

    Builtin: the family and the generators' source. JSON Lines and local dataset directories: the files' bytes, wherever
    they lie, and names inside a directory. Hub: id and revision only; an unpinned id hashes the same when its authors
    change it.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    local = data.hub is not None and resolve(manifest_dir, data.hub).is_dir()
    places = ("jsonl", "eval_jsonl", *(["hub"] if local else []))
    digest.update(json.dumps(data.model_dump(mode="json") | {n: "" for n in places if getattr(data, n)}).encode())
    files: list[Path] = []
    if data.builtin is not None:
        package = Path(__file__).parents[1] / "builtin"
        files += sorted(f for f in package.glob("*.py") if f.name.startswith(("tasks", "problem", "family_")))
    if data.jsonl is not None:
        files.append(resolve(manifest_dir, data.jsonl))
    if data.eval_jsonl is not None:
        files.append(resolve(manifest_dir, data.eval_jsonl))
    if local:
        folder = resolve(manifest_dir, str(data.hub))
        files += sorted(f for f in folder.rglob("*") if f.is_file())
        digest.update(json.dumps([str(f.relative_to(folder)) for f in files]).encode())
    for file in files:
        try:
            with open_data(file) as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------- encoding


def encode_examples(
    examples: Sequence[Example],
    tokenizer: TextTokenizer,
    *,
    max_length: int,
    overlong: Literal["drop", "truncate"],
    completion_only: bool,
) -> EncodedSet:
    """Tokenise examples, mask prompts, and drop or cut those longer than `max_length` tokens.

    EOS ends every completion; a cut one loses it, since the model shall not learn to stop there. An example with no
    trained token left after the cut is dropped.

    Raises:
        DataError: every example was dropped.
    """
    from tqdm import tqdm

    kept: list[Encoded] = []
    dropped = truncated = boundary = longest = 0
    # The bar appears only when tokenising takes longer than two seconds.
    with tqdm(total=len(examples), desc="tokenise", unit="example", delay=2, leave=False) as bar:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            for example_ids in _encode_chunk(chunk, tokenizer):
                ids, prompt_length, merged = example_ids
                boundary += merged
                longest = max(longest, len(ids))
                labels = [MASKED] * prompt_length + ids[prompt_length:] if completion_only else list(ids)
                if len(ids) > max_length:
                    ids, labels = ids[:max_length], labels[:max_length]
                    # The first label has no token before it to be predicted from.
                    if overlong == "drop" or all(label == MASKED for label in labels[1:]):
                        dropped += 1
                        continue
                    truncated += 1
                kept.append(Encoded(ids, labels))
            bar.update(len(chunk))
    if examples and not kept:
        raise DataError(
            f"train: all {len(examples)} examples are longer than max_length = {max_length} tokens (the longest has "
            f"{longest})",
            hint=f"Set train.max_length to {longest}, or train.overlong = 'truncate'.",
        )
    return EncodedSet(kept, len(examples), dropped, truncated, boundary, longest)


def _encode_chunk(chunk: Sequence[Example], tokenizer: TextTokenizer) -> Iterator[tuple[list[int], int, bool]]:
    """Tokenise a chunk in order; plain and templated examples each in one batch."""
    batches = {
        templated: iter(
            tokenizer.encode_pairs(
                [(e.prompt, e.completion) for e in chunk if e.templated == templated],
                add_special_tokens=not templated,
            )
        )
        for templated in {e.templated for e in chunk}
    }
    for example in chunk:
        pair = next(batches[example.templated])
        yield pair.input_ids, pair.prompt_length, pair.boundary


def pack_examples(encoded: Sequence[Encoded], max_length: int) -> list[Packed]:
    """Put examples into rows of at most `max_length` tokens: each, in order, into the first row with room for it.

    `position_ids` start again with each example, and the label of each example's first token is -100, so that no
    example is predicted from another.

    Raises:
        ValueError: an example is longer than `max_length`.
    """
    rows: list[list[Encoded]] = []
    rooms = _Rooms(len(encoded), max_length)
    for example in encoded:
        length = len(example.input_ids)
        if length > max_length:
            raise ValueError(f"an example of {length} tokens does not fit rows of {max_length}")
        index = rooms.take(length)
        if index == len(rows):
            rows.append([])
        rows[index].append(example)
    return [_join(row) for row in rows]


def _join(row: Sequence[Encoded]) -> Packed:
    return Packed(
        input_ids=[token for e in row for token in e.input_ids],
        labels=[label for e in row for label in [MASKED, *e.labels[1:]]],
        position_ids=[position for e in row for position in range(len(e.input_ids))],
    )


class _Rooms:
    """First fit in O(log n): a tree over rows whose nodes hold the largest room below them."""

    def __init__(self, rows: int, room: int) -> None:
        self._leaves = 1
        while self._leaves < rows:
            self._leaves *= 2
        self._room = [room] * (2 * self._leaves)

    def take(self, length: int) -> int:
        """Index of the first row with `length` room; takes it. A row per example always suffices."""
        node = 1
        while node < self._leaves:
            node = 2 * node if self._room[2 * node] >= length else 2 * node + 1
        index = node - self._leaves
        self._room[node] -= length
        while node > 1:
            node //= 2
            self._room[node] = max(self._room[2 * node], self._room[2 * node + 1])
        return index
