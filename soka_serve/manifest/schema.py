"""The manifest's schema: one frozen pydantic model per TOML table.

Each field is described here and nowhere else: `soka-serve schema`, the starter manifest and the docs are rendered
from `Field(description=...)`. Units stand in the description. Unknown keys are errors everywhere, and so are keys
that another key makes meaningless: nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field, Tag, create_model, field_validator

from soka_serve.manifest.fields import FormatVersion, PathOrId, PositiveInt, Text
from soka_serve.manifest.optimisers import DEFAULT_OPTIMISER, OPTIMISERS, REFUSED
from soka_serve.manifest.rules import Adapt
from soka_serve.manifest.table import ARRAY_FORM, TABLE_FORM, Key, Table, TableKeys, value_of
from soka_serve.regularisers import REGULARISERS
from soka_serve.starts import STARTS, names_of
from soka_serve.trained import PARTS, TRAINED

SCHEMA_VERSION = 1

REWRITING = ("pissa", "full")  # methods that train on changed weights of the base

SOKA_RATE = 8.0
_OTHER_RATE = 2e-3

if TYPE_CHECKING:
    OptimiserName = str
else:
    OptimiserName = Literal[tuple(OPTIMISERS)]

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _check_source(keys: TableKeys, names: tuple[str, ...]) -> Iterator[tuple[Key, str]]:
    """Exactly one of the names must be set."""
    came = keys.has(*names)
    if not came:
        yield (), f"expected one of {', '.join(names)}; got none of them"
    for name in came[1:]:
        yield (name,), f"{name} and {came[0]} exclude each other: give exactly one of {', '.join(names)}"


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
        "CPU without AMX, which is slow in half precision.",
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the base in 8 or 4 bits while training (bitsandbytes); initialisation reads the originals.",
    )

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        yield from _check_source(keys, ("builtin", "path", "hub"))
        if keys.has("revision") and not keys.has("hub"):
            yield ("revision",), "revision belongs to hub; this base is not a hub id"


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
        yield from _check_source(keys, ("builtin", "jsonl", "hub"))
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


class _Regularise(Table):
    """What other methods add to the loss, or do to gradients and factors; 0 is none of it.

    `history.jsonl` has the value of each that is set, without its number; its `loss` stays that of the task.
    """

    LATER = frozenset(REGULARISERS)

    @property
    def chosen(self) -> dict[str, float]:
        """The numbers that are not zero, by the regulariser's name."""
        return {name: value for name in REGULARISERS if (value := getattr(self, name))}


if TYPE_CHECKING:
    Regularise = _Regularise
else:
    Regularise = create_model(
        "Regularise",
        __base__=_Regularise,
        __doc__=_Regularise.__doc__,
        **{
            row.name: (
                Annotated[int if row.whole else float, Field(ge=0)],
                Field(0 if row.whole else 0.0, description=row.meaning),
            )
            for row in REGULARISERS.values()
        },
    )


class Train(Table):
    """The fine-tuning run."""

    LATER = frozenset({"answered", "optimiser", "regularise", "weight_decay_schedule"})

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
        f"init = {names_of(s for s in STARTS.values() if s.changes)} only.",
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
        description="Peak learning rate of AdamW. For soka it says how far a step moves factors, and means the same "
        "at every width, factor shape and rank. Default: RATE with method = 'soka', 2e-3 otherwise.".replace(
            "RATE", f"{SOKA_RATE:g}"
        ),
        examples=[SOKA_RATE],
    )
    left_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="Multiplier on the learning rate for left factors.")
    right_lr: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Multiplier on the learning rate for right factors."
    )
    sigma_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="Multiplier on the learning rate for sigma.")
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

    @field_validator("optimiser", mode="before")
    @classmethod
    def _check_optimiser(cls, value: object) -> object:
        if isinstance(value, str) and value in REFUSED:
            raise ValueError(f"the Trainer's {value} is refused: {REFUSED[value]}")
        return value

    @property
    def rate(self) -> float:
        """The peak learning rate: what the manifest says, or the method's default."""
        if self.learning_rate is not None:
            return self.learning_rate
        return SOKA_RATE if self.method == "soka" else _OTHER_RATE

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


