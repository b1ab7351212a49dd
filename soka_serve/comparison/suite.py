"""A comparison suite: which methods are trained on which data, at which learning rates, with which seeds.

    [[method]] x [[dataset]] x rates x seeds

Fields that a manifest has too are the manifest's own: [base], [[dataset]] data, [[method]] adapt, and in [train] the
keys of the recipe that every method shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model, field_validator
from pydantic_core import PydanticCustomError

from soka_serve.compiler.methods import METHODS
from soka_serve.io.files import sha256_text
from soka_serve.manifest.fields import FormatVersion, PositiveInt, Text
from soka_serve.manifest.nodes import TomlPath, one_of
from soka_serve.manifest.problems import show
from soka_serve.manifest.read import name_key, parse_toml, read_text, validate
from soka_serve.manifest.rules import Adapt
from soka_serve.manifest.schema import NAME_PATTERN, Base, Data, Manifest, Train
from soka_serve.manifest.table import Key, Table, TableKeys, value_of

SHARED_KEYS = (
    "max_length", "overlong", "packing", "completion_only", "steps", "batch_size", "accumulate", "schedule",
    "warmup_frac", "weight_decay", "max_grad_norm", "gradient_checkpointing", "precision",
)  # fmt: skip


def _known_method(value: object) -> object:
    """Look a method up in the registry as it is now, so that one added to it can be compared."""
    if not isinstance(value, str) or value not in METHODS:
        words = list(METHODS)
        raise PydanticCustomError("expected", "{expected}", {"expected": one_of(words), "words": words})
    return value


MethodName = Annotated[str, BeforeValidator(_known_method), WithJsonSchema({"type": "string", "enum": list(METHODS)})]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=60)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is written twice")
    return values


_fields: dict[str, Any] = {
    name: (Train.model_fields[name].annotation, Train.model_fields[name]) for name in SHARED_KEYS
}
_fields["steps"] = (PositiveInt, Field(description="Optimiser steps of every run.", examples=[150]))
Recipe = create_model("Recipe", __base__=Table, __doc__="The part of [train] that all methods share.", **_fields)


class Protocol(Table):
    """How learning rates are chosen and results are measured."""

    seeds: Annotated[tuple[Seed, ...], AfterValidator(_distinct)] = Field(
        (0, 1, 2, 3, 4), strict=False, min_length=1, description="Seeds of the runs at the chosen learning rate."
    )
    sweep_seeds: Annotated[tuple[Seed, ...], AfterValidator(_distinct)] = Field(
        (100,), strict=False, min_length=1, description="Seeds of the runs that the learning rate is chosen by."
    )
    extensions: Annotated[int, Field(ge=0, le=8)] = Field(
        2, description="How often the grid is extended by one rate while the best one is at its edge."
    )
    validation: PositiveInt = Field(100, description="Held-out problems that learning rates are chosen by.")
    test: PositiveInt = Field(200, description="Held-out problems of the results; none of the validation problems.")
    evaluations: PositiveInt = Field(
        2,
        description="How often a run answers the test problems: after equal shares of its steps, the last at its end.",
    )
    max_new_tokens: PositiveInt = Field(96, description="Longest answer, tokens.")
    loss_window: PositiveInt = Field(10, description="Steps that the training loss is averaged over.")
    loss_reference: Text | None = Field(
        None,
        description="Method whose mean final training loss is the one that 'steps to the loss' counts to; default: the "
        "first reference of the first claim.",
        examples=["lora-r1"],
    )

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        if seen.knows("seeds", "sweep_seeds"):
            both = sorted(set(seen.values["seeds"]) & set(seen.values["sweep_seeds"]))
            if both:
                yield (
                    ("sweep_seeds",),
                    f"{', '.join(map(str, both))} stands in seeds too: no run of the results may choose a rate",
                )


class DataSet(Table):
    """Data that every method is trained on and measured with."""

    name: Name = Field(description="What results call it.", examples=["math"])
    data: Data = Field(description="Training and evaluation data, as in a manifest's [train.data].")
    answers: Literal["builtin", "hashes", "boxed", "exact"] = Field(
        "builtin",
        description="How an answer is marked: a builtin family's own way; the number after '####'; the content of the "
        "first \\boxed{}; or equality with the completion.",
    )

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        if seen.knows("data", "answers"):
            data = seen.values["data"]
            builtin = value_of(data, "builtin") is not None
            if builtin and seen.values["answers"] != "builtin":
                yield ("answers",), "answers belongs to data of your own; builtin families mark their own answers"
            if not builtin and seen.values["answers"] == "builtin":
                yield (), "answers is required for data of your own: 'hashes', 'boxed' or 'exact'"
            if not builtin and not any(value_of(data, name) for name in ("eval_jsonl", "eval_split", "eval_frac")):
                yield ("data",), "a comparison needs evaluation data: eval_jsonl, eval_split or eval_frac"


class Contender(Table):
    """One method with everything but its learning rate."""

    name: Name = Field(description="What results call it.", examples=["soka-r1"])
    method: MethodName = Field(description="What is trained.")
    rank: PositiveInt = Field(
        1,
        description="Rank of lora, pissa, rslora, dora, lokr, corda and eva; adalora begins with half as much more and "
        "ends with it. soka reads adapt; osf trains half of each weight's singular directions.",
    )
    adapt: Adapt = Field(default_factory=lambda: Adapt(), description="Modules; for soka also init, rank and shape.")
    rates: Annotated[tuple[Rate, ...], AfterValidator(_distinct)] = Field(
        strict=False, min_length=1, description="Learning rates to try.", examples=[[1e-3, 2e-3, 4e-3]]
    )
    datasets: tuple[Name, ...] | None = Field(None, strict=False, description="Datasets to run on; default: all.")
    priority: PositiveInt = Field(1, description="Runs with a smaller number come first.")
    fold_sigma: Literal["no", "left", "both"] = Field(
        "no",
        description="soka: multiply sigma into the left factors, or its root into both, and keep it fixed at 1.",
    )
    left_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="As in a manifest.")
    right_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="As in a manifest.")
    sigma_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="As in a manifest.")
    calibration_batches: PositiveInt = Field(
        8, description="corda and eva: training batches that their initialisation reads."
    )

    @field_validator("rates")
    @classmethod
    def _sorted(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(rates))

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        if not seen.knows("method"):
            return
        method = METHODS[seen.values["method"]]
        if not method.kronecker:
            for name in seen.has("fold_sigma", "left_lr", "right_lr", "sigma_lr"):
                yield (name,), f"{name} belongs to method = 'soka'; the method is {method.name!r}"
        if not method.ranked:
            instead = "; write adapt = { rank = { ... } }" if method.kronecker else ""
            for name in seen.has("rank"):
                yield (name,), f"rank does not go with method = {method.name!r}{instead}"
        if not method.reads_batches:
            for name in seen.has("calibration_batches"):
                yield (name,), f"calibration_batches belongs to corda and eva; the method is {method.name!r}"
        if seen.has("fold_sigma") and seen.has("sigma_lr"):
            yield ("sigma_lr",), "sigma_lr does not go with fold_sigma, which keeps sigma fixed"


class Claim(Table):
    """A method that is tested against others, seed by seed."""

    candidate: Name = Field(description="Name of a method.", examples=["soka-r1"])
    references: tuple[Name, ...] = Field(
        strict=False, min_length=1, description="Names of methods it is compared with.", examples=[["lora-r1"]]
    )


class Suite(Table):
    """A soka-serve comparison suite."""

    version: FormatVersion = Field(alias="schema", description="Version of the suite format; always 1.", examples=[1])
    name: Name = Field(description="Name of the suite.", examples=["paper"])
    description: str = Field("", description="One line about the suite.")
    base: Base = Field(description="The base model, as in a manifest.")
    train: Recipe = Field(description="What all methods share of a manifest's [train].")
    protocol: Protocol = Field(default_factory=lambda: Protocol(), description="How it is measured.")
    dataset: tuple[DataSet, ...] = Field(strict=False, min_length=1, description="Datasets.")
    method: tuple[Contender, ...] = Field(strict=False, min_length=1, description="Methods.")
    claim: tuple[Claim, ...] = Field((), strict=False, description="Paired tests.")

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        names: dict[str, list[str]] = {}

        def unknown(kind: str, name: str) -> str:
            return f"no {kind} is called {show(name)}; there are {', '.join(names[kind])}"

        for table in ("dataset", "method"):
            if not seen.knows(table):
                return
            names[table] = [value_of(item, "name") for item in seen.values[table]]
            for i, name in enumerate(names[table]):
                if name in names[table][:i]:
                    yield (table, i, "name"), f"{show(name)} is the name of another {table} already"
        for i, contender in enumerate(seen.values["method"]):
            for name in value_of(contender, "datasets") or ():
                if name not in names["dataset"]:
                    yield ("method", i, "datasets"), unknown("dataset", name)
        for i, claim in enumerate(seen.values["claim"] if seen.knows("claim") else ()):
            for key in ("candidate", "references"):
                value = value_of(claim, key)
                for name in (value,) if isinstance(value, str) else value or ():
                    if name not in names["method"]:
                        yield ("claim", i, key), unknown("method", name)
        reference = value_of(seen.values["protocol"], "loss_reference") if seen.knows("protocol") else None
        if reference is not None and reference not in names["method"]:
            yield ("protocol", "loss_reference"), unknown("method", reference)

    def datasets_of(self, contender: Contender) -> list[DataSet]:
        """The datasets that a method runs on."""
        return [d for d in self.dataset if contender.datasets is None or d.name in contender.datasets]

    def contender(self, name: str) -> Contender:
        """The method of that name."""
        return next(m for m in self.method if m.name == name)

    @property
    def loss_reference(self) -> str | None:
        """The method whose final training loss 'steps to the loss' counts to."""
        if self.protocol.loss_reference is not None:
            return self.protocol.loss_reference
        return self.claim[0].references[0] if self.claim else None


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and where it came from; relative paths in it start from `directory`."""

    suite: Suite
    path: Path
    directory: Path
    text: str
    sha256: str

    def name_key(self, path: TomlPath) -> str:
        """A key for messages: 'suite.toml:4:1: base.path'."""
        return name_key(path, self.text, str(self.path))


