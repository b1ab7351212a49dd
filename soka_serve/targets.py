"""Which modules of the base a manifest adapts, and by which rule. No torch.

`list_modules` reads a checkpoint's linear projections from its safetensors headers, or, when there are no weights at
hand, from config.json. `resolve_targets` lays the manifest's `[[adapt]]` rules over them. A module that several rules
match takes each key from the last rule that sets it, so that a later rule changes only what it names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from soka_serve.checkpoint import Checkpoint
from soka_serve.errors import CheckpointError, PlanError
from soka_serve.headers import read_json
from soka_serve.schema import Adapt, Manifest
from soka_serve.shapes import FactorShape, balanced_shape, check_shape, parallel_of
from soka_serve.told import warn

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
}

# Architectures whose layers hold exactly these seven projections as plain nn.Linear, under these names.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma")

_NOT_A_PROJECTION = {
    "lm_head": "the output head is not adapted: its vocabulary dimension is split by every serving engine",
    "embed_tokens": "the embedding is a table, not a linear projection",
}


@dataclass(frozen=True)
class Module:
    """A linear projection of the base.

    `name` is the full module name ('model.layers.0.self_attn.q_proj'), `layer` its layer number, and `dtype` the
    weight's dtype in torch's spelling ('bfloat16').
    """

    name: str
    out_features: int
    in_features: int
    layer: int | None
    dtype: str

    @property
    def projection(self) -> str:
        """The name's last component: 'q_proj'."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Target:
    """A module that is adapted, with the rule that holds for it after the cascade.

    `rules` are the indices of the `[[adapt]]` rules that matched, in order. `shape` is None for shape = 'auto', which
    only the weights can decide.
    """

    module: Module
    rule: Adapt
    rules: tuple[int, ...]
    shape: FactorShape | None


# ---------------------------------------------------------------------------------------------- modules of a base


def list_modules(directory: Path) -> list[Module]:
    """List the linear projections inside the layers of the base in `directory`, in layer order.

    Reads safetensors headers where there are any (exact for every architecture), else config.json (llama, mistral,
    qwen2, qwen3, gemma).

    Raises:
        CheckpointError: the checkpoint is broken, or there are only a config and an architecture we cannot derive
            shapes for.
    """
    if any(directory.glob("*.safetensors")):
        modules = _modules_from_headers(directory)
        if not modules:
            raise CheckpointError(f"{directory}: no linear projection in the checkpoint (no 2-D '…layers.N….weight')")
        return modules
    return modules_from_config(read_json(directory / "config.json"), source=directory / "config.json")


def _modules_from_headers(directory: Path) -> list[Module]:
    modules = []
    for name, info in Checkpoint.open(directory).tensors.items():
        layer = _LAYER.search(name)
        if not layer or not name.endswith(".weight") or len(info.shape) != 2:
            continue
        module = name.removesuffix(".weight")
        # Experts and their router run through fused kernels, never through nn.Linear.forward: an adapter would not act.
        if ".experts." in module or module.endswith((".router", ".block_sparse_moe.gate", ".mlp.gate")):
            continue
        if any(part.endswith("norm") or part.startswith("embed") for part in module.split(".")):
            continue
        out_features, in_features = info.shape
        dtype = _DTYPES.get(info.dtype, info.dtype.lower())
        modules.append(Module(module, out_features, in_features, int(layer.group(1)), dtype))
    order = {name: place for place, name in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"))}
    return sorted(modules, key=lambda m: (m.layer or 0, order.get(m.projection, len(order)), m.name))


def modules_from_config(config: dict[str, Any], *, source: Path | str = "config.json") -> list[Module]:
    """Derive the projections of a LLaMA-like model from its config.

    Raises:
        CheckpointError: an architecture we cannot derive, or dimensions that are missing or impossible.
    """
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise CheckpointError(
            f"{source}: model_type {kind!r}: the projections cannot be derived from the config alone; expected one of "
            f"{', '.join(LLAMA_LIKE)}",
            hint="With the weights on disk (base.path) any architecture is read from the safetensors headers.",
        )
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    wrong = [f"{key} = {config.get(key)!r}" for key in required if not _positive(config.get(key))]
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
    wrong += [f"{key} = {config[key]!r}" for key in optional if not _positive(config[key])]
    if wrong:
        raise CheckpointError(f"{source}: expected positive whole numbers; got {', '.join(wrong)}")
    hidden, inner, layers, heads = (int(config[key]) for key in required)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or hidden // heads)
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"{source}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden),
        "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return [
        Module(f"model.layers.{layer}.{name}", out_features, in_features, layer, dtype)
        for layer in range(layers)
        for name, (out_features, in_features) in shapes.items()
    ]


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# ---------------------------------------------------------------------------------------------- rules over modules


