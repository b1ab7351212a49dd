"""From an adapter directory to what vLLM's managers keep: checked against the model's layers as a whole, or refused."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from soka_serve.adapter import CONFIG_FILE, PEFT_TYPE, read_adapter
from soka_serve.errors import SokaError, printable
from soka_serve.headers import find_not_finite, read_json
from soka_serve.kron import Factors
from soka_vllm import compat
from soka_vllm.arena import too_large
from soka_vllm.layers import KroneckerMixin
from soka_vllm.lokr import read_lokr
from soka_vllm.lycoris import KIND as LYCORIS
from soka_vllm.lycoris import find_lycoris, read_lycoris, unflatten

_logger = logging.getLogger("vllm.soka")


def read_kind(directory: Path) -> str | None:
    """The kind of adapter in a directory, as its config names it; None where there is no config.

    Raises:
        ValueError: a config that cannot be read, or that names no kind.
    """
    file = directory / CONFIG_FILE
    if not file.exists():
        return LYCORIS if find_lycoris(directory) else None
    try:
        config = read_json(file)
    except SokaError as error:
        raise ValueError(_within(directory, error)) from error
    if "peft_type" not in config and "lora_alpha" not in config:
        raise ValueError(f"{CONFIG_FILE}: no peft_type; supported are LORA, {', '.join(READERS)}")
    return str(config.get("peft_type", "LORA"))


def _within(directory: Path, error: SokaError) -> str:
    """An error's message with files named as they are within the adapter; vLLM strikes paths from what it answers."""
    return error.message.replace(f"{directory}: ", "").replace(f"{directory}/", "")


def read_soka(directory: Path) -> dict[str, Factors]:
    """Read a SoKA adapter, finished or a checkpoint of a training, as the terms of each module's delta.

    Raises:
        CheckpointError: everything that is wrong with it.
    """
    adapter = read_adapter(directory)
    return {name: adapter.delta_factors(name) for name in adapter.factors}


READERS: dict[str, Callable[[Path], dict[str, Factors]]] = {
    PEFT_TYPE: read_soka,
    "LOKR": read_lokr,
    LYCORIS: read_lycoris,
}


def load_adapter(directory: Path, kind: str, lora_request: Any, manager: Any, dtype: torch.dtype) -> Any:
    """Read a Kronecker adapter as a vLLM LoRAModel.

    Each module's `lora_a` is Left (r, m, n) with sigma multiplied in and `lora_b` is Right (r, p, q), both on the CPU
    in `dtype`; three dimensions tell them from LoRA's two.

    Args:
        directory: the adapter.
        kind: its peft_type, one of READERS.
        lora_request: vLLM's request; its integer id goes into the model.
        manager: vLLM's LoRAModelManager, whose layers the adapter must fit.
        dtype: of the factors in the slots.

    Raises:
        ValueError: everything that is wrong with the adapter, or that does not fit the model.
    """
    try:
        adapter = READERS[kind](directory)
    except SokaError as error:
        raise ValueError(_within(directory, error)) from error
    places = _places(manager)
    if kind == LYCORIS:
        adapter = unflatten(adapter, places, compat.modules_elsewhere(manager.model))
    else:
        adapter = {compat.served_name(manager.model, name): factors for name, factors in adapter.items()}
    here = _check_layers(adapter, places, manager)
    weights = {}
    tensors: dict[str, torch.Tensor] = {}
    values, room = 0, None
    for name, factors in adapter.items():
        left = (factors.left * factors.sigma[:, None, None]).to(dtype)
        right = factors.right.to(dtype, copy=True)  # else all of the file stays in memory for it
        tensors |= {f"{name}: Left": left, f"{name}: Right": right}
        if name in places:
            layer, index = places[name]
            room = layer.slot_values
            values += sum(part.left.numel() + part.right.numel() for _, part in layer.parts(index, left, right))
        weights[name] = compat.LoRALayerWeights(name, factors.rank, factors.rank, left, right, scaling=1)
    if spoilt := find_not_finite(tensors):
        raise ValueError("\n".join(f"{name} has values that are not finite in {dtype}" for name in spoilt))
    if room is not None and values > room:
        raise ValueError(too_large(values, room))
    ranks = sorted({weight.rank for weight in weights.values()})
    _logger.info(
        "%s adapter %r from %s: %d modules, ranks %d to %d, on this rank %d of them with %d bytes in %s",
        *(kind, lora_request.lora_name, lora_request.lora_path, len(weights), ranks[0], ranks[-1]),
        *(here, values * dtype.itemsize, dtype),
    )
    return compat.LoRAModel(lora_request.lora_int_id, ranks[-1], weights)


