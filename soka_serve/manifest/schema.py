"""The manifest's schema: one frozen pydantic model per TOML table.

Each field is described here and nowhere else: `soka-serve schema`, the starter manifest and the docs are rendered
from `Field(description=...)`. Units stand in the description. Unknown keys are errors everywhere, and so are keys
that another key makes meaningless: nothing is ignored silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from soka_serve.manifest.table import Key, Seen, Table

SCHEMA_VERSION = 1

EVERY_MODULE = ("*",)
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# LLaMA's, and the fused ones of Phi-3, which vLLM computes in the same layers.
SERVED_PROJECTIONS = (*LLAMA_PROJECTIONS, "qkv_proj", "gate_up_proj")

DEFAULT_CALIBRATION_BATCHES = 8

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LAYER_RANGE = r"^(all|\d+|\d+-\d*|-\d+-)$"


def _no_nul(value: str) -> str:
    if "\x00" in value:
        raise ValueError("a path or id cannot hold a NUL character")
    return value


PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]  # a path, or an id on the hub


def _value(table: object, name: str) -> Any:
    """A key of a table that is still a mapping or already a model."""
    return table.get(name) if isinstance(table, Mapping) else getattr(table, name, None)


def _check_source(seen: Seen, names: tuple[str, ...]) -> Iterator[tuple[Key, str]]:
    """Exactly one of the names must be set."""
    came = seen.has(*names)
    if not came:
        yield (), f"expected one of {', '.join(names)}; got none of them"
    for name in came[1:]:
        yield (name,), f"{name} and {came[0]} exclude each other: give exactly one of {', '.join(names)}"


def _check_bounds(seen: Seen) -> Iterator[tuple[Key, str]]:
    """min <= max <= pool."""
    for low, high in (("min", "max"), ("max", "pool")):
        if seen.knows(low, high) and seen.values[low] > seen.values[high]:
            blamed = low if low in seen.present else high
            what = ", the number of candidate terms computed" if high == "pool" else ""
            yield (blamed,), f"{low} ({seen.show(low)}) is larger than {high} ({seen.show(high)}){what}"


class Base(Table):
    """The frozen model that the adapter belongs to."""

    builtin: Literal["tiny"] | None = Field(
        None, description="The LLaMA-architecture model inside the package.", examples=["tiny"]
    )
    path: Place | None = Field(
        None,
        description="Directory of a Hugging Face checkpoint (safetensors), relative to the manifest.",
        examples=["../models/my-llama"],
    )
    hub: Place | None = Field(
        None, description="Hugging Face hub id of a checkpoint.", examples=["meta-llama/Llama-2-7b-hf"]
    )
    revision: Text | None = Field(
        None, description="Branch, tag or commit of the hub id; pin a commit to reproduce.", examples=["main"]
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype in which the base is held while training; 'auto' is the checkpoint's own."
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="Hold the base in 8 or 4 bits while training (bitsandbytes); initialisation reads the originals.",
    )

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        yield from _check_source(seen, ("builtin", "path", "hub"))
        if seen.has("revision") and not seen.has("hub"):
            yield ("revision",), "revision belongs to hub; this base is not a hub id"


class RankFixed(Table):
    """The same number of terms for every module of the rule."""

    policy: Literal["fixed"] = Field("fixed", description="The rank is given.")
    rank: PositiveInt = Field(1, description="Number of Kronecker terms per module.")


class _RankBounds(Table):
    min: PositiveInt = Field(1, description="Fewest terms per module.")
    max: PositiveInt = Field(8, description="Most terms per module.")
    pool: PositiveInt = Field(64, description="Candidate terms computed per module; capped by the shape.")

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        yield from _check_bounds(seen)


class RankEnergy(_RankBounds):
    """The smallest rank whose cumulative energy reaches the threshold."""

    policy: Literal["energy"] = Field(description="Smallest rank whose cumulative energy reaches `threshold`.")
    threshold: Fraction = Field(0.5, description="Share of the energy (sum of squared sigma) to reach.")
    of: Literal["pool", "total"] = Field(
        "pool",
        description="Share of what: the candidate pool's energy, or all of the weight's. Real weights have slow "
        "Kronecker spectra, so a share of the total mostly ends at `max`; 'pool' chooses within the candidates.",
    )


class RankElbow(_RankBounds):
    """The elbow of the spectrum: the point farthest below the chord from the first to the last candidate."""

    policy: Literal["elbow"] = Field(description="The point of the spectrum farthest from its chord.")


class RankSpectrum(_RankBounds):
    """Energy threshold and elbow together, as in the paper; `combine` says which of the two ranks is taken."""

    policy: Literal["spectrum"] = Field(description="Energy threshold and elbow, as in the paper.")
    threshold: Fraction = Field(0.5, description="Share of the energy (sum of squared sigma) to reach.")
    of: Literal["pool", "total"] = Field("pool", description="Share of the candidate pool's energy or of the total.")
    combine: Literal["min", "max"] = Field(
        "min", description="Which of the two ranks is taken: the smaller prunes more, the larger keeps both criteria."
    )


class RankBudget(Table):
    """A total of trainable parameters, spread over the rule's modules by captured energy per parameter."""

    policy: Literal["budget"] = Field(description="Spread `parameters` over all modules with this policy.")
    parameters: PositiveInt = Field(
        description="Most trainable parameters for all modules together.", examples=[990_000]
    )
    min: Annotated[int, Field(ge=0)] = Field(0, description="Fewest terms per module; 0 lets a module go unadapted.")
    max: PositiveInt = Field(64, description="Most terms per module.")
    pool: PositiveInt = Field(64, description="Candidate terms computed per module; capped by the shape.")

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        yield from _check_bounds(seen)


