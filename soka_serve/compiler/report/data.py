"""What report.html and the model card tell of a build."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soka_serve.compiler.methods import METHODS, Method

_LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


@dataclass(frozen=True)
class ModuleSpectrum:
    """One adapted weight.

    Args:
        module: full name, such as `model.layers.0.self_attn.q_proj`.
        layer: its layer, or None for a module outside the layers.
        projection: the last part of the name, such as `q_proj`.
        shape: the weight's (out, in).
        factor_shape: (m, n, p, q).
        sigma: scales of the candidate terms, descending; empty when no spectrum was computed.
        total_energy: ‖·‖²_F of the matrix that was decomposed, so at least the sum of sigma².
        rank: terms chosen.
        parameters: trainable parameters of the module.
        init: where the factors start, as the manifest names it.
        policy: the rank policy, as the manifest names it.
    """

    module: str
    layer: int | None
    projection: str
    shape: tuple[int, int]
    factor_shape: tuple[int, int, int, int]
    sigma: tuple[float, ...]
    total_energy: float
    rank: int
    parameters: int
    init: str
    policy: str

    def shares(self) -> list[float]:
        """Share of the total energy per candidate term; empty when there is no usable spectrum."""
        energy = [s * s for s in self.sigma]
        total = self.total_energy if self.total_energy > 0 else sum(energy)
        if not (math.isfinite(total) and total > 0):
            return []
        return [e / total for e in energy]

    def captured_frac(self) -> float | None:
        """Share of the energy in the chosen terms, or None when the spectrum cannot tell."""
        shares = self.shares()
        captured = sum(shares[: self.rank])
        return captured if len(shares) >= self.rank and shares and math.isfinite(captured) else None


@dataclass(frozen=True)
class HistoryPoint:
    """What was logged at one optimiser step; None where nothing was."""

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    eval_loss: float | None = None


@dataclass(frozen=True)
class Sample:
    """One held-out problem and the model's answers without and with the adapter (texts as generated, untrusted)."""

    prompt: str
    expected: str
    before: str
    after: str
    before_ok: bool | None = None
    after_ok: bool | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything that report.html and the model card show.

    `accuracy_before` and `accuracy_after` are (correct, total). `comparison` maps other methods to the trainable
    parameters that they would need on the same modules. `artefacts` maps names to paths relative to the report.
    `rank_over_time` maps modules to (step, rank), where terms were dropped in training. Times are in seconds.
    """

    name: str
    description: str
    base_name: str
    method: str
    created: str
    versions: Mapping[str, str]
    seed: int
    modules: Sequence[ModuleSpectrum]
    history: Sequence[HistoryPoint]
    samples: Sequence[Sample]
    accuracy_before: tuple[int, int] | None
    accuracy_after: tuple[int, int] | None
    trainable_parameters: int
    base_parameters: int
    comparison: Mapping[str, int]
    adapter_bytes: int
    dropped_energy_frac: float
    data_summary: Mapping[str, object]
    manifest_text: str
    lock: Mapping[str, object]
    artefacts: Mapping[str, str]
    rank_over_time: Mapping[str, Sequence[tuple[int, int]]] | None
    timings_s: Mapping[str, float]

    @property
    def registered(self) -> Method:
        """The method, as the registry has it."""
        return METHODS[self.method]


def history_points(log: Sequence[Mapping[str, Any]]) -> list[HistoryPoint]:
    """What a training log says per step; entries of one step are merged, and later ones win.

    Args:
        log: from `soka_serve.compiler.history.read_history`. Entries that tell something else are passed over.
    """
    values: dict[int, dict[str, float]] = {}
    for entry in log:
        found = {key: float(value) for key in _LOGGED if isinstance(value := entry.get(key), int | float)}
        if found:
            values.setdefault(int(entry["step"]), {}).update(found)
    return [HistoryPoint(step, *map(values[step].get, _LOGGED)) for step in sorted(values)]


def rank_history(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, int]]]:
    """(step, rank) per module from a training log; empty when it names no modules."""
    tracks: dict[str, list[tuple[int, int]]] = {}
    for entry in log:
        modules = entry.get("modules")
        for module, spectrum in modules.items() if isinstance(modules, dict) else ():
            if isinstance(spectrum, dict) and isinstance(spectrum.get("rank"), int):
                tracks.setdefault(module, []).append((int(entry["step"]), spectrum["rank"]))
    return tracks
