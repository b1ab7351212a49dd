"""LoKr in the LyCORIS library's own files, for linear layers of language models.

`LycorisNetwork.save_weights` writes one safetensors file and no config. Its keys name a module by its path with "_" for
"." (`lycoris_model_layers_0_self_attn_q_proj.lokr_w1`), so it takes the served model's modules to read them.

Its scale is the stored alpha over the rank, once, as LyCORIS 4.1 trains and as its bypass mode and its loader compute;
`rs_lora` is in the stored alpha already. (Its merge_to and onfly_merge multiply by the scale twice.) Two whole factors
have no rank and the scale 1, but for those that `rs_lora` trained: their scale is not in the file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from torch import tensor

from soka_serve.adapter.format import refusal
from soka_serve.adapter.lokr import LokrFactor, find_factor
from soka_serve.errors import CheckpointError, SokaError, name_some
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE
from soka_serve.io.safetensors import TensorInfo, read_header, read_tensor
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape

PREFIX = "lycoris_"
KIND = "LyCORIS LoKr"

_ROUNDING = 1e-2  # of an alpha that was saved in bfloat16

T = TypeVar("T")


@dataclass(frozen=True)
class _LycorisModule:
    left: LokrFactor
    right: LokrFactor
    alpha: TensorInfo | None
    rank: int | None  # of what is a product of two; None where both factors are whole


@dataclass(frozen=True)
class LycorisFiles:
    """An adapter of LyCORIS of which all but the values was checked, by the modules' flattened names."""

    file: Path
    modules: dict[str, _LycorisModule]
    budget: ReadingBudget
    problems: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, FactorShape]:
        """By module."""
        return {name: FactorShape(*part.left.shape, *part.right.shape) for name, part in self.modules.items()}

    @property
    def ranks(self) -> frozenset[int]:
        """All that products in this file have."""
        return frozenset(part.rank for part in self.modules.values() if part.rank is not None)

    def read(self) -> dict[str, Factors]:
        """One float32 term per module, by its name with "_" for "."; sigma is alpha over the rank.

        Raises:
            CheckpointError: a scale that the file does not hold, values that are not finite.
        """
        factors, problems = {}, []
        for name, part in self.modules.items():
            self.budget.check_time(self.file)
            try:
                factors[name] = _read_module(part, self.ranks)
            except ValueError as error:
                problems.append(f"{self.file.name}: {PREFIX}{name}: {error}")
        if problems:
            raise refusal(self.file.parent, problems)
        return factors


def find_lycoris(directory: Path, budget: ReadingBudget | None = None) -> Path | None:
    """The LoKr file of a directory: its one safetensors file, where there is no PEFT config; else None."""
    if (directory / CONFIG_FILE).exists() or not directory.is_dir():
        return None
    files = list(islice(directory.glob("*.safetensors"), 2))
    if len(files) != 1:
        return None
    try:
        keys = read_header(files[0], budget)
    except SokaError:
        return None
    return files[0] if any(key.partition(".")[2].startswith("lokr_") for key in keys) else None


def look_at_lycoris(directory: Path, budget: ReadingBudget) -> LycorisFiles:
    """Check a LoKr adapter that LyCORIS wrote without reading its values.

    Args:
        directory: holds the file, see `find_lycoris`.
        budget: what reading it may take.

    Raises:
        CheckpointError: what is wrong: made for a diffusion model, weight-decomposed, convolutions, tensors missing,
            unknown, of wrong shape or too large.
    """
    file = find_lycoris(directory, budget)
    if file is None:
        raise CheckpointError(f"{directory}: expected one safetensors file with LyCORIS's lokr_ tensors")
    parts_of: dict[str, dict[str, TensorInfo]] = {}
    for key, info in read_header(file, budget).items():
        name, _, part = key.partition(".")
        parts_of.setdefault(name, {})[part] = info
    modules, problems = {}, []
    for name, parts in parts_of.items():
        budget.check_time(directory)
        try:
            modules[name.removeprefix(PREFIX)] = _find_module(name, parts, budget)
        except ValueError as error:
            problems.append(f"{file.name}: {name}: {error}")
    if problems:
        raise refusal(directory, problems)
    return LycorisFiles(file, modules, budget)


