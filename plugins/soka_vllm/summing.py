"""A worker's part of a sum of adapters: the sum of what it holds of them, term by term, as one adapter.

Terms of Kronecker factors concatenate along their number, LoRA's matrices along their rank, each scaled, so the delta
of the sum is the sum of the scaled deltas, but for the rounding of scaled factors to the dtype that is served.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights

from soka_serve.errors import first_ten
from soka_vllm.arena import too_large
from soka_vllm.layers import KroneckerMixin
from soka_vllm.loader import places_of, taken_name
from soka_vllm.settings import KEEP_VARIABLE
from soka_vllm.store import BESIDE, READ_RESULT, ReadResult, tensors_of, whole_modules, worker_adapters
from soka_vllm.sums import members_of

_logger = logging.getLogger("vllm.soka")


class _Part(NamedTuple):
    """What one adapter adds to a module: Left (r, m, n) and Right (r, p, q), or LoRA's A (r, in) and B (out, r)."""

    adapter: str
    scale: float
    a: Tensor
    b: Tensor

    @property
    def is_kronecker(self) -> bool:
        return self.a.ndim == 3

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> list[int]:
        """Of the Kronecker factors: m, n, p, q."""
        return [*self.a.shape[1:], *self.b.shape[1:]]


def add_up(manager: Any, lora_request: Any, values: int) -> Any:
    """The LoRAModel of a sum.

    Args:
        manager: vLLM's WorkerLoRAManager; holds the members (`soka_vllm.store`).
        lora_request: vLLM's, of the sum.
        values: that Kronecker factors of one adapter may have.

    Raises:
        ValueError: why the adapters have no sum that can be served, all reasons at once.
    """
    adapters = manager._adapter_manager
    if adapters._is_moe:
        raise ValueError("sums of adapters are not served on mixtures of experts")
    places = places_of(adapters)
    modules: dict[str, list[_Part]] = {}
    for member in members_of(lora_request):
        model = worker_adapters(manager).model(member.number)
        if model is None:
            raise ValueError(f"`{member.name}` is not in this worker's memory")
        if whole_modules(model):
            raise ValueError(f"`{member.name}` replaces whole modules; those have no sum")
        for name, a, b, scaling in _flat(model, adapters.packed_modules):
            part = _Part(member.name, member.scale * scaling, a, b)
            modules.setdefault(taken_name(name, places, adapters), []).append(part)
    _check(modules, manager.lora_config.max_lora_rank, values)
    model = _model(lora_request, modules, adapters)
    setattr(model, READ_RESULT, _reading(manager, lora_request, model))
    return model


def _reading(manager: Any, lora_request: Any, model: Any) -> ReadResult:
    """What a worker says of a sum it has made: by its members, since workers hold the same ones in unlike forms.

    vLLM multiplies the scaling into matrices of an adapter where it puts them into a slot, which under pipeline
    parallelism it does in some workers only.
    """
    digest = xxhash.xxh3_128(lora_request.lora_path.encode())
    for member in members_of(lora_request):
        digest.update(worker_adapters(manager).fingerprint(member.number).encode())
    return ReadResult(fingerprint=digest.hexdigest(), nbytes=sum(tensor.nbytes for _, tensor in tensors_of(model)))


def _flat(model: Any, packed: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Modules of a LoRAModel, each with its two tensors and scaling; vLLM packs some when it takes an adapter over."""
    for name, held in model.loras.items():
        if isinstance(held.lora_a, Tensor):
            yield name, held.lora_a, held.lora_b, held.scaling
            continue
        parts = packed[name]
        for i, (a, b, scaling) in enumerate(zip(held.lora_a, held.lora_b, held.scaling, strict=True)):
            if a is not None and parts.index(parts[i]) == i:  # a layer may hold a module twice
                yield parts[i], a, b, scaling


def _check(modules: Mapping[str, Sequence[_Part]], max_lora_rank: int, values: int) -> None:
    problems: list[str] = []
    total = 0
    for name, parts in modules.items():
        kronecker = [part for part in parts if part.is_kronecker]
        total += sum(part.a.numel() + part.b.numel() for part in kronecker)
        other = next((part for part in kronecker if part.shape != kronecker[0].shape), None)
        if other is not None:
            first = kronecker[0]
            problems.append(
                f"{name}: the factor shapes {first.shape} of `{first.adapter}` and {other.shape} of `{other.adapter}` "
                "differ, and terms of different shapes do not concatenate"
            )
        ranks = [part.rank for part in parts if not part.is_kronecker]
        if sum(ranks) > max_lora_rank:
            problems.append(
                f"{name}: LoRA ranks {' + '.join(map(str, ranks))} = {sum(ranks)}, and --max-lora-rank is "
                f"{max_lora_rank}; start the server with {sum(ranks)} or more"
            )
    if total > values:
        problems.append(
            f"the sum has {total} values of factors; this server takes {values} of one adapter ({KEEP_VARIABLE} may "
            "allow for more)"
        )
    if problems:
        raise ValueError("\n".join(first_ten(problems)))


def _model(lora_request: Any, modules: Mapping[str, Sequence[_Part]], adapters: Any) -> Any:
    places = places_of(adapters)
    weights: dict[str, LoRALayerWeights] = {}
    beside: dict[str, LoRALayerWeights] = {}
    kronecker_layers = {
        id(places[name][0]) for name, parts in modules.items() if name in places and any(p.is_kronecker for p in parts)
    }
    taken, room, spoilt = 0, None, []
    for name, parts in modules.items():
        layer, index = places.get(name, (None, 0))
        for kronecker in (True, False):
            chosen = [part for part in parts if part.is_kronecker is kronecker]
            if not chosen:
                continue
            a, b = _joined(chosen)
            if not bool(a.isfinite().all() and b.isfinite().all()):
                spoilt.append(name)
            if kronecker and isinstance(layer, KroneckerMixin):
                room = layer.slot_values
                if (arranged := layer.arranged(index, a, b)) is not None:
                    a, b, own = arranged
                    taken += own.numel()
                else:
                    taken += sum(part.left.numel() + part.right.numel() for _, part in layer.parts(index, a, b))
            target = beside if not kronecker and id(layer) in kronecker_layers else weights
            target[name] = LoRALayerWeights(name, a.shape[0], a.shape[0], a, b, scaling=1)
    if spoilt:
        lines = [f"{name}: scaled values are not finite in {a.dtype}; give smaller scales" for name in spoilt]
        raise ValueError("\n".join(first_ten(lines)))
    if room is not None and taken > room:
        raise ValueError(too_large(taken, room))
    rank = max(weight.rank for weight in (*weights.values(), *beside.values()))
    _logger.info("Sum %r: %d modules, ranks up to %d", lora_request.lora_name, len(modules), rank)
    model = LoRAModel(lora_request.lora_int_id, rank, weights)
    setattr(model, BESIDE, beside)
    return model


def _joined(parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
    """The two tensors of a sum of Kronecker terms, or of LoRA's matrices, in memory of their own.

    The scale goes where sigma and LoRA's scaling are: into Left, and into B.
    """
    kronecker = parts[0].is_kronecker
    scaled = [((part.a if kronecker else part.b).double() * part.scale).to(part.a.dtype) for part in parts]
    if kronecker:
        return torch.cat(scaled), torch.cat([part.b for part in parts])
    return torch.cat([part.a for part in parts]), torch.cat(scaled, 1)