class Output(Table):
    """What a build writes."""

    dir: PathOrId = Field(
        "build", description="Folder of builds, relative to where the command runs; files go to DIR/NAME."
    )
    write: tuple[Literal["adapter", "merged"], ...] = Field(
        ("adapter",), strict=False, min_length=1, description="'adapter', 'merged' (a dense model), or both."
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the factors.")
    adapter_terms: Literal["all", "trained"] = Field(
        "all",
        description="Terms that are stored, merged and served. 'all' is exact: trained minus initial ones, up to twice "
        "as many as were trained. 'trained' keeps the best ones, as many as were trained; the report has what is lost.",
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


def _trained_conflicts(rules: Sequence[object], train: object) -> Iterator[tuple[Key, str]]:
    """Keys of rules about what is trained that [train] makes meaningless, and the other way round."""
    made = [rule if isinstance(rule, Adapt) else Adapt.model_validate(rule) for rule in rules]
    said = [(i, key) for i, rule in enumerate(made) for key in rule.form.choices if key in rule.model_fields_set]
    method = value_of(train, "method")
    for i, key in said if method not in (None, "soka") else ():
        yield ("adapt", i, key), f"{key} belongs to method = 'soka'; the method is {method!r}"
    for i, key in said if value_of(train, "prune") else ():
        if TRAINED[key].tensors:
            yield ("train", "prune"), f"prune does not go with {key} of adapt[{i}], which belongs to all terms together"
    for part in PARTS:
        if value_of(train, f"{part}_lr") not in (None, 1.0) and all(part not in rule.form.rates for rule in made):
            yield ("train", f"{part}_lr"), f"{part}_lr would be ignored: no rule trains {part}"
    still = {part for part in PARTS if value_of(train, f"{part}_lr") == 0}
    for i, rule in enumerate(made) if method in (None, "soka") else ():
        zeros = [(rule.start.needs_trained, rule.start.written)]
        zeros += [(TRAINED[key].needs_trained, key) for key in rule.form.choices]
        for zero, whose in zeros:
            if zero in still:
                message = f"{zero}_lr = 0 does not go with {whose} of adapt[{i}], which starts {zero} at zero"
                yield ("train", f"{zero}_lr"), f"{message}: nothing would ever change"
        if rule.form.choices and rule.form.rates <= still:
            place = ("train", f"{min(rule.form.rates)}_lr")
            yield place, f"nothing of adapt[{i}] would be trained: its rates are all 0"


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
        if keys.knows("base", "train") and value_of(keys.values["train"], "method") == "full":
            bits = value_of(keys.values["base"], "quantize")
            if bits not in (None, "none"):
                yield ("base", "quantize"), f"a base in {bits} cannot be trained whole: method = 'full' needs 'none'"
        if keys.knows("output", "train") and value_of(keys.values["output"], "adapter_terms") == "trained":
            method = value_of(keys.values["train"], "method")
            if method not in (None, "soka"):
                yield ("output", "adapter_terms"), f"adapter_terms belongs to method = 'soka'; the method is {method!r}"
        if keys.knows("adapt", "train"):
            yield from _trained_conflicts(keys.values["adapt"], keys.values["train"])
            yield from _start_conflicts(keys.values["adapt"], value_of(keys.values["train"], "regularise"))
        if keys.knows("adapt"):
            rules = list(enumerate(keys.values["adapt"]))
            for start in STARTS.values():
                if start.source is None:
                    continue
                users = [i for i, rule in rules if value_of(rule, "init") == start.name]
                sources = [i for i, rule in rules if value_of(rule, start.source) is not None]
                for i in users if not sources else ():
                    yield ("adapt", i, "init"), f"init = {start.name!r} needs {start.source}, {start.source_is}"
                for i in sources if not users else ():
                    yield (
                        ("adapt", i, start.source),
                        f"{start.source} belongs to init = {start.name!r}, which no rule sets",
                    )


def _start_conflicts(rules: Sequence[object], table: object) -> Iterator[tuple[Key, str]]:
    """Regularisers that need another start than a rule has, or all of the factors trained and nothing beside them."""
    made = [rule if isinstance(rule, Adapt) else Adapt.model_validate(rule) for rule in rules]
    starts = dict.fromkeys(rule.start for rule in made if "init" in rule.model_fields_set) or [Adapt().start]
    forms = {key for rule in made for key in rule.form.choices}
    for row in REGULARISERS.values():
        if not value_of(table, row.name):
            continue
        reasons = [
            f"{start.written}, one of whose factors starts at zero: it holds factors at the size of their start"
            for start in starts
            if row.unit_factors and start.starts_at_zero
        ]
        reasons += [
            f"{start.written}, whose terms are subtracted again: the delta is not the sum of the factors"
            for start in starts
            if row.own_delta and start.subtracted
        ]
        reasons += [
            f"{key} in [[adapt]]: it acts on terms that are trained whole, with nothing beside them"
            for key in sorted(forms)
            if row.kronecker
        ]
        for reason in reasons:
            yield ("train", "regularise", row.name), f"{row.name} does not go with {reason}"