def unflatten(adapter: Mapping[str, T], names: Iterable[str], prefixes: Sequence[str] = ()) -> dict[str, T]:
    """What is by flattened name, as those of `LycorisFiles` are, by the modules' own names; others keep theirs.

    Args:
        adapter: by flattened name.
        names: of the modules that there are.
        prefixes: with which the names of further modules begin; only those get their dots back.

    Raises:
        ValueError: a flattened name stands for two of them.
    """
    found: dict[str, str] = {}
    for name in names:
        other = found.setdefault(name.replace(".", "_"), name)
        if other != name and name.replace(".", "_") in adapter:
            raise ValueError(f"{name.replace('.', '_')} may mean {other} or {name}")
    starts = {prefix.replace(".", "_"): prefix for prefix in prefixes}

    def name_of(flat: str) -> str:
        start = next((start for start in starts if flat.startswith(start)), "")
        return found.get(flat, starts.get(start, "") + flat.removeprefix(start))

    return {name_of(flat): value for flat, value in adapter.items()}


def _find_module(name: str, parts: dict[str, TensorInfo], budget: ReadingBudget) -> _LycorisModule:
    if not name.startswith(PREFIX):
        raise ValueError(
            f"names of modules begin with {PREFIX!r} in language models; lora_unet_, lora_te_ are diffusion"
        )
    if "dora_scale" in parts:
        raise ValueError("weight-decomposed (dora_scale): not a delta of the weight alone")
    if {"lokr_t1", "lokr_t2"} & parts.keys():
        raise ValueError("a Tucker core (lokr_t1, lokr_t2) belongs to a convolution, not to a linear layer")
    alpha = parts.pop("alpha", None)
    left, right = (find_factor(parts, which, budget) for which in ("lokr_w1", "lokr_w2"))
    if parts:
        raise ValueError(f"unknown tensors {name_some(sorted(parts))}")
    ranks = sorted({matrix.infos[0].shape[1] for matrix in (left, right) if len(matrix.infos) == 2})
    if len(ranks) > 1:
        raise ValueError(f"lokr_w1 and lokr_w2 are products of different ranks, {ranks[0]} and {ranks[1]}")
    if ranks == [0]:
        raise ValueError("products of rank 0")
    return _LycorisModule(left, right, alpha, ranks[0] if ranks else None)


def _read_module(part: _LycorisModule, ranks: Collection[int]) -> Factors:
    """One term; `ranks` are those of all modules in the file."""
    left, right, scale = part.left.read(), part.right.read(), tensor([_read_scale(part, ranks)])
    if not all(bool(values.isfinite().all()) for values in (left, right, scale)):
        raise ValueError("values are not finite")
    return Factors(left[None], right[None], scale)


def _read_scale(part: _LycorisModule, ranks: Collection[int]) -> float:
    if part.rank is not None:
        alpha = _read_alpha(part.alpha)
        if not math.isfinite(alpha) or alpha == 0:
            raise ValueError(f"alpha is {alpha:g}, expected a finite number other than 0")
        return alpha / part.rank
    if part.alpha is not None:
        # LyCORIS stores the rank that was asked for, and with rs_lora the rank times its root.
        alpha = _read_alpha(part.alpha)
        roots = [rank for rank in ranks if rank > 1 and math.isclose(alpha, rank**1.5, rel_tol=_ROUNDING)]
        if not alpha.is_integer() or (roots and alpha not in ranks):
            raise ValueError(
                f"two whole factors with alpha {alpha:g} were trained with rs_lora, by whose scale (the root of the "
                "rank that was asked for) LyCORIS's training multiplies and its loader does not; multiply lokr_w1 by "
                "the scale that you mean and take alpha out"
            )
    return 1.0


def _read_alpha(info: TensorInfo | None) -> float:
    if info is None or info.numel != 1:
        raise ValueError(f"alpha is {'missing' if info is None else f'of shape {info.shape}'}, expected one number")
    return float(read_tensor(info).flatten()[0])
