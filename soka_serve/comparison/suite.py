"""A comparison suite: which methods are trained on which data, what is tried for each, and which claims are tested.

    [[method]] x [[dataset]] x settings x seeds

Fields that a manifest has too are the manifest's own: [base], [[dataset]] data, [[method]] adapt, and in [train] the
keys of the recipe that every method shares. A setting is one value for each axis of a method's `grid`.

docs/suite.md and `soka-serve schema --suite` are rendered from `Field(description=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from soka_serve.compiler.methods import METHODS
from soka_serve.io.files import sha256_text
from soka_serve.manifest.fields import FormatVersion, PositiveInt
from soka_serve.manifest.nodes import one_of
from soka_serve.manifest.rules import Adapt, default_conflicts
from soka_serve.manifest.schema import NAME_PATTERN, Base, Data, Train
from soka_serve.manifest.table import Key, Table, TableKeys, value_of

AXES = {"learning_rate": "train.learning_rate", "clip": "train.clip"}
"""Short names of axes; `scale` is `adapt.scale` for SoKA and `train.method_scale` for the others."""

_PER_EXAMPLE = ("answer_loss", "forgetting")  # metrics

_OWN_KEYS = {
    "method", "method_rank", "method_scale", "data", "epochs", "learning_rate", "left_lr", "right_lr", "sigma_lr",
    "seed", "log_every", "eval_every", "save_every", "early_stopping", "answered",
    "report_to", "prune", "regularise",
}  # fmt: skip
SHARED_KEYS = tuple(name for name in Train.model_fields if name not in _OWN_KEYS)


def _known_method(value: object) -> object:
    """Look a method up in the registry as it is now, so that one added to it can be compared."""
    if not isinstance(value, str) or value not in METHODS:
        words = list(METHODS)
        raise PydanticCustomError("expected", "{expected}", {"expected": one_of(words), "words": words})
    return value


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError("a value is written twice")
    return values


MethodName = Annotated[str, BeforeValidator(_known_method), WithJsonSchema({"type": "string", "enum": list(METHODS)})]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=60)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], AfterValidator(_distinct)]
Values = Annotated[
    tuple[Annotated[int | float, Field(ge=0), WithJsonSchema({"type": "number", "minimum": 0})], ...],
    Field(strict=False, min_length=1),
    AfterValidator(_distinct),
    AfterValidator(lambda values: tuple(sorted(values))),
]

_fields: dict[str, Any] = {
    name: (Train.model_fields[name].annotation, Train.model_fields[name]) for name in SHARED_KEYS
}
_fields["steps"] = (PositiveInt, Field(description="Optimiser steps of every run.", examples=[150]))
Recipe = create_model(
    "Recipe",
    __base__=Table,
    __doc__="What all methods share of a manifest's [train]; the learning rate is an axis of a method's grid.",
    **_fields,
)


def _word(name: str) -> tuple[Any, Any]:
    """A key of [train] that a method may leave to the recipe."""
    field: Any = Train.model_fields[name]
    kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return kind | None, Field(None, description=f"In place of the recipe's {name}.")


Words = create_model(
    "Words",
    __base__=Table,
    __doc__="Optimiser and schedules that a method has of its own; numbers are axes of its grid.",
    optimiser=_word("optimiser"),
    schedule=_word("schedule"),
    weight_decay_schedule=_word("weight_decay_schedule"),
)


class Protocol(Table):
    """How settings are chosen and results are measured."""

    seeds: Seeds = Field(
        (0, 1, 2, 3, 4),
        strict=False,
        min_length=1,
        description="Seeds of the results, each from 0; five or more where a claim pairs seeds.",
    )
    sweep_seeds: Seeds = Field(
        (100, 101, 102),
        strict=False,
        min_length=1,
        description="Seeds that settings are chosen by, each from 0; none of `seeds`.",
    )
    settings: PositiveInt | None = Field(
        None,
        description="Settings that are tried for every method and dataset, each with every sweep seed (see "
        "`finalists`); 1 searches nothing. Default: what one pass over the axes of the largest grid takes.",
    )
    finalists: PositiveInt | None = Field(
        None,
        description="How many of the settings see the sweep seeds after the first: those that the first finds best; "
        "default: all.",
    )
    choose_by: Literal["loss", "accuracy"] = Field(
        "loss", description="What chooses a setting: loss or accuracy of the answers to the validation problems."
    )
    validation: PositiveInt = Field(100, description="Held-out problems that settings are chosen by.")
    test: PositiveInt = Field(200, description="Held-out problems of the results; none of the validation problems.")
    answered: Annotated[int, Field(ge=0)] | None = Field(
        None, description="How many test problems the model answers in words, for its accuracy; default: all of them."
    )
    max_new_tokens: PositiveInt = Field(96, description="Longest answer, tokens.")
    loss_window: PositiveInt = Field(
        10, description="Steps that the training loss is averaged over, for steps to a loss and for the last loss."
    )

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        if seen.knows("seeds", "sweep_seeds"):
            both = sorted(set(seen.values["seeds"]) & set(seen.values["sweep_seeds"]))
            if both:
                yield (
                    ("sweep_seeds",),
                    f"{', '.join(map(str, both))} stands in seeds too: no run of the results may choose a setting",
                )
        if seen.knows("finalists", "settings") and (seen.values["finalists"] or 0) > (
            seen.values["settings"] or math.inf
        ):
            yield ("finalists",), f"finalists is larger than settings ({seen.show('settings')})"
        if seen.knows("answered", "test") and (seen.values["answered"] or 0) > seen.values["test"]:
            yield ("answered",), f"answered is larger than test ({seen.show('test')})"


class DataSet(Table):
    """Data that every method is trained on and measured with."""

    name: Name = Field(description="What results call it.", examples=["math"])
    data: Data = Field(description="Training and evaluation data, as in a manifest's [train.data].")
    answers: Literal["builtin", "hashes", "boxed", "exact"] = Field(
        "builtin",
        description="How an answer is marked: a builtin family's own way, which data of your own has not; the number "
        "after '####'; the content of the first \\boxed{}; or equality with the completion.",
    )
    validation: Literal["eval", "train"] = Field(
        "eval",
        description="Where the validation problems of data of your own come from: the evaluation data, behind the test "
        "problems; or the training data's end, which is then not trained on.",
    )
    test_seed: Annotated[int, Field(ge=2, lt=2**32)] | None = Field(
        None,
        description="For a builtin family: draw other test problems than the 500 that builds measure by, and share "
        "neither arithmetic nor function with them; validation problems are the first of those 500. Default: test "
        "problems are the first of those 500.",
        examples=[2],
    )
    loss_targets: Values = Field(
        (),
        description="Training losses, nats per token and each from 0, that steps are counted to; default: none.",
        examples=[[0.5, 0.2]],
    )

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        if seen.knows("data", "answers", "validation"):
            data = seen.values["data"]
            builtin = value_of(data, "builtin") is not None
            for name in seen.has("answers", "validation") if builtin else ():
                yield (name,), f"{name} belongs to data of your own; builtin families have their own"
            if not builtin and seen.values["answers"] == "builtin":
                yield (), "answers is required for data of your own: 'hashes', 'boxed' or 'exact'"
            for name in () if builtin else seen.has("test_seed"):
                yield (name,), "test_seed belongs to builtin families; data of your own has its own test problems"
            if not builtin and not any(value_of(data, name) for name in ("eval_jsonl", "eval_split", "eval_frac")):
                yield ("data",), "a comparison needs evaluation data: eval_jsonl, eval_split or eval_frac"


class Other(Table):
    """Text that nothing is trained on: the rise of the loss on its completions is what a method forgets."""

    name: Name = Field(description="What results call it.", examples=["english"])
    data: Data = Field(description="Its training part is read, as in a manifest's [train.data].")
    examples: PositiveInt = Field(64, description="How many examples, from the first that fit max_length.")


class Contender(Table):
    """One method with everything but its setting."""

    name: Name = Field(description="What results call it.", examples=["soka-r1"])
    method: MethodName = Field(description="What is trained.")
    rank: PositiveInt = Field(
        1,
        description="Rank of lora, pissa, rslora, dora, lokr, cdka, corda and eva; adalora begins with half as much "
        "more and ends with it. soka reads adapt; osf trains half of each weight's singular directions.",
    )
    adapt: Adapt = Field(
        default_factory=lambda: Adapt(),
        description="Modules; for soka also init, rank and shape. Default: every linear projection in the language "
        "model's layers, for soka with one term.",
    )
    train: Words = Field(
        default_factory=lambda: Words(),
        description="Optimiser and schedules of its own; numbers go into its grid. Default: those of the recipe.",
        examples=[{"optimiser": "adafactor"}],
    )
    grid: dict[str, Values] = Field(
        min_length=1,
        description="Axes, each with an array of the values to try, from 0: learning_rate, clip, scale (adapt.scale of "
        "soka, train.method_scale of the others), or any key of a manifest with its table ('train.warmup_frac', "
        "'adapt.rank.parameters'). The first axis is searched first.",
        examples=[{"learning_rate": [1e-3, 2e-3, 4e-3], "clip": [0, 3]}],
    )
    datasets: tuple[Name, ...] | None = Field(None, strict=False, description="Datasets to run on; default: all.")
    priority: PositiveInt = Field(1, description="Runs with a smaller number come first.")
    calibration_batches: PositiveInt = Field(
        8, description="corda and eva: training batches that their initialisation reads."
    )

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        if not seen.knows("method"):
            return
        method = METHODS[seen.values["method"]]
        if not method.ranked:
            instead = "; write adapt = { rank = { ... } }" if method.kronecker else ""
            for name in seen.has("rank"):
                yield (name,), f"rank does not go with method = {method.name!r}{instead}"
        if not method.reads_batches:
            for name in seen.has("calibration_batches"):
                yield (name,), f"calibration_batches belongs to corda and eva; the method is {method.name!r}"
        if seen.knows("grid") and "scale" in seen.values["grid"] and not (method.scaled or method.kronecker):
            yield ("grid", "scale"), f"scale does not go with method = {method.name!r}"
        if method.kronecker and seen.knows("adapt"):
            adapt = seen.values["adapt"]
            for _, key, message in default_conflicts([Adapt.model_validate(adapt)]):
                yield ("adapt", key), message

    def key_of(self, axis: str) -> str:
        """The manifest's key that an axis sets, with its table: 'train.learning_rate'."""
        if axis == "scale":
            return "adapt.scale" if METHODS[self.method].kronecker else "train.method_scale"
        return AXES.get(axis, axis)

    @property
    def first(self) -> tuple[tuple[str, float], ...]:
        """The setting of each axis's first value."""
        return tuple((axis, values[0]) for axis, values in self.grid.items())

    @property
    def words(self) -> dict[str, str]:
        """What it has of its own in [train], by key."""
        found: dict[str, str] = self.train.model_dump(exclude_none=True)
        return found

    @property
    def first_pass(self) -> int:
        """Settings that one search along each axis tries."""
        return 1 + sum(len(values) - 1 for values in self.grid.values())


