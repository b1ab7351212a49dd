"""The kinds of adapters that the plugin reads, and what of one can be checked without the model and its values."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from soka_serve.adapter.format import PEFT_TYPE, QUANTIZE_KEY, AdapterFiles, look_at_adapter
from soka_serve.adapter.lokr import look_at_lokr
from soka_serve.adapter.patterns import Matcher
from soka_serve.adapter.raw import RawAdapter
from soka_serve.errors import CheckpointError, SokaError
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE
from soka_serve.io.json_files import read_json
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_vllm.base import ALLOW_VARIABLE
from soka_vllm.lycoris import KIND as LYCORIS
from soka_vllm.lycoris import find_lycoris, look_at_lycoris
from soka_vllm.stock import look_at_lora

_logger = logging.getLogger("vllm.soka")

LORA = "LORA"


class KroneckerFiles(Protocol):
    """A Kronecker adapter whose config and header were checked and whose values were not read yet."""

    @property
    def problems(self) -> Sequence[str]: ...

    @property
    def shapes(self) -> dict[str, FactorShape]: ...

    def read(self) -> dict[str, Factors]: ...


def read_kind(directory: Path, budget: ReadingBudget) -> str | None:
    """The kind of adapter in a directory, as its config names it; None where there is no config.

    Raises:
        ValueError: a config that cannot be read, or that names no kind.
    """
    file = directory / CONFIG_FILE
    if not file.exists():
        return LYCORIS if find_lycoris(directory, budget) else None
    try:
        config = read_json(file, budget)
    except SokaError as error:
        raise ValueError(within(directory, error)) from error
    if "peft_type" not in config and "lora_alpha" not in config:
        raise ValueError(f"{CONFIG_FILE}: no peft_type; supported are LORA, {', '.join(READERS)}")
    return str(config.get("peft_type", LORA))


def within(directory: Path, error: SokaError) -> str:
    """An error's message with files named as they are within the adapter; vLLM strikes paths from what it answers."""
    return error.message.replace(f"{directory}: ", "").replace(f"{directory}/", "")


@dataclass(frozen=True)
class SokaFiles:
    """A SoKA adapter, finished or a checkpoint of a training."""

    files: AdapterFiles

    @property
    def problems(self) -> Sequence[str]:
        """Where tensors and config do not agree."""
        return self.files.problems

    @property
    def shapes(self) -> dict[str, FactorShape]:
        """By module."""
        return {name: FactorShape(*spec["shape"]) for name, spec in self.files.config["soka_modules"].items()}

    def read(self) -> dict[str, Factors]:
        """The terms of each module's delta."""
        adapter = self.files.read()
        return {name: adapter.delta_factors(name) for name in adapter.factors}


def look_at_soka(directory: Path, budget: ReadingBudget, raw: RawAdapter | None = None) -> SokaFiles:
    """Check a SoKA adapter without reading its values.

    Args:
        directory: the adapter.
        budget: what reading it may take.
        raw: what `read_raw` has read of it.

    Raises:
        CheckpointError: what is wrong with it, or it adds to a base that bitsandbytes holds in bits: vLLM's layers that
            take adapters hold none so.
    """
    files = look_at_adapter(directory, budget, raw)
    if (bits := files.config.get(QUANTIZE_KEY)) is not None:
        message = f"{directory}: adds to its base in {bits} (bitsandbytes), and is wrong on the served one"
        if os.environ.get(ALLOW_VARIABLE) != "1":
            hint = f"merge it with `soka-serve merge` and serve that model, or set {ALLOW_VARIABLE}=1"
            raise CheckpointError(f"{message}; {hint}")
        _logger.warning("%s; served all the same, as %s says", message, ALLOW_VARIABLE)
    return SokaFiles(files)


READERS: dict[str, Callable[[Path, ReadingBudget], KroneckerFiles]] = {
    PEFT_TYPE: look_at_soka,
    "LOKR": look_at_lokr,
    LYCORIS: look_at_lycoris,
}


def look_at(directory: Path, kind: str | None, budget: ReadingBudget) -> Matcher:
    """Check all of an adapter that can be checked without the model and without reading its values.

    Args:
        directory: the adapter.
        kind: what `read_kind` says; of others than LoRA and READERS nothing is read here.
        budget: what reading it may take.

    Returns:
        What the patterns of a LoRA adapter match.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        if kind == LORA:
            return look_at_lora(directory, budget)
        if kind in READERS:
            READERS[kind](directory, budget)
    except SokaError as error:
        raise ValueError(within(directory, error)) from error
    return Matcher([], budget)
