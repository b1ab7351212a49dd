"""The manifest's schema: one frozen pydantic model per TOML table.

Each field is described in its table's module and nowhere else: `soka-serve schema`, the starter manifest and the docs
are rendered from `Field(description=...)`. Units stand in the description. Unknown keys are errors everywhere, and so
are keys that another key makes meaningless: nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from soka_serve.manifest.across import conflicts_across
from soka_serve.manifest.base import Base
from soka_serve.manifest.data import Data, DataPart
from soka_serve.manifest.fields import FormatVersion
from soka_serve.manifest.output import Eval, Output, Serve
from soka_serve.manifest.regularise import Regularise
from soka_serve.manifest.rules import Adapt
from soka_serve.manifest.table import Key, Table, TableKeys
from soka_serve.manifest.train import REWRITING, SOKA_RATE, Prune, Train

__all__ = [
    "NAME_PATTERN",
    "REWRITING",
    "SCHEMA_VERSION",
    "SOKA_RATE",
    "Adapt",
    "Base",
    "Data",
    "DataPart",
    "Eval",
    "Manifest",
    "Output",
    "Prune",
    "Regularise",
    "Serve",
    "Train",
]

SCHEMA_VERSION = 1

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Manifest(Table):
    """A soka-serve manifest."""

    version: FormatVersion = Field(
        alias="schema", description="Version of the manifest format; always 1.", examples=[SCHEMA_VERSION]
    )
    name: Annotated[str, Field(pattern=NAME_PATTERN, max_length=100)] | None = Field(
        None, description="Name of the build; default: the file's name without .toml.", examples=["math"]
    )
    description: str = Field("", description="One line about the adapter; goes into the model card.")
    base: Base = Field(description="The frozen base model.")
    adapt: tuple[Adapt, ...] = Field(
        (Adapt(),), strict=False, min_length=1, description="Rules: which modules are adapted, and how."
    )
    train: Train = Field(description="The fine-tuning run.")
    output: Output = Field(default_factory=lambda: Output(), description="What a build writes.")
    serve: Serve = Field(default_factory=lambda: Serve(), description="How the adapter is served.")
    eval: Eval = Field(default_factory=lambda: Eval(), description="How the adapter is measured.")

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        yield from conflicts_across(keys)