class Claim(Table):
    """One contrast between two methods, stated before the runs of the results; the program says true or false."""

    candidate: Name = Field(description="Name of a method.", examples=["soka-r1"])
    reference: Name = Field(description="Name of the method that it is compared with.", examples=["lora-r1"])
    dataset: Name | None = Field(None, description="Name of a dataset; default: the mean over all.")
    metric: Literal["answer_loss", "accuracy", "steps_to_loss", "forgetting", "grad_noise"] = Field(
        "answer_loss", description="What is compared; steps_to_loss is to the smallest of loss_targets."
    )
    relation: Literal["better", "no worse"] = Field(
        "better", description="Better than the reference, or worse by less than `margin`."
    )
    margin: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="How much worse than the reference is still 'no worse', which needs a margin above 0; 'better' has "
        "none. In the metric's unit: nats per token (answer_loss, forgetting), a share of the answers (accuracy), "
        "steps (steps_to_loss); grad_noise has no unit.",
    )
    pairs: Literal["seeds", "examples"] = Field(
        "seeds",
        description="What is paired: seeds, or examples, each with its mean over the seeds (answer_loss, forgetting). "
        "The test speaks for further seeds, or for further examples.",
    )
    primary: bool = Field(
        False,
        description="Test this contrast without correction; where there are claims, exactly one is primary.",
    )

    @classmethod
    def conflicts(cls, seen: TableKeys) -> Iterator[tuple[Key, str]]:
        by_example = seen.knows("pairs", "metric") and seen.values["pairs"] == "examples"
        if by_example and (metric := seen.values["metric"]) not in _PER_EXAMPLE:
            yield ("pairs",), f"{one_of(list(_PER_EXAMPLE))} is measured per example; the metric is {metric!r}"
        if seen.knows("relation", "margin"):
            relation, margin = seen.values["relation"], seen.values["margin"]
            if (relation == "no worse") != (margin > 0):
                yield ("margin",), "relation = 'no worse' needs a margin above 0, and 'better' has none"


