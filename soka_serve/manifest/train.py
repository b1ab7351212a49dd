"""The schema of [train]: the fine-tuning run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from soka_serve.manifest.data import Data, DataPart
from soka_serve.manifest.fields import PositiveInt
from soka_serve.manifest.optimisers import DEFAULT_OPTIMISER, OPTIMISERS, REFUSED
from soka_serve.manifest.regularise import Regularise
from soka_serve.manifest.table import ARRAY_FORM, TABLE_FORM, Key, Table, TableKeys, value_of
from soka_serve.regularisers import REGULARISERS
from soka_serve.starts import STARTS, names_of

REWRITING = ("pissa", "full")  # methods that train on changed weights of the base

SOKA_RATE = 8.0
_OTHER_RATE = 2e-3


def _taken(value: object) -> object:
    if isinstance(value, str) and value in REFUSED:
        raise ValueError(f"the Trainer's {value} is refused: {REFUSED[value]}")
    return value


if TYPE_CHECKING:
    OptimiserName = str
else:
    OptimiserName = Annotated[Literal[tuple(OPTIMISERS)], BeforeValidator(_taken)]


def _data_form(value: object) -> str:
    return ARRAY_FORM if isinstance(value, list | tuple) else TABLE_FORM


class Prune(Table):
    """Dropping terms during training."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = Field(
        description="A term whose share of its module's energy stays below this is dropped."
    )
    every: PositiveInt = Field(50, description="Steps between checks.")
    patience: PositiveInt = Field(2, description="Checks in a row that a term must fail.")
    min: PositiveInt = Field(1, description="Fewest terms a module keeps.")


