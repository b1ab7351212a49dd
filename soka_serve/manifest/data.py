"""The schema of [train.data], and of each of several [[train.data]]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from soka_serve.manifest.fields import PathOrId, PositiveInt, Text
from soka_serve.manifest.table import Key, Table, TableKeys, check_source


class Data(Table):
    """Where training examples come from, and how they become text."""

    builtin: Literal["math", "boxed", "code", "math-easy", "boxed-easy", "code-easy"] | None = Field(
        None, description="A task family generated inside the package.", examples=["math"]
    )
    jsonl: PathOrId | None = Field(
        None,
        description="JSON Lines file, one object per line, relative to the manifest.",
        examples=["data/train.jsonl"],
    )
    hub: PathOrId | None = Field(
        None,
        description="Hugging Face dataset id, or a local dataset directory: JSON, CSV, Parquet, Arrow or text files.",
        examples=["openai/gsm8k"],
    )
    config: Text | None = Field(None, description="The hub dataset's configuration name.", examples=["main"])
    split: Text = Field("train", description="The hub dataset's split to train on.")
    revision: Text | None = Field(None, description="Branch, tag or commit of the hub dataset.", examples=["main"])
    limit: PositiveInt | None = Field(None, description="Use only the first so many examples.", examples=[1000])
    prompt: str | None = Field(
        None,
        description="Jinja2 template of the prompt; columns are variables (a builtin family has prompt, completion "
        "and answer). Default: '{{ prompt }}'.",
        examples=["Question: {{ question }}\nAnswer:"],
    )
    completion: str | None = Field(
        None,
        description="Jinja2 template of what the model shall answer. Default: '{{ completion }}'.",
        examples=[" {{ answer }}"],
    )
    messages: Text | None = Field(
        None,
        description="Column that holds chat messages (role, content); rendered by the tokenizer's chat template. "
        "The last assistant message is the completion.",
        examples=["messages"],
    )
    eval_jsonl: PathOrId | None = Field(
        None, description="JSON Lines file of evaluation examples.", examples=["data/test.jsonl"]
    )
    eval_split: Text | None = Field(None, description="The hub dataset's split to evaluate on.", examples=["test"])
    eval_frac: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the training examples held out for evaluation when there is no evaluation set."
    )

    @property
    def has_evaluation(self) -> bool:
        """Whether there are examples to evaluate on."""
        return bool(self.builtin or self.eval_jsonl or self.eval_split or self.eval_frac)

    @property
    def asks_by_template(self) -> bool:
        """Whether templates say how a builtin family's problems are asked, an empty one as well."""
        return self.builtin is not None and not (self.prompt is None and self.completion is None)

    @field_validator("prompt", "completion")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        if value is not None:
            # Deferred: `schema` and `--help` never need Jinja2.
            from soka_serve.manifest.templates import parse_template

            parse_template(value)  # nothing is rendered here
        return value

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        yield from check_source(keys, ("builtin", "jsonl", "hub"))
        for name in keys.has("prompt", "completion") if keys.has("messages") else ():
            yield (name,), f"{name} and messages exclude each other"
        for name in keys.has("config", "split", "revision", "eval_split") if not keys.has("hub") else ():
            yield (name,), f"{name} belongs to hub; this data is not a hub dataset"
        if keys.has("builtin"):
            for name in keys.has("messages"):
                yield (name,), f"{name} does not go with builtin, whose columns are prompt, completion and answer"
            for name in keys.has("eval_frac"):
                yield (name,), f"{name} does not go with builtin, whose families have a held-out split of their own"
        else:
            held_out = keys.has("eval_jsonl", "eval_split", "eval_frac")
            for name in held_out[1:]:
                yield (name,), f"{name} and {held_out[0]} exclude each other: one evaluation set at a time"


class DataPart(Data):
    """One of several datasets that are mixed: `[[train.data]]` in place of `[train.data]`, with its keys and a weight.

    An epoch is the longest one with exact proportions in which no example comes twice: one dataset gives all of its
    examples, the others a seeded choice, the same in every epoch. `plan` shows the counts, after what is too long was
    dropped. Evaluation sets are joined; the quick check asks the problems of the first dataset that has some, and
    benchmarks take the prompt of the first dataset.
    """

    weight: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Share of the examples of an epoch, relative to the other weights. Without weights every dataset "
        "gives all of its examples.",
        examples=[0.5],
    )