class Suite(Table):
    """A soka-serve comparison suite."""

    version: FormatVersion = Field(alias="schema", description="Version of the suite format; always 1.", examples=[1])
    name: Name = Field(description="Name of the suite.", examples=["paper"])
    description: str = Field("", description="One line about the suite.")
    base: Base = Field(description="The base model, as in a manifest.")
    train: Recipe = Field(description="What all methods share of a manifest's [train].")
    protocol: Protocol = Field(
        default_factory=lambda: Protocol(),
        description="How settings are chosen and results are measured; default: that of each of its keys.",
    )
    dataset: tuple[DataSet, ...] = Field(
        strict=False, min_length=1, description="Data that methods are trained on and measured with."
    )
    other: tuple[Other, ...] = Field(
        (),
        strict=False,
        description="Text that nothing is trained on; it shows what is forgotten. Default: none, and forgetting is not "
        "measured.",
    )
    method: tuple[Contender, ...] = Field(strict=False, min_length=1, description="Methods that are compared.")
    claim: tuple[Claim, ...] = Field((), strict=False, description="Contrasts that are tested; default: none.")

    def datasets_of(self, contender: Contender) -> list[DataSet]:
        """The datasets that a method runs on."""
        return [d for d in self.dataset if contender.datasets is None or d.name in contender.datasets]

    def contender(self, name: str) -> Contender:
        """The method of that name."""
        return next(m for m in self.method if m.name == name)

    @property
    def settings(self) -> int:
        """Settings that are tried for each method on each dataset: the same number for all."""
        return self.protocol.settings or max(m.first_pass for m in self.method)

    @property
    def claims_sha256(self) -> str:
        """Hash of the claims, which every record of a result holds: it shows whether they came before the runs."""
        return sha256_text("\n".join(claim.model_dump_json() for claim in self.claim))
