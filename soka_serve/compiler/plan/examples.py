"""The data part of a plan: examples as the model will see them, and how many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soka_serve.base.base import Base
from soka_serve.base.served_tokenizer import check_reading, reading_note
from soka_serve.base.tokenizer import TextTokenizer
from soka_serve.data.encode import MASKED, EncodedSet, encode_examples, pack_examples
from soka_serve.data.examples import DataReader, Example
from soka_serve.data.mixture import mix_encoded, mixture_counts, naming
from soka_serve.data.rows import UnreachableDataError, resolve
from soka_serve.data.sources import count_examples
from soka_serve.errors import CheckpointError, DataError
from soka_serve.manifest.schema import Data, Manifest, Train

_TRIED = 8  # Examples of an evaluation set that are rendered, to see that they can be.
SAMPLE = 1000  # Examples rendered and tokenised for a plan; larger data is extrapolated from the first so many.
SHOWN = 3
_COUNTS = ("tokens", "trained_tokens", "dropped", "truncated", "boundary", "longest")  # of an `EncodedSet`

_MIXING_LAYERS = {"linear_attention", "conv", "mamba", "hybrid", "recurrent"}
_MIXING_KEYS = {"linear_conv_kernel_dim", "conv_L_cache", "mamba_d_state", "mamba_n_heads", "state_size", "ssm_cfg"}


@dataclass(frozen=True)
class Segment:
    """A piece of an example's text, and whether the loss is taken over it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RenderedExample:
    """An example as the model sees it, special tokens included; `tokens` is None when no tokenizer was at hand."""

    segments: tuple[Segment, ...]
    tokens: int | None
    trained_tokens: int | None


@dataclass(frozen=True)
class PartPlan:
    """One of several datasets: its examples (without those that are dropped), and how many of them an epoch takes."""

    source: str
    examples: int
    used: int


