"""The adapter on disk, format 1: a directory that PEFT loads, with safetensors and text in it and nothing else.

- `adapter_config.json`: PEFT's fields, peft_type "SOKA", soka_format 1, and per full module name its rank and shape.
- `adapter_model.safetensors`: `base_model.model.<module>.soka_left` (r, m, n), `.soka_right` (r, p, q), `.soka_sigma`
  (r,). The delta is relative to the untouched base: sum over k of sigma[k] * kron(left[k], right[k]). No other scale.
- `soka.lock` (TOML, provenance) and `README.md` (model card).

A checkpoint of a running training has the frozen initial factors too (`soka_left_initial` and so on, and soka_initial
in the config); its delta is trained minus initial. `trained` of a module in its config says what of the factors is
trained, and `soka_core` and the like are tensors that are trained beside them (`soka_serve.trained`).

`soka_quantize` in the config ("4bit" or "8bit") says that the delta is relative to a base that bitsandbytes holds in so
many bits (`soka_serve.base.held`), and wrong on any other. It stands there only where it is so, and a reader that does
not know it refuses the adapter.

Needs torch and safetensors, not PEFT.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from soka_serve.adapter.raw import RawAdapter, read_raw
from soka_serve.base.quantisation import QUANTIZE
from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import CheckpointError, SokaError, first_ten, is_printable, is_shown, name_some, printable
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CARD_FILE, CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.files import write_bytes_atomic, write_text_atomic
from soka_serve.io.json_files import parse_json
from soka_serve.io.lockfile import write_lock
from soka_serve.io.safetensors import (
    FLOAT_DTYPES,
    TensorInfo,
    find_not_finite,
    parse_header,
    read_tensors,
)
from soka_serve.kron import Factors, stack_terms
from soka_serve.kron.factors import subtract_terms
from soka_serve.kron.shapes import FactorShape
from soka_serve.trained import PARTS, TENSORS, Form, form_problem

log = logging.getLogger(__name__)

PEFT_TYPE = "SOKA"
SOKA_FORMAT = 1
KEY_PREFIX = "base_model.model."
QUANTIZE_KEY = "soka_quantize"
_KINDS = ("", "_initial")  # trained, and what the training began with

SAVE_AGAIN = "save or download the adapter again"

# The fields of soka_serve.peft.SokaConfig (a test holds the two together), with what a finished adapter has there.
_CONFIG: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "inference_mode": True,
    "init_soka_weights": False,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": PEFT_TYPE,
    "peft_version": None,
    "r": 1,
    "revision": None,
    "seed": 0,
    "shape": "balanced",
    "soka_format": SOKA_FORMAT,
    "soka_initial": False,
    "soka_modules": {},
    "target_modules": None,
    "task_type": "CAUSAL_LM",
}
# Fields of a config that PEFT wrote, which are about training, and those that format 1 has no place for.
_ONLY_TRAINING = frozenset({"init_scale", "rank_pattern", "soka_dropout", "soka_trained"})
_NOT_HERE = {"fan_in_fan_out": "weights stored (in, out), as transformers' Conv1D does, are merged by PEFT only"}
_MOST_UNKNOWN_KEYS = 50  # that a newer PEFT may have written


@dataclass(frozen=True)
class AdapterBase:
    """What an adapter's delta adds to.

    Args:
        name: of the base, or its path.
        quantize: the bits that bitsandbytes holds it in; None: its weights as they are, or as near as it is held.
    """

    name: str
    quantize: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk and checked.

    Args:
        directory: where it was read.
        config: adapter_config.json.
        factors: theta by full module name, float32 on the CPU whatever the file's dtype; the delta where more than
            left, right and sigma is trained of frozen ones.
        initial: the frozen initial factors of a training checkpoint; empty for a finished adapter.
    """

    directory: Path
    config: dict[str, Any]
    factors: dict[str, Factors]
    initial: dict[str, Factors]

    @property
    def base_model(self) -> str | None:
        """The base that the config names."""
        return self.config.get("base_model_name_or_path")

    @property
    def base(self) -> AdapterBase:
        """What its delta adds to."""
        return AdapterBase(self.base_model or "unknown", self.quantize)

    @property
    def quantize(self) -> str | None:
        """The bits of the base that its delta adds to, where it is right on a base in these alone."""
        return self.config.get(QUANTIZE_KEY)

    @property
    def parameters(self) -> int:
        """Trained values, without the initial factors."""
        return sum(f.parameters for f in self.factors.values())

    def delta_factors(self, module: str) -> Factors:
        """The terms of one module's delta: theta's minus the initial ones, where there are any (`subtract_terms`)."""
        theta = self.factors[module]
        return theta if module not in self.initial else subtract_terms(theta, self.initial[module])

    def exact_delta(self, module: str) -> Factors:
        """The same, not rounded: theta's terms and the initial ones, negated."""
        theta = self.factors[module]
        return theta if module not in self.initial else stack_terms(theta, self.initial[module], signs=(1, -1))


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's config and the header of its weights, both checked; the values of the tensors are not read yet.

    Args:
        directory: where it is.
        config: adapter_config.json.
        tensors: of adapter_model.safetensors, by name.
        problems: where tensors and config do not agree.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    problems: list[str]

    def read(self) -> Adapter:
        """See `read_adapter`."""
        problems, fitting = list(self.problems), self.tensors
        if problems:
            expected = _expected(self.config)
            fitting = {
                name: info
                for name, info in self.tensors.items()
                if info.dtype in FLOAT_DTYPES and info.shape == expected.get(name)
            }
        values = read_tensors(fitting, torch.float32)
        problems += [f"{WEIGHTS_FILE}: {name} has values that are not finite" for name in find_not_finite(values)]
        if problems:
            raise refusal(self.directory, problems, SAVE_AGAIN)
        factors, initial = (
            {
                name: Factors(*(values[key] for key in keys))
                for name in self.config["soka_modules"]
                if (keys := _keys(name, kind))[0] in values
            }
            for kind in _KINDS
        )
        moved = [
            f"{WEIGHTS_FILE}: {KEY_PREFIX}{name}.soka_{part} differs from its initial one, and is not trained"
            for name, spec in self.config["soka_modules"].items()
            for part in sorted(Form(spec.get("trained", {})).frozen & {"left", "right"})
            if name in initial and not torch.equal(getattr(factors[name], part), getattr(initial[name], part))
        ]
        if moved:
            raise refusal(self.directory, moved, SAVE_AGAIN)
        for name, spec in self.config["soka_modules"].items():
            added = {part: values[key] for part in TENSORS if (key := f"{KEY_PREFIX}{name}.soka_{part}") in values}
            if added:
                form, theta, start = Form(spec["trained"]), factors[name], initial.get(name)
                if start is None or form.frozen & {"left", "right"}:
                    initial.pop(name, None)
                    factors[name] = form.delta(theta, start, added)
                else:
                    whole = factors[name] = form.apply(theta, added)
                    initial[name] = stack_terms(start, whole.terms(slice(start.rank, None)), signs=(1, 0))
        return Adapter(self.directory, self.config, factors, initial)


