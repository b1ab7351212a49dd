"""PEFT's LoKr adapters as Kronecker factors: one term, w1 ⊗ w2 times alpha / r, each full or a product of two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soka_serve.adapter.format import KEY_PREFIX, refusal
from soka_serve.adapter.patterns import Matcher
from soka_serve.errors import CheckpointError, name_some
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.json_files import read_json
from soka_serve.io.safetensors import FLOAT_DTYPES, TensorInfo, read_header, read_tensor
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape


@dataclass(frozen=True)
class LokrFactor:
    """A factor that is on the disk: one matrix, or two to be multiplied."""

    infos: tuple[TensorInfo, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.infos[0].shape[0], self.infos[-1].shape[1]

    def read(self) -> Tensor:
        """In float32."""
        matrices = [read_tensor(info).float() for info in self.infos]
        return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


@dataclass(frozen=True)
class LokrFiles:
    """A LoKr adapter of which all but the values was checked: left and right factor and scale by module."""

    directory: Path
    modules: dict[str, tuple[LokrFactor, LokrFactor, float]]
    budget: ReadingBudget
    problems: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, FactorShape]:
        """By module."""
        return {name: FactorShape(*left.shape, *right.shape) for name, (left, right, _) in self.modules.items()}

    def read(self) -> dict[str, Factors]:
        """By full module name one term of float32 factors; sigma is LoKr's scale.

        Raises:
            CheckpointError: values that are not finite, or a file that is truncated.
        """
        factors, problems = {}, []
        for name, (left, right, scale) in self.modules.items():
            self.budget.check_time(self.directory)
            found = Factors(left.read()[None], right.read()[None], torch.tensor([scale]))
            if not all(bool(part.isfinite().all()) for part in (found.left, found.right, found.sigma)):
                problems.append(f"{WEIGHTS_FILE}: {name}: values are not finite")
            factors[name] = found
        if problems:
            raise refusal(self.directory, problems)
        return factors


def look_at_lokr(directory: Path, budget: ReadingBudget) -> LokrFiles:
    """Check a LoKr adapter that PEFT wrote, for linear layers, without reading its values.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        budget: what reading it may take.

    Raises:
        CheckpointError: what is wrong: files missing, truncated or too large, tensors missing, unknown or of wrong
            shape, whole modules saved along.
    """
    config = read_json(directory / CONFIG_FILE, budget)
    tensors = read_header(directory / WEIGHTS_FILE, budget)
    problems = []
    if config.get("modules_to_save"):
        whole = f"{config['modules_to_save']!r:.200}"
        problems.append(f"{CONFIG_FILE}: modules_to_save {whole}: whole modules cannot be served")
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for key, info in tensors.items():
        name, _, part = key.removeprefix(KEY_PREFIX).rpartition(".")
        if info.dtype not in FLOAT_DTYPES:
            problems.append(f"{WEIGHTS_FILE}: {key} is {info.dtype}, expected a floating-point dtype")
        by_module.setdefault(name, {})[part] = info
    if not tensors:
        problems.append(f"{WEIGHTS_FILE}: no tensors")
    matcher = Matcher(list(by_module), budget)
    modules = {}
    for name, parts in by_module.items() if not problems else ():
        budget.check_time(directory)
        try:
            left, right = (find_factor(parts, which, budget) for which in ("lokr_w1", "lokr_w2"))
            if parts:
                raise ValueError(f"unknown tensors {name_some(sorted(parts))}")
            modules[name] = left, right, _read_scale(config, name, matcher)
        except (ValueError, OverflowError) as error:
            problems.append(f"{WEIGHTS_FILE}: {name}: {error}")
    if problems:
        raise refusal(directory, problems)
    return LokrFiles(directory, modules, budget)


def find_factor(parts: dict[str, TensorInfo], which: str, budget: ReadingBudget) -> LokrFactor:
    """Find a factor, one matrix or the product of two; what was used leaves `parts`.

    Args:
        parts: a module's tensors by the last part of their name.
        which: "lokr_w1" or "lokr_w2".
        budget: its values, and those of the product, are taken from it.

    Raises:
        ValueError: tensors are missing, fit no product, or make a matrix that is too large.
    """
    names = [which] if which in parts else [f"{which}_a", f"{which}_b"]
    missing = [name for name in names if name not in parts]
    if missing:
        raise ValueError(f"expected {which}, or {which}_a and {which}_b; missing {', '.join(missing)}")
    infos = tuple(parts.pop(name) for name in names)
    shapes = [info.shape for info in infos]
    if any(len(shape) != 2 for shape in shapes) or (len(shapes) == 2 and shapes[0][1] != shapes[1][0]):
        raise ValueError(f"{' and '.join(names)} of shape {' and '.join(map(str, shapes))} make no matrix")
    matrix = LokrFactor(infos)
    rows, columns = matrix.shape
    try:
        budget.take_values("", rows * columns + sum(info.numel for info in infos if len(infos) == 2))
    except CheckpointError:
        raise ValueError(
            f"{' and '.join(names)} make a matrix of {rows} x {columns}, which is too large: all factors may have "
            f"{budget.values} values{budget.source}"
        ) from None
    return matrix


def _read_scale(config: Mapping[str, Any], name: str, matcher: Matcher) -> float:
    """alpha / r of one module, with the patterns that PEFT applies."""
    values = []
    for field in ("alpha", "r"):
        patterns = "rank_pattern" if field == "r" else "alpha_pattern"
        pattern = config.get(patterns) or {}
        if type(pattern) is not dict:
            raise ValueError(f"{CONFIG_FILE}: {patterns} must be an object, not {pattern!r:.120}")
        key = matcher.key_for(pattern, name)
        value = pattern.get(name if key is None else key, config.get(field))
        if isinstance(value, bool) or not isinstance(value, int | float) or (field == "r" and value <= 0):
            raise ValueError(f"{CONFIG_FILE} gives {field} as {value!r:.80}")
        values.append(value)
    return float(values[0] / values[1])