@dataclass(frozen=True)
class DataPlan:
    """The training data. Counts are those of `sampled` examples; None where something could not be read.

    `examples` is the whole number (after `limit` and `eval_frac`), `problem` says what could not be read, and `rows`
    how many rows the model sees per epoch (fewer than examples when packing or dropping); scaled up when sampled.
    `parts` are the datasets of a mixture, of which all examples are read. `reading` says where transformers, and so the
    counts, read text otherwise than tokenizer.json alone would.
    """

    source: str
    examples: int | None
    sampled: int
    encoded: bool
    tokens: int | None
    trained_tokens: int | None
    dropped: int | None
    truncated: int | None
    boundary: int | None
    longest: int | None
    rows: int | None
    steps: int | None
    shown: tuple[RenderedExample, ...]
    problem: str | None
    reading: str | None = None
    parts: tuple[PartPlan, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether every example was counted."""
        return self.examples is not None and self.sampled == self.examples


def mixes_rows(config: Mapping[str, Any]) -> bool:
    """Whether a base's config.json tells of convolutions or recurrent layers, which mix the examples of a packed row.

    Only told ahead: what a model really does is measured before training (`soka_serve.compiler.train.packing`).

    >>> mixes_rows({"layer_types": ["full_attention", "linear_attention"]}), mixes_rows({"head_dim": 64})
    (True, False)
    """
    inner = config.get("text_config")
    keys = {**config, **(inner if isinstance(inner, dict) else {})}
    types = keys.get("layer_types")
    kinds = {kind for kind in types if isinstance(kind, str)} if isinstance(types, list) else set()
    return bool(kinds & _MIXING_LAYERS or keys.keys() & _MIXING_KEYS)


def plan_data(manifest: Manifest, manifest_dir: Path, base: Base, *, hub_down: bool = False) -> DataPlan:
    """Render and tokenise the data, or the first `SAMPLE` examples of it.

    Data or a tokenizer that is not there is said in `problem`. With `hub_down` the hub was just found out of reach, and
    is not asked again: its client's retries take half a minute.

    Raises:
        CheckpointError: the tokenizer is there, but broken, or servers cannot read the text with it.
        DataError: the data is there, but malformed, lacks a column, or all of it is too long.
    """
    train = manifest.train
    problems: list[str] = []
    tokenizer = _find_tokenizer(base, problems)
    read = _read_examples(manifest, manifest_dir, tokenizer, hub_down, problems)
    examples, total = [example for part, _ in read for example in part], None
    if all(count is not None for _, count in read):
        total = sum(count or 0 for _, count in read) if read else None
    encoded: EncodedSet | None = None
    reading = None
    parts: tuple[PartPlan, ...] = ()
    if tokenizer is not None and examples:
        if differing := check_reading(tokenizer, examples, base.tokenizer_folder):
            reading = reading_note(tokenizer.settings.reader, differing, len(examples))
        try:
            sets = []
            for number, (part, _) in enumerate(read):
                with naming(number, len(read)):
                    sets.append(encode_examples(part, tokenizer, train))
            encoded = mix_encoded(sets, train.weights, train.seed)
            if len(sets) > 1:
                sizes = [len(one.examples) for one in sets]
                used = mixture_counts(sizes, train.weights)
                parts = tuple(map(PartPlan, map(_describe, train.datasets), sizes, used))
        except DataError as error:
            if len(examples) == total:
                raise
            problems.append(error.message)
    rows = _rows(train, encoded, total, len(examples))
    return DataPlan(
        source="; ".join(map(_describe, train.datasets)),
        examples=total,
        sampled=len(examples),
        encoded=encoded is not None,
        **{name: getattr(encoded, name) if encoded else None for name in _COUNTS},
        rows=rows,
        steps=_steps(train, rows),
        shown=_show(examples, encoded, tokenizer, train.completion_only),
        problem="; ".join(problems) or None,
        reading=reading,
        parts=parts,
    )


def _find_tokenizer(base: Base, problems: list[str]) -> TextTokenizer | None:
    """The base's tokenizer; None, and a problem, where it is not at hand."""
    try:
        return base.planned_tokenizer
    except CheckpointError:
        if (base.directory / "tokenizer.json").is_file():
            raise
    problems.append(f"tokens cannot be counted: the base's tokenizer is not at hand ({base.directory.name})")
    return None


def _read_examples(
    manifest: Manifest, manifest_dir: Path, tokenizer: TextTokenizer | None, hub_down: bool, problems: list[str]
) -> list[tuple[list[Example], int | None]]:
    """Of each dataset the first examples and how many there are; none, and a problem, where one cannot be reached."""
    found = []
    for number, data in enumerate(manifest.train.datasets):
        if data.messages is not None and tokenizer is None:
            problems.append("chat messages cannot be shown without the tokenizer's chat template")
        elif hub_down and data.hub is not None and not resolve(manifest_dir, data.hub).is_dir():
            problems.append(f"examples cannot be shown: hub dataset '{data.hub}': the hub cannot be reached")
        else:
            try:
                with naming(number, len(manifest.train.datasets)):
                    found.append(_sample(manifest.train, data, manifest_dir, tokenizer))
            except UnreachableDataError as error:
                problems.append(f"examples cannot be shown: {error.message}")
    return found if len(found) == len(manifest.train.datasets) else []


def _sample(
    train: Train, data: Data, manifest_dir: Path, tokenizer: TextTokenizer | None
) -> tuple[list[Example], int | None]:
    """The first `SAMPLE` training examples, and how many there are (None: only loading all of them would tell)."""
    total = count_examples(data, manifest_dir=manifest_dir)
    # With a held-out share, which examples are for training is only known after reading all of them; so are the
    # proportions of a mixture.
    limit = None if data.eval_frac or len(train.datasets) > 1 else SAMPLE
    reader = DataReader(data, manifest_dir, train.seed, tokenizer)
    examples = reader.examples("train", limit=limit, stream=data.hub is not None and limit is not None)
    if data.eval_jsonl or data.eval_split:  # a build reads it before it trains, and refuses what is wrong
        reader.examples("eval", limit=_TRIED, stream=data.hub is not None)
    if limit is None or (total is None and len(examples) < SAMPLE):
        total = len(examples)
    return examples if len(train.datasets) > 1 else examples[:SAMPLE], total


def _describe(data: Data) -> str:
    if data.builtin is not None:
        return f"builtin '{data.builtin}'"
    if data.jsonl is not None:
        return data.jsonl
    parts = [f"hub {data.hub}", *([f"config {data.config}"] if data.config else []), f"split {data.split}"]
    return ", ".join([*parts, *([f"revision {data.revision}"] if data.revision else [])])


def _rows(train: Train, encoded: EncodedSet | None, total: int | None, sampled: int) -> int | None:
    """Rows of an epoch, scaled up from the sample."""
    if encoded is None or total is None or not sampled:
        return None
    rows = len(pack_examples(encoded.examples, train.max_length)) if train.packing else len(encoded.examples)
    return rows if sampled == total else round(rows * total / sampled)


def _steps(train: Train, rows: int | None) -> int | None:
    """Optimiser steps, counted as transformers' Trainer counts them on one device."""
    if train.steps is not None:
        return train.steps
    if rows is None:
        return None
    batches = math.ceil(rows / train.batch_size)
    return math.ceil((train.epochs or 1.0) * max(1, math.ceil(batches / train.accumulate)))


def _show(
    examples: Sequence[Example], encoded: EncodedSet | None, tokenizer: TextTokenizer | None, completion_only: bool
) -> tuple[RenderedExample, ...]:
    """The first examples: as tokens where there is a tokenizer, else as text."""
    if encoded is None or tokenizer is None:
        return tuple(
            RenderedExample((Segment(e.prompt, not completion_only), Segment(e.completion, True)), None, None)
            for e in examples[:SHOWN]
        )
    shown = []
    for example in encoded.examples[:SHOWN]:
        masked = next((i for i, label in enumerate(example.labels) if label != MASKED), len(example.labels))
        head, tail = tokenizer.decode(example.input_ids[:masked]), tokenizer.decode_after(example.input_ids, masked)
        segments = [Segment(text, trained) for text, trained in ((head, False), (tail, True)) if text]
        shown.append(RenderedExample(tuple(segments), len(example.input_ids), len(example.input_ids) - masked))
    return tuple(shown)