def read_adapter(directory: str | Path, budget: ReadingBudget | None = None) -> Adapter:
    """Read and check an adapter directory, finished or a checkpoint of a training.

    Args:
        directory: the adapter.
        budget: what reading it may take.

    Raises:
        CheckpointError: what is wrong, one line each: files missing, truncated, malformed or too large, another
            peft_type or soka_format, settings that format 1 cannot hold, tensors missing or unknown, shapes or ranks
            that disagree with the config, values that are not finite, pickles.
    """
    return look_at_adapter(directory, budget).read()


def look_at_adapter(
    directory: str | Path, budget: ReadingBudget | None = None, raw: RawAdapter | None = None
) -> AdapterFiles:
    """Check an adapter directory without reading the values of its tensors.

    Args:
        directory: the adapter.
        budget: what reading it may take; the values of all its tensors are taken from it.
        raw: what `read_raw` has read of it.

    Raises:
        CheckpointError: what is wrong with the files themselves, one line each.
    """
    folder, budget = Path(directory), budget or ReadingBudget()
    raw = raw or read_raw(folder, budget)
    problems = list(raw.problems)
    config: dict[str, Any] = {}
    tensors: dict[str, TensorInfo] = {}
    try:
        if raw.config is not None:
            config = parse_json(folder / CONFIG_FILE, raw.config, unique=True)
            problems += [f"{CONFIG_FILE}: {line}" for line in _check_config(config)]
    except CheckpointError as error:
        problems.append(error.message)
    try:
        if raw.header is not None:
            tensors = parse_header(raw.header, budget)
            budget.take_values(folder / WEIGHTS_FILE, sum(info.numel for info in tensors.values()))
    except CheckpointError as error:
        problems.append(error.message)
    if problems:
        raise refusal(folder, problems, SAVE_AGAIN)
    return AdapterFiles(folder, config, tensors, _check_tensors(config, tensors))


def refusal(folder: Path, problems: Sequence[str], hint: str | None = None) -> CheckpointError:
    """The error that names the first of an adapter's problems, and how many more there are."""
    return CheckpointError("\n".join(f"{folder}: {p}" for p in first_ten(problems)), hint=hint)


