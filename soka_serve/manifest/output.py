"""The schema of [output], [serve] and [eval]: what becomes of a trained adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from soka_serve.manifest.fields import PathOrId, PositiveInt, Text
from soka_serve.manifest.table import Key, Table, TableKeys


class Output(Table):
    """What a build writes."""

    dir: PathOrId = Field(
        "build", description="Folder of builds, relative to where the command runs; files go to DIR/NAME."
    )
    write: tuple[Literal["adapter", "merged"], ...] = Field(
        ("adapter",), strict=False, min_length=1, description="'adapter', 'merged' (a dense model), or both."
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the factors.")
    adapter_terms: Literal["all", "trained"] | Annotated[float, Field(gt=0, le=1)] = Field(
        "all",
        description="Terms that are stored, merged and served. 'all' is exact: trained minus initial ones, up to twice "
        "as many as were trained. 'trained' keeps the best ones, as many as were trained; a share keeps as few as hold "
        "that share of each module's energy (plans count all of them). The report has what is lost.",
        examples=[0.999],
    )
    merged_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the merged model; 'auto' is the base's own."
    )
    report: bool = Field(True, description="Write report.html.")
    measure: tuple[Literal["intruders", "spectra"], ...] = Field(
        (),
        strict=False,
        description="What else is measured, for measured.json and the report. 'intruders': per module, how many of the "
        "10 leading singular vectors of the adapted weight the base's has not (SVDs of every adapted weight). "
        "'spectra': effective ranks and nuclear norms of hidden states, base and adapted, and of the base's first "
        "gradients (some training batches, forward and backward).",
        examples=[["intruders", "spectra"]],
    )

    @field_validator("adapter_terms", mode="before")
    @classmethod
    def _check_adapter_terms(cls, value: object) -> object:
        """Check the whole value here: one error instead of one for each side of the union."""
        if value in ("all", "trained") or (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        ):
            return value
        expected = "'all', 'trained', or a share of the energy above 0, at most 1"
        raise PydanticCustomError("expected", "{expected}", {"expected": expected, "words": ["all", "trained"]})

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        for name, file in (("adapter_dtype", "adapter"), ("merged_dtype", "merged")):
            if keys.has(name) and keys.knows("write") and file not in keys.values["write"]:
                yield (name,), f"{name} would be ignored: write does not list '{file}'"


class Serve(Table):
    """How `soka-serve serve` runs this adapter; builds do not read it."""

    name: Text | None = Field(
        None, description="Model name in the API; default: the manifest's name.", examples=["math"]
    )
    host: Text = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="TCP port.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the served base; 'auto' is vLLM's choice, and in `eval` the checkpoint's own."
    )
    max_model_len: PositiveInt | None = Field(
        None, description="Longest context, tokens; default: the base's.", examples=[2048]
    )


class Eval(Table):
    """The quick accuracy check that `build` runs before and after training (builtin data only), and eval tasks."""

    limit: Annotated[int, Field(ge=0)] = Field(200, description="Held-out problems answered; 0 skips the check.")
    max_new_tokens: PositiveInt = Field(
        128,
        description="Longest answer, tokens. `soka-serve eval` leaves each task its own length unless this is given.",
    )
    tasks: tuple[Text, ...] = Field(
        (),
        strict=False,
        description="lm-eval tasks for `soka-serve eval`; none: the one of the built-in data.",
        examples=[["soka_gsm8k"]],
    )
