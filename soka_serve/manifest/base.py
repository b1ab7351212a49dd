"""The schema of [base]: the frozen model that an adapter belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from soka_serve.manifest.fields import PathOrId, Text
from soka_serve.manifest.table import Key, Table, TableKeys, check_source


class Base(Table):
    """The frozen model that the adapter belongs to."""

    builtin: Literal["tiny"] | None = Field(
        None, description="The LLaMA-architecture model inside the package.", examples=["tiny"]
    )
    path: PathOrId | None = Field(
        None,
        description="Directory of a Hugging Face checkpoint (safetensors), relative to the manifest.",
        examples=["../models/my-llama"],
    )
    hub: PathOrId | None = Field(
        None, description="Hugging Face hub id of a checkpoint.", examples=["meta-llama/Llama-2-7b-hf"]
    )
    revision: Text | None = Field(
        None, description="Branch, tag or commit of the hub id; pin a commit to reproduce.", examples=["main"]
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype in which the base is held while training; 'auto' is the checkpoint's own, but float32 on a "
        "CPU without AMX, which most often is slow in half precision.",
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the base in 8 or 4 bits while training (bitsandbytes); initialisation reads the originals.",
    )

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        yield from check_source(keys, ("builtin", "path", "hub"))
        if keys.has("revision") and not keys.has("hub"):
            yield ("revision",), "revision belongs to hub; this base is not a hub id"
