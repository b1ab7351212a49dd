"""Intruder dimensions of an adapter or a fine-tuned model, module by module, beside its base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from soka_serve.adapter.format import PEFT_TYPE, QUANTIZE_KEY
from soka_serve.adapter.given import LOKR, open_given
from soka_serve.adapter.source import base_sha256_of, find_lock
from soka_serve.base.base import Base
from soka_serve.errors import CheckpointError
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.json_files import read_json
from soka_serve.io.progress import track
from soka_serve.io.safetensors import check_finite, read_header, read_tensor
from soka_serve.kron import Factors, dense_delta
from soka_serve.kron.intruders import count_intruders

if TYPE_CHECKING:
    from torch import Tensor

_LORA = "LORA"
# What makes another update of a LoRA than scale * B A, or leaves the scale to patterns.
_NOT_PLAIN = (
    *("alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config", "layer_replication", "lora_bias"),
    *("modules_to_save", "rank_pattern", "target_parameters", "use_bdlora", "use_dora", "use_qalora"),
)
# Beginnings of `init_lora_weights` with which PEFT changes the base's weights: B A is then no update of the base.
_REWRITING = ("corda", "loftq", "lora_ga", "olora", "pissa")


def intruders_of(path: Path, base: Base, *, progress: bool = True) -> dict[str, int]:
    """Per module, how many of the leading singular vectors of base + delta the base's weight has not.

    Args:
        path: an adapter (SoKA's, LoKr's, a plain LoRA), or a model of the base's architecture.
        base: what it was trained on.
        progress: show it.

    Returns:
        By full module name, see `soka_serve.kron.intruders.count_intruders`; for a model of all linear projections
        inside the layers.

    Raises:
        CheckpointError: another base, shapes that do not fit it, an adapter of another kind, damage.
    """
    base.check_plain()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts: dict[str, int] = {}
    modules, changed = _changed(path, base)
    config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).exists() else {}
    bits = config.get(QUANTIZE_KEY) if config.get("peft_type") == PEFT_TYPE else None
    with track(len(modules), "singular vectors", unit="module", enabled=progress) as advance:
        for module, delta in changed:
            weight = check_finite(base.weights.read(module), module).to(device)
            if bits is not None:  # the adapter adds to what such a base computes with
                from soka_serve.base.held import held_weight

                weight = held_weight(weight, bits)
            weight = weight.float()
            if delta.shape != weight.shape:
                raise CheckpointError(
                    f"{path}: {module} is {tuple(delta.shape)}, the base's weight {tuple(weight.shape)}",
                    hint="is this its own base?",
                )
            counts[module] = count_intruders(weight, check_finite(weight + delta.to(device), f"{path}: {module}"))
            advance(module)
    return counts


def _changed(path: Path, base: Base) -> tuple[list[str], Iterator[tuple[str, Tensor]]]:
    """Names of the modules that differ from the base's, and (name, delta in float32) of each."""
    if (path / CONFIG_FILE).exists():
        kind = read_json(path / CONFIG_FILE).get("peft_type")
        if kind not in (_LORA, LOKR, PEFT_TYPE):
            raise CheckpointError(
                f"{path}: peft_type is {kind!r:.80}",
                hint=f"intruder dimensions are counted for {PEFT_TYPE}, {LOKR} and plain {_LORA}, and for models",
            )
        _check_base(path, base)
        terms = _lora_terms(path) if kind == _LORA else open_given(path).read()
        return list(terms), ((name, dense_delta(terms[name])) for name in terms)
    other = Base(path)
    other.check_plain()
    names = [module.name for module in base.layout.modules]
    if names != [module.name for module in other.layout.modules]:
        raise CheckpointError(f"{path}: its projections are not those of {base.name}", hint="is this its own base?")
    return names, ((name, _difference(name, path, other, base)) for name in names)


def _difference(name: str, path: Path, other: Base, base: Base) -> Tensor:
    """A model's weight (out, in) minus the base's, float32."""
    changed, weight = other.weights.read(name), base.weights.read(name)
    if changed.shape != weight.shape:
        raise CheckpointError(
            f"{path}: {name} is {tuple(changed.shape)}, the base's weight {tuple(weight.shape)}",
            hint="is this its own base?",
        )
    return changed.float() - weight.float()


def _check_base(path: Path, base: Base) -> None:
    """Refuse a base whose weights are others than the lock says."""
    trained_on = base_sha256_of(find_lock(path))
    if trained_on is not None and trained_on != base.checkpoint.sha256():
        raise CheckpointError(
            f"{path}: made for base weights with sha256 {trained_on}; those of {base.name} are others",
            hint="give the base that it was trained on",
        )


def _lora_terms(path: Path) -> dict[str, Factors]:
    """By module the update of a LoRA as PEFT writes it, scale * B A: Kronecker products of columns and rows."""
    config = read_json(path / CONFIG_FILE)
    if others := [key for key in _NOT_PLAIN if config.get(key)]:
        raise CheckpointError(
            f"{path}: a LoRA with {', '.join(others)}", hint="intruder dimensions are counted for plain LoRAs"
        )
    if str(start := config.get("init_lora_weights")).lower().startswith(_REWRITING):
        raise CheckpointError(
            f"{path}: a LoRA with init_lora_weights = {start!r:.80}, which is an update of weights that PEFT changed",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{path / CONFIG_FILE}: lora_alpha must be a number, not {alpha!r:.80}", hint="write or fetch it again"
        )
    found = read_header(path / WEIGHTS_FILE)
    terms = {}
    for key in (key for key in found if key.endswith(".lora_A.weight")):
        stem = key.removesuffix("lora_A.weight")
        if f"{stem}lora_B.weight" not in found:
            raise CheckpointError(f"{path}: {stem}lora_B.weight is missing", hint="write or fetch it again")
        a, b = (read_tensor(found[f"{stem}lora_{part}.weight"]).float() for part in "AB")
        rank = a.shape[0]
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        terms[stem.removeprefix("base_model.model.").rstrip(".")] = Factors(
            b.t().unsqueeze(2), a.unsqueeze(1), torch.full((rank,), scale)
        )
    if not terms:
        raise CheckpointError(
            f"{path}: a LoRA of no linear projection", hint="intruder dimensions are those of weights"
        )
    return terms