def write_adapter(
    directory: str | Path,
    factors: Mapping[str, Factors],
    *,
    base_model: str | AdapterBase,
    dtype: torch.dtype = torch.float32,
    lock: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Write a finished adapter: each file on its own atomically, the folder made if need be.

    Args:
        factors: the delta relative to the untouched base, by full module name; at least one term each.
        base_model: name or path of the base, recorded in the config; or that with the bits it is held in.
        dtype: dtype of the factors in the file.
        lock: contents of soka.lock; not written when None.
        card: text of README.md; not written when None.

    Raises:
        CheckpointError: nothing to write, a module without terms, or values that are not finite in `dtype`.
        ValueError: no base_model.
        BuildError: disk full, no permission.
    """
    base = base_model if isinstance(base_model, AdapterBase) else AdapterBase(base_model)
    if not base.name:
        raise ValueError("base_model is empty")
    tensors: dict[str, torch.Tensor] = {}
    problems = [] if factors else ["an adapter needs at least one module"]
    for name in sorted(factors):
        if factors[name].rank == 0:
            problems.append(f"{name}: no terms")
        for part in PARTS:
            # A copy: safetensors refuses tensors that share memory, as modules with the same factors do.
            value = getattr(factors[name], part).detach().to("cpu", dtype, copy=True).contiguous()
            tensors[f"{KEY_PREFIX}{name}.soka_{part}"] = value
    problems += [
        f"{name.removeprefix(KEY_PREFIX)}: values are not finite in {dtype}" for name in find_not_finite(tensors)
    ]
    if problems:
        raise CheckpointError("\n".join(problems), hint="training diverged, or the dtype is too narrow")
    config = {
        **_CONFIG,
        "base_model_name_or_path": base.name,
        **({} if base.quantize is None else {QUANTIZE_KEY: base.quantize}),
        "r": max(f.rank for f in factors.values()),
        "soka_modules": {
            name: {"rank": factors[name].rank, "shape": list(factors[name].shape)} for name in sorted(factors)
        },
        "target_modules": sorted(factors),
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(folder / WEIGHTS_FILE, to_safetensors(tensors, metadata={"format": "pt"}))
    write_text_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if lock is not None:
        write_lock(folder / LOCK_FILE, lock)
    if card is not None:
        write_text_atomic(folder / CARD_FILE, card)


def unlike_bits(adapters: Sequence[Adapter]) -> list[SokaError]:
    """Adapters that add to a base in other bits than the first one: no sum of them is right on any base."""
    first = adapters[0]

    def what(adapter: Adapter) -> str:
        return f"a base in {adapter.quantize}" if adapter.quantize else "a base's own weights"

    return [
        CheckpointError(
            f"{other.directory}: adds to {what(other)}, {first.directory} to {what(first)}",
            hint="such adapters cannot be summed: their deltas are relative to different weights",
        )
        for other in adapters[1:]
        if other.quantize != first.quantize
    ]


def check_against(adapter: Adapter, weights: WeightMap) -> None:
    """Check that a base checkpoint has every weight that the adapter changes, in the right shape.

    Args:
        adapter: the adapter.
        weights: of the base.

    Raises:
        CheckpointError: all modules that do not fit.
    """
    problems: list[str] = []
    for module, factors in adapter.factors.items():
        info, shape = weights.find(module), factors.shape
        if info is None:
            close = difflib.get_close_matches(module, list(weights.modules()), n=1) if is_shown(problems) else []
            problems.append(weights.problem(module) + (f"; it has {close[0]}" if close else ""))
        elif tuple(info.shape) != (shape.out_features, shape.in_features):
            problems.append(
                f"{module}: the adapter's factors {list(shape)} make a {(shape.out_features, shape.in_features)} "
                f"delta, the base's weight is {tuple(info.shape)}"
            )
    if problems:
        raise refusal(adapter.directory, problems, f"the adapter was made for {adapter.base_model}")


def _check_config(config: Mapping[str, Any]) -> list[str]:
    """Problems of adapter_config.json, one line each."""
    if config.get("peft_type") != PEFT_TYPE:
        other = f"peft_type is {config.get('peft_type')!r:.80}, expected {PEFT_TYPE!r}"
        return [f"{other}; adapters of other methods are merged by PEFT's own merge_and_unload()"]
    if config.get("soka_format") != SOKA_FORMAT:
        return [f"soka_format is {config.get('soka_format')!r:.80}; this version reads {SOKA_FORMAT}"]
    problems = []
    unknown = set(config) - set(_CONFIG) - _ONLY_TRAINING - set(_NOT_HERE) - {QUANTIZE_KEY}
    refused = keys_with_meaning(unknown) if len(unknown) <= _MOST_UNKNOWN_KEYS else sorted(unknown)
    if refused:
        problems.append(f"unknown keys [{name_some([repr(key) for key in refused])}]")
    ignored = sorted(unknown - set(refused))
    if ignored:  # a newer PEFT writes its own
        log.warning("%s: unknown keys [%s] are ignored", CONFIG_FILE, name_some([f"{key!r:.80}" for key in ignored]))
    problems += [f"{key}: {reason}" for key, reason in _NOT_HERE.items() if config.get(key)]
    if config.get("modules_to_save"):
        problems.append(
            f"modules_to_save {config['modules_to_save']!r:.200}: whole modules cannot be part of the delta"
        )
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(name), str | None) or not is_printable(config.get(name) or ""):
            problems.append(f"{name} must be a string or null, not {config[name]!r:.80}")
    if config.get(QUANTIZE_KEY, QUANTIZE[0]) not in QUANTIZE:
        problems.append(f"{QUANTIZE_KEY} must be {' or '.join(map(repr, QUANTIZE))}, not {config[QUANTIZE_KEY]!r:.80}")
    if not isinstance(config.get("soka_initial"), bool):
        problems.append(f"soka_initial must be true or false, not {config.get('soka_initial')!r:.80}")
    modules = config.get("soka_modules")
    if not isinstance(modules, dict) or not modules:
        return [*problems, f"soka_modules must map at least one module to its rank and shape, not {modules!r:.80}"]
    for name, spec in modules.items():
        if not is_printable(name):
            problems.append(f"soka_modules: {printable(name)}: a name with control characters")
        elif not isinstance(spec, dict) or set(spec) - {"trained"} != {"rank", "shape"}:
            problems.append(f"soka_modules: {name}: expected rank and shape, got {spec!r:.80}")
        elif not _is_count(spec["rank"]):
            problems.append(f"soka_modules: {name}: rank must be at least 1, not {spec['rank']!r:.80}")
        elif not (isinstance(spec["shape"], list) and len(spec["shape"]) == 4 and all(map(_is_count, spec["shape"]))):
            problems.append(f"soka_modules: {name}: shape must be [m, n, p, q], not {spec['shape']!r:.80}")
        elif problem := form_problem(spec.get("trained", {}), spec["rank"]):
            problems.append(f"soka_modules: {name}: trained: {problem}")
    return problems


def keys_with_meaning(unknown: Iterable[str]) -> list[str]:
    """Unknown keys of a config that would change what the factors mean: SoKA's own, and scales of other methods.

    >>> keys_with_meaning(["new_in_peft", "alpha", "soka_new"])
    ['alpha', 'soka_new']
    """
    return sorted(key for key in unknown if key.startswith("soka_") or "alpha" in key or "scal" in key)


def _check_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Disagreements of config and file: tensors that are missing, unknown, or of another shape or dtype."""
    expected = _expected(config)
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    problems = [f"missing {name}" for name in missing]
    if unknown:
        problems.append(f"tensors that {CONFIG_FILE} does not name: {name_some(unknown)}")
    for key, shape in expected.items():
        info = tensors.get(key)
        if info is not None and info.dtype not in FLOAT_DTYPES:
            problems.append(f"{key} is {info.dtype}, expected a floating-point dtype")
        elif info is not None and info.shape != shape:
            problems.append(f"{key} is {info.shape}, {CONFIG_FILE} makes it {shape!s:.200}")
    return [f"{WEIGHTS_FILE}: {problem}" for problem in problems]


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that the config makes."""
    expected: dict[str, tuple[int, ...]] = {}
    plain: dict[tuple[int, ...], dict[str, tuple[int, ...]]] = {}  # mostly few shapes for many modules
    for name, spec in config["soka_modules"].items():
        rank, shape, trained = spec["rank"], spec["shape"], spec.get("trained", {})
        if trained or (sizes := plain.get((rank, *shape))) is None:
            sizes = Form(trained).sizes(rank, FactorShape(*shape))
            if not trained:
                plain[rank, *shape] = sizes
        for part, size in sizes.items():
            expected[f"{KEY_PREFIX}{name}.soka_{part}"] = size
        if config["soka_initial"]:
            expected |= {key: sizes[part] for key, part in zip(_keys(name, "_initial"), PARTS, strict=True)}
    return expected


def _keys(module: str, kind: str) -> list[str]:
    """Names of a module's tensors, in the order of PARTS."""
    return [f"{KEY_PREFIX}{module}.soka_{part}{kind}" for part in PARTS]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