RankPolicy = Annotated[RankFixed | RankEnergy | RankElbow | RankSpectrum | RankBudget, Field(discriminator="policy")]


class Adapt(Table):
    """One rule: which modules are adapted, and how.

    Rules are read in order. A module that several rules match takes each key from the last rule that sets it.
    """

    modules: tuple[Text, ...] = Field(
        EVERY_MODULE,
        strict=False,
        min_length=1,
        description="Projection names ('q_proj') or shell patterns on full names ('model.layers.*.mlp.*'). '*' is "
        "every linear projection in the language model's layers, but for routers and experts.",
    )
    layers: Annotated[str, Field(pattern=LAYER_RANGE)] | tuple[int, ...] = Field(
        "all",
        description="Layers of the rule: 'all', '0-15', '4-' (from 4 on), '-4-' (the last four), or a list [0, 2, 4].",
    )
    enabled: bool = Field(True, description="false takes the matched modules out again.")
    shape: Literal["balanced", "auto"] | tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = Field(
        "balanced",
        description="Factor shape: 'balanced' (fewest parameters per term), 'auto' (most captured energy at equal "
        "parameters), or [m, n, p, q] with m*p = out and n*q = in.",
    )
    tp: PositiveInt = Field(
        1, description="Tensor-parallel size that the shape must shard over: m for column-parallel, n for row-parallel."
    )
    init: Literal["weights", "delta", "gradient", "zero", "random"] = Field(
        "weights",
        description="Where the factors start: principal Kronecker components of the weight, of a fine-tuned "
        "checkpoint's delta, of the first gradient, zero (the KronA baseline), or random (to compare with).",
    )
    finetuned: Place | None = Field(
        None,
        description="For init = 'delta': directory or hub id of the fully fine-tuned checkpoint.",
        examples=["meta-llama/Llama-2-7b-chat-hf"],
    )
    calibration_batches: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Training batches whose activations weight the decomposition (0: none); with init = 'gradient', "
        "the batches the gradient is taken over. Default: 8 with init = 'weights' or 'gradient', else 0.",
        examples=[8],
    )
    rank: RankPolicy = Field(default_factory=lambda: RankFixed(), description="How many terms each module gets.")

    @property
    def batches(self) -> int:
        """Training batches that the initialisation looks at."""
        if self.calibration_batches or (self.calibration_batches == 0 and self.init != "gradient"):
            return self.calibration_batches
        return DEFAULT_CALIBRATION_BATCHES if self.init in ("weights", "gradient") else 0

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        """Check the whole value here: one error instead of one for each side of the union."""
        expected = "'all', a range ('0-15', '4-', '-4-') or a list of layer numbers"
        if isinstance(value, str) and re.match(LAYER_RANGE, value):
            first, _, last = value.partition("-")
            if first.isdigit() and last.isdigit() and int(first) > int(last):
                raise PydanticCustomError(
                    "layers", "the range runs backwards: {first} is after {last}", {"first": first, "last": last}
                )
            return value
        if isinstance(value, list | tuple) and value and all(type(i) is int and i >= 0 for i in value):
            return tuple(value)
        raise PydanticCustomError("expected", "{expected}", {"expected": expected})

    @field_validator("shape", mode="before")
    @classmethod
    def _check_shape(cls, value: object) -> object:
        if isinstance(value, str) and value in ("balanced", "auto"):
            return value
        if isinstance(value, list | tuple) and len(value) == 4 and all(type(i) is int and i >= 1 for i in value):
            return tuple(value)
        expected = "'balanced', 'auto' or four whole numbers [m, n, p, q], each at least 1"
        raise PydanticCustomError("expected", "{expected}", {"expected": expected, "words": ["balanced", "auto"]})

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        if len(seen.has("finetuned", "init")) == 2 and seen.knows("init") and seen.values["init"] != "delta":
            yield ("finetuned",), f"finetuned belongs to init = 'delta'; this rule's init is {seen.values['init']!r}"
        if seen.has("calibration_batches", "init") and seen.knows("calibration_batches", "init"):
            batches, init = seen.values["calibration_batches"], seen.values["init"]
            if batches and init in ("zero", "random"):
                yield (
                    ("calibration_batches",),
                    f"calibration_batches does not go with init = {init!r}: nothing is decomposed",
                )


