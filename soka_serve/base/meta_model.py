"""The modules of a base as transformers builds it, without its weights: what is adapted is what the model has.

File headers do not tell a layer of the model from one that it leaves out (multi-token prediction), a projection from a
router, the language model from a vision tower, or a weight from a part of it. The model on the meta device does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.modules import BaseModules, ModelSize, Module, ModuleExclusion, in_layer_order, misfit
from soka_serve.base.pretrained import build_meta_model
from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import CheckpointError
from soka_serve.io.safetensors import DTYPES, TensorInfo

EXPERTS = "experts run through fused kernels, which no adapter reaches"
ROUTER = "a router"
MAMBA = "Mamba's fused kernels read the weight without calling the layer"
TIED = "shares its weight with another module: a merge would change both"
CONVERTED = "transformers makes the weight from other tensors, so that a delta cannot be merged into the checkpoint"
ELSEWHERE = "outside of the language model's layers"

_MAMBA_PROJECTIONS = frozenset({"x_proj", "dt_proj", "out_proj"})


def read_meta(checkpoint: Checkpoint) -> BaseModules:
    """The modules of a checkpoint's model, by transformers' own class for it.

    Raises:
        CheckpointError: transformers knows no causal language model for it, its config makes none, the checkpoint lacks
            projections or has them in other shapes than the config says, or there is nothing to adapt.
    """
    model, weights, unused = _open(checkpoint)
    config = model.config.get_text_config(decoder=True)
    layers = [re.compile(rf"{re.escape(name)}\.(\d+)\.") for name in _find_layers(model, config, checkpoint.directory)]
    kept: list[tuple[str, int, Any]] = []
    left_out: dict[str, list[str]] = {}
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    for name, module in modules.items():
        if not any(p.ndim > 1 for p in module.parameters(recurse=False)):
            continue
        layer = next((int(match[1]) for pattern in layers if (match := pattern.match(name))), None)
        if layer is None:
            reason = ELSEWHERE if type(module) is nn.Linear and module is not head else None
        else:
            reason = _reason(name, module, modules)
            if reason is None and shared[id(module.weight)] > 1:
                reason = TIED
            if reason is None and weights.is_converted(name):
                reason = CONVERTED
            if reason is None:
                kept.append((name, layer, module))
        if reason is not None:
            left_out.setdefault(reason, []).append(name)
    outside = [
        ModuleExclusion(tuple(names), reason, _towers(names, _decoder_name(model)) if reason == ELSEWHERE else ())
        for reason, names in left_out.items()
    ]
    if not kept:
        raise CheckpointError(
            f"{checkpoint.directory}: no linear projection in the layers of {type(model).__name__} can be adapted"
            + "".join(f"\n  not {entry.to_text()}" for entry in outside),
            hint="adapters go on plain nn.Linear layers",
        )
    listed = _check(kept, weights, checkpoint)
    left = set(unused)
    size = ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        linear=sum(m.out_features * m.in_features for m in listed),
        weight_bytes=sum(info.nbytes for info in checkpoint.tensors.values() if info.name not in left),
        dtype=listed[0].dtype,
        hidden=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        layers=int(config.num_hidden_layers),
    )
    return BaseModules(listed, size, tuple(outside), unused, weights)


def read_weights(checkpoint: Checkpoint) -> WeightMap:
    """Where a checkpoint keeps the weights of its model's modules, whatever can be adapted of them.

    Raises:
        CheckpointError: transformers knows no causal language model for it, or its config makes none.
    """
    return _open(checkpoint)[1]


def _open(checkpoint: Checkpoint) -> tuple[Any, WeightMap, tuple[str, ...]]:
    """The model on the meta device, and what of the checkpoint goes where in it."""
    model = build_meta_model(checkpoint.directory)
    return model, *map_tensors(model, checkpoint.tensors, checkpoint.directory)


def _find_layers(model: Any, config: Any, directory: Path) -> list[str]:
    """Names of the lists of the language model's layers: the outermost in it of as many as the config says."""
    start = _decoder_name(model)
    found: list[str] = []
    for name, module in model.named_modules():
        inside = not start or name.startswith(f"{start}.")
        outermost = not any(name.startswith(f"{outer}.") for outer in found)
        if inside and outermost and isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            found.append(name)
    if not found:
        raise CheckpointError(
            f"{directory}: {type(model).__name__} has no list of {config.num_hidden_layers} layers, the number in its "
            "config.json",
            hint="the architecture is not supported",
        )
    return found


def _decoder_name(model: Any) -> str:
    decoder = model.get_decoder()
    return next(str(name) for name, module in model.named_modules() if module is decoder)


def _towers(names: Iterable[str], decoder: str) -> tuple[str, ...]:
    """The largest parts of a model that hold the named modules and do not hold the decoder.

    >>> _towers(["model.vision.layers.0.fc", "model.vision.layers.1.fc", "head"], "model.language")
    ('model.vision', 'head')
    """
    found = []
    for name in names:
        parts, shared = name.split("."), 0
        for mine, others in zip(parts, decoder.split("."), strict=False):
            if mine != others:
                break
            shared += 1
        found.append(".".join(parts[: shared + 1]))
    return tuple(dict.fromkeys(found))


def _reason(name: str, module: Any, modules: Mapping[str, Any]) -> str | None:
    """Why a module with a weight cannot be adapted; None where it can."""
    parent = modules[name.rpartition(".")[0]]
    parts = name.split(".")
    if "experts" in parts:
        return EXPERTS
    if hasattr(parent, "experts") or "router" in parts:
        return ROUTER
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, no nn.Linear"
    if hasattr(parent, "A_log") and hasattr(parent, "D") and parts[-1] in _MAMBA_PROJECTIONS:
        return MAMBA
    return None


def _check(kept: Iterable[tuple[str, int, Any]], weights: WeightMap, checkpoint: Checkpoint) -> tuple[Module, ...]:
    listed, problems = [], []
    for name, layer, module in kept:
        info = weights.find(name)
        shape = (module.out_features, module.in_features)
        if info is None:
            problems.append(f"{name}.weight is missing")
        elif info.shape != shape:
            problems.append(f"{info.name} is {info.shape}, config.json makes it {shape}")
        else:
            listed.append(Module(name, *shape, layer, DTYPES[info.dtype][1]))
    if problems:
        raise misfit(checkpoint.directory, problems)
    return in_layer_order(listed)


def map_tensors(
    model: Any, tensors: Mapping[str, TensorInfo], source: Path | str = "the base"
) -> tuple[WeightMap, tuple[str, ...]]:
    """Which tensor becomes which parameter when transformers loads a checkpoint, by its own renaming.

    Args:
        model: on the meta device.
        tensors: the checkpoint's headers by tensor name.
        source: the checkpoint, for messages.

    Returns:
        The map, and the tensors that the model does not use.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    names: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    unused = []
    for tensor in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if name not in state and tensor in state:
            name, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if pattern is not None:
            first, *others = by_pattern[pattern].target_patterns
            made = [name, *(name.replace(first, other) for other in others)]
            for parameter in made:
                converted.setdefault(parameter, []).append(tensor)
            if not any(parameter in state for parameter in made):
                unused.append(tensor)
        elif name in state:
            names[name] = tensor
        elif not _is_ignored(tensor):
            unused.append(tensor)
    return WeightMap(tensors, names, converted, source), tuple(unused)


def _is_ignored(tensor: str) -> bool:
    """Whether a tensor is a buffer that transformers computes, and old checkpoints hold."""
    return tensor.endswith("rotary_emb.inv_freq")
