"""The configuration of a SoKA adapter, as PEFT reads and writes it (adapter_config.json)."""

# ruff: noqa: RUF009 - `_field` gives each class a field of its own, as `dataclasses.field` does
from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from soka_serve.adapter.format import keys_with_meaning
from soka_serve.base.quantisation import QUANTIZE
from soka_serve.errors import CheckpointError
from soka_serve.manifest.rules import DEFAULT_SCALE
from soka_serve.peft.errors import FitError
from soka_serve.peft.registration import NAME, add_peft_type
from soka_serve.trained import Form, form_problem

SOKA_FORMAT = 1

# Fields that readers of format 1 may not know: written only where they are used, and what they are where they are not.
OPTIONAL: dict[str, Any] = {
    "rank_pattern": {},
    "soka_dropout": 0.0,
    "fan_in_fan_out": False,
    "init_scale": DEFAULT_SCALE,
    "soka_trained": {},
    "soka_quantize": None,
}


def _field(told: str, default: Any = None, *, factory: Any = MISSING) -> Any:
    """A field with what PEFT's command lines tell of it."""
    given = {"default": default} if factory is MISSING else {"default_factory": factory}
    return field(**given, metadata={"help": told})


@dataclass
class SokaConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of a SoKA adapter: its modules, their numbers of terms, and how the factors start.

    There is no field `bias` and none for `target_parameters`: a SoKA adapter changes weights of linear layers.

    Raises:
        FitError: a field has a value that cannot be; all of them are named.
        CheckpointError: `soka_format` is one that this version does not read.
    """

    r: int = _field("Number of Kronecker terms per module, unless soka_modules says.", 1)
    shape: str | list[int] = _field(
        "Factor shape: 'balanced' (fewest parameters per term) or [m, n, p, q] for every module.", "balanced"
    )
    target_modules: list[str] | set[str] | str | None = _field(
        "Module names or endings, a regular expression (a string), or 'all-linear'. None: PEFT's default LoRA targets "
        "of the architecture."
    )
    exclude_modules: list[str] | str | None = _field("Module names or endings, or a regular expression, to leave out.")
    layers_to_transform: list[int] | int | None = _field("Adapt these layers only; target_modules must then be a list.")
    layers_pattern: list[str] | str | None = _field(
        "Name of the list of layers, for layers_to_transform, such as 'layers'."
    )
    modules_to_save: list[str] | None = _field("Other modules that are trained and saved whole, such as 'lm_head'.")
    init_soka_weights: Literal["weights", "zero", "random", False] = _field(
        "'zero': right factors zero, left ones random (KronA). 'weights': principal Kronecker components of each "
        "weight, subtracted again as frozen initial factors, so that nothing changes at step 0. 'random': all random, "
        "from torch's own generator, so that the adapter has an effect at once; for tests. False: empty until they are "
        "loaded; a forward before that is an error.",
        "zero",
    )
    init_scale: float = _field(
        "Size of the terms at the start, sigma's root mean square for factors of unit entries, as a share of the "
        "weight's typical entry (SoKA's alpha); of 1/sqrt(in) where the weight is not in memory.",
        DEFAULT_SCALE,
    )
    rank_pattern: dict[str, int] = _field(
        "Number of terms by module name, ending or regular expression; overrides r.", factory=dict
    )
    soka_dropout: float = _field("Share of the inputs that the delta does not see in training, 0 to below 1.", 0.0)
    fan_in_fan_out: bool = _field(
        "The adapted weights are stored (in, out), as transformers' Conv1D does. Set by itself.", False
    )
    seed: int = _field("Seed of the initialisations 'weights' and 'zero'.", 0)
    soka_modules: dict[str, dict[str, Any]] = _field(
        "Per full module name {'rank': r, 'shape': [m, n, p, q], 'trained': {}}; each may be left out. Overrides r, "
        "rank_pattern, shape and soka_trained; complete after the adapter was built.",
        factory=dict,
    )
    soka_trained: dict[str, Any] = _field(
        "What of the factors is trained, as [[adapt]] in a manifest says it: {'train_factors': ['sigma']} leaves left "
        "and right as they start. Of modules for which soka_modules does not say 'trained'.",
        factory=dict,
    )
    soka_quantize: str | None = _field(
        "'4bit' or '8bit': the adapter adds to a base that bitsandbytes holds in so many bits (4: NF4), wrong on "
        "any other, so that it is refused there. Such are adapters that began with what quantising loses.",
    )
    soka_initial: bool = _field(
        "The adapter holds frozen initial factors too. Set by init_soka_weights = 'weights'.", False
    )
    soka_format: int = _field("Version of the adapter's format on disk.", SOKA_FORMAT)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        self.shapes_are_open = False  # set in loading: the file's tensors say the shapes
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if self.soka_format != SOKA_FORMAT:
            raise CheckpointError(
                f"adapter_config.json: soka_format is {self.soka_format!r}; this version reads {SOKA_FORMAT}",
                hint="the adapter was written by another version of soka-serve",
            )
        problems = self._problems()
        if problems:
            raise FitError("SokaConfig: " + "; ".join(problems))
        if self.init_soka_weights == "weights":
            self.soka_initial = True

    def _problems(self) -> list[str]:
        """Everything that is wrong with the values, one line each."""
        problems = []
        if not _is_count(self.r):
            problems.append(f"r must be a whole number of at least 1, not {self.r!r}")
        if self.shape != "balanced" and not _is_shape(self.shape):
            problems.append(f"shape must be 'balanced' or [m, n, p, q], not {self.shape!r}")
        init = self.init_soka_weights
        if init not in ("weights", "zero", "random") and init is not False:
            problems.append(f"init_soka_weights must be 'weights', 'zero', 'random' or False, not {init!r}")
        if init in ("zero", "random") and self.soka_initial:
            problems.append(f"soka_initial does not go with init_soka_weights = {init!r}, which has no initial factors")
        if not isinstance(self.init_scale, int | float) or not self.init_scale > 0:
            problems.append(f"init_scale must be above 0, not {self.init_scale!r}")
        if not isinstance(self.soka_dropout, int | float) or not 0 <= self.soka_dropout < 1:
            problems.append(f"soka_dropout must be from 0 to below 1, not {self.soka_dropout!r}")
        for name, rank in self.rank_pattern.items():
            if not _is_count(rank):
                problems.append(f"rank_pattern[{name!r}] must be at least 1, not {rank!r}")
        if self.soka_quantize not in (None, *QUANTIZE):
            known = " or ".join(map(repr, QUANTIZE))
            problems.append(f"soka_quantize must be {known} or None, not {self.soka_quantize!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            problems.append("layers_to_transform needs target_modules to be a list, not a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            problems.append("layers_pattern needs layers_to_transform")
        for name, spec in self.soka_modules.items():
            if not isinstance(spec, Mapping) or not set(spec) <= {"rank", "shape", "trained"}:
                problems.append(f"soka_modules[{name!r}] takes rank, shape and trained only, got {spec!r}")
                continue
            if "rank" in spec and not _is_count(spec["rank"]):
                problems.append(f"soka_modules[{name!r}]: rank must be at least 1, not {spec['rank']!r}")
            if "shape" in spec and not _is_shape(spec["shape"]):
                problems.append(f"soka_modules[{name!r}]: shape must be [m, n, p, q], not {spec['shape']!r}")
            if problem := form_problem(spec.get("trained", {}), spec["rank"] if _is_count(spec.get("rank")) else 1):
                problems.append(f"soka_modules[{name!r}]: trained: {problem}")
        if problem := form_problem(self.soka_trained, self.r if _is_count(self.r) else 1):
            problems.append(f"soka_trained: {problem}")
        places = {f"soka_modules[{n!r}]": m["trained"] for n, m in self.soka_modules.items() if _trains(m)}
        if not places or len(places) < len(self.soka_modules):  # else there may be no module that has it
            places["soka_trained"] = self.soka_trained
        for place, choices in places.items():
            if not form_problem(choices, 1) and (problem := self._zero_problem(place, Form(choices))):
                problems.append(problem)
        return problems

    def _zero_problem(self, place: str, form: Form) -> str | None:
        """Why a form, told in `place`, does not go with the start; None where it does."""
        if self.init_soka_weights != "zero" or "right" not in form.frozen:
            return None
        return f"init_soka_weights = 'zero' starts right at zero, and {place} does not train it; 'weights' goes with it"

    def form_problem_of(self, module: str) -> str | None:
        """Why what is trained of a module does not go with the start; None where it does."""
        place = "soka_modules" if _trains(self.soka_modules.get(module)) else "soka_trained"
        return self._zero_problem(place, self.form_of(module))

    @property
    def is_loading(self) -> bool:
        """Whether the adapter's weights come from a file, so that `soka_modules` alone says what is adapted."""
        return self.init_soka_weights is False and bool(self.soka_modules)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse unknown keys of adapter_config.json that change what the factors mean; PEFT warns of the others."""
        refused = keys_with_meaning(set(kwargs) - {f.name for f in fields(cls)})
        if refused and kwargs.get("peft_type") == NAME:  # PEFT reads other methods' files through any config class
            raise CheckpointError(
                f"adapter_config.json: unknown keys {refused}",
                hint="the adapter was written by another version of soka-serve, or for another method",
            )
        return dict(super().check_kwargs(**kwargs))

    def to_dict(self) -> dict[str, Any]:
        """The fields, sets as sorted lists, so that the same config gives the same file.

        Fields that older readers refuse stand there only where they are used (`OPTIONAL`).
        """
        return {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()  # type: ignore[no-untyped-call, unused-ignore]
            if key not in OPTIONAL or value != OPTIONAL[key]
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json.

        The config of an adapter that was built says `init_soka_weights: false`: its factors lie in the file next to it,
        and loading must not decompose the base again.
        """
        asked = self.init_soka_weights, self.init_scale, self.soka_trained
        if getattr(self, "_is_built", False):  # `soka_modules` says what is trained of each
            self.init_soka_weights, self.init_scale, self.soka_trained = False, DEFAULT_SCALE, {}
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.init_soka_weights, self.init_scale, self.soka_trained = asked

    def rank_of(self, module: str) -> int:
        """The number of terms that is asked for: `soka_modules`, else `rank_pattern`, else `r`."""
        pattern = get_pattern_key(list(self.rank_pattern), module)
        return int(self.soka_modules.get(module, {}).get("rank", self.rank_pattern.get(pattern, self.r)))

    def form_of(self, module: str) -> Form:
        """What of a module is trained: `soka_modules`, else `soka_trained`."""
        return Form(self.soka_modules.get(module, {}).get("trained", self.soka_trained))

    def told(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """What `soka_modules` says of a module, so that `soka_trained` does not count for it."""
        return {**({"trained": {}} if self.soka_trained else {}), **spec}

    def start_building(self, *, in_use: bool) -> None:
        """Note what was asked for; an adapter that is built from the config then completes `soka_modules`.

        A config that a model was made from can be used for another model, which follows what was asked for, not what
        the first one came to. An adapter on the same model (`in_use`) is made like the one that is there.
        """
        asked, recorded = getattr(self, "_asked", None), getattr(self, "_recorded", None)
        if in_use and recorded is not None:
            return
        if asked is not None and self.soka_modules == recorded:
            self.soka_modules = copy.deepcopy(asked)
        self.soka_initial = self.soka_initial or self.init_soka_weights == "weights"
        self._asked = copy.deepcopy(self.soka_modules)

    def forget_building(self) -> None:
        """Be as read from a file: what the config says now is what is asked for."""
        for name in ("_asked", "_recorded"):
            self.__dict__.pop(name, None)

    def record(self, modules: Mapping[str, Mapping[str, Any]]) -> None:
        """Record an adapter's rank, factor shape and form per module in `soka_modules`."""
        self.soka_modules = {name: self.told(spec) for name, spec in modules.items()}
        self._recorded = copy.deepcopy(self.soka_modules)
        self._is_built = True


def _trains(spec: object) -> bool:
    return isinstance(spec, Mapping) and "trained" in spec


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_shape(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 4 and all(_is_count(v) for v in value)
