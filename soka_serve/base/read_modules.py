"""The modules of a base: from config.json where that is enough, else from transformers.

LLaMA-like architectures need no torch. For the others `soka_serve.base.meta_model` is imported when it is called.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from soka_serve.base.checkpoint import Checkpoint
from soka_serve.base.folder import ModelFolder
from soka_serve.base.modules import (
    LLAMA_LIKE,
    BaseModules,
    Module,
    in_layer_order,
    is_tied,
    llama_parameters,
    misfit,
    modules_from_config,
    size_from_config,
)
from soka_serve.base.weight_map import WeightMap
from soka_serve.errors import CheckpointError
from soka_serve.io.safetensors import DTYPES

logger = logging.getLogger(__name__)

_HEAD = "lm_head.weight"
_SLOW_S = 2.0


def derive_modules(folder: ModelFolder) -> BaseModules:
    """The modules of a base whose weights are not here, by its config.json.

    Raises:
        CheckpointError: its architecture is not LLaMA-like (llama, mistral, qwen2, qwen3, gemma), or its config is
            malformed.
    """
    config, source = folder.config, folder.directory / "config.json"
    modules = tuple(modules_from_config(config, source=source))
    return BaseModules(modules, size_from_config(config, modules, source=source))


def read_modules(checkpoint: Checkpoint) -> BaseModules:
    """The modules of a checkpoint, as the model that transformers loads has them.

    Raises:
        CheckpointError: the checkpoint is not the one that its config describes, or is of an architecture that we
            cannot derive and transformers does not know.
    """
    if checkpoint.config.get("model_type") in LLAMA_LIKE:
        return _read_llama(checkpoint)
    started = time.monotonic()
    from soka_serve.base.meta_model import read_meta

    found = read_meta(checkpoint)
    if (seconds := time.monotonic() - started) > _SLOW_S:
        logger.info("%s: transformers took %.1f s to list the model's modules", checkpoint.directory, seconds)
    return found


def weights_of(checkpoint: Checkpoint) -> WeightMap:
    """Where a checkpoint keeps the weights of its model's modules.

    Where transformers cannot build the model, tensors are taken to be called as its modules are, with a warning.
    """
    if checkpoint.config.get("model_type") in LLAMA_LIKE:
        return _llama_weights(checkpoint)
    from soka_serve.base.meta_model import read_weights

    try:
        return read_weights(checkpoint)
    except CheckpointError as error:
        logger.warning("%s; its tensors are taken to be named as the adapter's modules are", error.message)
        return WeightMap(checkpoint.tensors, source=checkpoint.directory)


def _llama_weights(checkpoint: Checkpoint) -> WeightMap:
    """Names as they are, or without 'model.' in front where the bare model was saved."""
    names = {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": name
        for name in checkpoint.tensors
        if f"model.{name}" not in checkpoint.tensors
    }
    return WeightMap(checkpoint.tensors, names, source=checkpoint.directory)


def _read_llama(checkpoint: Checkpoint) -> BaseModules:
    """Derived from the config and held against the headers."""
    config, source = checkpoint.config, checkpoint.directory / "config.json"
    derived = modules_from_config(config, source=source)
    expected = size_from_config(config, derived, source=source)
    weights = _llama_weights(checkpoint)
    shapes = llama_parameters(config, derived)
    used = {name: info for name in shapes if (info := weights.find_parameter(name)) is not None}
    problems = [f"{name} is missing" for name in shapes if name not in used]
    problems += [
        f"{info.name} is {info.shape}, config.json makes it {shapes[name]}"
        for name, info in used.items()
        if info.shape != shapes[name]
    ]
    if problems:
        raise misfit(checkpoint.directory, problems)
    dtypes = {module.name: DTYPES[used[f"{module.name}.weight"].dtype][1] for module in derived}
    modules = in_layer_order([Module(m.name, m.out_features, m.in_features, m.layer, dtypes[m.name]) for m in derived])
    taken = {info.name for info in used.values()}
    unused = [name for name in checkpoint.tensors if name not in taken and not name.endswith("rotary_emb.inv_freq")]
    if is_tied(config):
        unused = [name for name in unused if name != _HEAD]
    stored = sum(info.nbytes for info in used.values())
    size = replace(expected, weight_bytes=stored, dtype=modules[0].dtype)
    return BaseModules(modules, size, unused=tuple(unused), weights=weights)