def check_lora(model: Any, manager: Any) -> None:
    """Hold an ordinary LoRA adapter, as vLLM has read it, against the layers: vLLM leaves out what it cannot place.

    Where vLLM itself renames modules or leaves some out on purpose (experts, towers of multimodal models, pooling
    models) nothing is checked.

    Args:
        model: vLLM's LoRAModel, not yet packed.
        manager: vLLM's LoRAModelManager.

    Raises:
        ValueError: all modules that the served model has no layer for, or whose matrices do not fit or are not finite.
    """
    if manager._is_moe or manager.supports_mm or manager.is_pooling_model:
        return
    places, elsewhere = _places(manager), compat.modules_elsewhere(manager.model)
    problems = []
    for name, weights in model.loras.items():
        if f"{name}.".startswith(elsewhere):
            continue
        down, up = weights.lora_a, weights.lora_b
        if name not in places:
            problems.append(_no_layer(name, places, manager))
        elif down is None or up is None:
            problems.append(f"{printable(name)}: lora_{'A' if down is None else 'B'} is missing")
        elif not bool(down.isfinite().all() and up.isfinite().all()):
            problems.append(f"{printable(name)}: values are not finite")
        elif isinstance(places[name][0], KroneckerMixin):
            layer, index = places[name]
            shape = (up.shape[0], down.shape[1])
            if shape != layer.shards.shapes[index] or up.shape[1] != down.shape[0]:
                problems.append(
                    f"{name}: lora_B {tuple(up.shape)} and lora_A {tuple(down.shape)}, "
                    f"the served weight is {layer.shards.shapes[index]}"
                )
    if problems:
        raise ValueError("\n".join(problems))


def _no_layer(name: str, places: Mapping[str, object], manager: Any) -> str:
    close = difflib.get_close_matches(name, places, n=1)
    near = f"; close is {close[0]}" if close else ""
    targets = manager.lora_config.target_modules
    left_out = f"; --lora-target-modules is {' '.join(targets)}" if targets else ""
    return f"{printable(name)}: no layer of the served model that takes adapters{near}{left_out}"


def _places(manager: Any) -> dict[str, tuple[Any, int]]:
    """By module name as in a checkpoint, the layer that takes its adapters and which of the layer's modules it is."""
    places = {}
    for name, layer in manager.modules.items():
        parts = manager.packed_modules.get(name, [name])
        places.update({part: (layer, index) for index, part in enumerate(parts)})
    return places


def _check_layers(adapter: Mapping[str, Factors], places: Mapping[str, tuple[Any, int]], manager: Any) -> int:
    """Each module of the adapter must be a layer, or a slice of one, that takes Kronecker factors of its shape.

    A rank of a pipeline answers for its own layers; what lies inside a layer that it knows to be another's is left to
    that rank.

    Returns:
        How many of the modules are on this rank.

    Raises:
        ValueError: all that do not fit.
    """
    problems = []
    elsewhere = compat.modules_elsewhere(manager.model)
    here = 0
    for name, factors in adapter.items():
        if f"{name}.".startswith(elsewhere):
            continue
        here += 1
        layer, index = places.get(name, (None, 0))
        shape = factors.shape
        if layer is None:
            problems.append(_no_layer(name, places, manager))
        elif not isinstance(layer, KroneckerMixin):
            problems.append(f"{name}: {type(layer).__name__} takes no Kronecker adapter; only attention and MLP do")
        elif (shape.out_features, shape.in_features) != layer.shards.shapes[index]:
            problems.append(
                f"{name}: factors {list(shape)} make a {(shape.out_features, shape.in_features)} delta, "
                f"the served weight is {layer.shards.shapes[index]}"
            )
    if problems:
        raise ValueError("\n".join(problems))
    return here