def parse_layers(layers: str | Sequence[int], count: int) -> frozenset[int]:
    """Turn a rule's `layers` into layer numbers of a model with `count` layers.

    >>> sorted(parse_layers("-2-", 8))
    [6, 7]
    >>> sorted(parse_layers("2-4", 8))
    [2, 3, 4]

    Raises:
        PlanError: a layer outside 0 .. count − 1, a range that runs backwards, or text that is not a range.
    """
    last = count - 1
    if not isinstance(layers, str):
        outside = [layer for layer in layers if not 0 <= layer <= last]
        if outside:
            raise PlanError(f"layers {outside} are outside the model's 0-{last}")
        return frozenset(layers)
    if layers == "all":
        return frozenset(range(count))
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", layers):
        first, end = int(match[1]), int(match[2] or match[1])
        if first > end:
            raise PlanError(f"layers '{layers}' runs backwards; write '{end}-{first}'")
        if end > last:
            raise PlanError(f"layers '{layers}' is outside the model's 0-{last}")
        return frozenset(range(first, end + 1))
    if match := re.fullmatch(r"(\d+)-", layers):
        if int(match[1]) > last:
            raise PlanError(f"layers '{layers}' is outside the model's 0-{last}")
        return frozenset(range(int(match[1]), count))
    if match := re.fullmatch(r"-(\d+)-", layers):
        wanted = int(match[1])
        if not 1 <= wanted <= count:
            raise PlanError(f"layers '{layers}' asks for the last {wanted} layers; the model has {count}")
        return frozenset(range(count - wanted, count))
    raise PlanError(f"layers '{layers}': expected 'all', '0-15', '4-' (from 4 on), '-4-' (the last four), or a list")


def matches(pattern: str, module: Module) -> bool:
    """Whether a rule's pattern matches: a plain name the last component, one with '.', '*', '?', '[' the full name."""
    if any(char in pattern for char in ".*?["):
        return fnmatchcase(module.name, pattern)
    return module.projection == pattern


def _explain_no_match(pattern: str, modules: Sequence[Module]) -> str:
    """Say why a pattern matches nothing, with the nearest names."""
    word = pattern.rsplit(".", 1)[-1]
    for name, reason in _NOT_A_PROJECTION.items():
        if name in pattern:
            return f"'{pattern}' cannot be adapted: {reason}"
    if "norm" in word:
        return f"'{pattern}' cannot be adapted: a norm is a vector, not a linear projection"
    projections = list(dict.fromkeys(m.projection for m in modules))
    if any(char in pattern for char in ".*?["):
        suffixed = [m.name for m in modules if m.name.endswith("." + pattern)]
        if suffixed:
            return f"'{pattern}' matches no module (patterns with a dot match full names); did you mean '*.{pattern}'?"
        near = get_close_matches(pattern, [m.name for m in modules], n=1, cutoff=0.6)
        if not near:
            near = get_close_matches(word, projections, n=1, cutoff=0.5)
    else:
        near = get_close_matches(pattern, projections, n=1, cutoff=0.5)
    tip = f"; did you mean '{near[0]}'?" if near else ""
    return f"'{pattern}' matches no module{tip} (the base has {', '.join(projections)})"


