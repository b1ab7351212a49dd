"""A finished adapter that training goes on from: SoKA's, or LoKr's as PEFT writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from soka_serve.adapter.format import PEFT_TYPE, QUANTIZE_KEY, AdapterFiles, look_at_adapter, refusal
from soka_serve.adapter.lokr import LokrFiles, look_at_lokr
from soka_serve.adapter.source import base_sha256_of, find_lock
from soka_serve.errors import CheckpointError
from soka_serve.io.budget import ReadingBudget
from soka_serve.io.file_names import CONFIG_FILE, WEIGHTS_FILE
from soka_serve.io.files import sha256_text
from soka_serve.io.json_files import read_json
from soka_serve.kron import Factors
from soka_serve.kron.shapes import FactorShape
from soka_serve.trained import Form

LOKR = "LOKR"


@dataclass(frozen=True)
class GivenAdapter:
    """An adapter whose config and header were checked.

    Args:
        directory: where it is.
        files: what was checked.
        terms: by full module name the number of terms of its delta, and their factor shape.
        base_sha256: of the base weights that it was trained on; None where nothing says so.
        quantize: the bits of the base that it adds to, where it is right on that alone.
    """

    directory: Path
    files: AdapterFiles | LokrFiles
    terms: Mapping[str, tuple[int, FactorShape]]
    base_sha256: str | None
    quantize: str | None = None

    def read(self) -> dict[str, Factors]:
        """By full module name the terms of its delta, float32 on the CPU; of a training checkpoint trained - initial.

        Raises:
            CheckpointError: values that are not finite, or files that were damaged since.
        """
        if isinstance(self.files, LokrFiles):
            return self.files.read()
        adapter = self.files.read()
        return {name: adapter.delta_factors(name) for name in adapter.factors}

    def sha256(self, hash_file: Callable[[Path], str]) -> str:
        """Of what makes the delta: the weights, and the config, which holds LoKr's scale."""
        return sha256_text(" ".join(hash_file(self.directory / name) for name in (WEIGHTS_FILE, CONFIG_FILE)))


def open_given(directory: Path) -> GivenAdapter:
    """Check an adapter without reading its values.

    Raises:
        CheckpointError: no adapter, of another kind, or damaged.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{directory}: no adapter: {CONFIG_FILE} is missing",
            hint="Name the adapter's folder, such as build/math/adapter.",
        )
    budget = ReadingBudget()
    kind = read_json(directory / CONFIG_FILE, budget).get("peft_type")
    if kind == LOKR:
        lokr = look_at_lokr(directory, budget)
        terms = {name: (1, shape) for name, shape in lokr.shapes.items()}
        return GivenAdapter(directory, lokr, terms, base_sha256_of(find_lock(directory)))
    if kind != PEFT_TYPE:
        raise CheckpointError(
            f"{directory}: peft_type is {kind!r:.80}; training goes on from {PEFT_TYPE} and {LOKR} adapters"
        )
    own = look_at_adapter(directory, budget)
    if own.problems:
        raise refusal(directory, own.problems)
    subtracted = own.config["soka_initial"]
    terms = {
        name: (
            Form(spec.get("trained", {})).served(spec["rank"], subtracted=subtracted),
            FactorShape(*spec["shape"]),
        )
        for name, spec in own.config["soka_modules"].items()
    }
    return GivenAdapter(directory, own, terms, base_sha256_of(find_lock(directory)), own.config.get(QUANTIZE_KEY))
