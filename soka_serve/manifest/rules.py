"""The schema of `[[adapt]]`: which modules a rule means, their factors' shape and start, and their number of terms.

`soka_serve.base.target_modules` lays the rules over the modules of a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from soka_serve.manifest.fields import Fraction, PathOrId, PositiveInt, Text
from soka_serve.manifest.table import Key, Table, TableKeys, value_of
from soka_serve.starts import STARTS, Start, names_of
from soka_serve.trained import MOST_EXTRA_TERMS, PARTS, TRAINED, Factor, Form, RuleFacts

EVERY_MODULE = ("*",)
LLAMA_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# LLaMA's, and the fused ones of Phi-3, which vLLM computes in the same layers.
SERVED_PROJECTIONS = (*LLAMA_PROJECTIONS, "qkv_proj", "gate_up_proj")

DEFAULT_CALIBRATION_BATCHES = 8
DEFAULT_SCALE = 0.01
SMALL = 0.003
"""The scale beside which terms of another size than `scale` have their rates (`soka_serve.peft.optimizer`)."""
LAYER_RANGE = r"^(all|\d+|\d+-\d*|-\d+-)$"

if TYPE_CHECKING:
    StartName = str
else:
    StartName = Literal[tuple(STARTS)]


def _check_bounds(keys: TableKeys) -> Iterator[tuple[Key, str]]:
    """min <= max <= pool."""
    for low, high in (("min", "max"), ("max", "pool")):
        if keys.knows(low, high) and keys.values[low] > keys.values[high]:
            blamed = low if low in keys.present else high
            what = ", the number of candidate terms computed" if high == "pool" else ""
            yield (blamed,), f"{low} ({keys.show(low)}) is larger than {high} ({keys.show(high)}){what}"


class RankFixed(Table):
    """The same number of terms for every module of the rule."""

    policy: Literal["fixed"] = Field("fixed", description="The rank is given.")
    rank: PositiveInt = Field(1, description="Number of Kronecker terms per module.")


class _RankBounds(Table):
    min: PositiveInt = Field(1, description="Fewest terms per module.")
    max: PositiveInt = Field(8, description="Most terms per module.")
    pool: PositiveInt = Field(64, description="Candidate terms computed per module; capped by the shape.")

    @classmethod
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        yield from _check_bounds(keys)


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
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        yield from _check_bounds(keys)


RankPolicy = Annotated[RankFixed | RankEnergy | RankElbow | RankSpectrum | RankBudget, Field(discriminator="policy")]


# Keys that choose a variant of a start, with the values that choose none.
_PLAIN = {"components": "principal", "right": "trained"}


def _start_of(init: str, components: str, right: str) -> Start:
    start = STARTS[init]
    return start.variants.get(components, start.variants.get(right, start))


def _is_plain(key: str, rule: Mapping[str, Any]) -> bool:
    """Whether a key of the registry of what is trained is as if it were not there."""
    default = Adapt.model_fields[key].default
    return bool((tuple(rule[key]) if isinstance(default, tuple) else rule[key]) == default)


def misfits(start: Start, rule: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What of a rule does not go with its start: (key, message).

    Args:
        start: what `init`, `components` and `right` name.
        rule: its keys; some may be missing.
    """
    for key in ("components", "right"):
        variant = rule.get(key)
        if variant not in (None, _PLAIN[key], start.name):
            having = names_of(other for other in STARTS.values() if variant in other.variants)
            init = rule.get("init") or Adapt.model_fields["init"].default
            yield key, f"{key} = {variant!r} belongs to init = {having}; the init is {init!r}"
    policy = value_of(rule.get("rank"), "policy")
    if start.fixed_rank and policy not in (None, "fixed"):
        yield "rank", f"policy = {policy!r} does not go with {start.written}: {start.fixed_rank}"
    terms = value_of(rule.get("rank"), "rank" if policy in (None, "fixed") else "max") or 1
    chosen = [key for key in TRAINED if key in rule and not _is_plain(key, rule)]
    for key in chosen:
        yield from TRAINED[key].misfits(rule[key], RuleFacts(start, policy, terms, frozenset(chosen)))
        if start.cuts and TRAINED[key].frozen(rule[key]) & {"left", "right"}:
            yield key, f"{key} does not go with {start.written}, whose terms are trained whole"
    if start.fixed_shape and rule.get("shape") == "auto":
        yield "shape", f"'auto' does not go with {start.written}: {start.fixed_shape}"


