"""`soka-serve inspect`: what an adapter, a build, a model or a safetensors file holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from soka_serve.adapter.remote.fetch import local_adapter
from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.folder import ModelFolder
from soka_serve.base.modules import text_config
from soka_serve.base.quantisation import read_quantisation
from soka_serve.errors import CheckpointError, printable
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE, LOCK_FILE, WEIGHTS_FILE
from soka_serve.io.json_files import read_json
from soka_serve.io.lockfile import lock_of
from soka_serve.io.safetensors import TensorInfo, read_header, stored_bytes
from soka_serve.io.text import table
from soka_serve.trained import TENSORS, Form, form_problem

Kind = Literal["adapter", "training checkpoint", "build", "merged model", "model", "config", "safetensors file"]
Array = NDArray[np.float64]

_PART = re.compile(r"^(?:base_model\.model\.)?(.+)\.(soka_\w+|lora_[AB]\.weight)$")
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
# What a config says, by how it is called here.
_SAID = {
    **{"architecture": "architectures", "layers": "num_hidden_layers", "hidden": "hidden_size"},
    **{"heads": "num_attention_heads", "kv heads": "num_key_value_heads", "vocabulary": "vocab_size"},
}
_SHOWN_SIGMAS = 4
_SHOWN_CHARACTERS = 2000  # of a fact


@dataclass(frozen=True)
class ModuleInfo:
    """One adapted weight. `delta_norm` is the Frobenius norm of the delta; `sigma` is as stored, () for a LoRA.

    `term_norms` are the Frobenius norms of the terms, |sigma| * |left| * |right|; they equal `sigma` in an exported
    adapter, whose factors have unit norm.
    """

    module: str
    weight_shape: tuple[int, int]
    factor_shape: tuple[int, ...]
    rank: int
    parameters: int
    delta_norm: float
    sigma: tuple[float, ...]
    term_norms: tuple[float, ...]


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose names differ only in numbers ('model.layers.*.mlp.up_proj.weight'), of one shape and dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a path holds. `facts` are short lines for the top; `parts` are the directories of a build.

    `intruders` are by module, where a base was given: see `soka_serve.kron.intruders.count_intruders`.
    """

    path: Path
    kind: Kind
    facts: dict[str, str | int | float]
    modules: tuple[ModuleInfo, ...] = ()
    groups: tuple[TensorGroup, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    parts: tuple[Inspection, ...] = ()
    intruders: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For machines: everything, as JSON takes it."""
        found = asdict(self)
        found["path"] = str(self.path)
        found["parts"] = [part.to_json() for part in self.parts]
        return found

    def to_text(self) -> str:
        """Aligned tables for people."""
        sections = [f"{printable(self.path)}: {self.kind}\n{_facts(self.facts)}".rstrip()]
        if self.modules:
            sections.append(_module_table(self.modules))
        if self.groups:
            sections.append(_group_table(self.groups))
        if some := [[printable(module), str(count)] for module, count in self.intruders.items() if count]:
            sections.append("\n".join(table([["module", "intruders"], *some], right=[1])))
        if self.provenance:
            sections.append("Provenance (soka.lock)\n" + _facts(_flat(self.provenance)))
        sections += [part.to_text() for part in self.parts]
        return "\n\n".join(sections)


def inspect(path: str | Path, *, base: str | Path | None = None) -> Inspection:
    """Look into a path: an adapter, a training checkpoint, a build, a merged or base model, or one safetensors file.

    Only headers, configs and an adapter's own small tensors are read; torch is not needed.

    Args:
        path: what to look into; as text it may also be a hub id or URL of an adapter.
        base: directory or hub id of the base of an adapter, a build or a fine-tuned model, or 'tiny'. Intruder
            dimensions are then counted (arXiv:2410.21228), which reads both and takes time.

    Raises:
        CheckpointError: nothing that this package knows, or it is damaged; a base that it does not belong to.
    """
    found = _look_into(local_adapter(path))
    return found if base is None else _with_intruders(found, str(base))


def _look_into(path: Path) -> Inspection:
    if path.is_file() and path.suffix == ".safetensors":
        return _file(path)
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or directory", hint="give an adapter, a build or a model directory"
        )
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            return _adapter(path)
        if (path / "config.json").exists():
            return _model(path)
        if any((path / name).exists() for name in ("adapter", "merged", LOCK_FILE)):
            return _build(path)
    raise CheckpointError(
        f"{path}: neither an adapter (adapter_config.json), nor a model (config.json), nor a build (soka.lock)",
        hint="give the directory itself, such as build/math or build/math/adapter, or a .safetensors file",
    )


def _with_intruders(found: Inspection, base: str) -> Inspection:
    """The inspection with intruder dimensions: of a build, those of its adapter or else of its model."""
    if found.kind == "build" and found.parts:
        first, *others = found.parts
        return replace(found, parts=(_with_intruders(first, base), *others))
    if found.kind not in ("adapter", "training checkpoint", "model", "merged model"):
        raise CheckpointError(
            f"{found.path}: a {found.kind} has no base", hint="give an adapter, a build or a model, or leave --base out"
        )
    from soka_serve.adapter.intruders import intruders_of
    from soka_serve.base.resolve import open_base

    counts = intruders_of(found.path, open_base(base))
    with_some = sum(count > 0 for count in counts.values())
    fact = f"{sum(counts.values()):,} in {with_some:,} of {len(counts):,} modules"
    return replace(found, facts={**found.facts, "intruder dimensions": fact}, intruders=counts)


def _file(path: Path) -> Inspection:
    tensors = read_header(path)
    return Inspection(path, "safetensors file", _totals(tensors.values()), groups=_group(tensors.values()))


def _build(path: Path) -> Inspection:
    parts = tuple(inspect(path / name) for name in ("adapter", "merged") if (path / name).is_dir())
    lock = lock_of(path)
    facts: dict[str, str | int | float] = {}
    if "name" in lock:
        facts["name"] = str(lock["name"])
    others = [p.name for p in sorted(path.iterdir()) if p.is_file()]
    if others:
        facts["files"] = ", ".join(others)
    # The lock of the build says it all; its parts repeat it.
    bare = tuple(replace(p, provenance={}) for p in parts)
    provenance = lock or next((p.provenance for p in parts if p.provenance), {})
    return Inspection(path, "build", facts, provenance=provenance, parts=bare)


def _model(path: Path) -> Inspection:
    lock = lock_of(path)
    kind: Kind = "merged model" if lock.get("kind") == "merged" else "model"
    folder = ModelFolder(path)
    config = folder.config
    said = text_config(config)
    facts: dict[str, str | int | float] = {}
    for label, key in _SAID.items():
        if (value := said.get(key)) is not None:
            facts[label] = ", ".join(map(str, value)) if isinstance(value, list) else value
    facts["tied embeddings"] = "yes" if config.get("tie_word_embeddings") else "no"
    if (quantised := read_quantisation(folder)) is not None:
        facts["quantised"] = quantised.to_text()
    if not any(path.glob("*.safetensors*")) and not any(path.glob("*.bin")):
        return Inspection(path, "config", facts, provenance=lock)
    checkpoint = Checkpoint.open(path, folder)
    tensors = list(checkpoint.tensors.values())
    totals = _totals(tensors)
    if quantised is not None:  # several packed into one, and scales beside them
        totals = {"stored values" if name == "parameters" else name: value for name, value in totals.items()}
    facts |= totals
    facts["files"] = len(checkpoint.files)
    return Inspection(path, kind, facts, groups=_group(tensors), provenance=lock)


@np.errstate(invalid="ignore", over="ignore")  # norms of a damaged adapter are shown as nan or inf
def _adapter(path: Path) -> Inspection:
    budget = ReadingBudget()
    config = read_json(path / CONFIG_FILE, budget)
    tensors = read_header(path / WEIGHTS_FILE, budget)
    budget.take_values(path, sum(info.numel for info in tensors.values()))
    modules = _modules(config, tensors)
    kind: Kind = "training checkpoint" if config.get("soka_initial") else "adapter"
    facts: dict[str, str | int | float] = {"method": str(config.get("peft_type"))}
    if config.get("base_model_name_or_path"):
        facts["base"] = str(config["base_model_name_or_path"])
    if (bits := config.get("soka_quantize")) is not None:
        facts["adds to"] = f"its base in {bits!s:.20} (bitsandbytes), and is wrong on any other"
    trained = [t for t in tensors.values() if not t.name.endswith("_initial")]
    facts |= _totals(trained)
    if kind == "training checkpoint":
        initial = sum(t.numel for t in tensors.values()) - int(facts["parameters"])
        facts["initial factors"] = f"{initial:,} values, frozen"
    if modules:
        ranks = [m.rank for m in modules]
        facts["modules"] = len(modules)
        facts["rank"] = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else ranks[0]
        facts["delta norm"] = f"{float(np.sqrt(sum(m.delta_norm**2 for m in modules))):.4g} over all modules"
    groups = () if modules else _group(tensors.values())
    return Inspection(path, kind, facts, modules, groups, lock_of(path))


def _modules(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[ModuleInfo, ...]:
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if found := _PART.match(name):
            parts.setdefault(found.group(1), {})[found.group(2)] = info
    read = {"SOKA": _soka_module, "LORA": _lora_module}.get(str(config.get("peft_type")))
    if read is None:
        return ()
    return tuple(read(module, parts[module], config) for module in sorted(parts, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key of module names that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _soka_module(module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleInfo:
    left, right, sigma = (_read(module, parts, f"soka_{part}") for part in ("left", "right", "sigma"))
    if left.ndim != 3 or right.ndim != 3 or sigma.shape != left.shape[:1] or sigma.shape != right.shape[:1]:
        raise CheckpointError(
            f"{module}: left {left.shape}, right {right.shape} and sigma {sigma.shape} do not fit together",
            hint="expected (r, m, n), (r, p, q) and (r,): the adapter is damaged",
        )
    if any(f"soka_{name}" in parts for name in TENSORS):
        left, right, sigma = _with_added(module, parts, config, (left, right, sigma))
    stacked = [(left, right, sigma)]
    if config.get("soka_initial"):
        initial = [_read(module, parts, f"soka_{part}_initial") for part in ("left", "right", "sigma")]
        stacked.append((initial[0], initial[1], -initial[2]))
    lefts, rights = (np.concatenate([s[i].reshape(len(s[2]), -1) for s in stacked]) for i in (0, 1))
    scales = np.concatenate([s[2] for s in stacked])
    # <L1 x R1, L2 x R2> = <L1, L2> <R1, R2>: norms without the dense delta.
    gram = (lefts @ lefts.T) * (rights @ rights.T) * np.outer(scales, scales)
    rank, (m, n), (p, q) = len(sigma), left.shape[1:], right.shape[1:]
    return ModuleInfo(
        module=module,
        weight_shape=(m * p, n * q),
        factor_shape=(m, n, p, q),
        rank=rank,
        parameters=left.size + right.size + sigma.size,
        delta_norm=float(np.sqrt(max(gram.sum(), 0.0))),
        sigma=tuple(sigma.tolist()),
        term_norms=tuple(np.sqrt(np.diag(gram)[:rank]).tolist()),
    )


def _with_added(
    module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any], terms: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """The terms of a module in training, with what is trained beside left, right and sigma."""
    import torch

    from soka_serve.kron import Factors

    form = config.get("soka_modules", {}).get(module, {}).get("trained", {})
    if (problem := form_problem(form)) is not None:
        raise CheckpointError(f"{module}: trained: {problem}", hint="the adapter is damaged: write it again")
    added = {name: _read(module, parts, f"soka_{name}") for name in TENSORS if f"soka_{name}" in parts}
    whole = Form(form).apply(
        Factors(*(torch.tensor(t) for t in terms)), {name: torch.tensor(value) for name, value in added.items()}
    )
    return whole.left.numpy(), whole.right.numpy(), whole.sigma.numpy()


def _lora_module(module: str, parts: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> ModuleInfo:
    a, b = (_read(module, parts, f"lora_{part}.weight") for part in ("A", "B"))
    rank = a.shape[0]
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != rank or not rank:
        raise CheckpointError(
            f"{module}: lora_A {a.shape} and lora_B {b.shape} do not fit together",
            hint="expected (r, in) and (out, r): the adapter is damaged",
        )
    scale = _number(config, "lora_alpha", rank) / (np.sqrt(rank) if config.get("use_rslora") else rank)
    norm = float(np.sqrt(max(np.sum((a @ a.T) * (b.T @ b)), 0.0)) * scale)
    return ModuleInfo(module, (b.shape[0], a.shape[1]), (), rank, a.size + b.size, norm, (), ())


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a config, or the default where there is none."""
    value = config.get(key) or default
    if not isinstance(value, int | float):
        raise CheckpointError(
            f"{CONFIG_FILE}: {key} must be a number, not {value!r:.80}", hint="the adapter is damaged: fetch it again"
        )
    return float(value)


def _read(module: str, parts: Mapping[str, TensorInfo], part: str) -> Array:
    """A small tensor in float64."""
    if part not in parts:
        raise CheckpointError(f"{module}: {part} is missing", hint="the adapter is damaged: write or fetch it again")
    info = parts[part]
    with info.file.open("rb") as stream:
        stream.seek(info.start)
        data = stream.read(info.nbytes)
    if info.dtype == "BF16":  # the upper half of a float32
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    elif info.dtype in ("F64", "F32", "F16"):
        values = np.frombuffer(data, f"<f{stored_bytes(info.dtype, 1)}")
    else:
        raise CheckpointError(f"{info.file}: {info.name} is {info.dtype}", hint="expected a floating-point dtype")
    return values.astype(np.float64).reshape(info.shape)


def _totals(tensors: Collection[TensorInfo]) -> dict[str, str | int | float]:
    return {
        "tensors": len(tensors),
        "parameters": sum(t.numel for t in tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "dtype": ", ".join(sorted({t.dtype for t in tensors})),
    }


def _group(tensors: Collection[TensorInfo]) -> tuple[TensorGroup, ...]:
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = {}
    for info in tensors:
        groups.setdefault((_NUMBER.sub(".*", info.name), info.dtype, info.shape), []).append(info)
    found = []
    for (name, dtype, shape), same in sorted(groups.items(), key=lambda item: item[0][0]):
        sizes = sum(i.numel for i in same), sum(i.nbytes for i in same)
        found.append(TensorGroup(same[0].name if len(same) == 1 else name, dtype, shape, len(same), *sizes))
    return tuple(found)


# --- text ------------------------------------------------------------------------------------------------------------


def _facts(facts: Mapping[str, object]) -> str:
    shown = {printable(key): _show(value) for key, value in facts.items()}
    width = max(map(len, shown), default=0)
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in shown.items())


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else printable(value, _SHOWN_CHARACTERS)


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted keys; the long ones (ranks of modules, files) as a count."""
    found: dict[str, object] = {}
    for key, value in table.items():
        if not isinstance(value, Mapping):
            found[f"{prefix}{key}"] = value
        elif key in ("ranks", "files"):
            found[f"{prefix}{key}"] = f"{len(value)} entries"
        else:
            found |= _flat(value, f"{prefix}{key}.")
    return found


def _module_table(modules: Sequence[ModuleInfo]) -> str:
    has_terms = any(m.sigma for m in modules)
    head = ["module", "weight", *(["factors m n p q"] if has_terms else []), "rank", "parameters", "|delta|"]
    rows = []
    for m in modules:
        shape = [" ".join(map(str, m.factor_shape))] if has_terms else []
        rows.append([m.module, _by(m.weight_shape), *shape, str(m.rank), f"{m.parameters:,}", f"{m.delta_norm:.4g}"])
        if has_terms:
            shown = ", ".join(f"{s:.3g}" for s in m.term_norms[:_SHOWN_SIGMAS])
            rows[-1].append(shown + (", ..." if len(m.term_norms) > _SHOWN_SIGMAS else ""))
    return "\n".join(table([[*head, *(["|terms|"] if has_terms else [])], *rows], right=range(1, len(head))))


def _group_table(groups: Sequence[TensorGroup]) -> str:
    rows = [
        [g.name, g.dtype, _by(g.shape) or "scalar", str(g.count), f"{g.parameters:,}", f"{g.size_bytes:,}"]
        for g in groups
    ]
    head = ["tensor", "dtype", "shape", "count", "parameters", "bytes"]
    return "\n".join(table([head, *rows], right=range(2, len(head))))


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