def resolve_targets(manifest: Manifest, modules: Sequence[Module]) -> list[Target]:
    """Lay the manifest's rules over the base's modules.

    Returns one `Target` per adapted module, in the order of `modules`.

    Raises:
        PlanError: everything that does not fit, in one error: patterns that match nothing, layers that are not there,
            shapes that do not divide, `init = 'delta'` without `finetuned`, nothing left enabled.
    """
    problems: list[str] = []
    count = 1 + max((m.layer for m in modules if m.layer is not None), default=-1)
    matched: dict[str, list[int]] = {m.name: [] for m in modules}
    for index, rule in enumerate(manifest.adapt):
        try:
            layers = parse_layers(rule.layers, count)
        except PlanError as error:
            problems.append(f"adapt[{index}].layers: {error.message}")
            layers = frozenset(range(count))
        chosen = {m.name for pattern in rule.modules for m in modules if matches(pattern, m)}
        if "modules" in rule.model_fields_set or not chosen:
            # The default list of projections may name some that an architecture lacks; a written one may not.
            for pattern in rule.modules:
                if not any(matches(pattern, m) for m in modules):
                    problems.append(f"adapt[{index}].modules: {_explain_no_match(pattern, modules)}")
        hits = [m for m in modules if m.name in chosen and m.layer in layers]
        if chosen and not hits:
            problems.append(f"adapt[{index}]: matches no module in layers {rule.layers!r}")
        for module in hits:
            matched[module.name].append(index)
    chosen_rules = {name: cascade([manifest.adapt[i] for i in hits]) for name, hits in matched.items() if hits}
    enabled = [m for m in modules if m.name in chosen_rules and chosen_rules[m.name].enabled]
    if not enabled and not problems:
        problems.append("adapt: no module is left enabled; there is nothing to train")
    targets = []
    failures: dict[str, list[str]] = {}  # message -> modules it holds for: 32 layers, one line
    for module in enabled:
        rule, hits_of = chosen_rules[module.name], tuple(matched[module.name])
        if rule.init == "delta" and not rule.finetuned:
            index = _setter(manifest, hits_of, "init")
            message = f"adapt[{index}].init: 'delta' needs `finetuned`, the fully fine-tuned checkpoint"
            failures.setdefault(message, []).append(module.name)
        try:
            targets.append(Target(module, rule, hits_of, _resolve_shape(module, rule)))
        except PlanError as error:
            index = _setter(manifest, hits_of, "tp" if rule.tp > 1 and not isinstance(rule.shape, tuple) else "shape")
            message = f"adapt[{index}].shape: {error.message.replace(module.name, module.projection)}"
            failures.setdefault(message, []).append(module.name)
    for message, names in failures.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        problems.append(f"{message} ({names[0]}{more})")
    if problems:
        raise PlanError("\n".join(problems), hint="`soka-serve inspect BASE` lists a base's modules and shapes.")
    _warn_unused(manifest, targets)
    return targets


def cascade(rules: Sequence[Adapt]) -> Adapt:
    """One rule that takes each key from the last of `rules` that sets it."""
    values = {key: getattr(rule, key) for rule in rules for key in sorted(rule.model_fields_set)}
    return Adapt().model_copy(update=values)


def _resolve_shape(module: Module, rule: Adapt) -> FactorShape | None:
    parallel = parallel_of(module.name)
    size = (module.out_features, module.in_features)
    if isinstance(rule.shape, tuple):
        return check_shape(FactorShape(*rule.shape), *size, module=module.name, tp=rule.tp, parallel=parallel)
    # For 'auto' too: it says now, not after hours of reading weights, that no shape can be.
    balanced = balanced_shape(*size, tp=rule.tp, parallel=parallel)
    return None if rule.shape == "auto" else balanced


def _setter(manifest: Manifest, indices: Sequence[int], key: str) -> int:
    """Index of the rule whose `key` holds: the last that sets it, else the last that matched."""
    return next((i for i in reversed(indices) if key in manifest.adapt[i].model_fields_set), indices[-1])


def budget_groups(manifest: Manifest, targets: Sequence[Target]) -> dict[int, list[Target]]:
    """Targets with a budget policy by the index of the rule whose budget they share.

    Two rules that each set a budget have a budget each.
    """
    groups: dict[int, list[Target]] = {}
    for target in targets:
        if target.rule.rank.policy == "budget":
            groups.setdefault(_setter(manifest, target.rules, "rank"), []).append(target)
    return groups


def _warn_unused(manifest: Manifest, targets: Sequence[Target]) -> None:
    """Log rules and keys that have no effect, since nothing is ignored silently."""
    used = {index for target in targets for index in target.rules}
    for index, rule in enumerate(manifest.adapt):
        mine = [t for t in targets if index in t.rules]
        if rule.enabled and index not in used:
            warn(logger, "adapt[%d] has no effect: later rules disable every module it matches", index)
        if rule.finetuned and mine and all(t.rule.init != "delta" for t in mine):
            warn(logger, "adapt[%d].finetuned has no effect: init is not 'delta'", index)
        if rule.calibration_batches and mine and all(t.rule.init in ("zero", "random") for t in mine):
            warn(logger, "adapt[%d].calibration_batches has no effect: init is 'zero'", index)