class Adapt(Table):
    """One rule: which modules are adapted, and how.

    Rules are read in order. A module that several rules match takes each key from the last rule that sets it.
    """

    LATER = frozenset({"components", "adapter", "right", *TRAINED})

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
    init: StartName = Field(
        "zero",
        description="Where the factors start. " + "; ".join(f"{s.name!r}: {s.meaning}" for s in STARTS.values()) + ".",
    )
    components: Literal["principal", "minor"] = Field(
        "principal",
        description="For init = 'weights': its largest terms, or its smallest ('minor'; a full SVD of every module, "
        "and a fixed rank).",
    )
    right: Literal["trained", "dct"] = Field(
        "trained",
        description="'dct', for init = 'gradient': Right stays one of the cosine transform's atoms, those that align "
        "best with the gradient; Left starts at zero. Stored and served with as many terms as were trained.",
    )
    finetuned: PathOrId | None = Field(
        None,
        description="For init = 'delta': directory or hub id of the fully fine-tuned checkpoint.",
        examples=["meta-llama/Llama-2-7b-chat-hf"],
    )
    adapter: PathOrId | None = Field(
        None,
        description="For init = 'adapter': folder of the finished adapter, or its URL (hf://owner/name@revision, "
        "s3://..., https://...); it gives ranks and factor shapes.",
        examples=["../build/math/adapter"],
    )
    calibration_batches: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Training batches whose activations at trained tokens weight the decomposition (0: none); with "
        "init = 'gradient', the batches the gradient is taken over. Default: 8 with init = "
        f"{names_of(s for s in STARTS.values() if s.calibrated)}, else 0.",
        examples=[8],
    )
    weighting: Literal["inputs", "both"] = Field(
        "inputs",
        description="What the calibration batches tell that weights the decomposition: the layer's inputs, or also the "
        "loss's gradients by its outputs ('both'), which takes a backward pass as well.",
    )
    scale: Annotated[float, Field(gt=0, le=1000)] = Field(
        DEFAULT_SCALE,
        description="Size of the terms at the start, sigma's root mean square for factors of unit entries, as a share "
        "of the weight's typical entry: SoKA's alpha. The larger, the more a step changes. Not for "
        "init = "
        f"{names_of(s for s in STARTS.values() if s.changes)}, whose terms have a size of their own.",
    )
    rank: RankPolicy = Field(default_factory=lambda: RankFixed(), description="How many terms each module gets.")
    train_factors: tuple[Factor, ...] = Field(
        PARTS,
        strict=False,
        min_length=1,
        description="Which factors are trained; the others stay as they start. With 'sigma' alone a term costs one "
        "parameter (SVFit). Where left or right stays, the adapter is stored and served with as many terms as were "
        "trained, exactly.",
        examples=[["sigma"]],
    )

    core: bool = Field(
        False,
        description="Train an r x r matrix between the Left and the Right factors, which stay as they start, instead "
        "of sigma: the delta is the sum over j and k of its entries times Left_j x Right_k (NLoRA's IntTune). Stored "
        "and served with as many terms as the rank, exactly.",
    )

    extra_terms: Annotated[int, Field(ge=0, le=MOST_EXTRA_TERMS)] = Field(
        0,
        description="Further terms per module, trained whole, which start at a delta of zero (Left random, Right "
        "zero). With train_factors = ['sigma'], SALT on Kronecker terms.",
        examples=[1],
    )

    @property
    def form(self) -> Form:
        """What is trained of a module's factors."""
        fields = type(self).model_fields
        values = {key: value for key in TRAINED if (value := getattr(self, key)) != fields[key].default}
        if self.start.frozen:
            values["train_factors"] = tuple(part for part in self.train_factors if part not in self.start.frozen)
        return Form({key: list(value) if isinstance(value, tuple) else value for key, value in values.items()})

    @property
    def start(self) -> Start:
        """What `init`, `components` and `right` name."""
        return _start_of(self.init, self.components, self.right)

    @property
    def source(self) -> str | None:
        """What `finetuned`, or another key that the start reads, says."""
        return getattr(self, self.start.source) if self.start.source else None

    @property
    def batches(self) -> int:
        """Training batches that the initialisation looks at."""
        if self.start.unweighed:
            return 0
        if self.calibration_batches or (self.calibration_batches == 0 and not self.start.needs_gradient):
            return self.calibration_batches
        return DEFAULT_CALIBRATION_BATCHES if self.start.calibrated else 0

    @field_validator("train_factors")
    @classmethod
    def _check_train_factors(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a factor is named twice")
        return tuple(part for part in PARTS if part in value)

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, value: object) -> object:
        """Check the whole value here: one error instead of one for each side of the union."""
        expected = "'all', a range ('0-15', '4-', '-4-') or a list of layer numbers"
        if isinstance(value, str) and re.fullmatch(LAYER_RANGE, value):
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
    def conflicts(cls, keys: TableKeys) -> Iterator[tuple[Key, str]]:
        # Without an init of its own a rule has that of a rule before it, which `default_conflicts` and the plan see.
        if keys.has("init") and keys.knows("init"):
            for key, message in _start_conflicts(keys):
                yield (key,), message


def _start_conflicts(keys: TableKeys) -> Iterator[tuple[str, str]]:
    """What a rule says that does not go with its start: (key, message)."""
    start = _start_of(*(keys.values.get(key, _PLAIN.get(key)) for key in ("init", "components", "right")))
    for other in STARTS.values() if keys.has("init") else ():
        if other.source is not None and other.source != start.source and keys.has(other.source):
            yield (
                other.source,
                f"{other.source} belongs to {other.written}; this rule's init is {keys.values['init']!r}",
            )
    if start.changes and keys.has("scale"):
        yield "scale", f"scale does not go with {start.written}, whose terms have the delta's own size"
    for key in keys.has("rank", "shape", "tp") if start.given else ():
        yield key, f"{key} does not go with {start.written}: {start.given}"
    for key in keys.has("calibration_batches", "weighting") if start.unweighed else ():
        if keys.knows(key) and keys.values[key]:
            yield key, f"{key} does not go with {start.written}: {start.unweighed}"
    yield from misfits(start, keys.values)


def default_conflicts(rules: Sequence[Adapt]) -> Iterator[tuple[int, str, str]]:
    """What rules say that does not go with the default start, where none says another: (index, key, message)."""
    plain, weights = Adapt.model_fields["init"].default, STARTS["weights"]
    if any(rule.init != plain for rule in rules):
        return
    said = any("init" in rule.model_fields_set for rule in rules)
    for index, rule in enumerate(rules):
        keys = Adapt._see(rule.model_dump(exclude_unset=True), set())
        taken = replace(keys, values={**keys.values, "init": weights.name})
        refused = {key for key, _ in _start_conflicts(taken)}
        for key, message in _start_conflicts(keys):
            instead = f"; {weights.written} takes it" + (f", and {plain!r} is the default" if not said else "")
            yield index, key, message + ("" if key in refused or weights.written in message else instead)