class Data(Table):
    """Where training examples come from, and how they become text."""

    builtin: Literal["math", "boxed", "code", "math-easy", "boxed-easy", "code-easy"] | None = Field(
        None, description="A task family generated inside the package.", examples=["math"]
    )
    jsonl: Place | None = Field(
        None,
        description="JSON Lines file, one object per line, relative to the manifest.",
        examples=["data/train.jsonl"],
    )
    hub: Place | None = Field(
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
    eval_jsonl: Place | None = Field(
        None, description="JSON Lines file of evaluation examples.", examples=["data/test.jsonl"]
    )
    eval_split: Text | None = Field(None, description="The hub dataset's split to evaluate on.", examples=["test"])
    eval_frac: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the training examples held out for evaluation when there is no evaluation set."
    )

    @field_validator("prompt", "completion")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        if value is not None:
            from soka_serve.manifest.templates import (
                parse_template,  # deferred: `schema` and `--help` never need Jinja2
            )

            parse_template(value)  # nothing is rendered here
        return value

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        yield from _check_source(seen, ("builtin", "jsonl", "hub"))
        for name in seen.has("prompt", "completion") if seen.has("messages") else ():
            yield (name,), f"{name} and messages exclude each other"
        for name in seen.has("config", "split", "revision", "eval_split") if not seen.has("hub") else ():
            yield (name,), f"{name} belongs to hub; this data is not a hub dataset"
        if seen.has("builtin"):
            for name in seen.has("messages"):
                yield (name,), f"{name} does not go with builtin, whose columns are prompt, completion and answer"
            for name in seen.has("eval_frac"):
                yield (name,), f"{name} does not go with builtin, whose families have a held-out split of their own"
        else:
            held_out = seen.has("eval_jsonl", "eval_split", "eval_frac")
            for name in held_out[1:]:
                yield (name,), f"{name} and {held_out[0]} exclude each other: one evaluation set at a time"


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

    method: Literal["soka", "lora", "pissa", "lokr", "full"] = Field(
        "soka", description="What is trained; the others are PEFT baselines over the same modules, data and schedule."
    )
    method_rank: PositiveInt = Field(2, description="Rank of the lora, pissa and lokr baselines; soka reads [[adapt]].")
    data: Data = Field(description="The training data.")
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
        "init = 'delta' only.",
        examples=[300],
    )
    batch_size: PositiveInt = Field(8, description="Examples per device and step.")
    accumulate: PositiveInt = Field(1, description="Batches summed into one optimiser step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="Peak learning rate of AdamW.")
    left_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="Multiplier on the learning rate for left factors.")
    right_lr: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Multiplier on the learning rate for right factors."
    )
    sigma_lr: Annotated[float, Field(ge=0)] = Field(1.0, description="Multiplier on the learning rate for sigma.")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Learning rate after warm-up.")
    warmup_frac: Annotated[float, Field(ge=0, lt=1)] = Field(0.03, description="Share of the steps spent warming up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradients are clipped to this norm.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward; saves memory.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Autocast dtype of the computation; trained factors stay float32."
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
        None, description="Stop after so many evaluations without a better loss; needs eval_every.", examples=[3]
    )
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        (),
        strict=False,
        description="Experiment trackers, as transformers names them; for tensorboard: `tensorboard --logdir build`.",
    )
    prune: Prune | None = Field(None, description="Drop weak terms during training.")

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        if len(seen.has("epochs", "steps")) == 2:
            yield ("steps",), "steps and epochs exclude each other"
        if seen.has("early_stopping") and not seen.has("eval_every"):
            yield ("early_stopping",), "early_stopping needs eval_every"
        if seen.has("prune") and seen.knows("method") and seen.values["method"] != "soka":
            yield ("prune",), f"prune belongs to method = 'soka'; the method is {seen.values['method']!r}"
        if seen.has("eval_every") and seen.knows("data"):
            sources = ("builtin", "eval_jsonl", "eval_split", "eval_frac")
            if not any(_value(seen.values["data"], name) for name in sources):
                yield ("eval_every",), "eval_every needs evaluation data: eval_jsonl, eval_split or eval_frac"


