"""Examples -> token ids with a loss mask -> rows of several examples.

`encode_examples` tokenises and masks, `pack_examples` puts several examples in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from soka_serve.base.tokenizer import TextTokenizer, TokenPair
from soka_serve.data.examples import Example
from soka_serve.errors import DataError
from soka_serve.io.progress import track
from soka_serve.manifest.schema import Train

MASKED = -100  # The label that cross-entropy ignores, in torch and transformers.

_CHUNK = 512  # Examples tokenised per call, so that progress shows.


@dataclass(frozen=True)
class EncodedExample:
    """Token ids, and labels of the same length; a label of -100 is not trained on."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EncodedSet:
    """Encoded examples and what became of the rest.

    `total` examples came in; `dropped` were too long (or had no trained token left), `truncated` were cut, and
    `boundary` had a token that would have merged prompt and completion and were split there instead.
    """

    examples: list[EncodedExample]
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
class PackedRow:
    """Several examples in one row; `position_ids` start again at 0 with each, which keeps their attention apart."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


def encode_examples(examples: Sequence[Example], tokenizer: TextTokenizer, train: Train) -> EncodedSet:
    """Tokenise examples, mask prompts, and drop or cut those longer than `train.max_length` tokens, as [train] says.

    EOS ends every completion; a cut one loses it, since the model shall not learn to stop there. An example with no
    trained token left after the cut is dropped.

    Raises:
        DataError: every example was dropped.
    """
    kept: list[EncodedExample] = []
    max_length = train.max_length
    dropped = truncated = boundary = longest = 0
    with track(len(examples), "tokenise", unit="example") as advance:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            for pair in _encode_chunk(chunk, tokenizer):
                ids, prompt_length = pair.input_ids, pair.prompt_length
                boundary += pair.boundary
                longest = max(longest, len(ids))
                labels = [MASKED] * prompt_length + ids[prompt_length:] if train.completion_only else list(ids)
                if len(ids) > max_length:
                    ids, labels = ids[:max_length], labels[:max_length]
                    # The first label has no token before it to be predicted from.
                    if train.overlong == "drop" or all(label == MASKED for label in labels[1:]):
                        dropped += 1
                        continue
                    truncated += 1
                kept.append(EncodedExample(ids, labels))
            advance(by=len(chunk))
    if examples and not kept:
        raise DataError(
            f"train: all {len(examples)} examples are longer than max_length = {max_length} tokens (the longest has "
            f"{longest})",
            hint=f"Set train.max_length to {longest}"
            + (", or train.overlong = 'truncate'." if train.overlong == "drop" else "."),
        )
    return EncodedSet(kept, len(examples), dropped, truncated, boundary, longest)


def _encode_chunk(chunk: Sequence[Example], tokenizer: TextTokenizer) -> Iterator[TokenPair]:
    """Tokenise a chunk in order; plain and templated examples each in one batch."""
    batches = {
        templated: iter(
            tokenizer.encode_pairs(
                [(e.prompt, e.completion) for e in chunk if e.templated == templated], add_special_tokens=not templated
            )
        )
        for templated in {e.templated for e in chunk}
    }
    for example in chunk:
        yield next(batches[example.templated])


def answerable(examples: Sequence[Example], tokenizer: TextTokenizer) -> list[bool]:
    """Whether each example's prompt has a token, so that a model has something to go on from.

    A tokenizer that puts nothing before a text makes no token of an empty one.
    """
    return [pair.prompt_length > 0 for pair in _encode_chunk(examples, tokenizer)]


def check_answerable(examples: Sequence[Example], tokenizer: TextTokenizer, whose: str, hint: str) -> None:
    """Refuse to ask examples of which a prompt has no token.

    Args:
        examples: what a model is to answer.
        tokenizer: the base's.
        whose: key or data that the error names.
        hint: what to do instead.

    Raises:
        DataError: how many they are.
    """
    if empty := answerable(examples, tokenizer).count(False):
        raise DataError(
            f"{whose}: {empty} of {len(examples)} held-out prompts have no token, so that no answer can be asked for",
            hint=hint,
        )


def pack_examples(encoded: Sequence[EncodedExample], max_length: int) -> list[PackedRow]:
    """Put examples into rows of at most `max_length` tokens: each, in order, into the first row with room for it.

    `position_ids` start again with each example, and the label of each example's first token is -100, so that no
    example is predicted from another.

    Raises:
        ValueError: an example is longer than `max_length`.
    """
    rows: list[list[EncodedExample]] = []
    rooms = _RowTree(len(encoded), max_length)
    for example in encoded:
        length = len(example.input_ids)
        if length > max_length:
            raise ValueError(f"an example of {length} tokens does not fit rows of {max_length}")
        index = rooms.take(length)
        if index == len(rows):
            rows.append([])
        rows[index].append(example)
    return [_join(row) for row in rows]


def _join(row: Sequence[EncodedExample]) -> PackedRow:
    return PackedRow(
        input_ids=[token for e in row for token in e.input_ids],
        labels=[label for e in row for label in [MASKED, *e.labels[1:]]],
        position_ids=[position for e in row for position in range(len(e.input_ids))],
    )


class _RowTree:
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