def read_suite(path: str | Path) -> LoadedSuite:
    """Read, parse and validate a suite.

    Raises:
        ManifestError: the file cannot be read, is not TOML, or does not follow the schema; holds all problems.
    """
    path = Path(path)
    text = read_text(path)
    return LoadedSuite(parse_suite(text, str(path)), path, path.absolute().parent, text, sha256_text(text))


def parse_suite(text: str, file: str) -> Suite:
    """Parse and validate a suite's text; `file` is what errors call it.

    Raises:
        ManifestError: everything that is wrong, each with its place.
    """
    return validate(Suite, parse_toml(text, file), text, file)


def manifest_of(suite: Suite, contender: Contender, dataset: DataSet, *, rate: float, seed: int) -> Manifest:
    """The manifest of one run. A method that manifests do not know has the recipe of `lora`."""
    shared: Any = suite.train
    train = Train(
        method=cast(Any, contender.method if METHODS[contender.method].in_manifests else "lora"),
        method_rank=contender.rank,
        data=dataset.data,
        learning_rate=rate,
        left_lr=contender.left_lr,
        right_lr=contender.right_lr,
        sigma_lr=0.0 if contender.fold_sigma != "no" else contender.sigma_lr,
        seed=seed,
        log_every=1,
        **{name: getattr(shared, name) for name in SHARED_KEYS},
    )
    return Manifest(schema=1, name=contender.name, base=suite.base, adapt=(contender.adapt,), train=train)