class Output(Table):
    """What a build writes."""

    dir: Place = Field(
        "build", description="Folder of builds, relative to where the command runs; files go to DIR/NAME."
    )
    write: tuple[Literal["adapter", "merged"], ...] = Field(
        ("adapter",), strict=False, min_length=1, description="'adapter', 'merged' (a dense model), or both."
    )
    adapter_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Dtype of the factors.")
    merged_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Dtype of the merged model; 'auto' is the base's own."
    )
    report: bool = Field(True, description="Write report.html.")

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        for name, file in (("adapter_dtype", "adapter"), ("merged_dtype", "merged")):
            if seen.has(name) and seen.knows("write") and file not in seen.values["write"]:
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


class Manifest(Table):
    """A soka-serve manifest."""

    version: Literal[1] = Field(
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

    @field_validator("version", mode="before")
    @classmethod
    def _check_version(cls, value: object) -> object:
        if type(value) is not int:  # Python's 1 == True == 1.0 would let those through the Literal
            raise PydanticCustomError("expected", "{expected}", {"expected": f"the integer {SCHEMA_VERSION}"})
        return value

    @classmethod
    def conflicts(cls, seen: Seen) -> Iterator[tuple[Key, str]]:
        if seen.knows("base", "train") and _value(seen.values["train"], "method") == "full":
            bits = _value(seen.values["base"], "quantize")
            if bits not in (None, "none"):
                yield ("base", "quantize"), f"a base in {bits} cannot be trained whole: method = 'full' needs 'none'"
        if seen.knows("adapt"):
            rules = list(enumerate(seen.values["adapt"]))
            deltas = [i for i, rule in rules if _value(rule, "init") == "delta"]
            sources = [i for i, rule in rules if _value(rule, "finetuned") is not None]
            for i in deltas if not sources else ():
                yield ("adapt", i, "init"), "init = 'delta' needs finetuned, the checkpoint whose delta is taken"
            for i in sources if not deltas else ():
                yield ("adapt", i, "finetuned"), "finetuned belongs to init = 'delta', which no rule sets"
