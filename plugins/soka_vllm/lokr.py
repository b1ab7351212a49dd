"""PEFT's LoKr adapters as Kronecker factors: one term, w1 ⊗ w2 times alpha / r, each full or a product of two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soka_serve.adapter import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE
from soka_serve.errors import CheckpointError
from soka_serve.headers import FLOAT_DTYPES, TensorInfo, read_header, read_json, read_tensor
from soka_serve.kron import Factors

# Largest matrix that two halves may make: a small file could ask for any amount of memory.
_MAX_VALUES = 1 << 28


def read_lokr(directory: Path) -> dict[str, Factors]:
    """Read a LoKr adapter that PEFT wrote, for linear layers.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.

    Returns:
        By full module name one term of float32 factors; sigma is LoKr's scale.

    Raises:
        CheckpointError: everything that is wrong: files missing or truncated, tensors missing, unknown or of wrong
            shape, values that are not finite, whole modules saved along.
    """
    config = read_json(directory / CONFIG_FILE)
    tensors = read_header(directory / WEIGHTS_FILE)
    problems = []
    if config.get("modules_to_save"):
        problems.append(f"{CONFIG_FILE}: modules_to_save {config['modules_to_save']}: whole modules cannot be served")
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        name, _, part = key.removeprefix(KEY_PREFIX).rpartition(".")
        if info.dtype not in FLOAT_DTYPES:
            problems.append(f"{WEIGHTS_FILE}: {key} is {info.dtype}, expected a floating-point dtype")
        by_module.setdefault(name, {})[part] = info
    if not tensors:
        problems.append(f"{WEIGHTS_FILE}: no tensors")
    factors = {}
    for name, parts in by_module.items() if not problems else ():
        try:
            left, right = (read_matrix(parts, which) for which in ("lokr_w1", "lokr_w2"))
            if parts:
                raise ValueError(f"unknown tensors {', '.join(sorted(parts))}")
            scale = torch.tensor([_read_scale(config, name)])
            if not bool(left.isfinite().all() and right.isfinite().all() and scale.isfinite().all()):
                raise ValueError("values are not finite")
            factors[name] = Factors(left[None], right[None], scale)
        except (ValueError, OverflowError, re.error) as error:
            problems.append(f"{WEIGHTS_FILE}: {name}: {error}")
    if problems:
        raise CheckpointError("\n".join(f"{directory}: {problem}" for problem in problems))
    return factors


def read_matrix(parts: dict[str, TensorInfo], which: str) -> Tensor:
    """A factor in float32, one matrix or the product of two; what was used leaves `parts`.

    Args:
        parts: a module's tensors by the last part of their name.
        which: "lokr_w1" or "lokr_w2".

    Raises:
        ValueError: tensors are missing, fit no product, or make a matrix that is too large.
    """
    names = [which] if which in parts else [f"{which}_a", f"{which}_b"]
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"expected {which}, or {which}_a and {which}_b; missing {', '.join(missing)}")
    infos = [parts.pop(name) for name in names]
    shapes = [tuple(info.shape) for info in infos]
    if any(len(shape) != 2 for shape in shapes) or (len(shapes) == 2 and shapes[0][1] != shapes[1][0]):
        raise ValueError(f"{' and '.join(names)} of shape {' and '.join(map(str, shapes))} make no matrix")
    if shapes[0][0] * shapes[-1][1] > _MAX_VALUES:
        raise ValueError(f"{' and '.join(names)} make a matrix of {shapes[0][0]} x {shapes[-1][1]}, which is too large")
    matrices = [read_tensor(info).float() for info in infos]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def _read_scale(config: Mapping[str, Any], name: str) -> float:
    """alpha / r of one module, with the patterns that PEFT applies."""
    from peft.utils.other import get_pattern_key

    values = []
    for field in ("alpha", "r"):
        patterns = "rank_pattern" if field == "r" else "alpha_pattern"
        pattern = config.get(patterns) or {}
        if type(pattern) is not dict:
            raise ValueError(f"{CONFIG_FILE}: {patterns} must be an object, not {pattern!r:.120}")
        value = pattern.get(get_pattern_key(pattern.keys(), name), config.get(field))
        if isinstance(value, bool) or not isinstance(value, int | float) or (field == "r" and value <= 0):
            raise ValueError(f"{CONFIG_FILE} gives {field} as {value!r}")
        values.append(value)
    return float(values[0] / values[1])