class Train(Table):
    """The fine-tuning run."""

    LATER = frozenset({"answered", "compile", "optimiser", "regularise", "weight_decay_schedule"})

    method: Literal["soka", "lora", "pissa", "lokr", "full"] = Field(
        "soka", description="What is trained; the others are PEFT baselines over the same modules, data and schedule."
    )
    method_rank: PositiveInt = Field(2, description="Rank of the lora, pissa and lokr baselines; soka reads [[adapt]].")
    method_scale: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Factor of the lora, pissa and lokr baselines' update, alpha / rank; soka reads [[adapt]]."
    )
    data: Annotated[
        Annotated[Data, Tag(TABLE_FORM)]
        | Annotated[tuple[DataPart, ...], Field(strict=False, min_length=1), Tag(ARRAY_FORM)],
        Discriminator(_data_form),
    ] = Field(description="The training data.")
    max_length: PositiveInt = Field(512, description="Longest example, tokens.")
    overlong: Literal["drop", "truncate"] = Field(
        "drop", description="What happens to examples longer than max_length; both are counted and reported."
    )
    packing: bool = Field(
        False,
        description="Put several examples in one row, attention kept apart. Refused before training where the base "
        "mixes them.",
    )
    completion_only: bool = Field(True, description="Take the loss over the completion only, not the prompt.")
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the data (or give steps); 1 when neither is given.", examples=[1.0]
    )
    steps: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Optimiser steps (or give epochs); 0 exports the initialisation, which does something with "
        f"init = {names_of(s for s in STARTS.values() if s.moves_base)} only.",
        examples=[300],
    )
    batch_size: PositiveInt = Field(8, description="Examples per device and step.")
    accumulate: PositiveInt = Field(1, description="Batches summed into one optimiser step.")
    optimiser: OptimiserName = Field(
        DEFAULT_OPTIMISER,
        description="What makes steps of gradients: 'adamw', or another of the transformers Trainer's, by its name for "
        "it. Those that project gradients (GaLore, APOLLO) go with method = 'full' only.",
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Peak learning rate of AdamW. For soka it says how far a step moves factors, meant to be right at "
        "every width, rank and factor shape; long runs may need less. Default: RATE with method = 'soka', 2e-3 "
        "otherwise, which is tuned for no method.".replace("RATE", f"{SOKA_RATE:g}"),
        examples=[SOKA_RATE],
    )
    left_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="Multiplier on the learning rate for left factors.")
    right_lr: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Multiplier on the learning rate for right factors."
    )
    sigma_lr: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Multiplier on the learning rate for sigma. Default: 0 where sigma only repeats the size of Left "
        "and Right (docs/training.md has the cases), else 1.",
        examples=[1.0],
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Learning rate after warm-up.")
    warmup_frac: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="Share of the steps spent warming up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="AdamW's weight decay, at each parameter's own rate. For soka it pulls deltas to zero, "
        "the model to the base.",
    )
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Weight decay over the steps: as it is, or annealed to zero (SoMA: 'cosine')."
    )
    clip: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="0: each step's gradient is scaled to norm 1, so that steps weigh alike in AdamW's averages. Else "
        "gradients are clipped to this multiple of the median norm of the last 32 steps.",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Clip gradients to this norm instead of by `clip`.", examples=[1.0]
    )
    group_by_length: bool = Field(
        True, description="Put examples of similar lengths in a batch, which leaves little padding."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward; saves memory.")
    compile: bool = Field(
        False,
        description="Run decoder layers through torch.compile: faster steps, once it has taken a minute or two. A CPU "
        "needs a C++ compiler.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Autocast dtype of the computation; trained factors stay float32. 'auto' is the dtype in which the "
        "base is held while training, where the device computes in it.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        0, description="Seed of data order, initialisation and dropout."
    )
    log_every: PositiveInt = Field(10, description="Steps between log lines.")
    eval_every: PositiveInt | None = Field(
        None, description="Steps between evaluations of the loss; none by default.", examples=[100]
    )
    save_every: PositiveInt = Field(50, description="Steps between resume points.")
    early_stopping: PositiveInt | None = Field(
        None,
        description="Stop after so many evaluations without a better loss (or accuracy, see `answered`), and keep the "
        "best one's weights; needs eval_every.",
        examples=[3],
    )
    answered: PositiveInt | None = Field(
        None,
        description="Judge evaluations not by the loss but by greedy answers to so many held-out problems: "
        "early_stopping waits for a better accuracy, and keeps the weights of the best. Of a builtin family they are "
        "none of those that results are measured on; of other data the first evaluation examples, whose answers stand "
        "after #### or in \\boxed{}.",
        examples=[100],
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (),
        strict=False,
        description="Experiment trackers, as transformers names them; for tensorboard: `tensorboard --logdir build`.",
    )
    prune: Prune | None = Field(None, description="Drop weak terms during training.")
    regularise: Regularise = Field(
        default_factory=lambda: Regularise(), description="What other methods add to the loss, or do to the factors."
    )

    @property
    def datasets(self) -> tuple[Data, ...]:
        """The one dataset, or those that are mixed."""
        return (self.data,) if isinstance(self.data, Data) else self.data

    @property
    def judged(self) -> Data | None:
        """The first dataset that has held-out problems, which the quick check asks."""
        return next((data for data in self.datasets if data.has_evaluation), None)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Shares of the datasets in an epoch; None where each gives all of its examples."""
        found = [part.weight for part in self.data if part.weight is not None] if isinstance(self.data, tuple) else []
        return tuple(found) or None

    @property
    def rate(self) -> float:
        """The peak learning rate: what the manifest says, or the method's default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return SOKA_RATE if self.method == "soka" else _OTHER_RATE

    @property
    def multipliers(self) -> dict[str, float | None]:
        """Of the rates of left, right and sigma, as `soka_serve.peft.optimizer` takes them."""
        asked = any(REGULARISERS[name].needs_sigma for name in self.regularise.chosen)
        sigma = 1.0 if self.sigma_lr is None and asked else self.sigma_lr
        return {"left": self.left_lr, "right": self.right_lr, "sigma": sigma}

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        if len(keys.has("epochs", "steps")) == 2:
            yield ("steps",), "steps and epochs exclude each other"
        if len(keys.has("clip", "max_grad_norm")) == 2:
            yield ("max_grad_norm",), "max_grad_norm and clip exclude each other"
        if keys.has("weight_decay_schedule") and not keys.has("weight_decay"):
            yield ("weight_decay_schedule",), "weight_decay_schedule belongs to weight_decay, which is 0, the default"
        if keys.has("early_stopping") and not keys.has("eval_every"):
            yield ("early_stopping",), "early_stopping needs eval_every"
        if keys.has("answered") and not keys.has("early_stopping"):
            yield ("answered",), "answered needs early_stopping, which keeps the best evaluation's weights"
        if keys.has("prune") and keys.knows("method") and keys.values["method"] != "soka":
            yield ("prune",), f"prune belongs to method = 'soka'; the method is {keys.values['method']!r}"
        if keys.knows("data") and isinstance(keys.values["data"], list | tuple):
            weights = [value_of(part, "weight") for part in keys.values["data"]]
            for i in (i for i, weight in enumerate(weights) if weight is None) if any(weights) else ():
                yield ("data", i), "weight is missing: other datasets have one, so that each needs it"
        if keys.has("optimiser") and keys.knows("optimiser", "method"):
            yield from _optimiser_conflicts(keys)
        if keys.has("regularise") and keys.knows("regularise", "method"):
            yield from _regulariser_conflicts(keys)
        if keys.has("eval_every") and keys.knows("data"):
            sources = ("builtin", "eval_jsonl", "eval_split", "eval_frac")
            parts = data if isinstance(data := keys.values["data"], list | tuple) else [data]
            if not any(value_of(part, name) for part in parts for name in sources):
                yield ("eval_every",), "eval_every needs evaluation data: eval_jsonl, eval_split or eval_frac"


def _optimiser_conflicts(keys: TableKeys) -> Iterator[tuple[Key, str]]:
    """Methods and keys that an optimiser does not go with."""
    name, method = keys.values["optimiser"], keys.values["method"]
    optimiser = OPTIMISERS[name]
    if optimiser.projects and method != "full":
        yield (
            ("optimiser",),
            f"{name} projects gradients of whole weight matrices: it belongs to method = 'full'; the method is "
            f"{method!r}",
        )
    if optimiser.lawless and method == "soka":
        yield (
            ("optimiser",),
            f"{name} does not go with method = 'soka', whose rates are shares of the layers' outputs: "
            f"{optimiser.lawless}",
        )
    if keys.has("prune") and not optimiser.by_value:
        yield ("prune",), f"prune does not go with optimiser = {name!r}, whose state cannot be cut with a term"


def _regulariser_conflicts(keys: TableKeys) -> Iterator[tuple[Key, str]]:
    """Methods and keys that a regulariser does not go with."""
    method, table = keys.values["method"], keys.values["regularise"]
    for row in REGULARISERS.values():
        if not value_of(table, row.name):
            continue
        place = ("regularise", row.name)
        if row.kronecker and method != "soka":
            yield place, f"{row.name} belongs to method = 'soka'; the method is {method!r}"
        elif row.needs_base and method in REWRITING:
            yield place, f"{row.name} asks the base, and method = {method!r} changes the base's weights"
        elif row.kronecker and all(keys.values.get(f"{part}_lr") == 0 for part in row.trains):
            yield place, f"{row.name} acts on {' and '.join(row.trains)} alone, which is not trained at a rate of 0"
        others = [name for name in row.excludes if name in REGULARISERS and value_of(table, name)]
        for key in keys.has(*row.excludes) + others:
            yield place, f"{row.name} does not go with {key}: {row.excludes[key]}"
